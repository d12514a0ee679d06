"""Reads the records of runs, groups runs of one setting, and computes the numbers of a group.

A setting is the config without order, seed and the keys that do not change results.
`config.setting_of` computes it, and records store it. A group is all runs of one setting on the
same data, with the same JAX flags (`unusual_flags`). Data are compared by the hashes of their
images and labels. Records of older versions have no such hashes. For them the benchmark and the
names of the tasks are compared, and the split hashes of runs that have the same seed.

Means are over all runs of a group. The accuracy of a task under an order is the mean over the seeds
of that order.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from halrp_jax import metrics
from halrp_jax.types import CHECKPOINTS, CONFIG, JAX_FLAGS, RECORD, SCHEMA, STANDING, TASKS, Json

# JSON files that a run writes beside the records
_NOT_RECORDS = {CONFIG, TASKS, STANDING, "tune.json"}

# Variants of a setting that have rows of their own in the tables; "" is the setting itself.
TEST_BATCH, RUNNING = "test-batch statistics", "running statistics"
FROZEN = "statistics of the base"
RETROSPECTIVE = "retrospective pruning"
VARIANTS = ("", TEST_BATCH, RUNNING, FROZEN, RETROSPECTIVE)
# value of method.batch_norm -> variant, and back
_VARIANT_OF = {"population": "", "batch": TEST_BATCH, "running": RUNNING, "frozen": FROZEN}
KINDS = {variant: kind for kind, variant in _VARIANT_OF.items()}
# The networks for which batch_norm=own does not mean running statistics, and those that have no
# BatchNorm. tests/reports/test_records.py compares both with halrp_jax/models/.
_OWN = {"alexnet": TEST_BATCH}
_WITHOUT_BATCH_NORM = (
  *("mlp", "saha_lenet", "saha_lenet_without_lrn"),
  *("vit_ti16", "vit_s16", "vit_b16"),
)


class Run(NamedTuple):
  """A record that was read."""

  path: str  # relative to the searched folder: folder of a record.json, or another JSON file
  record: Json  # content of record.json, with its `setting`

  @property
  def task_ids(self) -> tuple[int, ...]:
    """Returns the ids of the tasks in the order of training."""
    return tuple(self.record["task_ids"])

  @property
  def accuracy(self) -> np.ndarray:
    """Returns the accuracy matrix [T, T] in percent, NaN where nothing was measured."""
    return np.array(self.record["accuracy"], float)


class Skipped(NamedTuple):
  """A file that was left out of a report."""

  path: str  # as `Run.path`
  reason: str


class Group(NamedTuple):
  """All runs of one setting on the same data."""

  method: str
  benchmark: str
  network: str
  fraction: float  # of the training images that was used
  partial: bool  # whether there were less data than the protocol asks for
  setting: Json  # {dotted key: value}
  runs: tuple[Run, ...]

  @property
  def num_orders(self) -> int:
    """Returns the number of different task orders of the runs."""
    return len({run.task_ids for run in self.runs})


# --- reading --------------------------------------------------------------------------


def read(
  root: str, setting_of: Callable[[Json], Json] | None = None
) -> tuple[list[Run], list[Skipped]]:
  """Reads all records below a folder.

  Args:
    root: the folder.
    setting_of: computes the setting from a record's config (`config.setting_of`). Records of older
      versions need it, because they have no setting or one without the newest keys. None: the
      setting in the record is used.

  Returns:
    The records, and the JSON files that can't be used as records.
  """
  runs: list[Run] = []
  skipped: list[Skipped] = []
  for folder, folders, names in os.walk(root):
    folders[:] = sorted(f for f in folders if f != CHECKPOINTS)
    relative = pathlib.Path(folder).relative_to(root)
    if CONFIG in names and RECORD not in names:
      skipped.append(Skipped(str(relative), "not finished: the command of the run resumes it"))
    for name in sorted(n for n in names if n.endswith(".json") and n not in _NOT_RECORDS):
      path = str(relative if name == RECORD else relative / name)
      try:
        content = json.loads((pathlib.Path(folder) / name).read_text(encoding="utf-8"))
      except (OSError, ValueError, RecursionError) as e:
        skipped.append(Skipped(path, f"can't be read ({_brief(e)})"))
        continue
      if wrong := problem(content):
        skipped.append(Skipped(path, wrong))
      elif setting_of:
        runs.append(Run(path, content | {"setting": setting_of(content["config"])}))
      elif "network" not in (content.get("setting") or ()):
        skipped.append(Skipped(path, "was written by a version that stored no setting"))
      else:
        runs.append(Run(path, content))
  return runs, skipped


def _brief(error: Exception) -> str:
  """Returns an error message on one line of at most 100 characters."""
  return " ".join(str(error).split())[:100] or type(error).__name__


# the fields that a record must have
_TYPES = {
  "method": str,
  "benchmark": str,
  "order": str,
  "seed": int,
  "task_ids": list,
  "accuracy": list,
  "increment": list,
  "seconds": list,
  "partial": bool,
  "split_hash": str,
  "config": dict,
  "versions": dict,
  "device": str,
  "date": str,
}


def problem(content: object) -> str:
  """Returns why the content of a JSON file can't be used as a record, or "" if it can."""
  if not isinstance(content, dict) or not {"schema", "accuracy"} <= content.keys():
    return "is not a record of a run"
  if content["schema"] != SCHEMA:
    return f"has schema {content['schema']!r}, expected {SCHEMA}"
  wrong = [k for k, kind in _TYPES.items() if not isinstance(content.get(k), kind)]
  if wrong:
    return f"damaged: {', '.join(wrong)} missing or of another type"
  return _problem_of_numbers(content)


