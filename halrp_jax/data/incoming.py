"""Images without labels that a trained network is to classify.

They are the images of a folder, or the array `image` of an .npz file. Images of a folder and of its
subfolders are decoded and resized as in custom.py. Images of an .npz file must have the size of the
network's input.
"""

import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from halrp_jax.data import folders, formats, sources
from halrp_jax.types import Framing, UserError, brief

_WHOLE = Framing()


class Batch(NamedTuple):
  """A batch of images and their names."""

  names: list[str]
  image: np.ndarray  # uint8 [B, H, W, C]
  skipped: list[str]  # for each file that could not be read, a line that says why
  done: np.ndarray = np.zeros(0, np.uint8)  # [B] conversions as bits, for `formats.conversions`


class Incoming(NamedTuple):
  """The images of a folder or an .npz file."""

  total: int  # number of images, including damaged ones
  batches: Iterator[Batch]  # all but the last have `batch_size` readable images
  unused: str = ""  # one line about files that are not images; empty if there are none


def open_images(
  text: str, shape: tuple[int, int, int], batch_size: int, framing: Framing = _WHOLE
) -> Incoming:
  """Opens images, which are then read batch by batch, in the order of their names.

  Args:
    text: path of a folder or of an .npz file, given as --images.
    shape: [H, W, C] of the network's stored images.
    batch_size: number of images in a batch.
    framing: which part of the images of a folder is used.

  Raises:
    UserError: if there are no images, or those of an .npz file have another shape or type.
  """
  path = sources.path_of("--images", text)
  if path.is_dir():
    tree = folders.walk(path, f"--images={text}")
    names = [n for n in tree.files if folders.is_image(n) or folders.is_unread_image(n)]
    unused = folders.unused(set(tree.files).union(tree.skipped) - set(names))
    names = sorted([*names, *tree.broken], key=folders.path_order)
    if not names:
      raise UserError(f"--images={text}: contains no images{unused and f'; {unused}'}")
    return Incoming(len(names), _folder_batches(tree, names, shape, batch_size, framing), unused)
  if path.suffix.lower() != ".npz":
    raise UserError(f"--images={text}: expected an existing folder or .npz file")
  image = _read_npz(path, shape)
  starts = range(0, len(image), batch_size)
  names = [str(i) for i in range(len(image))]
  parts = (slice(i, i + batch_size) for i in starts)
  return Incoming(len(image), (Batch(names[part], image[part], []) for part in parts))


def _folder_batches(
  tree: folders.Tree,
  names: list[str],
  shape: tuple[int, int, int],
  batch_size: int,
  framing: Framing,
) -> Iterator[Batch]:
  """Yields the images of a folder in batches."""
  names_read, images, skipped, done = [], [], [], []
  for i, name in enumerate(names, 1):
    try:
      if name in tree.broken:
        raise UserError(tree.broken[name])
      image, bits = formats.read_photo(tree.path / name, shape, framing)
      images.append(image)
      done.append(bits)
      names_read.append(name)
    except UserError as e:
      skipped.append(str(e))
    if len(images) == batch_size or i == len(names):
      image = np.stack(images) if images else np.zeros((0, *shape), np.uint8)
      yield Batch(names_read, image, skipped, np.array(done, np.uint8))
      names_read, images, skipped, done = [], [], [], []


def _read_npz(path: pathlib.Path, shape: tuple[int, int, int]) -> np.ndarray:
  """Reads the array `image` of an .npz file as uint8 [N, H, W, C]."""
  try:
    with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
      image = archive["image"] if "image" in archive.files else None
  except Exception as e:  # zipfile, zlib and numpy raise many types of exceptions
    raise UserError(f"{path}: can't be read ({brief(e)}); write it with numpy.savez") from e
  expected = " x ".join(map(str, shape))
  if image is None:
    raise UserError(f"{path}: contains no array 'image'; expected uint8 [N, {expected}]")
  grey = image.ndim == 3
  found = (*image.shape[1:], 1) if grey else image.shape[1:]
  if image.dtype != np.uint8 or found not in (shape, (*shape[:2], 1)) or not len(image):
    raise UserError(
      f"{path}: image is {image.dtype} {image.shape}, expected uint8 [N, {expected}], N > 0"
    )
  image = image.reshape(len(image), *found)
  return np.broadcast_to(image, (len(image), *shape))
