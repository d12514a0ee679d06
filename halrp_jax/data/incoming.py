"""Images without labels, to be classified: a folder, or `image` of an .npz file.

A folder's images, also those of its sub-folders, are read and resized as in custom.py. An .npz has
images of the network's size.
"""

import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from halrp_jax.data import folders, formats, sources
from halrp_jax.types import UserError, brief


class Batch(NamedTuple):
  names: list[str]
  image: np.ndarray  # uint8 [B, H, W, C]
  skipped: list[str]  # lines that say what could not be read, and why
  done: np.ndarray = np.zeros(0, np.uint8)  # what was done to the images: `formats.conversions`


class Incoming(NamedTuple):
  total: int  # images, the damaged ones too
  batches: Iterator[Batch]  # all but the last one with as many good images as asked for
  unused: str = ""  # a text that counts the files that are no images; empty if there are none


def open_images(text: str, shape: tuple[int, int, int], batch_size: int) -> Incoming:
  """Opens the images that the user names, in the order of their names.

  Args:
    text: path of a folder or an .npz.
    shape: [H, W, C] as the network's images are stored.
    batch_size: images per batch.

  Raises:
    UserError: if there are none, or an .npz has others.
  """
  place = sources.path_of("--images", text)
  if place.is_dir():
    tree = folders.walk(place, f"--images={text}")
    names = [n for n in tree.files if folders.is_image(n) or folders.is_unread_image(n)]
    unused = folders.unused(set(tree.files).union(tree.skipped) - set(names))
    names = sorted([*names, *tree.broken], key=folders.path_order)
    if not names:
      raise UserError(f"--images={text}: holds no images{unused and f'; {unused}'}")
    return Incoming(len(names), _folder(tree, names, shape, batch_size), unused)
  if place.suffix.lower() != ".npz":
    raise UserError(f"--images={text}: neither a folder nor an .npz that is there")
  image = _npz(place, shape)
  starts = range(0, len(image), batch_size)
  names = [str(i) for i in range(len(image))]
  parts = (slice(i, i + batch_size) for i in starts)
  return Incoming(len(image), (Batch(names[part], image[part], []) for part in parts))


def _folder(tree: folders.Tree, names, shape, batch_size) -> Iterator[Batch]:
  names_read, images, skipped, done = [], [], [], []
  for i, name in enumerate(names, 1):
    try:
      if name in tree.broken:
        raise UserError(tree.broken[name])
      image, bits = formats.read_photo(tree.path / name, shape)
      images.append(image)
      done.append(bits)
      names_read.append(name)
    except UserError as e:
      skipped.append(str(e))
    if len(images) == batch_size or i == len(names):
      image = np.stack(images) if images else np.zeros((0, *shape), np.uint8)
      yield Batch(names_read, image, skipped, np.array(done, np.uint8))
      names_read, images, skipped, done = [], [], [], []


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
