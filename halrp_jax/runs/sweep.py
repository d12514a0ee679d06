"""Runs the cells of a sweep in one process, each in a folder of its own.

A cell is one run: a method, an order and a seed. A cell that fails doesn't stop the others.
"""

import contextlib
import functools
import itertools
import pathlib
import re
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

from ml_collections import config_dict

from halrp_jax import data, files
from halrp_jax.config import resolve, with_keys
from halrp_jax.data import orders, sources
from halrp_jax.devices import faults, replicas
from halrp_jax.keys import Config
from halrp_jax.runs import experiment, identity
from halrp_jax.types import InUse, Stopped, UserError, brief

ERROR = "error.txt"  # the traceback, in the folder of a cell that failed
ELSEWHERE = "at work elsewhere"  # state of a cell that another process runs


class Cell(NamedTuple):
  """One run of a sweep."""

  name: str  # path of its folder within the sweep's folder
  config: config_dict.ConfigDict  # as from `make_config`, not yet resolved


def cells(configs: dict[str, config_dict.ConfigDict], order_names: str, seeds: str) -> list[Cell]:
  """Returns a cell for every combination of config, order and seed.

  Args:
    configs: label -> config, not yet resolved. A cell's name begins with the label.
    order_names: names with commas; "all": the paper's orders of the benchmark; "": that of the
      config.
    seeds: whole numbers with commas; "": that of the config.

  Raises:
    UserError: if the seeds are not whole numbers, or the paper has no orders for a benchmark.
  """
  found = []
  for label, config in configs.items():
    for order, seed in itertools.product(
      _orders(config, order_names), _seeds(seeds) or [config.seed]
    ):
      name = f"{re.sub(r'[^A-Za-z0-9.,+=/-]+', '_', label)}_{order}_{seed}"
      found.append(Cell(name, with_keys(config, order=order, seed=seed)))
  return found


def _orders(config: config_dict.ConfigDict, text: str) -> list[object]:
  """Parses --orders."""
  if text != "all":
    return [name for name in text.split(",") if name] or [config.order]
  if config.benchmark not in orders.PAPER:
    raise UserError(f"--orders=all: {config.benchmark} has no list of orders; name them, as in 0,1")
  return list(orders.PAPER[config.benchmark])


def _seeds(text: str) -> list[int]:
  """Parses --seeds."""
  try:
    return [int(seed) for seed in text.split(",") if seed]
  except ValueError as e:
    raise UserError(f"--seeds={text}: expected whole numbers with commas, such as 0,1,2") from e


def shard(found: list[Cell], text: str) -> list[Cell]:
  """Returns every n-th cell from index i on, for --shard=i/n; all cells if `text` is ""."""
  if not text:
    return found
  match = re.fullmatch(r"(\d+)/(\d+)", text)
  if not match or int(match[1]) >= int(match[2]):
    raise UserError(f"--shard={text}: expected i/n with i from 0 to n - 1, such as 0/4")
  return found[int(match[1]) :: int(match[2])]


# --- the runs -------------------------------------------------------------------------


def run(
  found: list[Cell],
  root: str,
  show: Callable[[list[dict]], None],
  stop_asked: Callable[[], bool],
  vectorize: bool = False,
) -> list[dict]:
  """Runs the cells one after another; those that are finished are not run again.

  A cell that another process runs is tried once more at the end.

  Args:
    found: the cells.
    root: the folder in which the cells' folders are.
    show: is called with the rows (below) whenever one has changed.
    stop_asked: see `experiment.run`.
    vectorize: whether cells that differ only in order and seed are learned at once (`replicas`).

  Returns:
    A row per cell: name, method, state (waiting, running, done, failed, `ELSEWHERE`, or kept: it
    was finished by an earlier call), done and total (numbers of tasks), accuracy, seconds, error,
    note (what of the machine has changed since the cell was begun).

  Raises:
    UserError: before the first run if a config is wrong; later if the data are missing or JAX finds
      no device.
    Stopped: if `stop_asked` returned True; the same call resumes from there.
  """
  for cell in found:
    data.planned(resolve(cell.config))  # finds mistakes, also in orders, before the first run
  rows = [_waiting(cell) for cell in found]
  show(rows)
  groups = {}
  for i, cell in enumerate(found):
    key = with_keys(cell.config, order="", seed=0).to_json() if vectorize else i
    groups.setdefault(key, []).append((cell, rows[i]))
  read = identity.shared_read()
  for group in groups.values():
    _run_group(group, pathlib.Path(root), lambda: show(rows), stop_asked, read)
  for cell, row in zip(found, rows, strict=True):
    if row["state"] == ELSEWHERE:
      _run_group([(cell, row)], pathlib.Path(root), lambda: show(rows), stop_asked, read)
  return rows


