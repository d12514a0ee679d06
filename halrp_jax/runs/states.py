"""Reads the newest complete state of a run, and verifies all its checkpoints for `doctor`.

A state is stored as an item (checkpoint.py): its about.json names its parts and holds the results
so far. The parts, which are the shared pytree and the state of each task, are items too. A part
that does not change is stored once for several states (workdir.py).
"""

import pathlib
import re
import warnings

import jax
import jax.numpy as jnp

from halrp_jax import files
from halrp_jax.runs import cards, checkpoint
from halrp_jax.types import CHECKPOINTS, CONFIG, TASKS, Benchmark, Params, State, UserError

STATE = re.compile(r"state-(\d{4,})")
ITEM = re.compile(rf"{STATE.pattern}|(shared|task\d{{2,}})-[0-9a-f]{{16}}|now\.[\w.]+")
# The errors that reading an incomplete or damaged state raises.
NO_STATE = (checkpoint.Damaged, FileNotFoundError, KeyError, ValueError)


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
      if not item.name.startswith(("now.", "state-")):
        load_part(item)
    except (checkpoint.Damaged, FileNotFoundError, NotADirectoryError) as e:
      found["problem"] = str(e)
  for name in (p.name for p in find_states(folder / CHECKPOINTS) if p.name in trees):
    about = trees[name][1]
    if set(about["items"]) <= trees.keys():
      shared, *tasks = (trees[n][0]["tree"] for n in about["items"])
      return items, State(shared, tuple(tasks)), about["results"]
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
      state, about = load_state(folder)
      return state, about["results"]
    except NO_STATE as e:
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


def load_state(folder: pathlib.Path) -> tuple[State, dict]:
  """Reads a state with all its parts.

  Returns:
    The state, and the contents of its about.json.

  Raises:
    One of `NO_STATE`: if the state is incomplete or damaged.
  """
  about = checkpoint.verify(folder)
  shared, *tasks = (load_part(folder.parent / n) for n in about["items"])
  return State(*jax.tree.map(jnp.asarray, (shared, tuple(tasks)))), about


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
