"""Task orders of the paper (Appendix F.1), and those of the authors' code where they differ."""

import random

import numpy as np

from halrp_jax.types import UserError


def _numpy(num_tasks: int) -> dict[str, tuple[int, ...]]:
  """Returns NumPy's random permutations for the seeds 0 to 4, as in most lists of the paper."""
  return {
    str(s): tuple(map(int, np.random.RandomState(s).permutation(num_tasks))) for s in range(5)
  }


def _shuffled(num_tasks: int) -> dict[str, tuple[int, ...]]:
  """Returns Python's random permutations for the seeds 0 to 4.

  The authors' code for TinyImageNet uses them.
  """
  lists = {str(s): list(range(num_tasks)) for s in range(5)}
  for seed, ids in lists.items():
    random.Random(int(seed)).shuffle(ids)
  return {seed: tuple(ids) for seed, ids in lists.items()}


def _ids(text: str) -> tuple[int, ...]:
  """Returns task ids from a text in which they are separated by spaces."""
  return tuple(map(int, text.split()))


PAPER = {
  "cifar100_split": {
    "A": _ids("0 1 2 3 4 5 6 7 8 9"),
    "B": _ids("1 7 4 5 2 0 8 6 9 3"),
    "C": _ids("7 0 5 1 8 4 3 6 2 9"),
    "D": _ids("5 8 2 9 0 4 3 7 6 1"),
    "E": _ids("2 9 5 4 8 0 6 1 3 7"),
  },
  "cifar100_superclass": {
    "A": _ids("0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19"),
    "B": _ids("15 12 5 9 7 16 18 17 1 0 3 8 11 14 10 6 2 4 13 19"),
    "C": _ids("17 1 19 18 12 7 6 0 11 15 10 5 13 3 9 16 4 14 2 8"),
    "D": _ids("11 9 6 5 12 4 0 10 13 7 14 3 15 16 8 1 2 19 18 17"),
    "E": _ids("6 14 0 11 12 17 13 4 9 1 7 19 8 10 3 15 18 5 2 16"),
  },
  "pmnist": _numpy(10) | {"0": _ids("6 1 9 2 7 5 8 0 3 4")},
  "five_datasets": _numpy(5) | {"1": _ids("1 0 4 2 3")},
  "omniglot_rotation": _numpy(100),
  "tinyimagenet20": {
    "0": _ids("10 18 16 14 0 17 11 2 3 9 5 7 4 19 6 15 8 1 13 12"),
    "1": _ids("11 5 17 19 9 0 16 1 15 6 10 13 14 12 7 3 8 2 18 4"),
    "2": _ids("7 6 17 8 19 15 13 0 3 9 14 4 10 12 16 5 11 18 2 1"),
    "3": _ids("8 3 6 5 15 16 2 12 0 1 13 10 19 9 14 11 4 17 18 7"),
    "4": _ids("17 19 10 14 5 18 16 11 4 8 6 0 13 1 2 15 12 3 9 7"),
  },
  "tinyimagenet40": _numpy(40),
  # These benchmarks have no orders in the paper; the same rule is used.
  "digits": _numpy(10),
  "pmnist20": _numpy(20),
  "cifar100_20": _numpy(20),
}
# Orders of the authors' code, for the benchmarks where they differ from PAPER.
CODE = {"pmnist": _numpy(10), "five_datasets": _numpy(5), "tinyimagenet40": _shuffled(40)}


def resolve(order: str, benchmark: str, num_tasks: int, source: str = "paper") -> tuple[int, ...]:
  """Returns task ids in the order of training, for a value of the config key `order`.

  Args:
    order: a letter or seed number that names an order of the benchmark; "natural" for 0, 1, 2 ...;
      or ids separated by commas such as "2,0,1". Tasks whose ids are not given are not learned.
    benchmark: name of the benchmark.
    num_tasks: number of tasks of the benchmark. If `data.num_tasks` has changed it, the names are
      seeds of NumPy's permutations.
    source: "paper" for the orders of the paper, "code" for those of the authors' code.

  Raises:
    UserError: if `order` is none of these, or an id is out of range or given twice.
  """
  named = PAPER.get(benchmark, {}) | (CODE.get(benchmark, {}) if source == "code" else {})
  if any(len(ids) != num_tasks for ids in named.values()):
    named = _numpy(num_tasks)
  if order in named:
    return named[order]
  if order == "natural":
    return tuple(range(num_tasks))
  try:
    ids = tuple(int(part) for part in order.split(","))
  except ValueError:
    ids = ()
  if not ids or len(set(ids)) < len(ids) or not set(ids) <= set(range(num_tasks)):
    names = f"one of {', '.join(named)}, natural, or " if named else "natural, or "
    raise UserError(
      f"order must be {names}different ids from 0 to {num_tasks - 1} separated by commas for "
      f"{benchmark}, given {order!r}"
    )
  return ids
