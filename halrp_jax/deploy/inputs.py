"""What a user hands to a model that is deployed; anything else is refused in one line."""

import numpy as np

from halrp_jax.types import UserError


def require_images(image, shape: tuple, who: str) -> None:
  """Raises UserError if `image` is no uint8 array of a shape.

  Args:
    image: what was given.
    shape: (B, H, W, C); "B" where any number of images will do.
    who: begins the message.
  """
  found = getattr(image, "shape", ())
  same = len(found) == len(shape) and all(n in ("B", m) for n, m in zip(shape, found, strict=True))
  if not same or image.dtype != np.uint8:
    expected = ", ".join(map(str, shape))
    raise UserError(f"{who}: expected uint8 images [{expected}], given {_said(image)}")


def require_ids(task_ids, who: str) -> np.ndarray:
  """Returns task ids as an array [B]; raises UserError if they are no whole numbers."""
  try:
    ids = np.asarray(task_ids)
  except ValueError:  # lists of several lengths
    ids = None
  if ids is None or ids.ndim != 1 or ids.dtype.kind not in "iu":
    given = _said(task_ids if ids is None else ids)
    raise UserError(f"{who}: expected task ids, whole numbers [B], given {given}")
  return ids


def require_index(i, size: int | None, what: str) -> None:
  """Raises UserError if `i` is no whole number from 0 on, and below `size` if there is one."""
  if isinstance(i, int | np.integer) and i >= 0 and (size is None or i < size):
    return
  span = "from 0 on" if size is None else f"from 0 to {size - 1}"
  raise UserError(f"{what}: expected a whole number {span}, given {i!r}")


def _said(x) -> str:
  """Returns dtype and shape of an array, or the name of another type."""
  if hasattr(x, "shape") and hasattr(x, "dtype"):
    return f"{x.dtype} [{', '.join(map(str, x.shape))}]"
  return f"a {type(x).__name__}"