def _run_group(
  group: list[tuple[Cell, dict]],
  root: pathlib.Path,
  changed: Callable[[], None],
  stop_asked: Callable[[], bool],
  read: Callable[[Config], dict],
) -> None:
  """Runs the cells of a group at once, a thread each; a single cell without threads.

  Args:
    group: cells with their rows.
    root: the folder in which the cells' folders are.
    changed: is called whenever a row has changed.
    stop_asked: see `experiment.run`.
    read: see `experiment.run`.
  """
  if len(group) == 1:
    ((cell, row),) = group
    _run_cell(cell, row, root / cell.name, changed, stop_asked, read)
    return
  changed = replicas.serialize(changed)

  def job(cell, row, gang):
    cell = cell._replace(config=with_keys(cell.config, parallel="replicas"))
    _run_cell(cell, row, root / cell.name, changed, stop_asked, read, gang)

  replicas.run_all([functools.partial(job, *member) for member in group])


def _waiting(cell: Cell) -> dict:
  """Returns the row of a cell that has not begun."""
  return {
    "name": cell.name,
    "method": cell.config.to_dict()["method"]["name"],
    "state": "waiting",
    "done": 0,
    "total": 0,
    "accuracy": None,
    "seconds": 0.0,
    "error": "",
    "note": "",
  }


def _run_cell(
  cell: Cell,
  row: dict,
  folder: pathlib.Path,
  changed: Callable[[], None],
  stop_asked: Callable[[], bool],
  read: Callable[[Config], dict],
  gang: replicas.Gang | None = None,
) -> None:
  """Runs one cell and updates its row; arguments as `_run_group` and `experiment.run`."""
  start, finished = time.perf_counter(), []

  def show(event):
    row["seconds"] = time.perf_counter() - start
    if event["event"] == "finished":
      finished.append(True)
    elif event["event"] == "standing":
      row["note"] = "; ".join(event["said"])
    elif event["event"] in ("task", "evaluation"):
      row["total"] = event["num_tasks"]
      row["done"] = event["t"] + (event["event"] == "evaluation")
    changed()

  row |= {"state": "running", "error": ""}
  changed()
  try:
    record = experiment.run(
      cell.config, str(folder), show, stop_asked=stop_asked, gang=gang, read=read
    )
  except (Stopped, sources.Missing, BrokenPipeError):
    raise  # these concern all cells; the last: nobody reads the output any more
  except InUse as e:
    row |= {"state": ELSEWHERE, "error": brief(e)}
  except Exception as e:
    # A missing device concerns all cells. After a UserError it isn't asked for, since that would
    # start JAX's backend.
    if not isinstance(e, UserError) and (line := faults.unusable()):
      raise UserError(line) from e
    explained = not isinstance(e, UserError) and faults.explain(e)
    text = explained or f"{type(e).__name__}: {brief(e)}"
    row |= {"state": "failed", "error": text}
    _write_traceback(folder)
  else:
    row["accuracy"] = record["average_accuracy"]
    row["done"] = row["total"] = len(record["task_ids"])
    row["state"] = "kept" if finished else "done"
    (folder / ERROR).unlink(missing_ok=True)
  row["seconds"] = time.perf_counter() - start
  changed()


def _write_traceback(folder: pathlib.Path) -> None:
  """Writes the traceback of the current exception into a cell's folder, if that is possible."""
  with contextlib.suppress(OSError):
    files.write_text(folder / ERROR, traceback.format_exc())


def failed(rows: list[dict]) -> bool:
  """Tells whether a cell has failed."""
  return any(row["state"] == "failed" for row in rows)
