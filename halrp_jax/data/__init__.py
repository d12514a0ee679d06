"""The benchmarks by name, and what all of them share: fractions, validation split, order, hash.

A family's function `(config) -> tasks, partial` gives its tasks in the order of their ids, `train`
being the whole pool and `valid` empty, and whether data are missing. To add one: a file beside
this one and a line in `BENCHMARKS`.
"""

import hashlib
import math
from collections.abc import Callable

import jax
import numpy as np

from halrp_jax.data import cifar100, digits, orders
from halrp_jax.types import Benchmark, Split, Task, UserError

BENCHMARKS: dict[str, Callable] = {
  "cifar100_split": cifar100.load_split,
  "cifar100_superclass": cifar100.load_superclass,
  "digits": digits.load,
}


def load(config) -> Benchmark:
  """The benchmark a config names, split, in the order of training, images on the device.

  Raises:
    UserError: if data are missing, damaged or too few, or the order is none.
  """
  tasks, partial = BENCHMARKS[config.benchmark](config)
  order = orders.resolve(config.order, config.benchmark, len(tasks), config.protocol.order_source)
  tasks = [_hold_out(task, config) for task in tasks]
  split_hash = _hash(tasks)
  image = jax.device_put(tasks[0].train.image)  # one array for all splits of all tasks
  tasks = [_on_device(task, image) for task in tasks]
  return Benchmark(config.benchmark, tuple(tasks[i] for i in order), split_hash, partial)


def _hold_out(task: Task, config) -> Task:
  """Takes `train_fraction` of the pool and holds out the validation images (spec c).

  Keyed by seed and the task's own id: the same images in every order.
  """
  pool, fraction = task.train, config.protocol.validation_fraction
  num_pool = len(pool.index)
  num_used = math.ceil(config.train_fraction * num_pool)
  num_valid = math.floor(fraction * num_used)
  if num_used - num_valid < 1 or (fraction > 0 and num_valid < 1):
    raise UserError(
      f"train_fraction = {config.train_fraction} leaves task {task.name!r} {num_used - num_valid} "
      f"training and {num_valid} validation images of {num_pool}: take a larger fraction"
    )
  rows = np.random.default_rng((config.seed, task.id)).permutation(num_pool)[:num_used]

  def part(rows):
    return Split(pool.image, pool.index[rows], pool.label[rows])

  return task._replace(valid=part(rows[:num_valid]), train=part(rows[num_valid:]))


def _hash(tasks: list[Task]) -> str:
  digest = hashlib.sha256(np.ascontiguousarray(tasks[0].train.image))
  for task in tasks:
    for split in (task.train, task.valid, task.test):
      digest.update(np.asarray(split.index, np.int64).tobytes())
      digest.update(np.asarray(split.label, np.int64).tobytes())
    for leaf in jax.tree.leaves(task.inputs):
      digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()


def _on_device(task: Task, image: jax.Array) -> Task:
  def move(split):
    return Split(image, *(jax.device_put(np.asarray(x, np.int32)) for x in split[1:]))

  return task._replace(
    inputs=jax.device_put(task.inputs),
    train=move(task.train),
    valid=move(task.valid),
    test=move(task.test),
  )
