"""Explanations, on one line each, of errors whose cause is the machine or one of its devices."""

import jax
import jax.extend

from halrp_jax.devices import processes
from halrp_jax.types import brief

_NO_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "OUT_OF_MEMORY")
# Messages of CUDA's libraries and of libtpu about a device whose memory another process has taken.
_IN_USE = (
  "CUDA_ERROR_DEVICE_UNAVAILABLE",
  "busy or unavailable",
  "already in use",
  "DNN library initialization failed",
  "CUDNN_STATUS_NOT_INITIALIZED",
  "CUDNN_STATUS_INTERNAL_ERROR",
  "Failed to create cuBLAS handle",
  "CUBLAS_STATUS_NOT_INITIALIZED",
  "cusolverDnCreate",
)


def explain(error: BaseException) -> str | None:
  """Returns one line about an error that the machine caused, or None for any other error."""
  # With several processes, starting the platform would need all of them to call this function.
  if processes.count() == 1 and (line := unusable()):
    return line
  text = str(error)
  if isinstance(error, MemoryError):
    return (
      f"this machine has no memory left{_in_brackets(text)}; end other programs or use fewer images"
    )
  if not isinstance(error, jax.errors.JaxRuntimeError):
    return None
  device = jax.local_devices()[0].device_kind
  if any(words in text for words in _NO_MEMORY):
    return (
      f"{device}: out of memory{_in_brackets(text)}; end other programs that use the device, or "
      "set a smaller batch_size or network"
    )
  if any(words in text for words in _IN_USE):
    return (
      f"{device}: not available{_in_brackets(text)}; another program uses it: wait for that "
      "program or end it"
    )
  return None


def unusable() -> str | None:
  """Returns one line if JAX finds no device of the platform it is configured to use, else None.

  Starts the platform. If that fails, JAX is reconfigured to use any available platform, so the
  process should end afterwards.
  """
  try:
    jax.devices()
    return None
  except Exception as e:  # for cuda without a GPU: AssertionError; with python -O: AttributeError
    # JAX defines its options when it is imported.
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    text = str(e) if isinstance(e, RuntimeError) else ""
  if not platforms:
    return f"jax finds no device that it can use{_in_brackets(text)}"
  try:
    jax.config.update("jax_platforms", "")
    jax.extend.backend.clear_backends()
    found = ", ".join(sorted({device.platform for device in jax.devices()}))
  except Exception:
    found = "none"
  return (
    f"JAX_PLATFORMS={platforms}: jax finds no such device{_in_brackets(text)}; platforms that can "
    f"be used here: {found}. Set JAX_PLATFORMS to one of them or leave it unset"
  )


def _in_brackets(text: str) -> str:
  """Returns a library's message, shortened, with a space and brackets; empty for an empty one."""
  return f" ({brief(ValueError(text))})" if text.strip() else ""
