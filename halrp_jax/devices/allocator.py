"""Tuning of glibc's memory allocator for XLA on the CPU.

For the command line only: `tune` must be called before JAX is loaded.
"""

import ctypes
import importlib.util
import os
import platform

# Parameters of mallopt, with their numbers in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -3, -4, -8
_ACCELERATOR_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


def tune() -> bool:
  """Makes glibc keep the buffers that XLA:CPU frees, so that the next call can reuse them.

  By default glibc maps and unmaps each large buffer, and a training step spends a third of its time
  on page faults. The price: memory goes back to the system only when `trim` is called. The setting
  holds for the whole process, so importing the library does not change it. The environment variable
  HALRP_ALLOCATOR=system switches it off.

  Returns:
    Whether anything was changed. Nothing is changed where the C library is not glibc, or where JAX
    could use an accelerator.
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
    (_M_TRIM_THRESHOLD, -1),  # never give freed memory back
    (_M_TOP_PAD, 1 << 28),
    (_M_ARENA_MAX, 1),
    (_M_MMAP_MAX, 0),  # never use mmap
  ):
    libc.mallopt(parameter, value)
  return True


def trim() -> None:
  """Gives free memory back to the system if the C library is glibc.

  After `tune`, memory that was freed would otherwise count as used until the process ends.
  """
  if platform.libc_ver()[0] == "glibc":
    ctypes.CDLL("libc.so.6").malloc_trim(0)
