"""Permuted digits: the real handwritten digits that ship with scikit-learn. Needs no files.

1,797 images of 8 x 8 (E. Alpaydin and C. Kaynak, UCI 1998): the first 1,297 are the training pool,
the last 500 the test set. Ten tasks; each permutes the pixels its own way.
"""

import numpy as np

from halrp_jax.data.tasks import ImageSet, Outline, TaskOutline, make_task
from halrp_jax.keys import Config
from halrp_jax.types import Inputs, Task

NUM_TASKS = 10
NUM_TRAIN = 1297


def outline(config: Config) -> Outline:
  """Permuted digits: 10 permutations of 8 x 8 digits; needs no files."""
  task = (10, NUM_TRAIN, 500)
  return Outline((8, 8, 1), tuple(TaskOutline(f"permutation {i}", *task) for i in range(10)))


def read(config: Config) -> list[Task]:
  del config  # nothing here can be chosen
  from sklearn.datasets import load_digits  # a second to import, for this benchmark only

  digits = load_digits()
  image = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # [1797, 8, 8, 1]
  label = digits.target.astype(np.int32)
  data = ImageSet(image, label, NUM_TRAIN, tuple(str(n) for n in digits.target_names))
  pool = image[:NUM_TRAIN] / 255
  mean, std = (np.float32([f(pool)]) for f in (np.mean, np.std))
  tasks = []
  for i in range(NUM_TASKS):
    permutation = np.random.default_rng(i).permutation(image[0].size).astype(np.int32)
    inputs = Inputs(mean, std, permutation)
    tasks.append(make_task(i, f"permutation {i}", data, range(10), inputs))
  return tasks
