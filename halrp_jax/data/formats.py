"""Decoding of the original files and of the user's images into arrays.

The contents of a file are checked before they are used, because a file may be damaged or forged.
"""

import io
import math
import pathlib
import struct
import warnings
import zlib
from typing import cast

import numpy as np
from PIL import Image, ImageFile

from halrp_jax.data import archives
from halrp_jax.types import Framing, UserError, brief

# Largest accepted sizes, to protect the memory from forged files.
_MOST_IDX = 60_000_000  # bytes; MNIST's training images have 47 million
_MOST_MAT = 400_000_000  # bytes; SVHN's training images have 225 million
_MOST_PIXELS = 64_000_000
_MAT_COMPRESSED = 15  # type number of a zlib stream in a MATLAB file (miCOMPRESSED)
_MAT_NUMBERS = {"double", "single", *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64))}


def idx(contents: bytes, name: str, dimensions: int) -> np.ndarray:
  """Decodes an IDX file, the format of MNIST.

  Args:
    contents: the file, gzipped or not.
    name: name of the file in an error message.
    dimensions: expected number of axes: 1 for labels [N], 3 for images [N, H, W].

  Returns:
    uint8 array with that number of axes.

  Raises:
    UserError: if the file is damaged or has another number of axes.
  """
  contents = archives.gunzip(contents, name, _MOST_IDX)
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
  """Decodes a file of the binary version of CIFAR-10 or CIFAR-100.

  Args:
    contents: the file.
    name: name of the file in an error message.
    num_labels: number of labels before each image: 1 in CIFAR-10, 2 in CIFAR-100.

  Returns:
    Images, uint8 [N, 32, 32, 3], and labels, uint8 [N, num_labels].

  Raises:
    UserError: if the file is not a whole number of records.
  """
  record = num_labels + 3 * 32 * 32
  num_images, rest = divmod(len(contents), record)
  if rest or not num_images:
    raise UserError(
      f"{name}: {len(contents):,} bytes are not a whole number of {record}-byte records; truncated "
      "or damaged, delete it and download it again"
    )
  rows = np.frombuffer(contents, np.uint8).reshape(-1, record)
  planes = rows[:, num_labels:].reshape(-1, 3, 32, 32)
  return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), rows[:, :num_labels]


