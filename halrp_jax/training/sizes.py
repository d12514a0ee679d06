"""Counts of parameters."""

from typing import NamedTuple

import jax
import numpy as np
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
  """Returns the parameters of a whole network, the head at a task's own width."""
  count = count_rest(rest, kernels, num_classes)
  return sum(w.size for w in kernels.values()) + count.counted + count.biases


def count_leaves(tree: Params) -> int:
  """Returns how many numbers a pytree has."""
  return sum(x.size for x in jax.tree.leaves(tree))


def count_statistics(state) -> tuple[int, int]:
  """Counts BatchNorm's statistics: those that predictions use, those kept for training alone.

  Where all tasks have their own, the running ones they share serve training.
  """
  own = [p.stats for p in state.tasks]
  of_tasks, of_training = count_leaves(own), count_leaves(state.shared.get("stats", {}))
  return (of_tasks, of_training) if of_tasks else (of_training, 0)


def dense_size(base: int, counted: int, uncounted: int, training_only: int = 0) -> Size:
  """Returns the size of a model without zeros and masks.

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


# --- perturbations of shared kernels -----------------------------------------------------
# of task states with `perturbation`, `rest`, `stats`, and `rank` where U and V are padded


def low_rank_values(task) -> dict[str, np.ndarray]:
  """Returns all entries of U and V below the chosen rank, per layer; padding is no value."""
  values = {}
  for name, p in task.perturbation.items():
    columns = int(task.rank[name]) if hasattr(task, "rank") else p.U.shape[1]
    values[name] = np.concatenate([np.ravel(np.asarray(x)[:, :columns]) for x in (p.U, p.V)])
  return values


def dense_growth(state, tasks) -> float:
  """Returns what some tasks add to the base if zeros count too: the bound is on this."""
  dense = sum(_fixed_count(p) + sum(v.size for v in low_rank_values(p).values()) for p in tasks)
  return dense / _base_count(state)


def perturbed(state) -> Size:
  """Returns the size of a base and perturbations of it, in numbers.

  The paper counts neither the biases of later tasks nor BatchNorm's statistics.
  """
  base = _base_count(state)
  paper, dense, nonzero, mask_bits = base, base, base, 0
  for t, task in enumerate(state.tasks):
    uncounted = count_leaves(task.stats)
    if t:
      values = np.concatenate([*low_rank_values(task).values()])
      fixed, kept = _fixed_count(task), np.count_nonzero(values)
      paper += fixed + np.count_nonzero(np.abs(values) > 1e-8)
      dense += fixed + values.size
      nonzero += fixed + kept
      mask_bits += values.size if kept < values.size else 0
      uncounted += count_rest(task.rest, task.perturbation, int(task.num_classes)).biases
    dense += uncounted
    nonzero += uncounted
  return Size(base, dense, int(nonzero), int(mask_bits), 0, int(paper))


def _fixed_count(task) -> int:
  """Returns the values of a later task that the paper counts and pruning can't touch."""
  count = count_rest(task.rest, task.perturbation, int(task.num_classes)).counted
  for name, p in task.perturbation.items():
    count += p.R.size + p.S.size + (0 if p.sigma is None else int(task.rank[name]))
  return count


def _base_count(state) -> int:
  first = state.tasks[0]
  return network_count(state.shared["kernels"], first.rest, int(first.num_classes))
