"""Data sets of TensorFlow Datasets (TFDS), read without TensorFlow.

`tfds.builder(name).as_data_source` reads ArrayRecord files without TensorFlow. A data set that is
not prepared yet is prepared here if TensorFlow is installed (the extra [tfds]).
"""

import importlib.util
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from halrp_jax.data import formats
from halrp_jax.data.tasks import ImageSet
from halrp_jax.types import Framing, UserError, brief

_WHOLE = Framing()

_NAMES_IN_TFDS = {"svhn": "svhn_cropped"}  # where the names differ


def labelled(data_dir: str, name: str, shape: tuple[int, int, int]) -> ImageSet:
  """Reads a data set with the features image and label, whose images all have the same size.

  Args:
    data_dir: folder in which TFDS has prepared data sets; "" for TFDS's default.
    name: name of the data set in this package or in TFDS.
    shape: expected shape [H, W, C] of an image.

  Raises:
    UserError: if the data set can't be read or has images of another shape.
  """
  (x, y), (x_test, y_test), features = _read(data_dir, name, ("image", "label"))
  for image in (x, x_test):
    if image.shape[1:] != shape:
      raise UserError(
        f"TFDS set {name}: images are {image.shape[1:]}, expected {shape}; use data.source=original"
      )
  names = tuple(features["label"].names)
  return ImageSet(np.concatenate([x, x_test]), np.concatenate([y, y_test]), len(x), names)


def cifar100(data_dir: str) -> tuple[ImageSet, np.ndarray, tuple[str, ...]]:
  """Reads CIFAR-100.

  Args:
    data_dir: folder in which TFDS has prepared data sets; "" for TFDS's default.

  Returns:
    The images with their fine labels, the coarse labels [N], and the names of the superclasses.

  Raises:
    UserError: if the data set can't be read.
  """
  keys = ("image", "label", "coarse_label")
  (x, *y), (x_test, *y_test), features = _read(data_dir, "cifar100", keys)
  fine, coarse = (np.concatenate(pair) for pair in zip(y, y_test, strict=True))
  names = tuple(features["label"].names)
  data = ImageSet(np.concatenate([x, x_test]), fine, len(x), names)
  return data, coarse, tuple(features["coarse_label"].names)


def any_images(data_dir: str, name: str, size: int, framing: Framing = _WHOLE) -> ImageSet:
  """Reads any data set with the features image and label.

  Args:
    data_dir: folder in which TFDS has prepared data sets; "" for TFDS's default.
    name: name of the data set in TFDS.
    size: height and width to which images are resized; they get three channels.
    framing: which part of an image is used.

  Raises:
    UserError: if the data set can't be read or has not both features.
  """
  (x, y), (x_test, y_test), features = _read(data_dir, name, ("image", "label"), size, framing)
  names = tuple(features["label"].names)
  return ImageSet(np.concatenate([x, x_test]), np.concatenate([y, y_test]), len(x), names)


def _read(
  data_dir: str,
  name: str,
  keys: tuple[str, ...],
  size: int | None = None,
  framing: Framing = _WHOLE,
):
  """Reads the splits "train" and "test" of a data set; the first key is that of the images.

  Returns:
    Two lists of arrays, one array for each key, and the features by name.
  """
  import tensorflow_datasets as tfds  # takes seconds to import

  name = _NAMES_IN_TFDS.get(name, name)
  try:
    builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
  except Exception as e:  # TFDS raises many types of exceptions
    raise UserError(
      f"TFDS has no set {name!r} ({brief(e)}); see the list of data sets at "
      "https://www.tensorflow.org/datasets/catalog"
    ) from e
  _prepare(tfds, builder)
  features: Any = builder.info.features or {}
  if missing := [k for k in keys if k not in features]:
    raise UserError(
      f"TFDS set {name}: has no feature {missing[0]!r}; choose a set with image and label"
    )
  parts = [_arrays(builder, name, split, keys, size, framing) for split in ("train", "test")]
  return *parts, features


def _prepare(tfds, builder) -> None:
  """Prepares a data set unless it is prepared already or TensorFlow is not installed."""
  path = pathlib.Path(builder.data_dir)
  if path.exists() or importlib.util.find_spec("tensorflow") is None:
    return
  # Each set needs its own folder, because the archives of MNIST and FashionMNIST have equal names.
  config = tfds.download.DownloadConfig(extract_dir=str(path.parent / "extracted" / builder.name))
  try:
    builder.download_and_prepare(download_config=config)
  except Exception as e:  # the cause may be the network, the disk or TFDS
    raise UserError(
      f"TFDS set {builder.name} can't be prepared ({brief(e)}); try again, or prepare it elsewhere "
      "as array_record"
    ) from e


def _arrays(
  builder, name: str, split: str, keys: tuple[str, ...], size: int | None, framing: Framing
) -> list[np.ndarray]:
  """Reads one split of a prepared data set as an array for each key."""
  try:
    source = builder.as_data_source(split=split)
    examples = (source[i] for i in range(len(source)))
    rows = [[example[k] for k in keys] for example in examples]
  except Exception as e:  # readers may raise anything for a damaged file
    if not pathlib.Path(builder.data_dir).exists():
      raise UserError(
        f"TFDS set {name} is not prepared in {builder.data_dir} (data_dir); preparing needs "
        "TensorFlow: pip install 'halrp-jax[tfds]', or prepare it elsewhere as array_record"
      ) from e
    raise UserError(
      f"TFDS set {name}, split {split}: can't be read ({brief(e)}); prepare it again, or choose a "
      "set with the splits train and test"
    ) from e
  if not rows:
    raise UserError(f"TFDS set {name}: split {split} is empty; choose another set")
  images, *labels = zip(*rows, strict=True)
  images = [_sized(np.asarray(x), size, framing) for x in images]
  if len({x.shape for x in images}) > 1:
    raise UserError(f"TFDS set {name}: images differ in size; set data.image_size")
  return [np.stack(images), *(np.asarray(y, np.int64) for y in labels)]


def _sized(image: np.ndarray, size: int | None, framing: Framing) -> np.ndarray:
  """Resizes an image to uint8 [size, size, 3]; returns it unchanged if `size` is None."""
  if size is None:
    return image
  image = (image >> 8).astype(np.uint8) if image.dtype == np.uint16 else image
  picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  if picture.has_transparency_data:
    picture, _ = formats.on_white(picture)
  return formats.framed(picture.convert("RGB"), (size, size), framing)
