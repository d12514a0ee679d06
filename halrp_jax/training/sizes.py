"""Sizes of models: counts of parameters and of the other numbers that a method stores."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util

from halrp_jax.types import Params, Size, State, UserError
from halrp_jax.weights import lowrank, trees

_WORD = 4  # bytes of a number, a float32


class RestCount(NamedTuple):
  """Number of parameters without the kernels of all layers except the head."""

  counted: int  # BatchNorm's scale and bias, and the head
  biases: int  # of the layers with a kernel, wherever they are stored; the paper leaves them out


class Owned(NamedTuple):
  """What a later task has for itself beside U and V."""

  private: str = "all"  # of the parameters without kernels: "all", "norm" (and head) or "head"
  scales: bool = True  # R and S


EVERYTHING = Owned()


def count_rest(rest: Params, kernels: Mapping[str, object], num_classes: int) -> RestCount:
  """Counts parameters other than kernels.

  Args:
    rest: all parameters of a network except the kernels.
    kernels: anything by the paths of the layers that the kernels are from.
    num_classes: number of classes of the task; outputs of the head beyond them are not counted.
  """
  flat: Params = traverse_util.flatten_dict(rest, sep="/")
  biases = sum(x.size for path, x in flat.items() if trees.is_bias(path, kernels))
  head = sum(x.size // x.shape[-1] * num_classes for x in rest[trees.HEAD].values())
  others = sum(x.size for path, x in flat.items() if not path.startswith(f"{trees.HEAD}/"))
  return RestCount(others - biases + head, biases)


def network_count(
  kernels: Mapping[str, jax.Array | jax.ShapeDtypeStruct], rest: Params, num_classes: int
) -> int:
  """Counts the parameters of a whole network.

  Args:
    kernels: kernels of all layers except the head, by path.
    rest: the other parameters.
    num_classes: number of classes of the task; outputs of the head beyond them are not counted.
  """
  count = count_rest(rest, kernels, num_classes)
  return sum(w.size for w in kernels.values()) + count.counted + count.biases


def count_leaves(tree: Params) -> int:
  """Counts the numbers in a pytree."""
  return sum(x.size for x in jax.tree.leaves(tree))


def count_task_statistics(state: State) -> int:
  """Counts the BatchNorm statistics of the tasks.

  Statistics that are those of the first task, as with `method.batch_norm` "frozen", need not be
  stored again and are counted once.
  """
  first, *later = (p.stats for p in state.tasks)
  return count_leaves([first, *(stats for stats in later if not _equal(stats, first))])


def _equal(stats: Params, other: Params) -> bool:
  """Returns whether two trees of BatchNorm statistics have equal numbers."""
  leaves, others = jax.tree.leaves(stats), jax.tree.leaves(other)
  return len(leaves) == len(others) and all(map(np.array_equal, leaves, others))


def count_statistics(state: State) -> tuple[int, int]:
  """Counts BatchNorm's statistics.

  If the tasks have statistics of their own, predictions use these, and the shared running ones are
  needed for training alone.

  Returns:
    The number of statistics that predictions use, and of those for training alone.
  """
  of_tasks = count_task_statistics(state)
  shared = count_leaves(state.shared.get("stats", {}))
  return (of_tasks, shared) if of_tasks else (shared, 0)


def dense_size(base: int, counted: int, uncounted: int, training_only: int = 0) -> Size:
  """Returns the size of a model without zeros and masks.

  Args:
    base: parameters of the network of the first task.
    counted: numbers that later tasks add and that the authors' code counts for the paper.
    uncounted: numbers that it leaves out: biases of later tasks, BatchNorm's statistics of all.
    training_only: numbers that are stored for training alone.
  """
  dense = base + counted + uncounted
  return Size(base, dense, dense, 0, training_only, base + counted)


def whole_networks(state: State) -> Size:
  """Returns the size of a method whose task states each have a whole network, `params`."""
  counts = [network_count(*trees.split(p.params), int(p.num_classes)) for p in state.tasks]
  return dense_size(counts[0], sum(counts[1:]), count_task_statistics(state))


def allocate_budget(
  priorities: list[np.ndarray],
  costs: Sequence[float],
  max_numbers: float,
  share: float,
  upper_rank: int = 0,
) -> list[int]:
  """Returns ranks for `method.budget` (`lowrank.allocate_budget`).

  Args:
    priorities: by layer, of its first, second, ... column.
    costs: numbers that one column of a layer adds.
    max_numbers: what all layers together may have.
    share: `method.budget`, which `max_numbers` is as a share of the base.
    upper_rank: largest rank of a layer, 0 for no limit.

  Raises:
    UserError: if not a single column fits.
  """
  ranks = lowrank.allocate_budget(priorities, costs, max_numbers, upper_rank)
  if not any(ranks):
    least = share * min(costs, default=max_numbers) / max_numbers
    raise UserError(
      f"method.budget = {share}: leaves no room for one column of U and V in any layer; set it to "
      f"at least {least:.2g}, or to 0 for no limit"
    )
  return ranks


# --- perturbations of shared kernels -----------------------------------------------------
# Task states have `perturbation`, `rest`, `stats`, and `rank` if U and V are padded.


def low_rank_values(task: Params) -> dict[str, np.ndarray]:
  """Returns by layer path all entries of U and V without their padding, as an array [n].

  They are float32, or int8 (`lowrank.quantized`).

  Args:
    task: a task state.
  """
  values = {}
  for name, p in task.perturbation.items():
    columns = int(task.rank[name]) if hasattr(task, "rank") else p.U.shape[1]
    values[name] = np.concatenate([np.ravel(np.asarray(x)[:, :columns]) for x in (p.U, p.V)])
  return values


def dense_growth(state: State, tasks: Sequence[Params], owned: Owned = EVERYTHING) -> float:
  """Returns how much some tasks add to the model if zeros count too, as a fraction of the base.

  `method.prune_bound` limits this growth.

  Args:
    state: the method state.
    tasks: states of the tasks, not the first.
    owned: what a task has for itself.
  """
  dense = sum(
    _fixed_count(p, owned) + sum(v.size for v in low_rank_values(p).values()) for p in tasks
  )
  return dense / base_count(state)


def perturbed(state: State, owned: Owned = EVERYTHING) -> Size:
  """Returns the size of a method whose task states have perturbations of the shared kernels.

  As in the authors' code, `Size.paper` has neither the biases of later tasks nor BatchNorm's
  statistics, and of U and V only entries larger than 1e-8. An int8 is a fourth of a number.

  Args:
    state: the method state.
    owned: what a task has for itself; the rest is the base's and not counted again.
  """
  return total(perturbed_task(state, t, owned) for t in range(len(state.tasks)))


def total(parts: Iterable[Size]) -> Size:
  """Returns the sum of what the tasks have."""
  return Size(*map(sum, zip(*parts, strict=True)))


def perturbed_task(state: State, t: int, owned: Owned = EVERYTHING) -> Size:
  """Returns what one task has of the size that `perturbed` returns; the first has the base.

  Args:
    state: the method state.
    t: position of the task.
    owned: as for `perturbed`.
  """
  task, first = state.tasks[t], state.tasks[0]
  base = base_count(state) if t == 0 else 0
  counted, stats = base, 0 if t and _equal(task.stats, first.stats) else count_leaves(task.stats)
  all_perturbed = "rest" in state.shared
  if t == 0 and all_perturbed:  # its own head is a part of the base
    counted -= count_rest({trees.HEAD: task.rest[trees.HEAD]}, {}, int(task.num_classes)).counted
  if t == 0 and not all_perturbed:
    return Size(base, counted + stats, counted + stats, 0, 0, counted)
  values = np.concatenate([*low_rank_values(task).values()])
  counted += _fixed_count(task, owned)
  fixed = counted + stats + _own_rest(task, owned).biases
  if values.dtype == np.int8:  # none of them is left out, and each is a part of a number
    words = -(-values.nbytes // _WORD)
    return Size(base, fixed + words, fixed + words, 0, 0, counted + words)
  kept = int(np.count_nonzero(values))
  return Size(
    base=base,
    dense=fixed + values.size,
    nonzero=fixed + kept,
    mask_bits=values.size if kept < values.size else 0,
    training_only=0,
    paper=counted + int(np.count_nonzero(np.abs(values) > 1e-8)),
  )


def _fixed_count(task: Params, owned: Owned) -> int:
  """Counts the numbers of a later task that the paper counts and that are never pruned."""
  count = _own_rest(task, owned).counted
  for name, p in task.perturbation.items():
    count += p.R.size + p.S.size if owned.scales else 0
    count += 0 if p.sigma is None else int(task.rank[name])
  return count


def _own_rest(task: Params, owned: Owned) -> RestCount:
  """Counts the parameters other than kernels that a later task has for itself."""
  rest = task.rest
  if owned.private != "all":
    _, rest = trees.split_private(rest, owned.private == "norm")
  return count_rest(rest, task.perturbation, int(task.num_classes))


def base_count(state: State) -> int:
  """Counts the parameters of the base with the head of the first task."""
  rest = state.shared.get("rest", state.tasks[0].rest)
  return network_count(state.shared["kernels"], rest, _first_classes(state))


def _first_classes(state: State) -> int:
  """Returns the number of classes of the first task."""
  return int(state.tasks[0].num_classes)
