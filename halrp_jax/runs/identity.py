"""Compares a run with what its folder holds: the config and the standing of the run in it."""

import dataclasses
import json
import pathlib
from collections.abc import Callable

from halrp_jax import data, files, keys
from halrp_jax.devices import processes
from halrp_jax.keys import Config
from halrp_jax.runs import pretrained, standing
from halrp_jax.types import CHECKPOINTS, CONFIG, RECORD, STANDING, TASKS, UserError, brief

EXTENDED = "extended"  # key in the config of a run that `extend` made
# Keys that older versions did not have, and whose default is what those versions did.
_LATER_KEYS = (
  *keys.NEUTRAL_KEYS,
  "precision",
  "base",
  "base_source",
  "base_training",
  "protocol.head_rate",
  "protocol.crop_area",
  "data.framing",
  "data.crop",
  "data.interpolation",
  "data.num_tasks",
)
# Keys of a method that older versions did not have, with the value for what those versions did.
_OLDER_VALUES: dict[object, dict[str, str | bool | float]] = {
  "halrp": {
    "prune_scope": "all",
    "scales": True,
    "private": "all",
    "warmup_rate": 1.0,
    "budget": 0.0,
    "conv_form": "window_mean",
    "factors": "float32",
    "warmup_share": 0.0,
    "task_bound": 0.0,
    "prune_epochs": 0,
  },
  "wsn": {"scores": "random"},
}


# --- config ---------------------------------------------------------------------------


def read_config(path: str) -> dict:
  """Reads the resolved config of a run, without the entry that `extend` adds.

  Keys that the version which wrote the run did not have are filled in.

  Args:
    path: the run's folder.

  Raises:
    UserError: if the folder is not a run's.
  """
  missing = f"--workdir={path}: holds no {CONFIG}; give the folder of a run"
  config = files.read_json(pathlib.Path(path) / CONFIG, missing)
  _fill_in(config)
  return {k: v for k, v in config.items() if k != EXTENDED}


def _fill_in(config: dict) -> None:
  """Adds the keys that older versions did not have to a nested config."""
  known = keys.keys_of()
  values = config.get("data")
  if "base" not in config and config.get("benchmark") != "custom" and isinstance(values, dict):
    values["image_size"] = 0  # it was for custom alone
  if config.get("base") and config.get("benchmark") == "custom" and isinstance(values, dict):
    values.setdefault("framing", "whole")  # photographs were
  for name in _LATER_KEYS:
    section, _, key = name.rpartition(".")
    values = config.setdefault(section, {}) if section else config
    if isinstance(values, dict):
      values.setdefault(key, known[name].default)
  if isinstance(method := config.get("method"), dict):
    for key, value in _OLDER_VALUES.get(method.get("name"), {}).items():
      method.setdefault(key, value)


def check_config(folder: pathlib.Path, config: dict) -> None:
  """Writes the config into a new folder, or compares it with the one that the folder holds.

  Raises:
    UserError: names the keys that differ, except those that change no result.
  """
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
  # of a base the contents are compared (standing.py), not the path
  free = (*keys.NEUTRAL_KEYS, f"{EXTENDED}.data", "base" if old.get("base") and new["base"] else "")
  if refused := [k for k in changed if k not in free]:
    changes = ", ".join(f"{k} = {new.get(k)!r} (was {old.get(k)!r})" for k in refused)
    raise UserError(
      f"--workdir={folder} holds a run of another config: {changes}; take another folder, or "
      "start anew with --overwrite"
    )


@processes.on_leader
def finished_record(path: str, config: dict) -> dict | None:
  """Returns the record of a finished run of this config, or None if the run is not finished.

  Raises:
    UserError: if the folder holds a run of another config.
  """
  file = pathlib.Path(path) / RECORD
  if not file.exists():
    return None
  check_config(file.parent, config)
  remedy = "delete it: the same command then writes it again from the checkpoints"
  return files.read_json(file, remedy=remedy)


# --- standing -------------------------------------------------------------------------


