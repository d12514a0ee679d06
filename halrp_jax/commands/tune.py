"""Finds the best of a grid of config values, on validation images.

  python -m halrp_jax tune --config=FILE:METHOD --grid=KEY=V,V,...[;KEY=V,...] --workdir=DIR
  python -m halrp_jax tune --config=configs/cifar100_split.py:ewc --config.data_dir=DIR \\
      --grid=method.strength=10,100,1000 --workdir=runs/tune-ewc

Every cell is a run of its own below DIR, with a quarter of the training images (unless
--config.train_fraction says otherwise); the accuracies are those on the validation images after the
last task, and no test image is in the run. A second start goes on where the first was stopped.
Prints a table, the best cell first, and writes it to DIR/tune.json.
"""

import itertools
import json
import pathlib
import sys

import numpy as np
from ml_collections import config_dict

from halrp_jax import arguments, files, keys
from halrp_jax.commands import terminal
from halrp_jax.config import resolve
from halrp_jax.devices import compile_cache, stop
from halrp_jax.runs import experiment, identity
from halrp_jax.types import Diverged, InUse, Stopped, UserError

_FLAGS = {
  "grid": "KEY=VALUE,VALUE,... for one or more keys, with semicolons between",
  "workdir": "folder for the runs and tune.json",
  "compile_cache": "as in halrp_jax.main",
}
_EXAMPLE = "--config=configs/digits.py:ewc --grid=method.strength=10,100 --workdir=runs/tune-ewc"
_FRACTION = 0.25  # of the training images


def main(argv: list[str]) -> int:
  """Runs the cells that are not finished; prints the table."""
  switches, required = {"help": "show this text"}, ("config", "grid", "workdir")
  args = arguments.parse_config(["tune", *argv], _FLAGS, switches, required, _EXAMPLE)
  if args.help:
    print(__doc__)
    return 0
  keep_fraction = any(a.lstrip("-").startswith("config.train_fraction") for a in argv)
  cells = {
    name: _cell_config(args.config, values, keep_fraction)
    for name, values in _cells(args.grid).items()
  }
  for config in cells.values():
    resolve(config)  # a mistake in any cell is found before the first run
  compile_cache.use(args.compile_cache)
  root, stop_asked = pathlib.Path(args.workdir), stop.listen()
  results, waiting, read = {}, dict(cells), identity.shared_read()
  try:
    for name in [*cells, *cells]:  # one that another process is at is looked at again at the end
      if name in waiting and (row := _run(name, cells[name], root / name, stop_asked, read)):
        results[name] = row
        del waiting[name]
  except Stopped:
    print(f"stopped; the same command goes on from {root}", file=sys.stderr)
    return stop.EXIT_CODE
  if not results:
    raise UserError(f"tune: another process is at work in all cells of {root}; wait for it")
  table = sorted(results.items(), key=lambda item: -(item[1]["average_accuracy"] or -np.inf))
  files.write_json(root / "tune.json", dict(table))
  print(terminal.tune_text(dict(table)))
  if waiting:
    print(f"at work elsewhere, hence not in the table: {', '.join(waiting)}")
  return 0


def _cells(grid: str) -> dict[str, dict]:
  """The text of --grid -> {name: {key: value}} for every combination."""
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


def _value(text: str):
  words = {"True": True, "False": False}
  try:
    return words[text] if text in words else json.loads(text)
  except ValueError:
    return text


def _cell_config(config: config_dict.ConfigDict, values: dict, keep_fraction: bool):
  """The config of one cell, which sees no test image."""
  cell = config.copy_and_resolve_references()
  known = keys.flat(cell.to_dict())
  for key in values:
    if key not in known:
      raise UserError(f"--grid: {key} is not a config key{keys.nearest(key, known)}")
  values = {"protocol.evaluate_on": "validation"} | values
  values |= {} if keep_fraction else {"train_fraction": _FRACTION}
  with cell.unlocked():
    for key, value in values.items():
      section, _, name = key.rpartition(".")
      (cell[section] if section else cell)[name] = value
  return cell


def _run(
  name: str, config: config_dict.ConfigDict, folder: pathlib.Path, stop_asked, read
) -> dict | None:
  """Runs a cell; None if another process is at it."""
  print(f"--- {name}")
  try:
    with terminal.live_display(sys.stdout) as show:
      record = experiment.run(config, str(folder), show, stop_asked=stop_asked, read=read)
  except InUse as e:
    print(f"at work elsewhere: {e}")
    return None
  except Diverged as e:
    print(f"diverged: {e}")
    return {"average_accuracy": None, "bwt": None, "seconds": None}
  seconds = sum(sum(s.values()) for s in record["seconds"])
  return {k: record[k] for k in ("average_accuracy", "bwt")} | {"seconds": seconds}