def _problem_of_numbers(record: Json) -> str:
  """Returns what is wrong with the values of a record whose fields have the right types, or ""."""
  ids = record["task_ids"]
  if not ids or not all(type(i) is int for i in ids) or len(set(ids)) != len(ids):
    return "damaged: task_ids is not a list of different whole numbers"
  try:
    accuracy = np.array(record["accuracy"], float)
    growth = np.array(record["increment"], float)
    seconds = np.array([sum(s.values()) for s in record["seconds"]], float)
  except (TypeError, ValueError, AttributeError):
    return "damaged: accuracy, increment or seconds are not numbers"
  if accuracy.shape != (len(ids), len(ids)):
    return f"damaged: accuracy has shape {accuracy.shape}, expected {(len(ids), len(ids))}"
  measured = accuracy[np.isfinite(accuracy)]
  if not np.isfinite(accuracy[-1]).all() or measured.min() < 0 or measured.max() > 100:
    return "damaged: accuracies after the last task are missing or not between 0 and 100"
  if not len(growth) or not np.isfinite(growth).all() or not np.isfinite(seconds).all():
    return "damaged: increment or seconds are missing, NaN or infinite"
  config = record["config"]
  method = config.get("method")
  name = method.get("name") if isinstance(method, dict) else None
  if name != record["method"] or not isinstance(config.get("network"), str):
    return "damaged: its config is of another method or has no network"
  if not isinstance(config.get("train_fraction"), (int, float)):
    return "damaged: its config has no train_fraction"
  try:
    data_of(record)
    unusual_flags(record)
  except (KeyError, TypeError, ValueError, AttributeError):
    return "damaged: standing does not have the expected fields"
  return ""


def statistics(setting: Json) -> str:
  """Returns which statistics BatchNorm evaluates with in a setting.

  Returns:
    `TEST_BATCH`, `RUNNING` or `FROZEN`; "" for those of the training images, and for networks
    without BatchNorm.
  """
  network = str(setting.get("network")).partition(",")[0]  # without its options
  kind = setting.get("method.batch_norm", "own")
  if network in _WITHOUT_BATCH_NORM:
    return ""
  return _VARIANT_OF[kind] if kind in _VARIANT_OF else _OWN.get(network, RUNNING)


