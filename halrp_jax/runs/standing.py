"""What a run stands on, as one JSON object that is compared wherever it goes on or is put together.

  tasks         id, name and the hashes `data` and `split` (data/content.py), in the order of
                training
  split_hash    of all tasks together, all that older versions wrote
  input_shape, num_classes    of the network
  extends       hash of the state that `extend` began with
  flags         JAX flags that change numbers
  machine       what changes no more than the rounding: versions, platform, processor, XLA's flags
  changes       lines: what of `machine` has changed while the run was computed

A difference in `machine` is said and recorded, any other one is refused.
"""

import contextlib
import os
import platform
from importlib import metadata

import jax

import halrp_jax
from halrp_jax.types import JAX_FLAGS, Benchmark

_ROUNDING_FLAGS = ("jax_disable_jit", "jax_disable_most_optimizations", "jax_softmax_custom_jvp")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy")
_SHOWN = 3  # tasks that an error names


def of(benchmark: Benchmark) -> dict:
  """Returns what a run of a benchmark stands on, except `machine`: no backend is started."""
  return {
    "tasks": [of_task(task) for task in benchmark.tasks],
    "split_hash": benchmark.split_hash,
    "input_shape": list(map(int, benchmark.image_shape)),
    "num_classes": benchmark.max_classes,
    "flags": flags(),
  }


def of_task(task) -> dict:
  """Returns what is compared of one task; empty hashes are not known."""
  return {"id": task.id, "name": task.name, "data": task.data_hash, "split": task.split_hash}


def flags() -> dict:
  """Returns the values of `JAX_FLAGS` in this process."""
  return {name: _plain(getattr(jax.config, name, usual)) for name, usual in JAX_FLAGS.items()}


def _plain(value):
  return value if isinstance(value, bool | int | str | None) else str(value)


def versions() -> dict[str, str | None]:
  """Returns the versions of Python, this package and those that compute; None: not installed."""

  def version(name):
    with contextlib.suppress(metadata.PackageNotFoundError):
      return metadata.version(name)
    return None

  found = {name: version(name) for name in _PACKAGES}
  return {"halrp_jax": halrp_jax.__version__, "python": platform.python_version()} | found


def machine() -> dict:
  """Returns versions and machine; starts JAX's backend."""
  device = jax.devices()[0]
  found = {
    "platform": device.platform,
    "device": device.device_kind,
    "num_devices": jax.device_count(),
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
  }
  if device.platform == "cpu":  # the width of its vectors and the number of threads
    found |= {"processor": _processor(), "cores": _cores()}
  rounding = {name: _plain(getattr(jax.config, name, False)) for name in _ROUNDING_FLAGS}
  return found | rounding | versions()


def _processor() -> str:
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


def compare(before: dict, now: dict, place: str = "") -> tuple[list[str], list[str]]:
  """Compares what a run stood on with what it stands on now.

  Args:
    before: an object as above. What it lacks, or `now` does, is not compared.
    now: the same for this process.
    place: where the data are now, such as "data_dir=DIR".

  Returns:
    Lines that say what can't go on together, and lines that say what may round differently.
  """
  refused = _compare_tasks(before, now, f" in {place}" if place else "")
  for key in ("input_shape", "num_classes"):
    if key in before and key in now and before[key] != now[key]:
      refused.append(f"{key} = {now[key]} (was {before[key]})")
  if _differ(before.get("extends"), now.get("extends")):
    refused.append("the state that is extended is another one")
  refused += _changes(before.get("flags", {}), now.get("flags", {}))
  return refused, _changes(before.get("machine", {}), now.get("machine", {}))


def _compare_tasks(before: dict, now: dict, place: str) -> list[str]:
  if "tasks" not in before or "tasks" not in now:
    old, new = before.get("split_hash"), now.get("split_hash")
    if not _differ(old, new):
      return []
    return [f"other images, labels or splits{place} (split hash {new[:16]}, was {old[:16]})"]
  others, redrawn = [], []
  for old, new in zip(before["tasks"], now["tasks"], strict=False):
    task = f"{old['name']!r} (id {old['id']})"
    if new["id"] != old["id"] or _differ(old["data"], new["data"]):
      others.append(task)
    elif _differ(old["split"], new["split"]):
      redrawn.append(task)
  lines = [f"{_have(others)} other images or labels{place}"] if others else []
  lines += [f"{_have(redrawn)} other splits of the same images{place}"] if redrawn else []
  count = len(before["tasks"]), len(now["tasks"])
  if count[0] != count[1]:
    lines.append(f"there are {count[1]} tasks{place} (were {count[0]})")
  return lines


def _have(tasks: list[str]) -> str:
  """Returns the subject of a sentence: at most `_SHOWN` tasks, and the verb."""
  if len(tasks) == 1:
    return f"task {tasks[0]} has"
  more = f" and {len(tasks) - _SHOWN} more" if len(tasks) > _SHOWN else ""
  return f"tasks {', '.join(tasks[:_SHOWN])}{more} have"


def _differ(old: str | None, new: str | None) -> bool:
  return bool(old and new and old != new)


def _changes(before: dict, now: dict) -> list[str]:
  keys = [k for k in before if k in now and before[k] != now[k]]
  return [f"{k} = {now[k]!r} (was {before[k]!r})" for k in keys]
