"""Moves arrays from memory to a file, from which they are read when they are used."""

import mmap
import os
import pathlib
import tempfile
import weakref
from collections.abc import Callable

import jax
import numpy as np

from halrp_jax.types import Params

_CHUNK = 64 << 20  # bytes that are mapped at once; every map needs a file descriptor
_ALIGNED = 64  # bytes


class Spilled(np.ndarray):
  """An array whose numbers are in a file; its `base` is the map of the file."""

  __slots__ = ()  # one object is all that a thousand tasks need for each array


def make_spill(folder: pathlib.Path) -> Callable[[Params], Params]:
  """Builds spill(tree), which returns the tree with arrays of type `Spilled`.

  The file has no name and is gone when the process ends, however it ends. The arrays can't be
  written to. They are stored by columns, and zeros at the end are not written: U and V of a task
  are padded with columns of zeros.

  Args:
    folder: the file is made on its file system when it is first needed.

  Returns:
    The function; it raises OSError if the disk is full.
  """
  file, chunk, start, used = None, None, 0, 0

  def reserve(size: int) -> int:
    """Maps more of the file if need be; returns where in `chunk` there is room for `size` bytes."""
    nonlocal file, chunk, start, used
    if file is None:
      file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  `close` closes it
    if chunk is None or used + size > len(chunk):
      end = os.fstat(file.fileno()).st_size
      length = max(_rounded(size, mmap.ALLOCATIONGRANULARITY), _CHUNK)
      os.ftruncate(file.fileno(), end + length)
      chunk = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=end)
      start, used = end, 0
    offset, used = used, used + _rounded(size, _ALIGNED)
    return offset

  def spill_array(x: jax.Array | np.ndarray) -> np.ndarray:
    array = np.asarray(x)
    if not array.size:
      return array
    offset = reserve(array.nbytes)
    assert file is not None  # made by `reserve`
    contents, written = array.tobytes(order="F").rstrip(b"\0"), 0
    while written < len(contents):
      written += os.pwrite(file.fileno(), contents[written:], start + offset + written)
    return Spilled(array.shape, array.dtype, chunk, offset, order="F")

  def spill(tree: Params) -> Params:
    return jax.tree.map(spill_array, tree)

  def close() -> None:
    if file is not None:
      file.close()  # the maps stay

  weakref.finalize(spill, close)
  return spill


def is_spilled(tree: Params) -> bool:
  """Returns whether the arrays of a pytree are in a file."""
  return all(isinstance(x, Spilled) for x in jax.tree.leaves(tree) if x.size)


def release(x: jax.Array | np.ndarray) -> None:
  """Frees the memory that reading a spilled array took; it is read again when it is used."""
  if isinstance(x, Spilled) and isinstance(x.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
    x.base.madvise(mmap.MADV_DONTNEED)


def _rounded(size: int, unit: int) -> int:
  """Returns `size` rounded up to a multiple of `unit`."""
  return -(-size // unit) * unit
