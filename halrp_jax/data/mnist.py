"""Permuted MNIST as the paper has it (P-MNIST), and as IRU has it (PMNIST-20).

P-MNIST (spec c): images resized to 32 x 32 and repeated in three channels; one permutation of all
3,072 values per task, channels mixed. A permutation is a leaf that is applied inside jit: the
images are stored once, in one channel. `data.mnist_size` = 28 keeps the original images (784
values).
PMNIST-20: 28 x 28, task 0 unpermuted, the others by shuffles that add up (IRU's notebook).

References: Y. LeCun et al., "Gradient-based learning applied to document recognition", 1998;
I. Goodfellow et al., "An empirical investigation of catastrophic forgetting", 2013.
"""

import numpy as np
from PIL import Image

from halrp_jax.data import cache, mnist_family
from halrp_jax.data.tasks import ImageSet, Outline, TaskOutline, make_task
from halrp_jax.keys import Config
from halrp_jax.types import Inputs, Task

_MEAN, _STD = 0.1307, 0.3081
# position of every task in the order in which the authors' program wrote its cache (spec c)
_WRITTEN = (2, 8, 4, 9, 1, 6, 7, 3, 0, 5)


def outline(config: Config) -> Outline:
  """P-MNIST: 10 permutations of MNIST, 32 x 32 x 3."""
  size = config.data.mnist_size
  shape = (32, 32, 3) if size == 32 else (size, size, 1)
  return Outline(shape, tuple(_outline(f"permutation {i}") for i in range(10)))


def outline_20(config: Config) -> Outline:
  """PMNIST-20: 20 permutations of MNIST, 28 x 28 (IRU's setting)."""
  return Outline((28, 28, 1), tuple(_outline(f"permutation {i}") for i in range(20)))


def _outline(name: str) -> TaskOutline:
  return TaskOutline(name, 10, 60_000, 10_000)


def read(config: Config) -> list[Task]:
  size = config.data.mnist_size
  data = mnist_family.read(config, "mnist")
  if size == 32:
    image = _resized(data.image, config.data.cache)
    return _tasks(data._replace(image=image), [_joint_permutation(i) for i in range(10)], 3)
  seeds = [100 * i + _WRITTEN.index(i) for i in range(10)]
  return _tasks(data, [np.random.RandomState(s).permutation(size**2) for s in seeds], 1)


def read_20(config: Config) -> list[Task]:
  values, permutations = np.arange(28 * 28), []
  for i in range(20):
    if i:
      np.random.RandomState(100 * i).shuffle(values)
    permutations.append(values.copy())
  return _tasks(mnist_family.read(config, "mnist"), permutations, 1)


def _tasks(data: ImageSet, permutations, channels: int) -> list[Task]:
  mean, std = (np.full(channels, x, np.float32) for x in (_MEAN, _STD))
  return [
    make_task(i, f"permutation {i}", data, range(10), Inputs(mean, std, np.asarray(p, np.int32)))
    for i, p in enumerate(permutations)
  ]


def _joint_permutation(i: int) -> np.ndarray:
  """Which of the 1,024 stored values each of the 3,072 input values [32, 32, 3] of task i is.

  The authors permute values in the order channel, row, column; channels are equal copies.
  """
  permutation = np.random.RandomState(100 * i + _WRITTEN.index(i)).permutation(3 * 32 * 32)
  grey = permutation % (32 * 32)
  return grey.reshape(3, 32, 32).transpose(1, 2, 0).reshape(-1)


def _resized(image: np.ndarray, setting: str) -> np.ndarray:
  """[N, 28, 28, 1] -> [N, 32, 32, 1], bilinear as Pillow does it"""

  def decode(out):
    for i, x in enumerate(image[..., 0]):
      out[i, :, :, 0] = np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BILINEAR))

  shape = (len(image), 32, 32, 1)
  return cache.images(setting, f"mnist32-{cache.digest(image)}", shape, decode)
