"""Images without labels, to be classified: a folder, or `image` of an .npz file.

A folder's PNG and JPEG files, also those of its sub-folders, are resized as in custom.py; of an
animated one the first frame counts. An .npz has images of the network's size.
"""

import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from halrp_jax.data import formats, sources
from halrp_jax.types import UserError, brief

_SUFFIXES = (".png", ".jpg", ".jpeg")
_MOST = 200_000_000  # bytes of one image's file


class Batch(NamedTuple):
  names: list[str]
  image: np.ndarray  # uint8 [B, H, W, C]
  skipped: list[str]  # lines that say what could not be read, and why


class Incoming(NamedTuple):
  total: int  # images, the damaged ones too
  batches: Iterator[Batch]  # all but the last one with as many good images as asked for


def open_images(text: str, shape: tuple[int, int, int], batch_size: int) -> Incoming:
  """The images that the user names.

  Args:
    text: path of a folder or an .npz.
    shape: [H, W, C] as the network's images are stored.
    batch_size: images per batch.

  Raises:
    UserError: if there are none, or an .npz has others.
  """
  place = sources.path_of("--images", text)
  if place.is_dir():
    names = sorted(
      p.relative_to(place).as_posix()
      for p in place.rglob("*")
      if p.suffix.lower() in _SUFFIXES and p.is_file() and not p.name.startswith(".")
    )
    if not names:
      raise UserError(f"--images={text}: holds no PNG or JPEG")
    return Incoming(len(names), _folder(place, names, shape, batch_size))
  if place.suffix != ".npz":
    raise UserError(f"--images={text}: neither a folder nor an .npz that is there")
  image = _npz(place, shape)
  starts = range(0, len(image), batch_size)
  names = [str(i) for i in range(len(image))]
  parts = (slice(i, i + batch_size) for i in starts)
  return Incoming(len(image), (Batch(names[part], image[part], []) for part in parts))


def _folder(place, names, shape, batch_size) -> Iterator[Batch]:
  batch = Batch([], [], [])
  for name in names:
    try:
      batch.image.append(_picture(place / name, shape))
      batch.names.append(name)
    except UserError as e:
      batch.skipped.append(str(e))
    if len(batch.names) == batch_size:
      yield batch._replace(image=np.stack(batch.image))
      batch = Batch([], [], [])
  if batch.names or batch.skipped:
    image = np.stack(batch.image) if batch.names else np.zeros((0, *shape), np.uint8)
    yield batch._replace(image=image)


def _picture(path: pathlib.Path, shape) -> np.ndarray:
  height, width, channels = shape
  contents = sources.read_file(path, _MOST)
  image = formats.picture(contents, str(path), "L" if channels == 1 else "RGB", None)
  if image.size != (width, height):
    image = image.resize((width, height), Image.Resampling.BILINEAR)
  return np.asarray(image).reshape(shape)


def _npz(path: pathlib.Path, shape) -> np.ndarray:
  try:
    with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
      image = archive["image"] if "image" in archive.files else None
  except Exception as e:  # zipfile, zlib and numpy raise many kinds
    raise UserError(f"{path}: can't be read ({brief(e)}); write it with numpy.savez") from e
  expected = " x ".join(map(str, shape))
  if image is None:
    raise UserError(f"{path}: holds no array 'image'; expected uint8 [N, {expected}]")
  grey = image.ndim == 3
  found = (*image.shape[1:], 1) if grey else image.shape[1:]
  if image.dtype != np.uint8 or found not in (shape, (*shape[:2], 1)) or not len(image):
    raise UserError(
      f"{path}: image is {image.dtype} {image.shape}, expected uint8 [N, {expected}], N > 0"
    )
  image = image.reshape(len(image), *found)
  return np.broadcast_to(image, (len(image), *shape))
