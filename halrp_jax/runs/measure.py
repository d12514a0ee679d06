"""Measures seconds and memory of a run, and names its device."""

import contextlib
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator

import jax

from halrp_jax.devices import allocator


def seconds(learning: dict, evaluating: dict, select: float) -> dict[str, float]:
  """Returns the wall-clock seconds of one task by kind of work.

  Args:
    learning: measurement of `Method.learn` by `measure`.
    evaluating: measurement of the evaluation by `measure`.
    select: seconds that `learn` spent on the SVD and on choosing ranks.
  """
  return {
    "compile": learning["compile"] + evaluating["compile"],
    "select": select,
    "train": max(learning["wall"] - learning["compile"] - select, 0.0),
    "evaluate": max(evaluating["wall"] - evaluating["compile"], 0.0),
  }


# --- effects --------------------------------------------------------------------------


@contextlib.contextmanager
def compile_clock() -> Iterator[Callable[[], float]]:
  """Yields a function that returns the seconds spent on tracing and compiling in this block."""
  total = 0.0

  def listen(event: str, duration_secs: float, **_):
    nonlocal total
    if event.startswith("/jax/core/compile/"):
      total += duration_secs

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield lambda: total
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def measure(compile_seconds: Callable[[], float]) -> Iterator[dict[str, float]]:
  """Yields a dict that holds the seconds of the block when it ends: "wall" and "compile".

  Args:
    compile_seconds: result of `compile_clock`.
  """
  seconds = {}
  wall, compiling = time.perf_counter(), compile_seconds()
  yield seconds
  seconds["wall"] = time.perf_counter() - wall
  seconds["compile"] = min(compile_seconds() - compiling, seconds["wall"])


def forget_peak() -> None:
  """Resets the process's peak memory where the system can (Linux); accelerators can't.

  Returns freed memory to the system first, since an earlier run of the process may have needed
  more than this one. The caller has collected garbage.
  """
  allocator.trim()
  with contextlib.suppress(OSError), open("/proc/self/clear_refs", "wb") as stream:
    stream.write(b"5")


def peak_memory() -> int:
  """Returns the peak memory in bytes: of the accelerator, or of this process on the CPU.

  The process's peak counts from `forget_peak`, the accelerator's from the start of the process.
  """
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("peak_bytes_in_use") or _peak_of_process()


def _peak_of_process() -> int:
  """Returns the peak memory of this process in bytes.

  `getrusage` also counts the process that this one was forked from, so it is used only where there
  is no /proc.
  """
  with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as stream:
    return 1024 * next(int(line.split()[1]) for line in stream if line.startswith("VmHWM"))
  unit = 1 if platform.system() == "Darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device() -> str:
  """Returns the number and kind of the devices, and the number of host cores, as one text."""
  device = jax.devices()[0]
  return (
    f"{jax.device_count()} x {device.device_kind} ({device.platform}), {os.cpu_count()} host cores"
  )
