"""Seconds, memory and device of a run."""

import contextlib
import gc
import os
import platform
import resource
import time

import jax

from halrp_jax.devices import allocator


def seconds(learning: dict, evaluating: dict, select: float) -> dict[str, float]:
  """Returns the wall clock of one task by kind of work; select: SVD and ranks."""
  return {
    "compile": learning["compile"] + evaluating["compile"],
    "select": select,
    "train": max(learning["wall"] - learning["compile"] - select, 0.0),
    "evaluate": max(evaluating["wall"] - evaluating["compile"], 0.0),
  }


# --- effects --------------------------------------------------------------------------


@contextlib.contextmanager
def compile_clock():
  """Yields a function that tells the seconds this process has spent on tracing and compiling."""
  total = 0.0

  def listen(event: str, seconds: float, **_):
    nonlocal total
    if event.startswith("/jax/core/compile/"):
      total += seconds

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield lambda: total
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def measure(compiled):
  """Fills a dict with the seconds of wall clock and of compilation inside the block."""
  seconds = {}
  wall, compile_ = time.perf_counter(), compiled()
  yield seconds
  seconds["wall"] = time.perf_counter() - wall
  seconds["compile"] = min(compiled() - compile_, seconds["wall"])


def forget_peak() -> None:
  """Lets the process's peak begin anew where the system can (Linux). No accelerator can.

  What was freed goes back first: an earlier run of the process may have needed more than this one.
  """
  gc.collect()
  allocator.trim()
  with contextlib.suppress(OSError), open("/proc/self/clear_refs", "wb") as stream:
    stream.write(b"5")


def peak_memory() -> int:
  """Returns the bytes of memory that this process needed at its peak.

  On an accelerator its own memory, on the CPU the process's since `forget_peak`.
  """
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("peak_bytes_in_use") or _peak_of_process()


def _peak_of_process() -> int:
  """getrusage also counts what the process was forked from, hence only where there is no /proc."""
  with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as stream:
    return 1024 * next(int(line.split()[1]) for line in stream if line.startswith("VmHWM"))
  unit = 1 if platform.system() == "Darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device() -> str:
  device = jax.devices()[0]
  return (
    f"{jax.device_count()} x {device.device_kind} ({device.platform}), {os.cpu_count()} host cores"
  )
