"""Checks what a user hands to a deployed model; everything unexpected is one clear error line."""

import os
import pathlib

import numpy as np

from halrp_jax.types import UserError


def require_path(path: object, what: str) -> pathlib.Path:
  """Returns a path as `pathlib.Path`; raises UserError if it is of another type.

  Args:
    path: what was given.
    what: begins the message, such as "export.load".
  """
  if not isinstance(path, str | os.PathLike):
    raise UserError(f"{what}: expected the path of a folder, given {path!r}")
  return pathlib.Path(os.fspath(path))


def require_images(image: object, shape: tuple[str | int, ...], what: str) -> None:
  """Raises UserError if `image` is not a uint8 array of a shape.

  Args:
    image: what was given.
    shape: (B, H, W, C), with "B" for any number of images.
    what: begins the message, such as "classify".
  """
  found = getattr(image, "shape", ())
  fits = len(found) == len(shape) and all(n in ("B", m) for n, m in zip(shape, found, strict=True))
  if not fits or getattr(image, "dtype", None) != np.uint8:
    expected = ", ".join(map(str, shape))
    raise UserError(f"{what}: expected uint8 images [{expected}], given {_describe(image)}")


def require_ids(task_ids: object, what: str) -> np.ndarray:
  """Returns task ids as an array [B]; raises UserError if they are not whole numbers.

  Args:
    task_ids: what was given.
    what: begins the message.
  """
  try:
    ids = np.asarray(task_ids)
  except ValueError:  # nested lists of different lengths
    ids = None
  if ids is None or ids.ndim != 1 or ids.dtype.kind not in "iu":
    given = _describe(task_ids if ids is None else ids)
    raise UserError(f"{what}: expected task ids, whole numbers [B], given {given}")
  return ids


def require_index(i: object, size: int | None, what: str) -> None:
  """Raises UserError if `i` is not a whole number from 0 to `size` - 1.

  Args:
    i: what was given.
    size: None: there is no upper limit.
    what: begins the message.
  """
  if isinstance(i, int | np.integer) and i >= 0 and (size is None or i < size):
    return
  limits = "from 0 on" if size is None else f"from 0 to {size - 1}"
  raise UserError(f"{what}: expected a whole number {limits}, given {i!r}")


def _describe(x: object) -> str:
  """Returns dtype and shape of an array, or the name of another type."""
  shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
  if shape is not None and dtype is not None:
    return f"{dtype} [{', '.join(map(str, shape))}]"
  return f"a {type(x).__name__}"
