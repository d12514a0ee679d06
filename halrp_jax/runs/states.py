"""The states in a run's folder, read: the newest one that is whole, and all that is there.

A state is an item of `checkpoint` that names its parts and has the results so far; the parts are
items too, and each is written once (workdir.py).
"""

import pathlib
import re
import warnings

import jax
import jax.numpy as jnp

from halrp_jax import files
from halrp_jax.runs import cards, checkpoint
from halrp_jax.types import CHECKPOINTS, CONFIG, TASKS, Benchmark, State, UserError

STATE = re.compile(r"state-(\d{4,})")
ITEM = re.compile(rf"{STATE.pattern}|(shared|task\d{{2,}})-[0-9a-f]{{16}}|now\.[\w.]+")
NO_STATE = (checkpoint.Damaged, FileNotFoundError, KeyError, ValueError)


def inspect(path: str) -> tuple[list[dict], State | None, dict]:
  """Verifies every file of a run; changes nothing.

  Returns:
    Per item: name, files, bytes, problem (a line, or None), strays (names of files that no run has
    written); the newest state that is whole; the results that belong to it.

  Raises:
    UserError: if there is no run.
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
  """Reads the tasks of a run, in the order of training, without their images."""
  file = pathlib.Path(path) / TASKS
  card = files.read_json(
    file,
    f"--workdir={path}: holds no {TASKS}, which has class names and normalisation: the run is of "
    "an older version; learn it again (--overwrite)",
  )
  return cards.to_benchmark(card, str(file))


def newest_state(path: str) -> tuple[State, dict]:
  """Reads the newest state of a run whose files all verify, and its results.

  Raises:
    UserError: if there is none.
  """
  problem = "no task is learned yet"
  for folder in find_states(pathlib.Path(path) / CHECKPOINTS):
    try:
      state, about = load_state(folder)
      return state, about["results"]
    except NO_STATE as e:
      problem = str(e)
      warnings.warn(f"{e}; the state before {folder.name} is used instead", stacklevel=2)
    except OSError as e:
      raise UserError(f"{e.filename or folder}: can't be read ({e.strerror or e})") from e
  raise UserError(f"--workdir={path}: holds no state that is whole ({problem})")


def find_states(items: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folders of the states, the newest first."""
  found = [p for p in items.glob("state-*") if STATE.fullmatch(p.name) and p.is_dir()]
  return sorted(found, key=position, reverse=True)


def position(folder: pathlib.Path) -> int:
  """Returns how many groups of tasks are learned in a state."""
  return int(STATE.fullmatch(folder.name)[1])


def load_state(folder: pathlib.Path) -> tuple[State, dict]:
  """Reads a state with all its parts and what is written about it; raises one of `NO_STATE`."""
  about = checkpoint.verify(folder)
  shared, *tasks = (load_part(folder.parent / n) for n in about["items"])
  return State(*jax.tree.map(jnp.asarray, (shared, tuple(tasks)))), about


def load_part(folder: pathlib.Path):
  """Reads a part of a state, and checks the hash in its name: another run's can't stand there."""
  if not folder.is_dir():
    raise checkpoint.Damaged(f"{folder}: missing")
  tree = checkpoint.load(folder)[0]["tree"]
  if not folder.name.endswith(f"-{checkpoint.fingerprint(tree)[:16]}"):
    raise checkpoint.Damaged(f"{folder}: holds something else than its name says")
  return tree