def svhn(contents: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Decodes a MATLAB 5 file of SVHN's cropped digits.

  Args:
    contents: the file.
    name: name of the file in an error message.

  Returns:
    Images, uint8 [N, 32, 32, 3], and labels from 0 to 9 [N]. The label 10 of the file becomes 0.

  Raises:
    UserError: if the file is damaged or has unexpected contents.
  """
  from scipy import io as scipy_io  # slow to import

  try:
    _require_mat(contents, name)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # the contents are checked below
      for declared in scipy_io.whosmat(io.BytesIO(contents)):
        _require_svhn(name, *declared)
      found = scipy_io.loadmat(io.BytesIO(contents), variable_names=("X", "y"))
    image, label = np.asarray(found["X"]), np.asarray(found["y"]).reshape(-1)
  except UserError:
    raise
  except Exception as e:  # scipy may raise anything for a damaged file
    raise UserError(
      f"{name}: not a MATLAB 5 file with X and y ({brief(e)}); delete it and download it again"
    ) from e
  if image.dtype != np.uint8:  # logical or complex
    raise UserError(f"{name}: X is {image.dtype}, expected uint8; delete it and download it again")
  if len(label) != image.shape[3] or not np.isin(label, np.arange(11)).all():
    raise UserError(
      f"{name}: y has {len(label)} labels, expected one from 1 to 10 for each of {image.shape[3]} "
      "images; the file is damaged, delete it and download it again"
    )
  return np.ascontiguousarray(image.transpose(3, 0, 1, 2)), np.real(label).astype(np.int64) % 10


def _require_svhn(name: str, variable: str, shape: tuple[int, ...], kind: str) -> None:
  """Raises UserError if a variable declares an unexpected type or shape.

  This is checked before the variable is read, so that no memory is allocated for a forged size.
  """
  size = math.prod(shape)
  if variable == "X":
    good = kind == "uint8" and len(shape) == 4 and shape[:3] == (32, 32, 3)
    expected = "uint8 (32, 32, 3, N)"
  else:
    good = variable != "y" or (kind in _MAT_NUMBERS and size == max(shape))
    expected = "numbers (N, 1)"
  if not good or size > _MOST_MAT:
    raise UserError(
      f"{name}: {variable} is {kind} {shape}, expected {expected}; delete it and download it again"
    )


def _require_mat(contents: bytes, name: str) -> None:
  """Raises UserError if the file is not a MATLAB 5 file, or decompresses to too many bytes."""
  order = {b"IM": "<", b"MI": ">"}.get(contents[126:128])
  if order is None or len(contents) < 136:
    raise UserError(f"{name}: not a MATLAB 5 file; delete it and download it again")
  position, total = 128, 0
  while position + 8 <= len(contents):
    kind, size = struct.unpack(f"{order}2I", contents[position : position + 8])
    position += 8
    if kind == _MAT_COMPRESSED:
      element = memoryview(contents)[position : position + size]
      total += _decompressed_size(element, _MOST_MAT - total)
      if total > _MOST_MAT:
        raise UserError(
          f"{name}: decompresses to more than {_MOST_MAT:,} bytes, so it is not the original file; "
          "delete it and download it again"
        )
    position += size


def _decompressed_size(compressed: memoryview, most: int) -> int:
  """Returns the size of a zlib stream after decompression; stops counting above `most` bytes."""
  stream, total = zlib.decompressobj(), 0
  for start in range(0, len(compressed), 2**16):  # a chunk decompresses to at most 64 MiB
    total += len(stream.decompress(compressed[start : start + 2**16]))
    if total > most or stream.eof:
      break
  return total


def picture(contents: bytes, name: str, mode: str, size: tuple[int, int] | None) -> Image.Image:
  """Decodes an image of a published data set, or any image.

  An image of a published data set must be a PNG or JPEG file of a given size. Its pixels are used
  as they are stored, which is what the authors of the data sets do. Other images are decoded as
  `photo` does.

  Args:
    contents: the file.
    name: name of the file in an error message.
    mode: "L" or "RGB": Pillow's mode of the returned image.
    size: (width, height) of an image of a published data set; None for any other image.

  Raises:
    UserError: if the image can't be read or has another size.
  """
  if size is None:
    return photo(contents, name, mode)[0]
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      image = Image.open(io.BytesIO(contents), formats=("PNG", "JPEG"))
      if image.size == size:
        return (_eight_bits(image) if _is_deep(image) else image).convert(mode)
  except Exception as e:  # Pillow may raise anything for a damaged file
    raise UserError(
      f"{name}: not a PNG or JPEG image that can be read ({brief(e)}); download it again"
    ) from e
  raise UserError(
    f"{name}: {image.size[0]} x {image.size[1]} pixels, expected {size[0]} x {size[1]}; download "
    "the data set again"
  )


# --- the user's images ----------------------------------------------------------------

_WHOLE = Framing()
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
_MOST_BYTES = 200_000_000  # largest accepted file
_ORIENTATION = 0x0112  # tag of EXIF and TIFF
_TRANSPOSITIONS = {  # by value of that tag
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
# The conversions of an image, as bits.
_ROTATED, _TRANSPARENT, _DEEP, _PALETTE, _COLOURS, _GREY, _FRAMES, _RESIZED = (
  1 << i for i in range(8)
)
_DESCRIPTIONS = {
  _ROTATED: "rotated or mirrored as their EXIF orientation says",
  _TRANSPARENT: "with transparency, put on white",
  _DEEP: "with 16 bits, scaled to 8",
  _PALETTE: "with a palette, converted to its colours",
  _COLOURS: "in CMYK or another colour space, converted to RGB",
  _GREY: "converted from grey to RGB or from colour to grey",
  _FRAMES: "with several frames, of which the first is used",
  _RESIZED: "resized",
}
# The first bytes of files, and what such a file is.
_BEGINNINGS = (
  (b"\x89PNG", "PNG"),
  (b"\xff\xd8", "JPEG"),
  (b"RIFF", "WEBP"),
  (b"BM", "BMP"),
  (b"GIF8", "GIF"),
  (b"II", "TIFF"),
  (b"MM", "TIFF"),
)
_OTHER_BEGINNINGS = (  # files that are often mistaken for images
  (b"version https://git-lfs", "a pointer to a file in Git LFS, which git lfs pull downloads"),
  (b"<", "HTML, SVG or XML"),
  (b"%PDF", "PDF"),
  (b"PK\3\4", "a zip archive"),
  (b"\x1f\x8b", "a gzip archive"),
  (b"\x89HDF", "HDF5"),
  (b"8BPS", "PSD"),
  (b"\0\0\0\x0cjP", "JPEG 2000"),
  (b"\x93NUMPY", "a numpy array"),
)


def read_photo(
  path: pathlib.Path, shape: tuple[int, int, int], framing: Framing = _WHOLE
) -> tuple[np.ndarray, int]:
  """Reads an image file of the user's and resizes the image.

  Args:
    path: the file.
    shape: shape [H, W, C] of the returned array; C is 1 or 3.
    framing: which part of the image is used.

  Returns:
    uint8 array of that shape, and bits that say how the image was converted (see `conversions`).

  Raises:
    UserError: if the file can't be read; names the file, its format, and the reason.
  """
  contents = archives.read_file(path, _MOST_BYTES)
  image, done = photo(contents, str(path), "L" if shape[2] == 1 else "RGB")
  if image.size != (shape[1], shape[0]):
    done |= _RESIZED
  return framed(image, shape[:2], framing).reshape(shape), done


def photograph(x: np.ndarray, shape: tuple[int, int, int], framing: Framing) -> np.ndarray:
  """Returns a decoded photograph as a stored image.

  Args:
    x: uint8 [h, w] or [h, w, 3], of any size.
    shape: shape [H, W, C] of the stored image; C is 1 or 3.
    framing: which part of the photograph is used.

  Raises:
    UserError: if it has another shape or dtype.
  """
  if x.dtype != np.uint8 or x.ndim not in (2, 3) or x.shape[2:] not in ((), (3,)) or not x.size:
    raise UserError(
      f"photograph: expected uint8 [h, w] or [h, w, 3], given {x.dtype} {list(x.shape)}"
    )
  image = Image.fromarray(x).convert("L" if shape[2] == 1 else "RGB")
  return framed(image, shape[:2], framing).reshape(shape)


def framed(image: Image.Image, size: tuple[int, int], framing: Framing) -> np.ndarray:
  """Returns a photograph as a stored image, uint8 [H, W] or [H, W, C].

  A central rectangle is found as by torchvision's `Resize` and `CenterCrop`: the photograph is
  scaled until it just holds H / crop x W / crop pixels, and its middle is cut out.

  Args:
    image: the photograph.
    size: height H and width W of the stored image.
    framing: which part of the photograph is used.
  """
  height, width = size
  method = Image.Resampling[framing.interpolation.upper()]
  if not framing.crop:
    whole = image if image.size == (width, height) else image.resize((width, height), method)
    return np.asarray(whole)
  least_width, least_height = (math.floor(n / framing.crop) for n in (width, height))
  if image.width * least_height >= image.height * least_width:
    scaled = (int(least_height * image.width / image.height), least_height)
  else:
    scaled = (least_width, int(least_width * image.height / image.width))
  image = image if image.size == scaled else image.resize(scaled, method)
  left, top = (round((n - m) / 2) for n, m in zip(scaled, (width, height), strict=True))
  return np.asarray(image.crop((left, top, left + width, top + height)))


def conversions(done: np.ndarray) -> str:
  """Returns a text that counts how images were converted; empty if none was converted.

  Args:
    done: the bits that `read_photo` returned for each image. [N]
  """
  counts = {text: int(np.count_nonzero(done & bit)) for bit, text in _DESCRIPTIONS.items()}
  text = ", ".join(f"{n:,} {text}" for text, n in counts.items() if n)
  return text and f"of {len(done):,} images {text}"


def photo(contents: bytes, name: str, mode: str) -> tuple[Image.Image, int]:
  """Decodes an image in the way an image viewer shows it.

  The image is rotated as its EXIF orientation says, transparent parts become white, values are
  scaled to 8 bits, and the first frame is used. Colour profiles are not applied.

  Args:
    contents: the file.
    name: name of the file in an error message.
    mode: "L" or "RGB": Pillow's mode of the returned image.

  Returns:
    The image in its original size, and bits that say how it was converted (see `conversions`).

  Raises:
    UserError: if the image can't be read.
  """
  kind, is_other = _kind_of(contents)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      image = Image.open(io.BytesIO(contents), formats=_FORMATS)
      kind, (width, height) = image.format or kind, image.size
      if width * height > _MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels, expected at most {_MOST_PIXELS:,}")
      return _as_seen(image, mode)
  except Image.UnidentifiedImageError:
    kind += "" if is_other else ": damaged at its beginning"
  except Exception as e:  # Pillow may raise anything for a damaged file
    kind += f": {brief(e)}"
  raise UserError(f"{name}: not an image that can be read ({kind}); replace the file or remove it")


def _kind_of(contents: bytes) -> tuple[str, bool]:
  """Returns what a file is by its first bytes, and whether that is not one of `_FORMATS`."""
  if not contents:
    return "an empty file", True
  if contents[4:8] == b"ftyp":
    return "HEIC, AVIF or a video", True
  for beginnings, start in ((_BEGINNINGS, contents), (_OTHER_BEGINNINGS, contents[:256].lstrip())):
    for beginning, kind in beginnings:
      if start.startswith(beginning):
        return kind, beginnings is _OTHER_BEGINNINGS
  return "none of PNG, JPEG, WebP, BMP, GIF, TIFF and PPM", True


def _as_seen(opened: ImageFile.ImageFile, mode: str) -> tuple[Image.Image, int]:
  """Returns an opened image as a viewer shows it, and its conversions as bits (see `photo`)."""
  image: Image.Image = opened
  deep = _is_deep(image) or any(";16" in str(tile) for tile in opened.tile)
  done = _DEEP * deep | _FRAMES * _has_frames(image)
  # Pillow rotates a TIFF image when it is loaded, and then forgets the orientation.
  orientation = _orientation(image) if image.format == "TIFF" else 1
  image.load()
  if orientation not in _TRANSPOSITIONS:
    orientation = _orientation(image)
    if orientation in _TRANSPOSITIONS:
      image = image.transpose(_TRANSPOSITIONS[orientation])
  done |= _ROTATED * (orientation in _TRANSPOSITIONS)
  if _is_deep(image):
    image = _eight_bits(image)
  elif image.mode == "F":
    raise ValueError("pixels are floating-point numbers of unknown range")
  done |= _PALETTE * (image.mode in ("P", "PA"))
  done |= _COLOURS * (image.mode in ("CMYK", "YCbCr", "LAB", "HSV"))
  if image.has_transparency_data:
    image, transparent = on_white(image)
    done |= _TRANSPARENT * transparent
  colours = image.mode not in ("1", "L", "LA", "I")
  return image.convert(mode), done | _GREY * (colours != (mode == "RGB"))


def on_white(image: Image.Image) -> tuple[Image.Image, bool]:
  """Returns an image with transparent parts on white, and whether it had any."""
  grey = image.mode in ("1", "L", "LA", "La")
  if image.mode in ("La", "RGBa"):
    image = image.convert(image.mode.upper())
  image = image.convert("RGBA")
  lowest, _ = cast("tuple[int, int]", image.getchannel("A").getextrema())  # of a single channel
  transparent = lowest < 255
  white = Image.new("RGBA", image.size, "white")
  return Image.alpha_composite(white, image).convert("L" if grey else "RGB"), transparent


def _orientation(image: Image.Image) -> int:
  """Returns the EXIF orientation of an image, from 1 (upright) to 8."""
  try:
    return image.getexif().get(_ORIENTATION, 1)
  except Exception:  # the EXIF data may be damaged while the image is not
    return 1


def _has_frames(image: Image.Image) -> bool:
  """Returns whether an image has more than one frame."""
  try:
    return bool(getattr(image, "is_animated", False))
  except Exception:  # a frame after the first is damaged
    return True


def _is_deep(image: Image.Image) -> bool:
  """Returns whether the pixels of an image are integers of more than 8 bits."""
  return image.mode.startswith("I")


def _eight_bits(image: Image.Image) -> Image.Image:
  """Scales an image from 16 bits to 8. Pillow would clip the values instead."""
  tags = getattr(image, "tag_v2", {})  # exist in TIFF images only
  if image.format == "TIFF" and image.mode == "I":
    raise ValueError("pixels are signed or 32-bit integers of unknown range")
  wide = np.asarray(image, np.int64) << (16 - tags.get(258, (16,))[0])  # BitsPerSample
  if tags.get(262) == 0:  # PhotometricInterpretation: white is 0
    wide = 65535 - wide
  if (clear := image.info.get("transparency")) is not None:
    wide[wide == clear] = 65535  # white, like the transparent parts of other images
  return Image.fromarray((wide >> 8).clip(0, 255).astype(np.uint8))
