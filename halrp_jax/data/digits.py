"""Permuted digits: handwritten digits that are part of scikit-learn. Needs no files.

The data set has 1,797 images of 8 x 8 pixels (E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, 1998). Training and validation images are drawn from the first 1,297; the last 500 are
the test images. There are 10 tasks, and each permutes the pixels in a different way.
"""

from typing import Any

import numpy as np

from halrp_jax.data.tasks import ImageSet, Outline, TaskOutline, make_task
from halrp_jax.keys import Config
from halrp_jax.types import Inputs, Task

NUM_TASKS = 10
NUM_TRAIN = 1297


def outline(config: Config) -> Outline:
  """Describes permuted digits: 10 permutations of 8 x 8 pixels."""
  task = (10, NUM_TRAIN, 500)
  return Outline((8, 8, 1), tuple(TaskOutline(f"permutation {i}", *task) for i in range(10)))


def read(config: Config) -> list[Task]:
  """Reads the tasks. They do not depend on the config."""
  del config
  from sklearn.datasets import load_digits  # takes a second to import

  digits: Any = load_digits()  # a Bunch, whose attributes have no types
  image = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # [1797, 8, 8, 1]
  label = digits.target.astype(np.int32)
  data = ImageSet(image, label, NUM_TRAIN, tuple(str(n) for n in digits.target_names))
  pool = image[:NUM_TRAIN] / 255
  mean, std = (np.array([f(pool)], np.float32) for f in (np.mean, np.std))
  tasks = []
  for i in range(NUM_TASKS):
    permutation = np.random.default_rng(i).permutation(image[0].size).astype(np.int32)
    inputs = Inputs(mean, std, permutation)
    tasks.append(make_task(i, f"permutation {i}", data, range(10), inputs))
  return tasks
