"""What the families share: what a protocol asks for, arrays of images, tasks made of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from halrp_jax.types import Array, Inputs, Split, Task


class TaskOutline(NamedTuple):
  name: str
  num_classes: int
  num_train: int  # images in the pool that training and validation images come from
  num_test: int
  num_valid: int = 0  # of a validation set of its own, apart from the pool


class Outline(NamedTuple):
  """What a protocol asks for, known without the data. Tasks by id."""

  image_shape: tuple[int, int, int]  # of the network's input [H, W, C]
  tasks: tuple[TaskOutline, ...]


class ImageSet(NamedTuple):
  """The images of a data set, training images first."""

  image: Array  # uint8 [N, H, W, C]
  label: np.ndarray  # int [N]
  num_train: int
  class_names: tuple[str, ...]

  def rows(self, classes: Sequence[int], test: bool) -> np.ndarray:
    """Rows of the training or of the test images of some classes, in the order of the file."""
    is_test = np.arange(len(self.label)) >= self.num_train
    return np.flatnonzero(np.isin(self.label, classes) & (is_test == test))


def make_task(
  id: int, name: str, data: ImageSet, classes: Sequence[int], inputs: Inputs, **rows: np.ndarray
) -> Task:
  """A task of some classes; the label within it is the position of the class in `classes`.

  Args:
    id: the benchmark's number for the task.
    name: its name.
    data: the images.
    classes: labels of `data` that belong to the task, ascending.
    inputs: how its images become network inputs.
    **rows: train, valid, test: rows of `data`; all images of these classes, no validation set of
      its own, where not given. `test`: the data set itself has no test set for the task.
  """
  classes = np.asarray(classes)

  def split(rows):
    return Split(data.image, rows, np.searchsorted(classes, data.label[rows]))

  train, test = (rows.get(n, data.rows(classes, n == "test")) for n in ("train", "test"))
  names = tuple(data.class_names[c] for c in classes)
  valid = rows.get("valid", np.zeros(0, np.int64))
  own_test = "test" not in rows
  return Task(id, name, names, inputs, split(train), split(valid), split(test), own_test)


def join(sets: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """One array of several, all splits of a benchmark being index sets over one. -> all, offsets"""
  offsets = np.cumsum([0, *(len(x) for x in sets)])[:-1]
  return (sets[0] if len(sets) == 1 else np.concatenate(sets)), offsets


def grey_to_rgb(image: np.ndarray) -> np.ndarray:
  """[N, H, W] -> [N, H, W, 3]"""
  return np.repeat(image[..., None], 3, axis=3)
