"""Bytes of the original files and of the user's images -> arrays.

Every format is checked before it is believed.
"""

import io
import math
import pathlib
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
  """Decodes an image.

  Args:
    contents: the file.
    name: what to call it in an error.
    mode: "L" or "RGB"; other modes are converted.
    size: (width, height) of a published data set: it must have it, be a PNG or JPEG, and its pixels
      are taken as they are stored, as the data set's authors do. None: any image, as it is meant to
      be seen (`photo`).

  Raises:
    UserError: if it can't be read, or has another size.
  """
  if size is None:
    return photo(contents, name, mode)[0]
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      image = Image.open(io.BytesIO(contents), formats=("PNG", "JPEG"))
      if image.size == size:
        return (_eight_bits(image) if _is_deep(image) else image).convert(mode)
  except Exception as e:  # a damaged file makes Pillow raise almost anything
    raise UserError(f"{name}: not a PNG or JPEG that can be read ({brief(e)}); get it again") from e
  expected = f"{size[0]} x {size[1]}"
  raise UserError(f"{name}: {image.size[0]} x {image.size[1]} pixels, expected {expected}")


# --- images of the user's -------------------------------------------------------------

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
_MOST_BYTES = 200_000_000  # of one image's file
_ORIENTATION = 0x0112  # EXIF and TIFF
_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
# what is done to an image, as bits
_TURNED, _CLEAR, _DEEP, _PALETTE, _COLOURS, _GREY, _FRAMES, _RESIZED = (1 << i for i in range(8))
_SAID = {
  _TURNED: "turned as their EXIF orientation says",
  _CLEAR: "with transparency, put on white",
  _DEEP: "with 16 bits, scaled to 8",
  _PALETTE: "with a palette, given its colours",
  _COLOURS: "in CMYK or another colour space, made RGB",
  _GREY: "grey made RGB, or colours made grey",
  _FRAMES: "with several frames, of which the first is used",
  _RESIZED: "resized",
}
_BEGINNINGS = (
  (b"\x89PNG", "PNG"),
  (b"\xff\xd8", "JPEG"),
  (b"RIFF", "WEBP"),
  (b"BM", "BMP"),
  (b"GIF8", "GIF"),
  (b"II", "TIFF"),
  (b"MM", "TIFF"),
)
_OTHER_BEGINNINGS = (  # of files that people take for images
  (b"version https://git-lfs", "the pointer of a file in Git LFS, which git lfs pull fetches"),
  (b"<", "HTML, SVG or XML"),
  (b"%PDF", "PDF"),
  (b"PK\3\4", "a zip archive"),
  (b"\x1f\x8b", "a gzip archive"),
  (b"\x89HDF", "HDF5"),
  (b"8BPS", "PSD"),
  (b"\0\0\0\x0cjP", "JPEG 2000"),
  (b"\x93NUMPY", "a numpy array"),
)


def read_photo(path: pathlib.Path, shape: tuple[int, int, int]) -> tuple[np.ndarray, int]:
  """Reads an image file of the user's.

  Args:
    path: the file.
    shape: [H, W, C] that it is made to have; C is 1 or 3.

  Returns:
    uint8 array of that shape, and bits that say what was done to it (`conversions`).

  Raises:
    UserError: names the file, its format, and why it can't be read.
  """
  height, width, channels = shape
  contents = sources.read_file(path, _MOST_BYTES)
  image, done = photo(contents, str(path), "L" if channels == 1 else "RGB")
  if image.size != (width, height):
    image, done = image.resize((width, height), Image.Resampling.BILINEAR), done | _RESIZED
  return np.asarray(image).reshape(shape), done


def conversions(done: np.ndarray) -> str:
  """Returns a text that counts what was done to images; empty if nothing was.

  Args:
    done: bits of `read_photo` for each image. [N]
  """
  counts = {text: int(np.count_nonzero(done & bit)) for bit, text in _SAID.items()}
  said = ", ".join(f"{n:,} {text}" for text, n in counts.items() if n)
  return said and f"of {len(done):,} images {said}"


