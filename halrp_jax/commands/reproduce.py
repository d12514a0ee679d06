"""Learns the runs of a table or figure of the paper and writes its report.

  python -m halrp_jax reproduce --list
  python -m halrp_jax reproduce --table=2 --budget=small --data_dir=DIR --workdir=runs/paper
  python -m halrp_jax reproduce --figure=3a --budget=full --methods=halrp,apd --seeds=0 ...

Learns the runs in folders below --workdir, as sweep does, and writes the report into the folder
report-NAME-BUDGET there. If it is stopped, the same command resumes it; runs that several tables
need are learned once. --list prints every table and figure with its number of runs, optimizer steps
and hours on this machine. Exit codes are those of sweep.

Budgets:
  smoke   few epochs on 1 % of the images, to see whether everything runs
  small   5 % of the images (table 6: 25 %), the first three orders, one seed
  full    the paper's protocol: five orders with five seeds each
"""

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from ml_collections import config_dict

from halrp_jax import arguments
from halrp_jax.commands import program, terminal
from halrp_jax.config import make_config, resolve
from halrp_jax.devices import compile_cache, stop
from halrp_jax.keys import Config
from halrp_jax.reports import paper, publish
from halrp_jax.runs import estimate, reproduce, sweep
from halrp_jax.types import Stopped, UserError

_EXAMPLE = "--table=2 --budget=small --data_dir=DIR --workdir=runs/paper, or --list"


def main(argv: list[str], stop_asked: Callable[[], bool] = lambda: False) -> int:
  """Learns the runs that are not finished and writes the report."""
  options = _parse(argv)
  configs = reproduce.configs_folder(options.configs)
  targets = _targets(options)
  compile_cache.use(options.compile_cache)
  if options.list:
    return _list(targets, configs, options, stop_asked)
  return _reproduce(targets[0], configs, options, stop_asked)


def _parse(argv: list[str]) -> argparse.Namespace:
  """Parses the command line; with --list most arguments are optional."""
  runs = "--list" not in argv
  parser = arguments.parser("reproduce", __doc__, _EXAMPLE)
  target = parser.add_mutually_exclusive_group(required=runs)
  for kind in ("table", "figure"):
    names = [name.removeprefix(f"{kind} ") for name in paper.TARGETS if name.startswith(kind)]
    target.add_argument(f"--{kind}", default="", choices=names, help=f"a {kind} of the paper")
  parser.add_argument("--budget", default="small", choices=paper.BUDGETS, help="default: small")
  parser.add_argument(
    "--list", action="store_true", help="print runs, steps and hours; learn nothing"
  )
  for name, text in (
    ("--data_dir", "folder of the original data files"),
    ("--workdir", "folder for the runs and the report"),
  ):
    kind = arguments.filled if runs else str
    parser.add_argument(name, default="", required=runs, type=kind, help=text)
  parser.add_argument("--methods", default="", help="names with commas; default: all of the table")
  parser.add_argument(
    "--orders", default="", help="names with commas, or all; default: as the budget"
  )
  parser.add_argument("--seeds", default="", help="numbers with commas; default: as the budget")
  parser.add_argument(
    "--shard", default="", help="i/n, with i from 0: learn only every n-th run, from run i on"
  )
  parser.add_argument(
    "--allow_partial", action="store_true", help="accept less data than the paper used"
  )
  parser.add_argument("--configs", default="", help="folder of the config files; default: configs")
  parser.add_argument("--compile_cache", default="", help=program.COMPILE_CACHE)
  return parser.parse_args(argv)


def _targets(options: argparse.Namespace) -> list[paper.Target]:
  """Returns the table or figure that was named, or all of them."""
  names = [f"{k} {v}" for k in ("table", "figure") if (v := getattr(options, k))]
  return [paper.TARGETS[name] for name in names or paper.TARGETS]


