"""Building blocks of the benchmark families: outlines, sets of images, and tasks."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from halrp_jax.types import Inputs, Split, Task


class TaskOutline(NamedTuple):
  """Name and sizes of one task of a protocol."""

  name: str
  num_classes: int
  num_train: int  # images to draw training images from, and validation images if `num_valid` is 0
  num_test: int
  num_valid: int = 0  # images of a separate validation set


class Outline(NamedTuple):
  """The tasks of a protocol and their sizes, known without the data."""

  image_shape: tuple[int, int, int]  # shape [H, W, C] of the network's input
  tasks: tuple[TaskOutline, ...]  # in the order of their ids, 0, 1, 2 ...


class ImageSet(NamedTuple):
  """The images of a data set, training images first."""

  image: np.ndarray  # uint8 [N, H, W, C]
  label: np.ndarray  # int [N]
  num_train: int
  class_names: tuple[str, ...]

  def rows(self, classes: Sequence[int] | np.ndarray, test: bool) -> np.ndarray:
    """Returns the rows of the training or test images of some classes, in ascending order.

    Args:
      classes: labels.
      test: whether to return test images, not training images.
    """
    is_test = np.arange(len(self.label)) >= self.num_train
    return np.flatnonzero(np.isin(self.label, classes) & (is_test == test))


def make_task(
  id: int,
  name: str,
  data: ImageSet,
  classes: Sequence[int] | np.ndarray,
  inputs: Inputs,
  **rows: np.ndarray,
) -> Task:
  """Makes a task of some classes. A label within the task is the index of its class in `classes`.

  Args:
    id: the benchmark's number for the task.
    name: name of the task.
    data: the images.
    classes: labels of `data` that belong to the task, in ascending order.
    inputs: how images become network inputs.
    **rows: `train`, `valid` and `test`: rows of `data` in each split. By default `train` and `test`
      are all training and test images of these classes, and `valid` is empty. Rows for `test` mean
      that the data set itself does not define test images for the task.
  """
  labels = np.asarray(classes)

  def split(rows):
    return Split(data.image, rows, np.searchsorted(labels, data.label[rows]))

  train, test = (rows.get(n, data.rows(labels, n == "test")) for n in ("train", "test"))
  names = tuple(data.class_names[c] for c in labels)
  valid = rows.get("valid", np.zeros(0, np.int64))
  own_test = "test" not in rows
  return Task(id, name, names, inputs, split(train), split(valid), split(test), own_test)


def offsets_of(sets: Sequence[np.ndarray]) -> np.ndarray:
  """Returns the row at which each array begins when they are concatenated."""
  return np.cumsum([0, *(len(x) for x in sets)])[:-1]


def resizing(stored: tuple[int, int], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the weights that resize images: those of `Inputs.resize`.

  The interpolation is bicubic, with antialiasing where an axis becomes smaller, as Pillow's is.

  Args:
    stored: height H and width W of the stored images.
    size: height H' and width W' of the network's input.

  Returns:
    float32 [H', H] and [W', W].
  """

  def weights(n: int, m: int) -> np.ndarray:
    scale = max(n / m, 1.0)
    centre = (np.arange(m) + 0.5) * n / m - 0.5
    x = np.abs(np.arange(n)[None] - centre[:, None]) / scale
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    w = np.where(x < 1, near, np.where(x < 2, far, 0))  # Keys' kernel with a = -0.5
    return (w / w.sum(1, keepdims=True)).astype(np.float32)

  return weights(stored[0], size[0]), weights(stored[1], size[1])


def grey_to_rgb(image: np.ndarray) -> np.ndarray:
  """Repeats grey images in three channels: [N, H, W] -> [N, H, W, 3]."""
  return np.repeat(image[..., None], 3, axis=3)
