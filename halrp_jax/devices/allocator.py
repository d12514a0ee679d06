"""glibc's allocator, tuned for XLA on the CPU. For the command line only, before jax loads."""

import ctypes
import importlib.util
import os
import platform

# mallopt parameters: keep freed memory, never mmap, one arena (malloc.h)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -3, -4, -8
_ACCELERATOR_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


def tune() -> bool:
  """Makes glibc keep the buffers that XLA:CPU allocates anew in every call.

  Without it glibc maps and unmaps each large buffer, and a step spends a third of its time on page
  faults; the price is that memory is given back to the system by `trim` alone.
  Changes the whole process, hence not done on import of the library. HALRP_ALLOCATOR=system
  switches it off.

  Returns:
    Whether anything was changed: only with glibc, and only if no accelerator could be used.
  """
  if os.environ.get("HALRP_ALLOCATOR") == "system" or platform.libc_ver()[0] != "glibc":
    return False
  platforms = os.environ.get("JAX_PLATFORMS", "")
  may_accelerate = any(importlib.util.find_spec(p) for p in _ACCELERATOR_PLUGINS)
  if platforms != "cpu" and (platforms or may_accelerate):
    return False
  libc = ctypes.CDLL("libc.so.6")
  for parameter, value in (
    (_M_MMAP_THRESHOLD, 1 << 30),
    (_M_TRIM_THRESHOLD, -1),
    (_M_TOP_PAD, 1 << 28),
    (_M_ARENA_MAX, 1),
    (_M_MMAP_MAX, 0),
  ):
    libc.mallopt(parameter, value)
  return True


def trim() -> None:
  """Gives what is free back to the system, where glibc can: else it counts as in use for ever."""
  if platform.libc_ver()[0] == "glibc":
    ctypes.CDLL("libc.so.6").malloc_trim(0)
