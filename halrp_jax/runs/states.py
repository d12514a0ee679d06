"""Reads the newest complete state of a run, and verifies all its checkpoints for `doctor`.

A state is stored as an item (checkpoint.py): its about.json names its parts and holds the results.
The parts, which are the shared pytree and the state of each task, are items too. A part that does
not change is stored once for several states (workdir.py). So that a state costs as much after a
thousand tasks as after ten, only one in `ROWS` states is whole. Those after it name it, and have
what is new since. The results of older groups of tasks are in items of their own, `ROWS` groups
each.
"""

import itertools
import operator
import pathlib
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax import files
from halrp_jax.runs import cards, checkpoint
from halrp_jax.types import CHECKPOINTS, CONFIG, TASKS, Benchmark, Params, State, UserError

STATE = re.compile(r"state-(\d{4,})")
ITEM = re.compile(rf"{STATE.pattern}|(shared|(task|rows)\d{{2,}})-[0-9a-f]{{16}}|now\.[\w.]+")
ROWS = 32  # so many groups of tasks after the last whole state, the next one is written
# Results by group of tasks. "t" is the position of the group's last task, "accuracy" that of the
# tasks at the positions "evaluated", null where it is not known any more; other tasks have the
# accuracy that they had before.
Rows = list[dict[str, Any]]


class Outline(NamedTuple):
  """What about.json says of a state, and of the whole state that it builds on."""

  items: dict[str, str]  # names of its parts by "shared", "task00", "task01", ...
  rows: Rows
  row_items: tuple[str, ...]  # names of the items that hold the first rows
  events: int  # in metrics.jsonl when it was saved
  states: tuple[str, ...]  # names of the state's own item and of the whole state's


def inspect(path: str) -> tuple[list[dict], State | None, dict]:
  """Verifies all checkpoints of a run, without changing anything.

  Args:
    path: the run's folder.

  Returns:
    A list with a dict for each entry of checkpoints/: name, files (how many), bytes (their size),
    problem (one line, or None) and strays (names of files that halrp_jax did not write). The newest
    complete state, or None. The results stored with that state, or {}.

  Raises:
    UserError: if the folder is not a run's.
  """
  folder = pathlib.Path(path)
  if not (folder / CONFIG).is_file():
    raise UserError(f"--workdir={path}: holds no {CONFIG}; give the folder of a run")
  items, trees = [], {}
  for item in sorted((folder / CHECKPOINTS).glob("[!.]*")):
    inside = [p for p in item.rglob("*") if p.is_file()]
    found = {"name": item.name, "files": len(inside), "problem": None, "strays": [item.name]}
    found["bytes"] = sum(p.stat().st_size for p in inside)
    items.append(found)
    if not ITEM.fullmatch(item.name):
      continue
    found["strays"] = checkpoint.strays(item)
    try:
      trees[item.name] = checkpoint.load(item)
      if not item.name.startswith(("now.", "state-", "rows")):
        load_part(item)
    except (checkpoint.Damaged, FileNotFoundError, NotADirectoryError) as e:
      found["problem"] = str(e)
  by_name = {found["name"]: found for found in items}
  for state in find_states(folder / CHECKPOINTS):
    try:
      found = outline(state)
      for name in found.items.values():
        if name not in trees or by_name[name]["problem"]:
          raise checkpoint.Damaged(f"{state}: {name} is missing or damaged")
      shared, *tasks = (trees[n][0]["tree"] for n in found.items.values())
      return items, State(shared, tuple(tasks)), results(found.rows)
    except checkpoint.Damaged as e:
      by_name[state.name]["problem"] = str(e)
  return items, None, {}


def read_benchmark(path: str) -> Benchmark:
  """Reads the tasks of a run, in the order of training, without their images.

  Raises:
    UserError: if tasks.json is missing or damaged.
  """
  file = pathlib.Path(path) / TASKS
  card = files.read_json(
    file,
    f"--workdir={path}: holds no {TASKS} with class names and normalisation; it was deleted, or an "
    "older version made the run; learn it again with --overwrite",
  )
  return cards.to_benchmark(card, str(file))


def newest_state(path: str) -> tuple[State, dict]:
  """Reads the newest complete state of a run, and the results stored with it.

  Warns about every newer state that is incomplete or damaged.

  Raises:
    UserError: if there is no complete state, or a file can't be read.
  """
  problem = "no task is learned yet"
  for folder in find_states(pathlib.Path(path) / CHECKPOINTS):
    try:
      found = outline(folder)
      return load_state(folder.parent, found), results(found.rows)
    except checkpoint.Damaged as e:
      problem = str(e)
      text = f"{folder} is skipped ({e}); an older state is used if there is one"
      warnings.warn(text, stacklevel=2)
    except OSError as e:
      raise UserError(f"{e.filename or folder}: can't be read ({e.strerror or e})") from e
  raise UserError(f"--workdir={path}: holds no complete state ({problem}); run its command again")


