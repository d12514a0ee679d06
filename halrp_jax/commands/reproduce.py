"""Learns the runs of a table or figure of the paper and writes its report.

  python -m halrp_jax reproduce --list
  python -m halrp_jax reproduce --table=2 --budget=small --data_dir=DIR --workdir=runs/paper
  python -m halrp_jax reproduce --figure=3a --budget=full --methods=halrp,apd --seeds=0 ...

Runs the cells below RUNS, the folder of --workdir, as `sweep` does (a second start goes on, tables
share their cells), then writes RUNS/report-NAME-BUDGET/. Budgets: smoke (two epochs or few more on
a hundredth of the images: does it all run?), small (a twentieth of the images, table 6 a quarter;
first three orders, one seed), full (the paper's protocol: five orders with five seeds each). --list
tells cells, optimizer steps and hours. Exit codes as of sweep.
"""

import argparse
import pathlib
import sys

from ml_collections import config_dict

from halrp_jax import arguments
from halrp_jax.commands import terminal
from halrp_jax.config import make_config, resolve
from halrp_jax.devices import compile_cache, stop
from halrp_jax.reports import paper, publish
from halrp_jax.runs import estimate, reproduce, sweep
from halrp_jax.types import Stopped, UserError

_EXAMPLE = "--table=2 --budget=small --data_dir=DIR --workdir=runs/paper, or --list"


def main(argv: list[str]) -> int:
  """Runs what is not finished and writes the report."""
  options = _parse(argv)
  configs = reproduce.configs_folder(options.configs)
  targets = _targets(options)
  compile_cache.use(options.compile_cache)
  if options.list:
    _list(targets, configs, options)
    return 0
  return _reproduce(targets[0], configs, options)


def _parse(argv: list[str]) -> argparse.Namespace:
  runs = "--list" not in argv
  parser = arguments.parser("reproduce", __doc__, _EXAMPLE)
  target = parser.add_mutually_exclusive_group(required=runs)
  for kind in ("table", "figure"):
    names = [name.removeprefix(f"{kind} ") for name in paper.TARGETS if name.startswith(kind)]
    target.add_argument(f"--{kind}", default="", choices=names, help=f"a {kind} of the paper")
  parser.add_argument("--budget", default="small", choices=paper.BUDGETS)
  parser.add_argument("--list", action="store_true", help="cells, steps and hours")
  needed = {"required": True, "type": arguments.filled} if runs else {"default": ""}
  parser.add_argument("--data_dir", help="folder of the original data", **needed)
  parser.add_argument("--workdir", help="folder for runs and reports", **needed)
  parser.add_argument("--methods", default="", help="with commas; default: all of the table")
  parser.add_argument("--orders", default="", help="with commas, or all; default: the budget's")
  parser.add_argument("--seeds", default="", help="with commas; default: the budget's")
  parser.add_argument("--shard", default="", help="i/n, as in sweep")
  parser.add_argument("--allow_partial", action="store_true", help="go on with less data")
  parser.add_argument("--configs", default="", help="folder of configs; default: configs")
  parser.add_argument("--compile_cache", default="", help="as in halrp_jax.main")
  return parser.parse_args(argv)


def _targets(options) -> list[paper.Target]:
  """Returns the one that was named, all if none was."""
  names = [f"{k} {v}" for k in ("table", "figure") if (v := getattr(options, k))]
  return [paper.TARGETS[name] for name in names or paper.TARGETS]


def _cells(target, configs: str, options) -> tuple[list[sweep.Cell], list[str]]:
  only = tuple(name for name in options.methods.split(",") if name)
  if unknown := set(only) - set(target.rows.values()):
    known = ", ".join(target.rows.values())
    raise UserError(f"--methods: {target.name} has no {', '.join(sorted(unknown))}; it has {known}")
  keys = {"data_dir": options.data_dir, "allow_partial": options.allow_partial}
  return reproduce.cells(configs, target, options.budget, only, options.orders, options.seeds, keys)


def _reproduce(target, configs: str, options) -> int:
  cells, absent = _cells(target, configs, options)
  smoke = options.budget == "smoke"
  root = pathlib.Path(options.workdir) / ("smoke" if smoke else "")
  for name in absent:
    print(f"not here yet: {name}")
  stop_asked = stop.listen()
  try:
    with terminal.live_sweep(sys.stdout) as show:
      rows = sweep.run(sweep.shard(cells, options.shard), str(root), show, stop_asked)
  except Stopped:
    print(f"stopped; the same command goes on from {options.workdir}", file=sys.stderr)
    return stop.EXIT_CODE
  print(terminal.sweep_text(rows))
  if any(row["state"] in ("done", "kept") for row in rows):
    found = publish.collect(str(root), reproduce.catalogue(configs, smoke), [target], only=True)
    out = pathlib.Path(options.workdir) / f"report-{target.slug}-{options.budget}"
    publish.write(found, str(out), f"halrp_jax: {target.name}, budget {options.budget}")
    print(out / publish.PAGE)
  return int(sweep.failed(rows))


# --- --list ---------------------------------------------------------------------------


def _list(targets, configs: str, options) -> None:
  """A line per table and figure. The time of a step is measured once per kind of run."""
  known = {}
  print(f"budget {options.budget}; hours: time of one step here, measured on random images, times")
  print("the steps; all systems but HALRP are counted at single-task learning's")
  print(f"{'':<10} {'cells':>6} {'steps':>12} {'hours':>8}  title")
  for target in targets:
    cells, absent = _cells(target, configs, options)
    count = seconds = 0
    for cell in sweep.shard(cells, options.shard):
      steps, cell_seconds = _estimate(cell, known)
      count, seconds = count + steps, seconds + cell_seconds
    lacks = f" (not here yet: {', '.join(absent)})" if absent else ""
    line = f"{target.name:<10} {len(cells):>6} {count:>12,} {seconds / 3600:>8.1f}"
    print(f"{line}  {target.title}{lacks}", flush=True)


def _estimate(cell: sweep.Cell, known: dict) -> tuple[int, float]:
  """Steps and seconds of a cell. known: kind of run -> calibration, filled here."""
  config = resolve(cell.config)
  steps, num_tasks = estimate.steps(config)
  kind = estimate.kind(config)
  if kind not in known:
    known[kind] = estimate.calibrate(_calibration_config(cell.config, kind[0]))
  step, task = known[kind]
  return steps, steps * step + num_tasks * task


def _calibration_config(config: config_dict.ConfigDict, method: str):
  """Two epochs of the same network with HALRP, or with STL."""
  keys = {k: v for k, v in config.to_dict().items() if k not in ("method", "protocol", "data")}
  keys = {k: v for k, v in keys.items() if k != "checkpoint"} | {"epochs": 2}
  own = {"batch_norm": config.method.batch_norm} if config.method.batch_norm else {}
  if method == "halrp":
    own |= {"svd": config.method.svd, "importance_split": "train"}
  protocol = config.protocol.to_dict()
  return resolve(make_config(method, protocol=protocol, methods_={method: own}, **keys))