def _cells(
  target: paper.Target, configs: str, options: argparse.Namespace
) -> tuple[list[sweep.Cell], list[str]]:
  """Returns the cells of a table or figure, and the names of methods not implemented here."""
  only = tuple(name for name in options.methods.split(",") if name)
  if unknown := set(only) - set(target.rows.values()):
    known = ", ".join(target.rows.values())
    raise UserError(f"--methods: {target.name} has no {', '.join(sorted(unknown))}, only {known}")
  keys = {"data_dir": options.data_dir, "allow_partial": options.allow_partial}
  return reproduce.cells(configs, target, options.budget, only, options.orders, options.seeds, keys)


def _reproduce(
  target: paper.Target,
  configs: str,
  options: argparse.Namespace,
  stop_asked: Callable[[], bool],
) -> int:
  """Learns the runs of a table or figure and writes the report; returns the exit code."""
  cells, missing = _cells(target, configs, options)
  smoke = options.budget == "smoke"
  root = pathlib.Path(options.workdir) / ("smoke" if smoke else "")
  for name in missing:
    print(f"not implemented: {name}")
  try:
    with terminal.live_sweep(sys.stdout) as show:
      rows = sweep.run(sweep.shard(cells, options.shard), str(root), show, stop_asked)
  except Stopped:
    print(f"stopped; the same command resumes from {options.workdir}", file=sys.stderr)
    return stop.EXIT_CODE
  print(terminal.sweep_text(rows))
  if any(row["state"] in ("done", "kept") for row in rows):
    found = publish.collect(str(root), reproduce.catalogue(configs, smoke), [target], only=True)
    out = pathlib.Path(options.workdir) / f"report-{target.slug}-{options.budget}"
    publish.write(found, str(out), f"halrp_jax: {target.name}, budget {options.budget}")
    print(out / publish.PAGE)
  return int(sweep.failed(rows))


# --- --list ---------------------------------------------------------------------------


def _list(
  targets: list[paper.Target],
  configs: str,
  options: argparse.Namespace,
  stop_asked: Callable[[], bool],
) -> int:
  """Prints a line per table and figure, and returns the exit code.

  The time of a step is measured once per kind of run.
  """
  known: dict[tuple, tuple[float, float]] = {}
  print(f"budget {options.budget}; hours: the number of steps times the time of one step, measured")
  print("here on random images; all methods but HALRP are counted like single-task learning")
  print(f"{'':<10} {'runs':>6} {'steps':>12} {'hours':>8}  title")
  for target in targets:
    cells, missing = _cells(target, configs, options)
    count, seconds = 0, 0.0
    for cell in sweep.shard(cells, options.shard):
      if stop_asked():
        print("stopped", file=sys.stderr)
        return stop.EXIT_CODE
      steps, cell_seconds = _estimate(cell, known)
      count, seconds = count + steps, seconds + cell_seconds
    more = f" (not implemented: {', '.join(missing)})" if missing else ""
    line = f"{target.name:<10} {len(cells):>6} {count:>12,} {seconds / 3600:>8.1f}"
    print(f"{line}  {target.title}{more}", flush=True)
  return 0


def _estimate(cell: sweep.Cell, known: dict[tuple, tuple[float, float]]) -> tuple[int, float]:
  """Returns steps and seconds of a cell; `known` caches the calibrations by kind of run."""
  config = resolve(cell.config)
  steps, num_tasks = estimate.steps(config)
  kind = estimate.kind(config)
  if kind not in known:
    known[kind] = estimate.calibrate(_calibration_config(cell.config, kind[0]))
  step, task = known[kind]
  return steps, steps * step + num_tasks * task


def _calibration_config(config: config_dict.ConfigDict, method: str) -> Config:
  """Returns a config for two epochs of the same network with "halrp" or "stl"."""
  values: dict[str, Any] = config.to_dict()
  chosen, protocol = values.pop("method"), values.pop("protocol")
  top: dict[str, Any] = {k: v for k, v in values.items() if k not in ("data", "checkpoint")}
  top["epochs"] = 2
  own = {"batch_norm": chosen["batch_norm"]} if chosen["batch_norm"] else {}
  if method == "halrp":
    own |= {"svd": chosen["svd"], "importance_split": "train"}
  return resolve(make_config(method, protocol=protocol, methods_={method: own}, **top))
