"""Compares runs one after another with all runs at once: seconds, accuracies, ranks.

  python benchmarks/replicas.py --config=configs/digits.py --orders=0,1,2,3,4 --seeds=0,1,2,3,4

The runs are those of `python -m halrp_jax sweep` without and with --vectorize, in this process. The
cache of compiled programs is empty at the start. Flags --config.KEY=VALUE apply to all runs.
"""

import json
import pathlib
import sys
import tempfile
import time

import numpy as np

from halrp_jax import arguments
from halrp_jax.devices import compile_cache
from halrp_jax.runs import sweep

FLAGS = {"orders": "task orders, separated by commas", "seeds": "seeds, separated by commas"}


def run(cells, folder: pathlib.Path, vectorize: bool):
  """Runs all cells of a sweep; returns seconds, accuracies [R] and the ranks of every run.

  Raises:
    RuntimeError: if a run fails.
  """
  start = time.perf_counter()
  rows = sweep.run(cells, str(folder), lambda rows: None, lambda: False, vectorize)
  seconds = time.perf_counter() - start
  if sweep.failed(rows):
    raise RuntimeError("; ".join(sorted({row["error"] for row in rows if row["error"]})))
  records = [
    json.loads((folder / cell.name / "record.json").read_text(encoding="utf-8")) for cell in cells
  ]
  accuracy = np.array([row["accuracy"] for row in rows])
  return seconds, accuracy, [record["ranks"] for record in records]


def main(argv: list[str]) -> None:
  """Runs both forms and prints their times and differences."""
  args = arguments.parse_config(argv, FLAGS, {})
  cells = sweep.cells({args.config.method.name: args.config}, args.orders, args.seeds)
  root, results = pathlib.Path(tempfile.mkdtemp(prefix="replicas-")), {}
  compile_cache.use(str(root / "cache"))
  for vectorize in (False, True):
    seconds, accuracy, ranks = run(cells, root / str(vectorize), vectorize)
    results[vectorize] = seconds, accuracy, ranks
    how = "at once" if vectorize else "one after another"
    print(f"{len(cells)} runs {how}: {seconds:.1f} s, mean ACC {accuracy.mean():.2f} %", flush=True)
  (slow, apart, ranks), (fast, joint, ranks_joint) = results[False], results[True]
  same = sum(a == b for a, b in zip(ranks, ranks_joint, strict=True))
  print(
    f"at once takes {fast / slow:.2f} of the time; largest difference in ACC of a run "
    f"{np.abs(apart - joint).max():.2f}; all ranks equal in {same} of {len(cells)} runs"
  )


if __name__ == "__main__":
  main(sys.argv)