def variant(setting: Json, standard: Json) -> str | None:
  """Returns how a setting differs from a standard setting.

  Returns:
    One of `VARIANTS`; None if other keys differ too. If the BatchNorm statistics differ, the
    variant names only them, and `method.prune_scope` is not compared: older versions, which had no
    population statistics, could only prune retrospectively.
  """
  different = {k for k in setting.keys() | standard.keys() if setting.get(k) != standard.get(k)}
  if different - {"method.batch_norm", "method.prune_scope"}:
    return None
  if (found := statistics(setting)) != statistics(standard):
    return found
  retrospective = "method.prune_scope" in different and setting.get("method.prune_scope") == "all"
  return RETROSPECTIVE if retrospective else ""


def group(runs: list[Run]) -> tuple[list[Group], list[Skipped]]:
  """Groups runs by setting and data.

  Returns:
    The groups, and the runs that were left out because there is a newer one of the same setting,
    order and seed.
  """
  found: dict[tuple, dict[tuple, Run]] = {}
  skipped: list[Skipped] = []
  runs = sorted(runs, key=lambda r: (r.record["date"], r.path))
  for run, data in zip(runs, _data(runs), strict=True):
    *head, setting = _key(run)
    key, cell = (*head, data, setting), (run.task_ids, run.record["seed"])
    if old := found.setdefault(key, {}).get(cell):
      reason = f"{run.path} is a newer run of the same setting, data, order and seed"
      skipped.append(Skipped(old.path, reason))
    found[key][cell] = run
  groups: list[Group] = []
  for (method, benchmark, network, fraction, partial, *_), cells in found.items():
    members = tuple(sorted(cells.values(), key=lambda r: r.path))
    setting = _setting(members[0])
    groups.append(Group(method, benchmark, network, fraction, partial, setting, members))
  return sorted(groups, key=lambda g: (g.benchmark, g.network, g.fraction, g.method)), skipped


def _key(run: Run) -> tuple:
  """Returns the first five fields of `Group`, the task ids, and the setting as JSON."""
  record, setting = run.record, _setting(run)
  # 1 and 1.0 are the same value
  whole = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in setting.items()}
  head = (record["method"], record["benchmark"], setting["network"])
  head += (float(record["config"]["train_fraction"]), record["partial"])
  whole["base"] = record.get("standing", {}).get("base")  # contents of the pretrained base
  return (*head, tuple(sorted(run.task_ids)), json.dumps(whole, sort_keys=True))


def _setting(run: Run) -> Json:
  """Returns the setting of a run, with the JAX flags that differ from their defaults."""
  return run.record["setting"] | unusual_flags(run.record)


def _data(runs: list[Run]) -> list[tuple]:
  """Returns a key for the data of each run: runs of one setting have equal keys for equal data."""
  found: list[tuple] = []
  splits: dict[tuple, dict[int, set[str]]] = {}  # (setting, names of tasks) -> seed -> split hashes
  for run in runs:
    if hashes := data_of(run.record):
      found.append(tuple(sorted(hashes.items())))
    else:
      names = tuple(sorted(map(str, run.record.get("task_names", ()))))
      found.append(names)
      seeds = splits.setdefault((_key(run), names), {})
      seeds.setdefault(run.record["seed"], set()).add(run.record["split_hash"])
  for i, run in enumerate(runs):
    seeds = splits.get((_key(run), found[i]), {})
    # runs of one seed draw the same splits, so different split hashes mean different data
    if any(len(hashes) > 1 for hashes in seeds.values()):
      found[i] = (*found[i], run.record["split_hash"])
  return found


def notes(groups: list[Group]) -> list[str]:
  """Returns sentences about the comparability of the runs that a report averages."""
  runs = [run for found in groups for run in found.runs]
  lines = []
  if unknown := sum(data_of(run.record) is None for run in runs):
    lines.append(
      f"{unknown} of {len(runs)} runs were made by versions that recorded no hash of the data: "
      "their data are distinguished by benchmark, task names and, for equal seeds, split hashes."
    )
  if mixed := sum(len({_machine(run) for run in found.runs}) > 1 for found in groups):
    lines.append(
      f"In {mixed} of {len(groups)} groups the runs were made with several versions or machines: "
      "results may differ by rounding."
    )
  return lines


def _machine(run: Run) -> str:
  """Returns a text that is equal for runs with the same versions on the same kind of machine."""
  return json.dumps([run.record["versions"], run.record["device"]], sort_keys=True)


