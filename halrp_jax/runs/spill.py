"""Moves arrays from memory to a file, from which they are read when they are used."""

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


def make_spill(folder: pathlib.Path) -> Callable[[Params], Params]:
  """Builds spill(tree), which returns the tree with arrays that are maps of a file.

  The file has no name and is gone when the process ends, however it ends. The arrays can't be
  written to. They are stored by columns, and zeros at the end are not written: U and V of a task
  are padded with columns of zeros.

  Args:
    folder: the file is made on its file system when it is first needed.

  Returns:
    The function; it raises OSError if the disk is full.
  """
  file, chunk, used = None, np.zeros(0, np.uint8), 0

  def room(size: int) -> tuple[int, np.ndarray]:
    """Returns where in the file `size` bytes have room, and their map."""
    nonlocal file, chunk, used
    if file is None:
      file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  `close` closes it
    if used + size > chunk.size:
      start, length = os.fstat(file.fileno()).st_size, max(_rounded(size), _CHUNK)
      os.ftruncate(file.fileno(), start + length)
      chunk, used = np.memmap(file, np.uint8, "r", start, (length,)), 0
    view = chunk[used : used + size]
    offset = os.fstat(file.fileno()).st_size - chunk.size + used
    used += _rounded(size)
    return offset, view

  def spill_array(x: jax.Array | np.ndarray) -> np.ndarray:
    array = np.asarray(x)
    if not array.size:
      return array
    offset, view = room(array.nbytes)
    assert file is not None  # made by `room`
    contents, written = array.tobytes(order="F").rstrip(b"\0"), 0
    while written < len(contents):
      written += os.pwrite(file.fileno(), contents[written:], offset + written)
    return view.view(array.dtype).reshape(array.shape, order="F")

  def spill(tree: Params) -> Params:
    return jax.tree.map(spill_array, tree)

  def close() -> None:
    if file is not None:
      file.close()  # the maps stay

  weakref.finalize(spill, close)
  return spill


def _rounded(size: int) -> int:
  """Returns `size` rounded up, so that the next array is aligned."""
  return -(-size // _ALIGNED) * _ALIGNED


def is_spilled(tree: Params) -> bool:
  """Returns whether the arrays of a pytree are maps of a file."""
  return all(isinstance(x, np.memmap) for x in jax.tree.leaves(tree) if x.size)
