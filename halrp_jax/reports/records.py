"""The records below a folder, and what they say together: means over runs, metrics over orders.

A group is all runs of one setting on the same data, the setting being everything in the config but
order, seed and what changes no result, and the JAX flags that are not as usual (`config.setting_of`
makes it, a record holds it). The data are known by the hashes of their images and labels; records
of older versions have none: there the benchmark,
the tasks' names and, of equal seeds, the split hash are compared. Means are over all runs of a
group; a task's accuracy under an order is its mean over the seeds of that order.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from halrp_jax import metrics
from halrp_jax.types import CHECKPOINTS, CONFIG, JAX_FLAGS, RECORD, SCHEMA, STANDING, TASKS

# JSON files of ours that are no records
_OURS = {CONFIG, TASKS, STANDING, "tune.json"}


# kinds of BatchNorm statistics that a row of a table says; those that need no word say nothing
TEST_BATCH, RUNNING = "test-batch statistics", "running statistics"
RETROSPECTIVE = "retrospective pruning"
VARIANTS = ("", TEST_BATCH, RUNNING, RETROSPECTIVE)
_STATISTICS = {"population": "", "batch": TEST_BATCH, "running": RUNNING}
KINDS = {word: kind for kind, word in _STATISTICS.items()}  # values of method.batch_norm
# what batch_norm=own meant, and networks on which it means nothing (a test holds both to models/)
_OWN = {"alexnet": TEST_BATCH}
_WITHOUT_BATCH_NORM = ("mlp", "saha_lenet", "saha_lenet_without_lrn")


class Run(NamedTuple):
  place: str  # folder of the run, or the file's name, below the folder that was searched
  record: dict  # with its `setting`

  @property
  def task_ids(self) -> tuple[int, ...]:
    return tuple(self.record["task_ids"])

  @property
  def accuracy(self) -> np.ndarray:
    """[T, T], NaN where nothing was measured."""
    return np.array(self.record["accuracy"], float)


class Skipped(NamedTuple):
  place: str
  reason: str


class Group(NamedTuple):
  method: str
  benchmark: str
  network: str
  fraction: float  # of the training images
  partial: bool  # less data than the protocol asks for
  setting: dict  # dotted key -> value
  runs: tuple[Run, ...]

  @property
  def num_orders(self) -> int:
    return len({run.task_ids for run in self.runs})


# --- reading --------------------------------------------------------------------------


def read(
  root: str, setting_of: Callable[[dict], dict] | None = None
) -> tuple[list[Run], list[Skipped]]:
  """Reads every record below a folder.

  Args:
    root: the folder.
    setting_of: config of a record -> its setting, for records of older versions, that hold none,
      or lack newer keys (`config.setting_of`). None: the setting is the one in the record.

  Returns:
    The records, and what looked like one but can't be used.
  """
  runs, skipped = [], []
  for folder, folders, names in os.walk(root):
    folders[:] = sorted(f for f in folders if f != CHECKPOINTS)
    place = pathlib.Path(folder).relative_to(root)
    if CONFIG in names and RECORD not in names:
      skipped.append(Skipped(str(place), "not finished: the same command goes on"))
    for name in sorted(n for n in names if n.endswith(".json") and n not in _OURS):
      where = str(place if name == RECORD else place / name)
      try:
        content = json.loads((pathlib.Path(folder) / name).read_text(encoding="utf-8"))
      except (OSError, ValueError, RecursionError) as e:
        skipped.append(Skipped(where, f"can't be read ({_brief(e)})"))
        continue
      if wrong := problem(content):
        skipped.append(Skipped(where, wrong))
      elif setting_of:
        runs.append(Run(where, content | {"setting": setting_of(content["config"])}))
      elif "network" not in (content.get("setting") or ()):
        skipped.append(Skipped(where, "is of a version that wrote no setting"))
      else:
        runs.append(Run(where, content))
  return runs, skipped


def _brief(error: Exception) -> str:
  return " ".join(str(error).split())[:100] or type(error).__name__


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


def problem(content) -> str:
  """Why this is no record that we can use; nothing if it is one."""
  if not isinstance(content, dict) or not {"schema", "accuracy"} <= content.keys():
    return "is no record of a run"
  if content["schema"] != SCHEMA:
    return f"has schema {content['schema']!r}; this version reads {SCHEMA}"
  wrong = [k for k, kind in _TYPES.items() if not isinstance(content.get(k), kind)]
  if wrong:
    return f"damaged: {', '.join(wrong)} missing or of another type"
  return _problem_of_numbers(content)


def _problem_of_numbers(record: dict) -> str:
  ids = record["task_ids"]
  if not ids or not all(type(i) is int for i in ids) or len(set(ids)) != len(ids):
    return "damaged: task_ids are no list of different numbers"
  try:
    accuracy = np.array(record["accuracy"], float)
    growth = np.array(record["increment"], float)
    seconds = np.array([sum(s.values()) for s in record["seconds"]], float)
  except (TypeError, ValueError, AttributeError):
    return "damaged: accuracy, increment or seconds are no numbers"
  if accuracy.shape != (len(ids), len(ids)):
    return f"damaged: accuracy is {accuracy.shape}, not {len(ids)} x {len(ids)}"
  measured = accuracy[np.isfinite(accuracy)]
  if not np.isfinite(accuracy[-1]).all() or measured.min() < 0 or measured.max() > 100:
    return "damaged: accuracies after the last task are missing or no percentages"
  if not len(growth) or not np.isfinite(growth).all() or not np.isfinite(seconds).all():
    return "damaged: increment or seconds are no finite numbers"
  config = record["config"]
  method = config.get("method")
  name = method.get("name") if isinstance(method, dict) else None
  if name != record["method"] or not isinstance(config.get("network"), str):
    return "damaged: its config does not belong to it"
  if not isinstance(config.get("train_fraction"), (int, float)):
    return "damaged: its config has no train_fraction"
  try:
    data_of(record), unusual_flags(record)
  except (KeyError, TypeError, ValueError, AttributeError):
    return "damaged: standing is not what was written"
  return ""


def statistics(setting: dict) -> str:
  """Returns which statistics BatchNorm evaluated with, "" for those of the training images."""
  network, kind = setting.get("network"), setting.get("method.batch_norm", "own")
  if network in _WITHOUT_BATCH_NORM:
    return ""
  return _STATISTICS[kind] if kind in _STATISTICS else _OWN.get(network, RUNNING)


def variant(setting: dict, standard: dict) -> str | None:
  """Returns how a setting differs from a standard one: one of `VARIANTS`; None: otherwise.

  With statistics other than those of the training images it makes no difference to the name how
  HALRP pruned: such runs were made before it could prune each task once.
  """
  odd = {k for k in setting.keys() | standard.keys() if setting.get(k) != standard.get(k)}
  if odd - {"method.batch_norm", "method.prune_scope"}:
    return None
  if (found := statistics(setting)) != statistics(standard):
    return found
  retrospective = "method.prune_scope" in odd and setting.get("method.prune_scope") == "all"
  return RETROSPECTIVE if retrospective else ""


def group(runs: list[Run]) -> tuple[list[Group], list[Skipped]]:
  """Groups runs of one setting and data; of two with one order and seed the newer one counts."""
  found: dict[tuple, dict[tuple, Run]] = {}
  skipped = []
  runs = sorted(runs, key=lambda r: (r.record["date"], r.place))
  for run, data in zip(runs, _data(runs), strict=True):
    *head, setting = _key(run)
    key, cell = (*head, data, setting), (run.task_ids, run.record["seed"])
    if old := found.setdefault(key, {}).get(cell):
      skipped.append(Skipped(old.place, f"{run.place} is a newer run of the same"))
    found[key][cell] = run
  groups = [
    Group(*key[:5], _setting(runs[0]), runs)
    for key, runs in (
      (key, tuple(sorted(cells.values(), key=lambda r: r.place))) for key, cells in found.items()
    )
  ]
  return sorted(groups, key=lambda g: (g.benchmark, g.network, g.fraction, g.method)), skipped


def _key(run: Run) -> tuple:
  """Returns the first five fields of `Group`, the tasks, and the setting as a text."""
  record, setting = run.record, _setting(run)
  # 1 and 1.0 are one value
  whole = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in setting.items()}
  head = (record["method"], record["benchmark"], setting["network"])
  head += (float(record["config"]["train_fraction"]), record["partial"])
  return (*head, tuple(sorted(run.task_ids)), json.dumps(whole, sort_keys=True))


def _setting(run: Run) -> dict:
  """Returns the setting of a run and the JAX flags that are not as usual."""
  return run.record["setting"] | unusual_flags(run.record)


def _data(runs: list[Run]) -> list[tuple]:
  """Returns what tells the data of each run from those of others of its setting."""
  found, splits = [], {}
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
    if any(len(hashes) > 1 for hashes in seeds.values()):  # draws are equal, so the data differ
      found[i] = (*found[i], run.record["split_hash"])
  return found


def notes(groups: list[Group]) -> list[str]:
  """Returns sentences that say what the means of a report take for granted."""
  runs = [run for found in groups for run in found.runs]
  lines = []
  if unknown := sum(data_of(run.record) is None for run in runs):
    lines.append(
      f"{unknown} of {len(runs)} runs are of versions that recorded no hash of their data: their "
      "data are told apart by the benchmark and the names of the tasks."
    )
  if mixed := sum(len({_machine(run) for run in found.runs}) > 1 for found in groups):
    lines.append(
      f"The runs of {mixed} of {len(groups)} settings are of several versions or machines: the "
      "last bits may differ."
    )
  return lines


def _machine(run: Run) -> str:
  return json.dumps([run.record["versions"], run.record["device"]], sort_keys=True)


def differences(setting: dict, other: dict) -> list[str]:
  """`key = value` for each key in which a setting differs from another."""
  keys = sorted(k for k in setting.keys() | other.keys() if setting.get(k) != other.get(k))
  return [f"{k} = {setting.get(k)}" for k in keys]


def data_of(record: dict) -> dict[int, str] | None:
  """Returns the hashes of all images of a record's tasks by id; None of an older version.

  Raises:
    ValueError, TypeError, KeyError or AttributeError: if the record is damaged.
  """
  if "standing" not in record:
    return None
  found = {task["id"]: task["data"] for task in record["standing"]["tasks"]}
  if not all(type(i) is int and isinstance(x, str) for i, x in found.items()):
    raise ValueError("ids and hashes of tasks")
  return found if all(found.values()) else None


def short_data(record: dict) -> str:
  """Returns eight digits that stand for the data of a record; "-" of an older version."""
  found = data_of(record)
  return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:8] if found else "-"


def unusual_flags(record: dict) -> dict:
  """Returns the flags of a record that are not JAX's defaults.

  Float32 products in float32 are no difference: they are what a CPU computes by default.
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
  value: float
  error: float | None  # standard error of the mean over runs; None where there is none


