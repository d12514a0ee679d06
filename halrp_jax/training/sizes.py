"""Counts of parameters."""

from typing import NamedTuple

import jax
from flax import traverse_util

from halrp_jax.types import Params, Size
from halrp_jax.weights import trees


class RestCount(NamedTuple):
  counted: int  # BatchNorm's scale and bias, and the head
  biases: int  # of the layers with a kernel (BatchNorm may keep them): the paper leaves them out


def count_rest(rest: Params, kernels: Params, num_classes: int) -> RestCount:
  """Counts everything but the kernels of the features; the head at a task's own width."""
  flat = traverse_util.flatten_dict(rest, sep="/")
  biases = sum(x.size for path, x in flat.items() if trees.is_bias(path, kernels))
  head = sum(x.size // x.shape[-1] * num_classes for x in rest[trees.HEAD].values())
  others = sum(x.size for path, x in flat.items() if not path.startswith(f"{trees.HEAD}/"))
  return RestCount(others - biases + head, biases)


def network_count(kernels: Params, rest: Params, num_classes: int) -> int:
  """Parameters of a whole network, the head at a task's own width."""
  count = count_rest(rest, kernels, num_classes)
  return sum(w.size for w in kernels.values()) + count.counted + count.biases


def count_leaves(tree: Params) -> int:
  """How many numbers a pytree has."""
  return sum(x.size for x in jax.tree.leaves(tree))


def count_statistics(state) -> tuple[int, int]:
  """Counts BatchNorm's statistics: those that predictions use, those kept for training alone.

  Where all tasks have their own, the running ones they share serve training.
  """
  own = [p.stats for p in state.tasks]
  of_tasks, of_training = count_leaves(own), count_leaves(state.shared.get("stats", {}))
  return (of_tasks, of_training) if of_tasks else (of_training, 0)


def dense_size(base: int, counted: int, uncounted: int, training_only: int = 0) -> Size:
  """Size of a model without zeros and masks.

  Args:
    base: parameters of the network of the first task.
    counted: numbers that later tasks add and the paper counts (spec a.9).
    uncounted: those it leaves out: biases of later tasks, BatchNorm's statistics of all.
    training_only: numbers kept for training alone.
  """
  dense = base + counted + uncounted
  return Size(base, dense, dense, 0, training_only, base + counted)


def whole_networks(state) -> Size:
  """Returns the size where every task has a network of its own, `params`."""
  counts = [network_count(*trees.split(p.params), int(p.num_classes)) for p in state.tasks]
  return dense_size(counts[0], sum(counts[1:]), count_leaves([p.stats for p in state.tasks]))
