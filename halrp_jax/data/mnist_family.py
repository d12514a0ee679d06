"""Reading of MNIST and FashionMNIST, whose IDX files may be gzipped or not."""

import numpy as np

from halrp_jax.data import formats, sources
from halrp_jax.data.tasks import ImageSet
from halrp_jax.keys import Config
from halrp_jax.types import UserError

_FILES = (
  ("train-images-idx3-ubyte", 3),
  ("train-labels-idx1-ubyte", 1),
  ("t10k-images-idx3-ubyte", 3),
  ("t10k-labels-idx1-ubyte", 1),
)


def read(config: Config, name: str) -> ImageSet:
  """Reads MNIST or a data set of the same format.

  Args:
    config: has `data_dir` and `data.source`.
    name: "mnist" or "fashion_mnist".

  Returns:
    The images as uint8 [N, 28, 28, 1], with labels from 0 to 9.

  Raises:
    sources.Missing: if the files are not found.
    UserError: if a file is damaged.
  """
  if config.data.source == "tfds":
    from halrp_jax.data import prepared

    return prepared.labelled(config.data_dir, name, (28, 28, 1))
  files = sources.find(config.data_dir, name)
  arrays = []
  for file, dimensions in _FILES:
    file = file if file in files.names else f"{file}.gz"
    (contents,) = files.read(file)
    arrays.append(formats.idx(contents, f"{files.path}: {file}", dimensions))
  x, y, x_test, y_test = arrays
  label = np.concatenate([y, y_test]).astype(np.int64)
  again = "delete the files and download them again"
  for images, labels, part in ((x, y, "training"), (x_test, y_test, "test")):
    if images.shape[1:] != (28, 28):
      size = " x ".join(map(str, images.shape[1:]))
      raise UserError(f"{files.path}: {part} images are {size}, expected 28 x 28; {again}")
    if len(images) != len(labels):
      counts = f"{len(labels)} labels for {len(images)} {part} images"
      raise UserError(f"{files.path}: {counts}; {again}")
  if len(label) and label.max() > 9:
    raise UserError(f"{files.path}: a label is {label.max()}, expected 0 to 9; {again}")
  image = np.concatenate([x, x_test])[..., None]
  return ImageSet(image, label, len(x), tuple("0123456789"))
