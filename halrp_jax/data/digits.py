"""Permuted digits: handwritten digits that are part of scikit-learn. Needs no files.

The data set has 1,797 images of 8 x 8 pixels (E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, 1998). Training and validation images are drawn from the first 1,297; the last 500 are
the test images. There are 10 tasks, or `data.num_tasks`, and each permutes the pixels in a
different way.
"""

import importlib.metadata
import zlib

import numpy as np

from halrp_jax.data.tasks import ImageSet, Outline, TaskOutline, make_task
from halrp_jax.keys import Config
from halrp_jax.types import Inputs, Task, UserError

NUM_TASKS = 10
NUM_TRAIN = 1297


def outline(config: Config) -> Outline:
  """Describes permuted digits: permutations of 8 x 8 pixels."""
  task, count = (10, NUM_TRAIN, 500), config.data.num_tasks or NUM_TASKS
  return Outline((8, 8, 1), tuple(TaskOutline(f"permutation {i}", *task) for i in range(count)))


def read(config: Config) -> list[Task]:
  """Reads the tasks."""
  rows = _read_rows()
  image = np.round(rows[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
  data = ImageSet(image, rows[:, -1].astype(np.int32), NUM_TRAIN, tuple("0123456789"))
  pool = image[:NUM_TRAIN] / 255
  mean, std = (np.array([f(pool)], np.float32) for f in (np.mean, np.std))
  tasks = []
  for i in range(config.data.num_tasks or NUM_TASKS):
    permutation = np.random.default_rng(i).permutation(image[0].size).astype(np.int32)
    inputs = Inputs(mean, std, permutation)
    tasks.append(make_task(i, f"permutation {i}", data, range(10), inputs))
  return tasks


def _read_rows() -> np.ndarray:
  """Returns [1797, 65]: the 64 pixels of an image, 0 to 16, then its label.

  Reads the file of scikit-learn, whose import would take a second.

  Raises:
    UserError: if it can't be read.
  """
  try:
    files = importlib.metadata.distribution("scikit-learn")
    path = str(files.locate_file("sklearn/datasets/data/digits.csv.gz"))
    return np.loadtxt(path, delimiter=",").reshape(1797, 65)
  except (ImportError, OSError, EOFError, ValueError, zlib.error) as e:
    raise UserError(f"the digits of scikit-learn can't be read ({e}); install it again") from e