def photo(contents: bytes, name: str, mode: str) -> tuple[Image.Image, int]:
  """Decodes an image as it is meant to be seen: turned, on white, 8 bits, the first frame.

  Colour profiles are not applied. See `read_photo`.
  """
  kind, is_other = _kind_of(contents)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      image = Image.open(io.BytesIO(contents), formats=_FORMATS)
      kind, (width, height) = image.format, image.size
      if width * height > _MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels, expected at most {_MOST_PIXELS:,}")
      return _as_seen(image, mode)
  except Image.UnidentifiedImageError:
    kind += "" if is_other else ": damaged at its beginning"
  except Exception as e:  # a damaged file makes Pillow raise almost anything
    kind += f": {brief(e)}"
  raise UserError(f"{name}: not an image that can be read ({kind}); get it again or remove it")


def _kind_of(contents: bytes) -> tuple[str, bool]:
  """Returns what a file seems to be, and whether that is none of `_FORMATS`."""
  if not contents:
    return "an empty file", True
  if contents[4:8] == b"ftyp":
    return "HEIC, AVIF or a film", True
  for beginnings, start in ((_BEGINNINGS, contents), (_OTHER_BEGINNINGS, contents[:256].lstrip())):
    for beginning, kind in beginnings:
      if start.startswith(beginning):
        return kind, beginnings is _OTHER_BEGINNINGS
  return "none of PNG, JPEG, WebP, BMP, GIF, TIFF and PPM", True


def _as_seen(image: Image.Image, mode: str) -> tuple[Image.Image, int]:
  deep = _is_deep(image) or any(";16" in str(tile) for tile in image.tile)
  done = _DEEP * deep | _FRAMES * _has_frames(image)
  turn = _orientation(image) if image.format == "TIFF" else 1  # whose load turns it
  image.load()
  if turn not in _TURNS and (turn := _orientation(image)) in _TURNS:
    image = image.transpose(_TURNS[turn])
  done |= _TURNED * (turn in _TURNS)
  if _is_deep(image):
    image = _eight_bits(image)
  elif image.mode == "F":
    raise ValueError("pixels are floating-point numbers, whose range no file says")
  done |= _PALETTE * (image.mode in ("P", "PA"))
  done |= _COLOURS * (image.mode in ("CMYK", "YCbCr", "LAB", "HSV"))
  if image.has_transparency_data:
    image, clear = on_white(image)
    done |= _CLEAR * clear
  colours = image.mode not in ("1", "L", "LA", "I")
  return image.convert(mode), done | _GREY * (colours != (mode == "RGB"))


def on_white(image: Image.Image) -> tuple[Image.Image, bool]:
  """Returns an image without transparency, and whether it had any."""
  grey = image.mode in ("1", "L", "LA", "La")
  if image.mode in ("La", "RGBa"):
    image = image.convert(image.mode.upper())
  image = image.convert("RGBA")
  clear = image.getchannel("A").getextrema()[0] < 255
  white = Image.new("RGBA", image.size, "white")
  return Image.alpha_composite(white, image).convert("L" if grey else "RGB"), clear


def _orientation(image: Image.Image) -> int:
  try:
    return image.getexif().get(_ORIENTATION, 1)
  except Exception:  # damaged EXIF data of a sound image
    return 1


def _has_frames(image: Image.Image) -> bool:
  try:
    return bool(getattr(image, "is_animated", False))
  except Exception:  # a damaged frame after the first
    return True


def _is_deep(image: Image.Image) -> bool:
  return image.mode.startswith("I")


def _eight_bits(image: Image.Image) -> Image.Image:
  """Scales 16 bits to 8, which Pillow clips."""
  tags = getattr(image, "tag_v2", {})  # of a TIFF
  if image.format == "TIFF" and image.mode == "I":
    raise ValueError("pixels have a sign or 32 bits, whose range no file says")
  wide = np.asarray(image, np.int64) << (16 - tags.get(258, (16,))[0])  # BitsPerSample
  if tags.get(262) == 0:  # PhotometricInterpretation: white is 0
    wide = 65535 - wide
  if (clear := image.info.get("transparency")) is not None:
    wide[wide == clear] = 65535  # on white, as other images are
  return Image.fromarray((wide >> 8).clip(0, 255).astype(np.uint8))