def find_states(items: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folders of the states, the newest first."""
  found = [p for p in items.glob("state-*") if STATE.fullmatch(p.name) and p.is_dir()]
  return sorted(found, key=position, reverse=True)


def position(folder: pathlib.Path) -> int:
  """Returns the number of groups of tasks learned in a state, read from its folder's name."""
  return int(folder.name.removeprefix("state-"))


def outline(folder: pathlib.Path) -> Outline:
  """Reads what a state consists of, from its item and the whole state that it builds on.

  Raises:
    checkpoint.Damaged: if an item is missing or damaged.
  """
  try:
    return _outline(folder)
  except FileNotFoundError as e:
    raise checkpoint.Damaged(f"{e}: missing") from e
  except (KeyError, TypeError, ValueError, AttributeError) as e:
    raise checkpoint.Damaged(f"{folder}: was changed or damaged ({type(e).__name__}: {e})") from e


def _outline(folder: pathlib.Path) -> Outline:
  """Returns what `outline` does; raises almost anything if an item is damaged."""
  about = checkpoint.verify(folder)
  if (whole := about.get("whole")) is not None:
    if whole >= position(folder):
      raise ValueError(f"state {whole} is not an earlier one")
    found = _outline(folder.with_name(f"state-{whole:04d}"))
    items, rows = found.items | about["items"], [*found.rows, *about["rows"]]
    row_items, names = found.row_items, (folder.name, *found.states)
  elif isinstance(about["items"], list):  # of a version that wrote every state whole
    items = {n.rpartition("-")[0]: n for n in about["items"]}
    rows, row_items, names = _older_rows(**about["results"]), (), (folder.name,)
  else:
    row_items, names = tuple(about["row_items"]), (folder.name,)
    parts = (checkpoint.verify(folder.with_name(name))["rows"] for name in row_items)
    items, rows = about["items"], [*itertools.chain(*parts), *about["rows"]]
  own = ["shared", *(f"task{t:02d}" for t in range(len(items) - 1))]
  return Outline({n: items[n] for n in own}, rows, row_items, about["events"], names)


def _older_rows(rows: Rows, accuracy: list[list]) -> Rows:
  """Returns the results of an older version with the accuracies of each group in its row."""
  measured = [(t, a) for t, a in enumerate(accuracy) if any(x is not None for x in a)]
  pairs = zip(rows, measured[-len(rows) :] if rows else [], strict=True)
  return [
    row | {"t": t, "evaluated": [*range(t + 1)], "accuracy": a[: t + 1]} for row, (t, a) in pairs
  ]


def accuracies(rows: Rows, num_tasks: int) -> np.ndarray:
  """Returns the accuracies [T, T] in % that the rows have, NaN where none was measured."""
  accuracy, last = np.full((num_tasks, num_tasks), np.nan), np.full(num_tasks, np.nan)
  for row in rows:
    last[row["evaluated"]] = np.array(row["accuracy"], float)  # None becomes NaN
    accuracy[row["t"]] = last
  return accuracy


def results(rows: Rows) -> dict[str, Any]:
  """Returns the results of a state: "rows", and "accuracy", a list of T lists of T (JSON types).

  Accuracies that were not measured are None.
  """
  return {"rows": rows, "accuracy": nulls(accuracies(rows, rows[-1]["t"] + 1 if rows else 0))}


def nulls(accuracy: np.ndarray) -> list[list[float | None]]:
  """Returns accuracies [S, T] with None for NaN, as JSON needs it."""
  return [[None if np.isnan(x) else x for x in row] for row in accuracy.tolist()]


def is_same(tree: Params, other: Params) -> bool:
  """Returns whether two pytrees have the very same arrays as leaves."""
  leaves, others = jax.tree.leaves(tree), jax.tree.leaves(other)
  return len(leaves) == len(others) and all(map(operator.is_, leaves, others))


def load_state(
  items: pathlib.Path,
  found: Outline,
  place: Callable[[int, Params], Params] = lambda t, tree: jax.tree.map(jnp.asarray, tree),
) -> State:
  """Reads all parts of a state.

  Args:
    items: the folder of the items.
    found: result of `outline`.
    place: (position of a task, or -1 for what they share; the part) -> the part to return. It is
      applied to every part when it is read; by default the arrays go to the device.

  Raises:
    checkpoint.Damaged: if a part is missing or damaged.
  """
  names = enumerate(found.items.values(), -1)
  shared, *tasks = (place(t, load_part(items / name)) for t, name in names)
  return State(shared, tuple(tasks))


def load_part(folder: pathlib.Path) -> Params:
  """Reads a part of a state, and checks the fingerprint in its name.

  Raises:
    checkpoint.Damaged: if it is missing or damaged, or its contents do not match its name.
  """
  if not folder.is_dir():
    raise checkpoint.Damaged(f"{folder}: missing")
  tree = checkpoint.load(folder)[0]["tree"]
  if not folder.name.endswith(f"-{checkpoint.fingerprint(tree)[:16]}"):
    raise checkpoint.Damaged(f"{folder}: its contents do not match the hash in its name")
  return tree
