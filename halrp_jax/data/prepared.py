"""Data sets that TFDS has prepared, read without TensorFlow.

`tfds.builder(name).as_data_source` reads ArrayRecord files without TensorFlow; preparing them
needs it (the extra [tfds]) and is done here where it is installed.
"""

import importlib.util
import pathlib

import numpy as np
from PIL import Image

from halrp_jax.data import formats
from halrp_jax.data.tasks import ImageSet
from halrp_jax.types import UserError, brief

_TFDS = {  # our names -> theirs, where they differ
  "svhn": "svhn_cropped",
}


def labelled(data_dir: str, name: str, shape: tuple[int, int, int]) -> ImageSet:
  """A set of images of one size with a label. image [N, *shape]"""
  (x, y), (x_test, y_test), info = _read(data_dir, name, ("image", "label"))
  for image in (x, x_test):
    if image.shape[1:] != shape:
      raise UserError(f"TFDS set {name}: images are {image.shape[1:]}, expected {shape}")
  names = tuple(info.features["label"].names)
  return ImageSet(np.concatenate([x, x_test]), np.concatenate([y, y_test]), len(x), names)


def cifar100(data_dir: str) -> tuple[ImageSet, np.ndarray, tuple[str, ...]]:
  """CIFAR-100: images with fine labels, coarse labels [N], names of the superclasses."""
  keys = ("image", "label", "coarse_label")
  (x, *y), (x_test, *y_test), info = _read(data_dir, "cifar100", keys)
  fine, coarse = (np.concatenate(pair) for pair in zip(y, y_test, strict=True))
  names = tuple(info.features["label"].names)
  data = ImageSet(np.concatenate([x, x_test]), fine, len(x), names)
  return data, coarse, tuple(info.features["coarse_label"].names)


def any_images(data_dir: str, name: str, size: int) -> ImageSet:
  """Any set with the features image and label, resized to [size, size, 3]."""
  (x, y), (x_test, y_test), info = _read(data_dir, name, ("image", "label"), size)
  names = tuple(info.features["label"].names)
  return ImageSet(np.concatenate([x, x_test]), np.concatenate([y, y_test]), len(x), names)


def _read(data_dir: str, name: str, keys, size: int | None = None):
  """-> arrays of the training split, arrays of the test split, the builder's info"""
  import tensorflow_datasets as tfds  # seconds to import, needed for this alone

  name = _TFDS.get(name, name)
  try:
    builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
  except Exception as e:  # TFDS raises many kinds
    raise UserError(f"TFDS has no set {name!r} ({brief(e)})") from e
  _prepare(tfds, builder)
  info = builder.info
  if lacking := [k for k in keys if k not in (info.features or {})]:
    raise UserError(f"TFDS set {name}: has no feature {lacking[0]!r}; it needs image and label")
  parts = [_arrays(builder, name, split, keys, size) for split in ("train", "test")]
  return *parts, info


def _prepare(tfds, builder) -> None:
  """Prepares a set that isn't, where TensorFlow can."""
  place = pathlib.Path(builder.data_dir)
  if place.exists() or importlib.util.find_spec("tensorflow") is None:
    return
  # A folder of its own: sharing one mixes MNIST and FashionMNIST, whose archives have equal names.
  config = tfds.download.DownloadConfig(extract_dir=str(place.parent / "extracted" / builder.name))
  try:
    builder.download_and_prepare(download_config=config)
  except Exception as e:  # the network, the disk, TFDS
    raise UserError(f"TFDS set {builder.name} can't be prepared ({brief(e)})") from e


def _arrays(builder, name: str, split: str, keys, size) -> list[np.ndarray]:
  try:
    source = builder.as_data_source(split=split)
    examples = (source[i] for i in range(len(source)))
    rows = [[example[k] for k in keys] for example in examples]
  except Exception as e:  # a damaged file makes its reader raise almost anything
    if not pathlib.Path(builder.data_dir).exists():
      raise UserError(
        f"TFDS set {name} is not prepared in {builder.data_dir} (data_dir); preparing needs "
        "TensorFlow: pip install 'halrp-jax[tfds]', or prepare it elsewhere as array_record"
      ) from e
    raise UserError(f"TFDS set {name}, split {split}: can't be read ({brief(e)})") from e
  if not rows:
    raise UserError(f"TFDS set {name}: split {split} is empty")
  images, *labels = zip(*rows, strict=True)
  images = [_sized(np.asarray(x), size) for x in images]
  if len({x.shape for x in images}) > 1:
    raise UserError(f"TFDS set {name}: images differ in size; set data.image_size")
  return [np.stack(images), *(np.asarray(y, np.int64) for y in labels)]


def _sized(image: np.ndarray, size: int | None) -> np.ndarray:
  """uint8 [H, W, C], or [size, size, 3]"""
  if size is None:
    return image
  image = (image >> 8).astype(np.uint8) if image.dtype == np.uint16 else image
  picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  if picture.has_transparency_data:
    picture, _ = formats.on_white(picture)
  picture = picture.convert("RGB")
  return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))
