"""XLA's deterministic GPU kernels, which must be requested before XLA starts."""

import os
import threading

import jax

from halrp_jax.types import UserError

FLAG = "--xla_gpu_deterministic_ops"
_probing = threading.Lock()


def require() -> None:
  """Adds --xla_gpu_deterministic_ops to XLA_FLAGS, for this process and its child processes.

  XLA reads the variable once, when its first backend starts. With the flag it computes the same
  bits in every run on the same kind of GPU; on other platforms the flag has no effect.

  Raises:
    UserError: if XLA has started already, or XLA_FLAGS contradicts the flag or names a file.
  """
  flags = os.environ.get("XLA_FLAGS", "").split()
  if flags and not flags[0].startswith("-"):
    raise UserError(
      f"deterministic = True: XLA_FLAGS={flags[0]} names a file, to which nothing can be added; "
      f"write {FLAG} into that file and set deterministic=False"
    )
  values = [value.lower() for name, _, value in (f.partition("=") for f in flags) if name == FLAG]
  if values and values[-1] in ("false", "0"):
    raise UserError(
      f"deterministic = True contradicts {FLAG}={values[-1]} in XLA_FLAGS; remove that flag"
    )
  if values:
    return
  if _backend_has_started():
    raise UserError(
      "deterministic = True comes too late: JAX has started in this process already; make this run "
      f"the first one of the process, or set XLA_FLAGS={FLAG}=true before the process starts"
    )
  os.environ["XLA_FLAGS"] = " ".join([*flags, f"{FLAG}=true"])


def _backend_has_started() -> bool:
  """Returns whether JAX's backend has started, without starting it.

  JAX has no public function for this. But once the backend has started, JAX refuses to change the
  number of CPU devices.
  """
  with _probing:
    # JAX defines its options when it is imported.
    before = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    try:
      jax.config.update("jax_num_cpu_devices", 2 if before == 1 else 1)
    except RuntimeError:
      return True
    jax.config.update("jax_num_cpu_devices", before)
    return False
