"""What goes wrong with the machine and its devices, told on one line."""

import jax
import jax.extend

from halrp_jax.devices import processes
from halrp_jax.types import brief

_NO_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "OUT_OF_MEMORY")
_TAKEN = (  # what CUDA's libraries and libtpu say of a device whose memory another process holds
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
  """Returns one line for an error that the machine is the cause of, None for all others."""
  if processes.count() == 1 and (line := unusable()):  # of several, all would have to start it
    return line
  text = str(error)
  if isinstance(error, MemoryError):
    return f"this machine has no memory left{_said(text)}; end other programs or use fewer images"
  if not isinstance(error, jax.errors.JaxRuntimeError):
    return None
  device = jax.local_devices()[0].device_kind
  if any(words in text for words in _NO_MEMORY):
    return (
      f"{device}: out of memory{_said(text)}; end what else uses the device, or take a smaller "
      "batch_size or network"
    )
  if any(words in text for words in _TAKEN):
    return f"{device}: can't be used now{_said(text)}; another program uses it: wait or end that"
  return None


def unusable() -> str | None:
  """Returns one line if jax finds no device of the platform that it is told to use.

  Starts the platform. Where it fails, jax is left with the devices that there are: for a process
  that ends.
  """
  try:
    jax.devices()
    return None
  except Exception as e:  # for cuda without a GPU AssertionError, with python -O AttributeError
    asked, said = jax.config.jax_platforms, str(e) if isinstance(e, RuntimeError) else ""
  if not asked:
    return f"jax finds no device that it can use{_said(said)}"
  try:
    jax.config.update("jax_platforms", "")
    jax.extend.backend.clear_backends()
    found = ", ".join(sorted({device.platform for device in jax.devices()}))
  except Exception:
    found = "none"
  return (
    f"JAX_PLATFORMS={asked}: jax finds no such device{_said(said)}; platforms that can be used "
    f"here: {found}. Set JAX_PLATFORMS to one of them or leave it unset"
  )


def _said(text: str) -> str:
  return f" ({brief(ValueError(text))})" if text.strip() else ""
