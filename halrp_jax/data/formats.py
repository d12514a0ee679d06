"""Bytes of the original files -> arrays. Every format is checked before it is believed."""

import io
import struct
import warnings

import numpy as np
from PIL import Image

from halrp_jax.data import sources
from halrp_jax.types import UserError, brief

_MOST_IDX = 60_000_000  # bytes; MNIST's training images have 47 million
_MOST_PIXELS = 64_000_000


def idx(contents: bytes, name: str, dimensions: int) -> np.ndarray:
  """uint8 array of an IDX file (MNIST), gzipped or not. [N] labels or [N, H, W] images"""
  contents = sources.gunzip(contents, name, _MOST_IDX)
  header = 4 + 4 * dimensions
  if len(contents) < header or contents[:4] != bytes([0, 0, 8, dimensions]):
    raise UserError(f"{name}: not an IDX file of {dimensions} dimensions; download it again")
  shape = struct.unpack(f">{dimensions}I", contents[4:header])
  if len(contents) - header != int(np.prod(shape, dtype=object)):
    raise UserError(
      f"{name}: {len(contents) - header:,} bytes for an array of {' x '.join(map(str, shape))}; "
      "truncated or damaged, download it again"
    )
  return np.frombuffer(contents, np.uint8, offset=header).reshape(shape)


def cifar(contents: bytes, name: str, num_labels: int) -> tuple[np.ndarray, np.ndarray]:
  """CIFAR's binary records. -> image uint8 [N, 32, 32, 3], label uint8 [N, num_labels]"""
  record = num_labels + 3 * 32 * 32
  num_images, rest = divmod(len(contents), record)
  if rest or not num_images:
    raise UserError(
      f"{name}: {len(contents):,} bytes are no whole number of {record}-byte records; truncated or "
      "damaged, download it again"
    )
  rows = np.frombuffer(contents, np.uint8).reshape(-1, record)
  planes = rows[:, num_labels:].reshape(-1, 3, 32, 32)
  return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), rows[:, :num_labels]


def svhn(contents: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
  """SVHN's cropped digits. -> image uint8 [N, 32, 32, 3], label [N] 0 to 9 (10 in the file is 0)"""
  from scipy import io as scipy_io  # slow to import, needed for this alone

  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # what is odd in the file is checked here
      found = scipy_io.loadmat(io.BytesIO(contents), variable_names=("X", "y"))
    image, label = np.asarray(found["X"]), np.asarray(found["y"]).reshape(-1)
  except Exception as e:  # a damaged file makes scipy raise almost anything
    raise UserError(
      f"{name}: not a MATLAB 5 file with X and y ({brief(e)}); download it again"
    ) from e
  if image.dtype != np.uint8 or image.ndim != 4 or image.shape[:3] != (32, 32, 3):
    raise UserError(f"{name}: X is {image.dtype} {image.shape}, expected uint8 (32, 32, 3, N)")
  if len(label) != image.shape[3]:
    raise UserError(f"{name}: {len(label)} labels for {image.shape[3]} images; damaged")
  label = label.astype(np.int64) % 10
  return np.ascontiguousarray(image.transpose(3, 0, 1, 2)), label


def picture(contents: bytes, name: str, mode: str, size: tuple[int, int] | None) -> Image.Image:
  """A PNG or JPEG, decoded.

  Args:
    contents: the file.
    name: what to call it in an error.
    mode: "L" or "RGB"; other modes are converted.
    size: (width, height) it must have; None: any.

  Raises:
    UserError: if it can't be read, or has another size.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      image = Image.open(io.BytesIO(contents), formats=("PNG", "JPEG"))
      wrong = size is not None and image.size != size
      if not wrong and image.size[0] * image.size[1] <= _MOST_PIXELS:
        return _eight_bits(image).convert(mode)
  except Exception as e:  # a damaged file makes Pillow raise almost anything
    raise UserError(f"{name}: not a PNG or JPEG that can be read ({brief(e)}); get it again") from e
  expected = f"{size[0]} x {size[1]}" if wrong else f"at most {_MOST_PIXELS:,} pixels"
  raise UserError(f"{name}: {image.size[0]} x {image.size[1]} pixels, expected {expected}")


def _eight_bits(image: Image.Image) -> Image.Image:
  """Pillow clips 16 bits to white when it converts them; so scale."""
  if image.mode.startswith("I;16") or image.mode == "I":
    wide = np.asarray(image, np.int64)
    return Image.fromarray((wide >> 8).clip(0, 255).astype(np.uint8))
  return image
