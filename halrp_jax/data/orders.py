"""Task orders of the paper (Appendix F.1) and, where they differ, of the authors' program."""

import numpy as np

from halrp_jax.types import UserError


def _ids(text: str) -> tuple[int, ...]:
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
  # Ours, not the paper's: numpy's permutation of the seed number, as its other benchmarks have it.
  "digits": {str(s): tuple(map(int, np.random.RandomState(s).permutation(10))) for s in range(5)},
}
CODE: dict[str, dict[str, tuple[int, ...]]] = {}  # only where it differs from PAPER


def resolve(order: str, benchmark: str, num_tasks: int, source: str = "paper") -> tuple[int, ...]:
  """Text of the config key `order` -> task ids in the order of training.

  Args:
    order: a letter or seed number of the benchmark's table, or ids such as "2,0,1".
    benchmark: name of the benchmark.
    num_tasks: number of its tasks.
    source: "paper" or "code": whose table.

  Raises:
    UserError: if it is none of these, or the ids are no permutation of 0..num_tasks-1.
  """
  named = PAPER.get(benchmark, {}) | (CODE.get(benchmark, {}) if source == "code" else {})
  if order in named:
    return named[order]
  try:
    ids = tuple(int(part) for part in order.split(","))
  except ValueError:
    ids = ()
  if sorted(ids) != list(range(num_tasks)):
    names = f"one of {', '.join(named)}, or " if named else ""
    raise UserError(
      f"order must be {names}the ids 0 to {num_tasks - 1} in any order with commas "
      f"for {benchmark}, got {order!r}"
    )
  return ids