def read_standing(path: str) -> dict:
  """Reads the standing of a run, or as much of it as the version that wrote the run recorded."""
  for name in (STANDING, RECORD, TASKS):
    file = pathlib.Path(path) / name
    if file.exists():
      found = files.read_json(file, remedy="--overwrite starts anew")
      older = {"split_hash": found.get("split_hash")}
      return found if name == STANDING else found.get("standing", older)
  return {}


def require_standing(path: str, config: dict, now: dict) -> tuple[dict, list[str]]:
  """Compares the recorded standing of a run with that of this process.

  Args:
    path: the run's folder.
    config: resolved, as a nested dict.
    now: the standing of this process.

  Returns:
    `now` with all lines of `changes`, and the lines that are new.

  Raises:
    UserError: if the run can't be resumed; names what differs.
  """
  before = read_standing(path)
  try:
    refused, new = standing.compare(before, now, _data_source(config))
    changes = list(before.get("changes", []))
  except (KeyError, TypeError, ValueError, AttributeError) as e:
    raise UserError(
      f"{path}/{STANDING}: was changed or damaged ({brief(e)}); --overwrite starts anew"
    ) from e
  if refused:
    raise UserError(
      f"--workdir={path} holds a run with other inputs: {'; '.join(refused)}; resume with those it "
      "began with, take another folder, or start anew with --overwrite"
    )
  if "flags" not in before:
    unknown = "its JAX flags, versions and machine are not known"
    new = [f"{path} is of a version that wrote no {STANDING}: {unknown}"]
  return now | {"changes": [*changes, *new]}, new


def _data_source(config: dict) -> str:
  """Returns the option with which the user named the data, such as "data_dir=DIR"."""
  if EXTENDED in config:
    return f"--data={config[EXTENDED]['data']}"
  return f"data_dir={config['data_dir']}" if config["data_dir"] else ""


def check_standing(folder: pathlib.Path, config: dict, now: dict) -> tuple[dict, list[str]]:
  """Writes the standing of this process into a folder, after comparing it if there are checkpoints.

  Returns and raises: as `require_standing`.
  """
  if any((folder / CHECKPOINTS).glob("[!.]*")):
    found, new = require_standing(str(folder), config, now)
  else:
    found, new = {"changes": []} | now, []
  files.write_json(folder / STANDING, found)
  return found, new


def shared_read() -> Callable[[Config], dict]:
  """Builds read(config) -> the entries `tasks` and `split_hash` of the standing; keeps no images.

  The data are read once for all configs that draw the same images, whatever method and order.
  """
  known = {}

  def read(config: Config) -> dict:
    drawn_by = ("benchmark", "data_dir", "seed", "train_fraction", "allow_partial")
    framed_by = ("base", "base_source", "network")
    values = config.to_dict()
    key = json.dumps([values[k] for k in (*drawn_by, *framed_by, "data", "protocol")])
    if key not in known:
      natural = dataclasses.replace(config, order="natural")
      benchmark = data.read(pretrained.framed(natural))
      tasks = {task.id: standing.of_task(task) for task in benchmark.tasks}
      known[key] = tasks, benchmark.split_hash
    tasks, split_hash = known[key]
    return {"tasks": list(data.in_order(config, tasks)), "split_hash": split_hash}

  return read


def require_same_data(
  config: Config, path: str, read: Callable[[Config], dict], show: Callable[[dict], None]
) -> None:
  """Compares a finished run with the data and the JAX flags of this process.

  The machine is not compared, since nothing is computed.

  Args:
    config: resolved.
    path: the run's folder.
    read: result of `shared_read`.
    show: is called with an event if there are no data to compare with.

  Raises:
    UserError: if data or flags differ.
  """
  now = {"flags": standing.flags()}
  try:
    now |= read(config)
    now |= {"base": pretrained.digest(config.base)} if config.base else {}
  except UserError as e:
    show({"event": "standing", "said": [f"{path}: its data can't be compared ({brief(e)})"]})
  _, new = require_standing(path, config.to_dict(), now)
  if new:
    show({"event": "standing", "said": new})
