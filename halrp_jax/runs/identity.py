"""Whose a run's folder is: its config and what it stands on, compared before anything goes on."""

import dataclasses
import json
import pathlib
from collections.abc import Callable

from halrp_jax import data, files, keys
from halrp_jax.devices import processes
from halrp_jax.keys import Config
from halrp_jax.runs import standing
from halrp_jax.types import CHECKPOINTS, CONFIG, RECORD, STANDING, TASKS, UserError, brief

EXTENDED = "extended"  # in the config of a run that learned more tasks than its benchmark has
_LATER_KEYS = (*keys.NEUTRAL_KEYS, "precision")  # programs before them did what the default says
# keys of a method that came later, and what programs did before
_BEFORE = {"halrp": {"prune_scope": "all"}}


# --- config ---------------------------------------------------------------------------


def read_config(path: str) -> dict:
  """The resolved config of a run; of one that was extended, that of the run it began as.

  A run of an older version gets the defaults of keys that did not exist (`_LATER_KEYS`).
  """
  missing = f"--workdir={path}: holds no {CONFIG}; give the folder of a run"
  config = files.read_json(pathlib.Path(path) / CONFIG, missing)
  _fill_in(config)
  return {k: v for k, v in config.items() if k != EXTENDED}


def _fill_in(config: dict) -> None:
  known = keys.keys_of()
  for name in _LATER_KEYS:
    section, _, key = name.rpartition(".")
    place = config.setdefault(section, {}) if section else config
    if isinstance(place, dict):
      place.setdefault(key, known[name].default)
  if isinstance(method := config.get("method"), dict):
    for key, value in _BEFORE.get(method.get("name"), {}).items():
      method.setdefault(key, value)


def check_config(folder: pathlib.Path, config: dict) -> None:
  """Refuses a folder with another config; writes the config into a new one."""
  path = folder / CONFIG
  if not path.exists():
    if any((folder / name).exists() for name in (RECORD, CHECKPOINTS)):
      raise UserError(f"{path}: missing; --overwrite starts anew")
    files.write_json(path, config)
    return
  old = files.read_json(path, remedy="--overwrite starts anew")
  _fill_in(old)
  old, new = keys.flat(old), keys.flat(config)
  changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
  if odd := [k for k in changed if k not in (*keys.NEUTRAL_KEYS, f"{EXTENDED}.data")]:
    changes = ", ".join(f"{k} = {new.get(k)!r} (was {old.get(k)!r})" for k in odd)
    raise UserError(
      f"--workdir={folder} holds a run of another config: {changes}; take another folder, or "
      "--overwrite"
    )


@processes.on_leader
def finished_record(path: str, config: dict) -> dict | None:
  """The record of a finished run of this config; None if there is none."""
  file = pathlib.Path(path) / RECORD
  if not file.exists():
    return None
  check_config(file.parent, config)
  remedy = "delete it: the same command then writes it again from the checkpoints"
  return files.read_json(file, remedy=remedy)


# --- what it stands on ----------------------------------------------------------------


def read_standing(path: str) -> dict:
  """Reads what a run stands on; of a run of an older version, what it wrote of it."""
  for name in (STANDING, RECORD, TASKS):
    file = pathlib.Path(path) / name
    if file.exists():
      found = files.read_json(file, remedy="--overwrite starts anew")
      older = {"split_hash": found.get("split_hash")}
      return found if name == STANDING else found.get("standing", older)
  return {}


def require_standing(path: str, config: dict, now: dict) -> tuple[dict, list[str]]:
  """Refuses a run that stands on something else.

  Returns:
    What it stands on now, with all `changes`, and those of them that are new.

  Raises:
    UserError: names what differs.
  """
  before = read_standing(path)
  try:
    refused, said = standing.compare(before, now, _place(config))
    changes = list(before.get("changes", []))
  except (KeyError, TypeError, ValueError, AttributeError) as e:
    raise UserError(
      f"{path}/{STANDING}: is not what was written ({brief(e)}); --overwrite starts anew"
    ) from e
  if refused:
    raise UserError(
      f"--workdir={path} holds a run that stands on something else: {'; '.join(refused)}; "
      "go on with what it began with, or begin anew in another folder or with --overwrite"
    )
  if "flags" not in before:
    lacks = f"{path} is of a version that wrote no {STANDING}: its JAX flags, versions and machine"
    said = [f"{lacks} are not known"]
  return now | {"changes": [*changes, *said]}, said


def _place(config: dict) -> str:
  """Says where the data are, as the user gave it."""
  if EXTENDED in config:
    return f"--data={config[EXTENDED]['data']}"
  return f"data_dir={config['data_dir']}" if config["data_dir"] else ""


def check_standing(folder: pathlib.Path, config: dict, now: dict) -> tuple[dict, list[str]]:
  """Refuses a folder that stands on something else, once something is learned; writes it down."""
  if any((folder / CHECKPOINTS).glob("[!.]*")):
    found, said = require_standing(str(folder), config, now)
  else:
    found, said = {"changes": []} | now, []
  files.write_json(folder / STANDING, found)
  return found, said


def shared_read() -> Callable:
  """Builds read(config) -> the part of standing.py that the data make; it keeps no images.

  They are read once for all configs that draw the same, whatever their method and order.
  """
  known = {}

  def read(config: Config) -> dict:
    drawn_by = ("benchmark", "data_dir", "seed", "train_fraction", "allow_partial")
    values = config.to_dict()
    key = json.dumps([values[k] for k in (*drawn_by, "data", "protocol")])
    if key not in known:
      natural = dataclasses.replace(config, order="natural")
      benchmark = data.read(natural)
      tasks = {task.id: standing.of_task(task) for task in benchmark.tasks}
      known[key] = tasks, benchmark.split_hash
    tasks, split_hash = known[key]
    return {"tasks": list(data.in_order(config, tasks)), "split_hash": split_hash}

  return read


def require_same_data(config: Config, path: str, read: Callable, show: Callable) -> None:
  """Refuses a finished run that stands on other data or JAX flags; without data it stays as it is.

  Nothing is computed, so it makes no difference on which machine this is.
  """
  now = {"flags": standing.flags()}
  try:
    now |= read(config)
  except UserError as e:
    show({"event": "standing", "said": [f"{path}: its data can't be compared ({brief(e)})"]})
  _, said = require_standing(path, config.to_dict(), now)
  if said:
    show({"event": "standing", "said": said})
