"""The standing of a run: what its numbers depend on beside the config, as one JSON object.

  tasks         per task, in the order of training: id, name, and the hashes `data` (all images and
                labels) and `split` (which of them train, validate and test; data/content.py)
  split_hash    one hash for all tasks; the only entry that older versions wrote
  input_shape, num_classes    of the network
  base          SHA-256 of the pretrained base, if there is one
  extends       fingerprint of the state that `extend` started from
  flags         JAX flags that change numbers
  machine       what changes the rounding at most: versions, platform, processor, XLA's flags
  changes       lines that say which entries of `machine` changed while the run was computed

It is compared when a run resumes, is extended, or is combined with others in a report. A difference
in `machine` is shown and recorded; any other difference is refused.
"""

import contextlib
import os
import platform
from importlib import metadata

import jax

import halrp_jax
from halrp_jax.types import JAX_FLAGS, Benchmark, Task

_ROUNDING_FLAGS = ("jax_disable_jit", "jax_disable_most_optimizations", "jax_softmax_custom_jvp")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy")
_SHOWN = 3  # tasks that an error names at most


def of(benchmark: Benchmark) -> dict:
  """Returns the standing of a run without `machine`, which would start JAX's backend."""
  return {
    "tasks": [of_task(task) for task in benchmark.tasks],
    "split_hash": benchmark.split_hash,
    "input_shape": list(map(int, benchmark.image_shape)),
    "num_classes": benchmark.max_classes,
    "flags": flags(),
  }


def of_task(task: Task) -> dict:
  """Returns the entry of one task; a hash is "" if it is not known."""
  return {"id": task.id, "name": task.name, "data": task.data_hash, "split": task.split_hash}


def flags() -> dict:
  """Returns the values of `JAX_FLAGS` in this process."""
  return {name: _plain(getattr(jax.config, name, value)) for name, value in JAX_FLAGS.items()}


def _plain(value: object) -> bool | int | str | None:
  """Returns a flag's value as JSON can hold it."""
  return value if isinstance(value, bool | int | str | None) else str(value)


def versions() -> dict[str, str | None]:
  """Returns the versions of Python and of the packages that compute; None: not installed."""

  def version(name):
    with contextlib.suppress(metadata.PackageNotFoundError):
      return metadata.version(name)
    return None

  found = {name: version(name) for name in _PACKAGES}
  return {"halrp_jax": halrp_jax.__version__, "python": platform.python_version()} | found


def machine() -> dict:
  """Returns the entry `machine` for this process; starts JAX's backend."""
  device = jax.devices()[0]
  found = {
    "platform": device.platform,
    "device": device.device_kind,
    "num_devices": jax.device_count(),
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
  }
  if device.platform == "cpu":  # vector width and number of threads change the rounding
    found |= {"processor": _processor(), "cores": _cores()}
  rounding = {name: _plain(getattr(jax.config, name, False)) for name in _ROUNDING_FLAGS}
  return found | rounding | versions()


def _processor() -> str:
  """Returns the model name of the processor."""
  with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as stream:
    for line in stream:
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  return platform.processor() or platform.machine()


def _cores() -> int:
  """Returns the number of cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def compare(before: dict, now: dict, source: str = "") -> tuple[list[str], list[str]]:
  """Compares two standings of a run. Entries that one of them does not have are not compared.

  Args:
    before: the recorded one.
    now: that of this process.
    source: where the data are now, such as "data_dir=DIR", for the lines.

  Returns:
    Lines that name differences with which the run can't be resumed, and lines that name differences
    that may change the rounding.
  """
  refused = _compare_tasks(before, now, f" in {source}" if source else "")
  for key in ("input_shape", "num_classes"):
    if key in before and key in now and before[key] != now[key]:
      refused.append(f"{key} = {now[key]} (was {before[key]})")
  if _differ(before.get("base"), now.get("base")):
    refused.append("base is another file")
  if _differ(before.get("extends"), now.get("extends")):
    refused.append("the run to be extended has another state")
  refused += _changes(before.get("flags", {}), now.get("flags", {}))
  return refused, _changes(before.get("machine", {}), now.get("machine", {}))


def _compare_tasks(before: dict, now: dict, source: str) -> list[str]:
  """Returns lines that name the tasks with other data; `source` ends each line."""
  if "tasks" not in before or "tasks" not in now:
    old, new = before.get("split_hash") or "", now.get("split_hash") or ""
    if not _differ(old, new):
      return []
    return [f"other images, labels or splits{source} (split hash {new[:16]}, was {old[:16]})"]
  others, redrawn = [], []
  for old, new in zip(before["tasks"], now["tasks"], strict=False):
    task = f"{old['name']!r} (id {old['id']})"
    if new["id"] != old["id"] or _differ(old["data"], new["data"]):
      others.append(task)
    elif _differ(old["split"], new["split"]):
      redrawn.append(task)
  lines = [f"{_have(others)} other images or labels{source}"] if others else []
  lines += [f"{_have(redrawn)} other splits of the same images{source}"] if redrawn else []
  old_count, new_count = len(before["tasks"]), len(now["tasks"])
  if old_count != new_count:
    lines.append(f"there are {new_count} tasks{source} (were {old_count})")
  return lines


def _have(tasks: list[str]) -> str:
  """Returns the beginning of a sentence, such as "tasks 'a' (id 0), 'b' (id 1) have"."""
  if len(tasks) == 1:
    return f"task {tasks[0]} has"
  more = f" and {len(tasks) - _SHOWN} more" if len(tasks) > _SHOWN else ""
  return f"tasks {', '.join(tasks[:_SHOWN])}{more} have"


def _differ(old: str | None, new: str | None) -> bool:
  """Tells whether two hashes differ; one that is not known differs from none."""
  return bool(old and new and old != new)


def _changes(before: dict, now: dict) -> list[str]:
  """Returns a line for every key of both whose value has changed."""
  keys = [k for k in before if k in now and before[k] != now[k]]
  return [f"{k} = {now[k]!r} (was {before[k]!r})" for k in keys]
