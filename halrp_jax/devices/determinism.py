"""XLA's deterministic GPU kernels, asked for before XLA starts."""

import os
import threading

import jax

from halrp_jax.types import UserError

FLAG = "--xla_gpu_deterministic_ops"
_asking = threading.Lock()


def require() -> None:
  """Puts --xla_gpu_deterministic_ops into XLA_FLAGS, for this process and those it starts.

  XLA reads the variable once, when its first backend starts. With the flag it promises the same
  bits from run to run on one kind of GPU; on other platforms it means nothing.

  Raises:
    UserError: if it would come too late, or XLA_FLAGS says something else.
  """
  flags = os.environ.get("XLA_FLAGS", "").split()
  if flags and not flags[0].startswith("-"):
    raise UserError(
      f"deterministic = True: XLA_FLAGS={flags[0]} names a file, to which nothing can be added; "
      f"write {FLAG} into it and leave the key False"
    )
  said = [value.lower() for name, _, value in (f.partition("=") for f in flags) if name == FLAG]
  if said and said[-1] in ("false", "0"):
    raise UserError(f"deterministic = True, but XLA_FLAGS has {FLAG}={said[-1]}: take it out")
  if said:
    return
  if _backend_has_started():
    raise UserError(
      "deterministic = True comes too late: JAX is at work in this process already; begin with "
      f"this run, or set XLA_FLAGS={FLAG}=true before the start"
    )
  os.environ["XLA_FLAGS"] = " ".join([*flags, f"{FLAG}=true"])


def _backend_has_started() -> bool:
  """Tells whether JAX's backend has started, without starting it.

  JAX has no public function for it. But once the backend has started, it refuses to change the
  number of CPU devices.
  """
  with _asking:
    before = jax.config.jax_num_cpu_devices
    try:
      jax.config.update("jax_num_cpu_devices", 2 if before == 1 else 1)
    except RuntimeError:
      return True
    jax.config.update("jax_num_cpu_devices", before)
    return False
