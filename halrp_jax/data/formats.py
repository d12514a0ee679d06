"""Bytes of the original files -> arrays. Every format is checked before it is believed."""

import io
import math
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

from halrp_jax.data import sources
from halrp_jax.types import UserError, brief

_MOST_IDX = 60_000_000  # bytes; MNIST's training images have 47 million
_MOST_MAT = 400_000_000  # bytes; SVHN's training images have 225 million
_MOST_PIXELS = 64_000_000
_MAT_PACKED = 15  # kind of the elements of a MATLAB file that are zlib streams
_MAT_NUMBERS = {"double", "single", *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64))}


def idx(contents: bytes, name: str, dimensions: int) -> np.ndarray:
  """uint8 array of an IDX file (MNIST), gzipped or not. [N] labels or [N, H, W] images"""
  contents = sources.gunzip(contents, name, _MOST_IDX)
  header = 4 + 4 * dimensions
  if len(contents) < header or contents[:4] != bytes([0, 0, 8, dimensions]):
    raise UserError(
      f"{name}: not an IDX file of {dimensions} dimensions; delete it and download it again"
    )
  shape = struct.unpack(f">{dimensions}I", contents[4:header])
  if len(contents) - header != int(np.prod(shape, dtype=object)):
    raise UserError(
      f"{name}: {len(contents) - header:,} bytes for an array of {' x '.join(map(str, shape))}; "
      "truncated or damaged, delete it and download it again"
    )
  return np.frombuffer(contents, np.uint8, offset=header).reshape(shape)


def cifar(contents: bytes, name: str, num_labels: int) -> tuple[np.ndarray, np.ndarray]:
  """CIFAR's binary records. -> image uint8 [N, 32, 32, 3], label uint8 [N, num_labels]"""
  record = num_labels + 3 * 32 * 32
  num_images, rest = divmod(len(contents), record)
  if rest or not num_images:
    raise UserError(
      f"{name}: {len(contents):,} bytes are no whole number of {record}-byte records; truncated or "
      "damaged, delete it and download it again"
    )
  rows = np.frombuffer(contents, np.uint8).reshape(-1, record)
  planes = rows[:, num_labels:].reshape(-1, 3, 32, 32)
  return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), rows[:, :num_labels]


def svhn(contents: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
  """SVHN's cropped digits. -> image uint8 [N, 32, 32, 3], label [N] 0 to 9 (10 in the file is 0)"""
  from scipy import io as scipy_io  # slow to import, needed for this alone

  try:
    _require_mat(contents, name)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # what is odd in the file is checked here
      for declared in scipy_io.whosmat(io.BytesIO(contents)):
        _require_svhn(name, *declared)
      found = scipy_io.loadmat(io.BytesIO(contents), variable_names=("X", "y"))
    image, label = np.asarray(found["X"]), np.asarray(found["y"]).reshape(-1)
  except UserError:
    raise
  except Exception as e:  # a damaged file makes scipy raise almost anything
    raise UserError(
      f"{name}: not a MATLAB 5 file with X and y ({brief(e)}); delete it and download it again"
    ) from e
  if image.dtype != np.uint8:  # logical or complex
    raise UserError(f"{name}: X is {image.dtype}, expected uint8")
  if len(label) != image.shape[3] or not np.isin(label, np.arange(11)).all():
    raise UserError(
      f"{name}: y has {len(label)} labels, expected one from 1 to 10 for each of {image.shape[3]} "
      "images; damaged, delete it and download it again"
    )
  return np.ascontiguousarray(image.transpose(3, 0, 1, 2)), label.real.astype(np.int64) % 10


def _require_svhn(name: str, variable: str, shape: tuple[int, ...], kind: str) -> None:
  """Refuses what a variable declares before memory is taken for it."""
  size = math.prod(shape)
  if variable == "X":
    good = kind == "uint8" and len(shape) == 4 and shape[:3] == (32, 32, 3)
    expected = "uint8 (32, 32, 3, N)"
  else:
    good = variable != "y" or (kind in _MAT_NUMBERS and size == max(shape))
    expected = "numbers (N, 1)"
  if not good or size > _MOST_MAT:
    raise UserError(f"{name}: {variable} is {kind} {shape}, expected {expected}")


def _require_mat(contents: bytes, name: str) -> None:
  """Refuses what is no MATLAB 5 file, or unpacks to more than any of SVHN's does."""
  order = {b"IM": "<", b"MI": ">"}.get(contents[126:128])
  if order is None or len(contents) < 136:
    raise UserError(f"{name}: not a MATLAB 5 file; delete it and download it again")
  at, total = 128, 0
  while at + 8 <= len(contents):
    kind, size = struct.unpack(f"{order}2I", contents[at : at + 8])
    at += 8
    if kind == _MAT_PACKED:
      total += _unpacked_size(memoryview(contents)[at : at + size], _MOST_MAT - total)
      if total > _MOST_MAT:
        raise UserError(f"{name}: unpacks to more than {_MOST_MAT:,} bytes; it is not the original")
    at += size


def _unpacked_size(packed: memoryview, most: int) -> int:
  """How many bytes zlib makes of these; it stops at more than `most`."""
  unpacker, total = zlib.decompressobj(), 0
  for at in range(0, len(packed), 2**16):  # of which zlib makes 64 MiB at most
    total += len(unpacker.decompress(packed[at : at + 2**16]))
    if total > most or unpacker.eof:
      break
  return total


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
