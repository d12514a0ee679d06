"""Environment variables that XLA:CPU and OpenBLAS read when they are loaded.

For the command line only: `prepare` must be called before NumPy and JAX are loaded.
"""

import importlib.metadata
import os

_FUSION_EMITTERS = "xla_cpu_use_fusion_emitters"


def prepare() -> None:
  """Sets what makes the start of a run fast, unless the user has set it.

  jaxlib 0.10 compiles for the CPU twice as fast without its fusion emitters; docs/speed.md has what
  that does to the steps. Later jaxlibs do not know the flag. The threads of OpenBLAS, which
  computes the singular values, wait busily for work for a tenth of a second after each call, which
  takes a core from XLA: they now wait for less than a millisecond.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  version = importlib.metadata.version("jaxlib").split(".")
  is_file = flags and not flags.lstrip().startswith("-")  # XLA reads its flags from that file
  if version[:2] == ["0", "10"] and not is_file and _FUSION_EMITTERS not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --{_FUSION_EMITTERS}=false".lstrip()
  os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")  # 2^20 cycles of the processor
