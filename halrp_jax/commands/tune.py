r"""Tries a grid of config values and ranks them by their accuracy on validation images.

  python -m halrp_jax tune --config=FILE:METHOD --grid='KEY=V,V,...[;KEY=V,...]' --workdir=DIR
  python -m halrp_jax tune --config=configs/cifar100_split.py:ewc --config.data_dir=DIR \
      --grid=method.strength=10,100,1000 --workdir=runs/tune-ewc

Each combination of values is a cell: a run of its own in a folder below DIR, with 25 % of the
training images unless the grid or --config.train_fraction says otherwise. The accuracies are those
on the validation images after the last task; test images are not used at all. Prints a table with
the best cell first, and writes it to DIR/tune.json. If it is stopped, the same command resumes it.
"""

import itertools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import config_dict

from halrp_jax import arguments, files, keys
from halrp_jax.commands import program, terminal
from halrp_jax.config import resolve
from halrp_jax.devices import compile_cache, stop
from halrp_jax.keys import Config
from halrp_jax.runs import experiment, identity
from halrp_jax.types import Diverged, InUse, Stopped, UserError

_FLAGS = {
  "grid": "KEY=VALUE,VALUE,... for one or more keys, separated by semicolons (quote them)",
  "workdir": "folder for the runs and tune.json",
  "compile_cache": program.COMPILE_CACHE,
}
_EXAMPLE = "--config=configs/digits.py:ewc --grid=method.strength=10,100 --workdir=runs/tune-ewc"
_FRACTION = 0.25  # train_fraction of a cell unless the command line sets one


def main(argv: list[str], stop_asked: Callable[[], bool] = lambda: False) -> int:
  """Runs the cells that are not finished, and prints the table."""
  switches, required = {"help": "show this text"}, ("config", "grid", "workdir")
  args = arguments.parse_config(["tune", *argv], _FLAGS, switches, required, _EXAMPLE)
  if args.help:
    print(terminal.verb_help_text(__doc__, _FLAGS | switches))
    return 0
  keep_fraction = any(a.lstrip("-").startswith("config.train_fraction") for a in argv)
  cells = {
    name: _cell_config(args.config, values, keep_fraction)
    for name, values in _cells(args.grid).items()
  }
  for config in cells.values():
    resolve(config)  # finds mistakes of all cells before the first run
  compile_cache.use(args.compile_cache)
  root = pathlib.Path(args.workdir)
  results, waiting, read = {}, dict(cells), identity.shared_read()
  try:
    for name in [*cells, *cells]:  # a cell that another process runs is tried again at the end
      if name in waiting and (row := _run(name, cells[name], root / name, stop_asked, read)):
        results[name] = row
        del waiting[name]
  except Stopped:
    print(f"stopped; the same command resumes from {root}", file=sys.stderr)
    return stop.EXIT_CODE
  if not results:
    raise UserError(f"tune: other processes are running all cells of {root}; wait for them")
  table = sorted(results.items(), key=lambda item: -(item[1]["average_accuracy"] or -np.inf))
  files.write_json(root / "tune.json", dict(table))
  print(terminal.tune_text(dict(table)))
  if waiting:
    print(f"not in the table, as other processes are running them: {', '.join(waiting)}")
  return 0


def _cells(grid: str) -> dict[str, dict]:
  """Parses --grid: returns name -> {key: value} for every combination of values."""
  axes = []
  for axis in filter(None, grid.split(";")):
    key, equals, texts = axis.partition("=")
    if not equals or not all(texts.split(",")):
      raise UserError(f"--grid={grid}: {axis!r} is not KEY=VALUE,VALUE,...")
    axes.append([(key.strip(), text.strip()) for text in texts.split(",")])
  return {
    ",".join(f"{k}={v}" for k, v in cell).replace("/", "_"): {k: _value(v) for k, v in cell}
    for cell in itertools.product(*axes)
  }


def _value(text: str) -> object:
  """Parses a config value: True, False, a JSON value, or else a text."""
  words = {"True": True, "False": False}
  try:
    return words[text] if text in words else json.loads(text)
  except ValueError:
    return text


def _cell_config(
  config: config_dict.ConfigDict, values: dict[str, object], keep_fraction: bool
) -> config_dict.ConfigDict:
  """Returns the config of one cell, which is evaluated on validation images."""
  cell = config.copy_and_resolve_references()
  known = keys.flat(cell.to_dict())
  for key in values:
    if key not in known:
      raise UserError(f"--grid: {key} is not a config key{keys.nearest(key, known)}")
  defaults: dict[str, object] = {"protocol.evaluate_on": "validation"}
  if not keep_fraction:
    defaults["train_fraction"] = _FRACTION
  values = defaults | values
  with cell.unlocked():
    for key, value in values.items():
      section, _, name = key.rpartition(".")
      target: Any = cell[section] if section else cell
      target[name] = value
  return cell


def _run(
  name: str,
  config: config_dict.ConfigDict,
  folder: pathlib.Path,
  stop_asked: Callable[[], bool],
  read: Callable[[Config], dict],
) -> dict | None:
  """Runs a cell and returns its row of the table; None if another process is running it."""
  print(f"--- {name}")
  try:
    with terminal.live_display(sys.stdout) as show:
      record = experiment.run(config, str(folder), show, stop_asked=stop_asked, read=read)
  except InUse as e:
    print(f"skipped for now: {e}")
    return None
  except Diverged as e:
    print(f"diverged: {e}")
    return {"average_accuracy": None, "bwt": None, "seconds": None}
  seconds = sum(sum(s.values()) for s in record["seconds"])
  return {k: record[k] for k in ("average_accuracy", "bwt")} | {"seconds": seconds}