def differences(setting: Json, other: Json) -> list[str]:
  """Returns "key = value" for each key in which a setting differs from another one."""
  keys = sorted(k for k in setting.keys() | other.keys() if setting.get(k) != other.get(k))
  return [f"{k} = {setting.get(k)}" for k in keys]


def data_of(record: Json) -> dict[int, str] | None:
  """Returns the data hashes of a record's tasks, {task id: hash}.

  Returns:
    None if a hash is missing, as in records of older versions.

  Raises:
    ValueError, TypeError, KeyError or AttributeError: if the record is damaged.
  """
  if "standing" not in record:
    return None
  found = {task["id"]: task["data"] for task in record["standing"]["tasks"]}
  if not all(type(i) is int and isinstance(x, str) for i, x in found.items()):
    raise ValueError("standing: ids or hashes of tasks have another type")
  return found if all(found.values()) else None


def short_data(record: Json) -> str:
  """Returns the first eight digits of a hash of a record's data; "-" if they are not known."""
  found = data_of(record)
  return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:8] if found else "-"


def unusual_flags(record: Json) -> Json:
  """Returns the JAX flags of a record that differ from JAX's defaults, {name: value}.

  A matrix product precision of float32 is not counted, because CPUs have it by default.
  """
  found = record.get("standing", {}).get("flags", {})
  return {
    name: value
    for name, value in found.items()
    if JAX_FLAGS.get(name) != value
    and (name, value) not in (("jax_default_matmul_precision", p) for p in ("highest", "float32"))
  }


# --- numbers of a group ---------------------------------------------------------------


class Number(NamedTuple):
  """A number with its standard error."""

  value: float
  error: float | None  # standard error of the mean over runs; None: not known


def mean(values: Sequence[float] | np.ndarray) -> Number:
  """Returns mean and standard error (sample deviation / sqrt(n)); no error for a single value."""
  values = np.asarray(values, float)
  error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
  return Number(float(values.mean()), error)


def by_order(found: Group) -> np.ndarray:
  """Returns the final accuracies of a group by task order.

  Returns:
    [num_orders, T] in percent, a row per order and a column per task by increasing task id, each
    value the mean over the seeds of the order.
  """
  column = {i: k for k, i in enumerate(sorted(found.runs[0].task_ids))}  # ids may have gaps
  rows: dict[tuple, list] = {}
  for run in found.runs:
    final = metrics.by_task_id(run.accuracy[-1], [column[i] for i in run.task_ids])
    rows.setdefault(run.task_ids, []).append(final)
  return np.array([np.mean(finals, 0) for finals in rows.values()])


def number(found: Group, metric: str) -> Number | None:
  """Returns a metric of a group.

  Args:
    found: the group.
    metric: "accuracy" (percent), "increment" (growth as a fraction of the base), "bwt" (points),
      "seconds" (of the whole run), "mopd" or "aopd" (points).

  Returns:
    The mean over the runs and its standard error. "mopd" and "aopd" are computed from all runs
    together and have no standard error. None where the metric is not defined: "mopd" and "aopd"
    need two orders, and "bwt" more than one task.
  """
  if metric in ("mopd", "aopd"):
    if found.num_orders < 2:
      return None
    return Number(getattr(metrics, metric)(by_order(found)), None)
  values = [value for run in found.runs if (value := _of_run(run, metric)) is not None]
  return mean(values) if len(values) == len(found.runs) else None


def _of_run(run: Run, metric: str) -> float | None:
  """Returns a metric of a single run (see `number`)."""
  if metric == "accuracy":
    return metrics.average_accuracy(run.accuracy)
  if metric == "bwt":
    return metrics.bwt(run.accuracy)
  if metric == "increment":
    return run.record["increment"][-1]
  return sum(sum(s.values()) for s in run.record["seconds"])


def training_seconds(run: Run) -> list[float]:
  """Returns the seconds of training and rank selection for each group of tasks learned jointly.

  Compilation and evaluation are not included.
  """
  return [s.get("train", 0.0) + s.get("select", 0.0) for s in run.record["seconds"]]
