"""Many runs in one process, one sub-folder each. A cell that fails doesn't stop the others."""

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
from halrp_jax.runs import experiment, identity
from halrp_jax.types import InUse, Stopped, UserError, brief

ERROR = "error.txt"  # in the folder of a cell that failed
ELSEWHERE = "at work elsewhere"  # state of a cell that another process runs


class Cell(NamedTuple):
  name: str  # its folder below the sweep's
  config: config_dict.ConfigDict  # as from `make_config`, not yet resolved


def cells(configs: dict[str, config_dict.ConfigDict], order_names: str, seeds: str) -> list[Cell]:
  """Every config with every order and seed; nothing is run.

  Args:
    configs: label -> config. The label begins the cell's name.
    order_names: names with commas, "all" for the orders the paper has for the benchmark, "" for the
      config's own.
    seeds: whole numbers with commas, "" for the config's own.
  """
  found = []
  for label, config in configs.items():
    for order, seed in itertools.product(
      _orders(config, order_names), _seeds(seeds) or [config.seed]
    ):
      name = f"{re.sub(r'[^A-Za-z0-9.,+=/-]+', '_', label)}_{order}_{seed}"
      found.append(Cell(name, with_keys(config, order=order, seed=seed)))
  return found


def _orders(config: config_dict.ConfigDict, text: str) -> list[str]:
  if text != "all":
    return [name for name in text.split(",") if name] or [config.order]
  if config.benchmark not in orders.PAPER:
    raise UserError(f"--orders=all: {config.benchmark} has no list of orders; name them")
  return list(orders.PAPER[config.benchmark])


def _seeds(text: str) -> list[int]:
  try:
    return [int(seed) for seed in text.split(",") if seed]
  except ValueError as e:
    raise UserError(f"--seeds={text}: whole numbers with commas between, such as 0,1,2") from e


def shard(found: list[Cell], text: str) -> list[Cell]:
  """Every n-th cell from the i-th on, `text` being "i/n" with i from 0; all of them for ""."""
  if not text:
    return found
  match = re.fullmatch(r"(\d+)/(\d+)", text)
  if not match or int(match[1]) >= int(match[2]):
    raise UserError(f"--shard={text}: i/n with i from 0 to n - 1, such as 0/4")
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

  Args:
    found: the cells.
    root: the folder their folders are in.
    show: is called with the rows below whenever one has changed.
    stop_asked: see `experiment.run`.
    vectorize: cells that differ in order and seed alone are learned at once (`replicas`).

  Returns:
    A row per cell: name, method, state (waiting, running, done, kept, failed or `ELSEWHERE`, which
    is looked at again at the end), done and total (tasks), accuracy, seconds, error, note (what has
    changed under it).

  Raises:
    UserError: before the first run, if a config is wrong; later if the data are not there, or jax
      has no device.
    Stopped: if `stop_asked` said so; the same call goes on from there.
  """
  for cell in found:
    data.planned(resolve(cell.config))  # mistakes, also in orders, before the first run
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


def _run_group(group, root: pathlib.Path, changed, stop_asked, read) -> None:
  """Runs cells at once, or the only one."""
  if len(group) == 1:
    ((cell, row),) = group
    _run_cell(cell, row, root / cell.name, changed, stop_asked, read=read)
    return
  changed = replicas.serialize(changed)

  def job(cell, row, gang):
    cell = cell._replace(config=with_keys(cell.config, parallel="replicas"))
    _run_cell(cell, row, root / cell.name, changed, stop_asked, gang=gang, read=read)

  replicas.run_all([functools.partial(job, *member) for member in group])


def _waiting(cell: Cell) -> dict:
  return {
    "name": cell.name,
    "method": cell.config.method.name,
    "state": "waiting",
    "done": 0,
    "total": 0,
    "accuracy": None,
    "seconds": 0.0,
    "error": "",
    "note": "",
  }


def _run_cell(cell, row, folder: pathlib.Path, changed, stop_asked, **how) -> None:
  """Runs one cell and keeps its row up to date. `how`: as in `experiment.run`."""
  start, finished = time.perf_counter(), []

  def event_seen(event):
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
    record = experiment.run(cell.config, str(folder), event_seen, stop_asked=stop_asked, **how)
  except (Stopped, sources.Missing, BrokenPipeError):  # the last: nobody sees the output
    raise
  except InUse as e:
    row |= {"state": ELSEWHERE, "error": brief(e)}
  except Exception as e:
    # a mistake of the user's is no device's; asking would start JAX's backend
    if not isinstance(e, UserError) and (line := faults.unusable()):
      raise UserError(line) from e
    # whatever else it is, the other cells don't depend on it
    explained = not isinstance(e, UserError) and faults.explain(e)
    text = explained or f"{type(e).__name__}: {brief(e)}"
    row |= {"state": "failed", "error": text}
    _keep_error(folder)
  else:
    row["accuracy"] = record["average_accuracy"]
    row["done"] = row["total"] = len(record["task_ids"])
    row["state"] = "kept" if finished else "done"
    (folder / ERROR).unlink(missing_ok=True)
  row["seconds"] = time.perf_counter() - start
  changed()


def _keep_error(folder: pathlib.Path) -> None:
  """The whole traceback, where it can be written at all."""
  with contextlib.suppress(OSError):
    files.write_text(folder / ERROR, traceback.format_exc())


def failed(rows: list[dict]) -> bool:
  return any(row["state"] == "failed" for row in rows)