def mean(values) -> Number:
  """Mean and standard error (sample deviation / sqrt(n)); no error for one value."""
  values = np.asarray(values, float)
  error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
  return Number(float(values.mean()), error)


def by_order(found: Group) -> np.ndarray:
  """Final accuracies [num_orders, T], columns by original id, each the mean over its seeds."""
  place = {i: k for k, i in enumerate(sorted(found.runs[0].task_ids))}  # ids may have gaps
  rows: dict[tuple, list] = {}
  for run in found.runs:
    final = metrics.by_task_id(run.accuracy[-1], [place[i] for i in run.task_ids])
    rows.setdefault(run.task_ids, []).append(final)
  return np.array([np.mean(finals, 0) for finals in rows.values()])


def number(found: Group, metric: str) -> Number | None:
  """One of `accuracy`, `increment`, `bwt`, `seconds`, `mopd`, `aopd`; None where it has no meaning.

  The order metrics have none for fewer than two orders.
  """
  if metric in ("mopd", "aopd"):
    if found.num_orders < 2:
      return None
    return Number(getattr(metrics, metric)(by_order(found)), None)
  values = [_of_run(run, metric) for run in found.runs]
  return None if None in values else mean(values)


def _of_run(run: Run, metric: str) -> float | None:
  if metric == "accuracy":
    return metrics.average_accuracy(run.accuracy)
  if metric == "bwt":
    return metrics.bwt(run.accuracy)
  if metric == "increment":
    return run.record["increment"][-1]
  return sum(sum(s.values()) for s in run.record["seconds"])


def training_seconds(run: Run) -> list[float]:
  """Per group of tasks: training and selection, without compilation and evaluation."""
  return [s.get("train", 0.0) + s.get("select", 0.0) for s in run.record["seconds"]]
