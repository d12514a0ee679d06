"""Permuted MNIST: P-MNIST of the paper, and PMNIST-20 of IRU.

P-MNIST follows the authors' code: images are resized to 32 x 32 and repeated in three channels,
and each task permutes all 3,072 values, across channels. The images are stored once, in one
channel; the permutation is an array that is applied inside jit. With `data.mnist_size` = 28 the
images keep their original size, and 784 values are permuted.

PMNIST-20 follows IRU's notebook: images of 28 x 28; task 0 is not permuted; each later task
shuffles the permutation of the task before it.

With `data.num_tasks` both have more tasks or fewer, which are permuted by the same rules.

References: Y. LeCun et al., "Gradient-based learning applied to document recognition", 1998;
I. Goodfellow et al., "An empirical investigation of catastrophic forgetting", 2013; R. Hyder et
al., "Incremental task learning with incremental rank updates", 2022, arXiv:2207.09074 (IRU).
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from halrp_jax.data import cache, mnist_family
from halrp_jax.data.tasks import ImageSet, Outline, TaskOutline, make_task
from halrp_jax.keys import Config
from halrp_jax.types import Inputs, Task

_MEAN, _STD = 0.1307, 0.3081
# The task order of the run in which the authors' code wrote its prepared data. The seed of a
# task's permutation depends on the position of the task in it.
_ORDER = (2, 8, 4, 9, 1, 6, 7, 3, 0, 5)


def outline(config: Config) -> Outline:
  """Describes P-MNIST: permutations of MNIST."""
  size = config.data.mnist_size
  shape = (32, 32, 3) if size == 32 else (size, size, 1)
  return Outline(shape, _outlines(config.data.num_tasks or 10))


def outline_20(config: Config) -> Outline:
  """Describes PMNIST-20: permutations of MNIST, 28 x 28."""
  return Outline((28, 28, 1), _outlines(config.data.num_tasks or 20))


def _outlines(count: int) -> tuple[TaskOutline, ...]:
  """Describes tasks of all images of MNIST."""
  return tuple(TaskOutline(f"permutation {i}", 10, 60_000, 10_000) for i in range(count))


def read(config: Config) -> list[Task]:
  """Reads the tasks of P-MNIST. Errors as in `mnist_family.read`."""
  size = config.data.mnist_size
  count, data = config.data.num_tasks or 10, mnist_family.read(config, "mnist")
  if size == 32:
    image = _resized(data.image, config.data.cache)
    return _tasks(data._replace(image=image), [_joint_permutation(i) for i in range(count)], 3)
  draws = (np.random.RandomState(_seed(i)).permutation(size**2) for i in range(count))
  return _tasks(data, [*draws], 1)


def read_20(config: Config) -> list[Task]:
  """Reads the tasks of PMNIST-20. Errors as in `mnist_family.read`."""
  values, permutations = np.arange(28 * 28), []
  for i in range(config.data.num_tasks or 20):
    if i:
      np.random.RandomState(100 * i).shuffle(values)
    permutations.append(values.copy())
  return _tasks(mnist_family.read(config, "mnist"), permutations, 1)


def _tasks(data: ImageSet, permutations: Sequence[np.ndarray], channels: int) -> list[Task]:
  """Makes a task of each permutation.

  Args:
    data: the images.
    permutations: one array per task: the row of the flattened stored image of each input value.
    channels: number of channels of the network's input.
  """
  mean, std = (np.full(channels, x, np.float32) for x in (_MEAN, _STD))
  return [
    make_task(i, f"permutation {i}", data, range(10), Inputs(mean, std, np.asarray(p, np.int32)))
    for i, p in enumerate(permutations)
  ]


def _seed(i: int) -> int:
  """Returns the seed of the permutation of task i; tasks beyond `_ORDER` have the position i."""
  return 100 * i + (_ORDER.index(i) if i < len(_ORDER) else i)


def _joint_permutation(i: int) -> np.ndarray:
  """Returns the permutation of task i, from 1,024 stored values to 3,072 input values.

  The authors' code permutes values in the order channel, row, column. All channels of an image
  are equal, so a value of any channel is read from the only stored channel.

  Returns:
    For each value of the input [32, 32, 3], the row in the flattened stored image. [3072]
  """
  permutation = np.random.RandomState(_seed(i)).permutation(3 * 32 * 32)
  grey = permutation % (32 * 32)
  return grey.reshape(3, 32, 32).transpose(1, 2, 0).reshape(-1)


def _resized(image: np.ndarray, setting: str) -> np.ndarray:
  """Resizes images with Pillow's bilinear filter: [N, 28, 28, 1] -> [N, 32, 32, 1].

  Args:
    image: the original images.
    setting: the config key `data.cache`.
  """

  def decode(out):
    for i, x in enumerate(image[..., 0]):
      out[i, :, :, 0] = np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BILINEAR))

  shape = (len(image), 32, 32, 1)
  return cache.images(setting, f"mnist32-{cache.digest(image)}", shape, decode)
