"""One run on several processes, of one machine or of many hosts; no effect in a process alone.

All execute the same program and hold the same numbers; only the batches of training (`parallel`)
and of evaluation are shared out. What they must decide alike and could decide differently, since it
depends on the clock, a signal or a disk, process 0 does for all: it alone reads and writes the
run's folder. Every function that tells one process what another knows waits until all have called.
"""

import functools
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from halrp_jax import packing
from halrp_jax.devices import stop
from halrp_jax.types import Diverged, InUse, Stopped, UserError, brief, result_of

_HEARTBEAT_SECONDS = 30  # after which one that says nothing counts as gone
_CONNECT_SECONDS = 600  # for hosts that fetch their images first
_SHORT = 1000  # bytes; a message up to here is sent at once

_given: tuple[int, int] | None = None  # index and number of processes, as `start` was told or found


# --- beginning and end ----------------------------------------------------------------


def start(coordinator: str, num_processes: str, process_id: str) -> None:
  """Makes this process one of several. Call it before jax computes anything.

  With "auto" it starts jax's backend, which alone can say how many processes there are.

  Args:
    coordinator: HOST:PORT where process 0 can be reached; "auto": all three from the environment
      (Cloud TPU, Slurm, Open MPI); "": there is one process.
    num_processes: how many, with a coordinator.
    process_id: which this is, from 0.

  Raises:
    UserError: if the arguments don't fit together, or process 0 is not there in time. If another is
      not, jax aborts the process.
  """
  if not coordinator:
    if num_processes or process_id:
      raise UserError("--num_processes and --process_id belong to --coordinator=HOST:PORT")
    return
  place = _place(coordinator, num_processes, process_id)
  if place:
    _meet(coordinator, place)
  try:
    jax.distributed.initialize(
      **place,
      initialization_timeout=_CONNECT_SECONDS,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
    )
    global _given
    _given = (
      (place["process_id"], place["num_processes"])
      if place
      else (jax.process_index(), jax.process_count())
    )
  except Exception as e:  # where it asks the environment, whatever that raises
    raise UserError(f"--coordinator={coordinator}: the processes don't meet ({brief(e)})") from e


def _place(coordinator: str, num_processes: str, process_id: str) -> dict:
  if coordinator == "auto":
    if num_processes or process_id:
      raise UserError("--coordinator=auto finds --num_processes and --process_id itself")
    return {}
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
    raise UserError(f"--coordinator={coordinator}: HOST:PORT of process 0, or auto")
  if not (num_processes.isdecimal() and int(num_processes)):
    raise UserError(f"--num_processes={num_processes}: a whole number from 1 on")
  if not (process_id.isdecimal() and int(process_id) < int(num_processes)):
    raise UserError(f"--process_id={process_id}: a whole number from 0 to {num_processes} - 1")
  return {
    "coordinator_address": coordinator,
    "num_processes": int(num_processes),
    "process_id": int(process_id),
    "cluster_detection_method": "deactivate",
  }


def _meet(coordinator: str, place: dict) -> None:
  """Looks if the others can be there: jax aborts a process that waits for them in vain."""
  host, _, port = coordinator.rpartition(":")
  me = f"process {place['process_id']} of {place['num_processes']}"
  if place["process_id"] == 0:
    try:
      socket.create_server(("", int(port))).close()
    except OSError as e:
      raise UserError(f"--coordinator={coordinator}: {me} can't listen there ({brief(e)})") from e
    print(f"{me} waits at {coordinator} for the others", file=sys.stderr, flush=True)
    return
  print(f"{me} looks for process 0 at {coordinator}", file=sys.stderr, flush=True)
  end = time.monotonic() + _CONNECT_SECONDS
  while True:
    try:
      return socket.create_connection((host.strip("[]"), int(port)), 5).close()
    except OSError as e:
      if time.monotonic() > end:
        raise UserError(
          f"--coordinator={coordinator}: {me} found no process 0 there in {_CONNECT_SECONDS} s "
          f"({brief(e)})"
        ) from e
    time.sleep(0.2)


def run_to_end(main: Callable[[], int]) -> int:
  """main(), the exit code; of several processes one that fails ends here and at once.

  The others then notice. In the usual way out it would wait for them, and they for it.
  """
  try:
    code = main()
  except Exception as e:
    if count() == 1:
      raise
    if _is_lost(e):
      print(
        f"error: process {index()} of {count()}: another one has ended or can't be "
        f"reached ({brief(e)}); start all of them again: the run goes on",
        file=sys.stderr,
      )
      code = stop.EXIT_CODE
    else:
      traceback.print_exc()
      code = 1
  if code and jax.distributed.is_initialized():  # count() may be unknown, if `start` failed
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  return code


def _is_lost(error: Exception) -> bool:
  """The backends' errors have no type of their own."""
  words = ("Gloo", "NCCL", "onnection", "UNAVAILABLE", "DEADLINE_EXCEEDED")
  return any(word in str(error) for word in words)


# --- who ------------------------------------------------------------------------------


def count() -> int:
  """Returns the number of processes; does not start jax's backend after `start`, nor without it."""
  return _who()[1]


def index() -> int:
  """Returns the index of this process, from 0."""
  return _who()[0]


def _who() -> tuple[int, int]:
  if _given:
    return _given
  if jax.distributed.is_initialized():  # by a program that uses this package
    return jax.process_index(), jax.process_count()
  return 0, 1


def is_first() -> bool:
  """Whether this is the process that reads and writes the run's folder and shows what happens."""
  return index() == 0


# --- one for all ----------------------------------------------------------------------


def first_does(fn: Callable[[], object]):
  """fn() of process 0, for all: its result, or the error of ours that it raises."""
  if count() == 1:
    return fn()
  outcome = _outcome(fn) if is_first() else None
  received = _from_first(outcome)
  return result_of(outcome if is_first() else received)


def by_first(fn: Callable) -> Callable:
  """A function that `first_does`, whoever calls it."""

  @functools.wraps(fn)
  def call(*args, **kwargs):
    return first_does(lambda: fn(*args, **kwargs))

  return call


def all_do(fn: Callable[[], object]):
  """fn() of this process, unless one of them raises an error of ours: then all do."""
  if count() == 1:
    return fn()
  outcome = _outcome(fn)
  error = outcome if isinstance(outcome, Exception) else None
  for i, other in enumerate(_gather(error)):
    if other and error is None:
      raise type(other)(f"process {i}: {other}")
  return result_of(outcome)


def any_says(flag: bool) -> bool:
  """Whether one of them says so."""
  return flag if count() == 1 else any(_gather(bool(flag)))


def require_same(what: str, fn: Callable[[], str]) -> None:
  """Refuses to go on where fn() of one process is not that of the first; what: "other images".

  Raises:
    UserError: names the process.
  """
  if count() == 1:
    return
  said = _gather(fn())
  if other := [i for i, text in enumerate(said) if text != said[0]]:
    raise UserError(
      f"process {other[0]} has {what} than process 0: all must be started with the same arguments, "
      "data and software, on machines of one kind"
    )


def total(numbers: np.ndarray) -> np.ndarray:
  """Sum of an array of int32 over the processes."""
  return numbers if count() == 1 else _all(numbers).sum(0)


_ERRORS = {kind.__name__: kind for kind in (InUse, UserError, Stopped, Diverged)}


def _outcome(fn: Callable[[], object]):
  try:
    return fn()
  except tuple(_ERRORS.values()) as e:
    return e


# --- messages -------------------------------------------------------------------------


def _write(value) -> np.ndarray:
  """A value or an error of ours as bytes."""
  if isinstance(value, Exception):
    name = next(name for name, kind in _ERRORS.items() if isinstance(value, kind))
    value = {"error": name, "text": str(value)}
  else:
    value = {"value": value}
  return np.frombuffer(packing.to_bytes(value), np.uint8)


def _read(data: np.ndarray):
  value = packing.from_bytes(data.tobytes())
  return _ERRORS[value["error"]](value["text"]) if "error" in value else value["value"]


def _from_first(value):
  """Process 0's `value`."""
  data = _write(value if is_first() else None)
  head = np.zeros(8 + _SHORT, np.uint8)
  if is_first():
    head[:8] = np.frombuffer(np.int64(data.size).tobytes(), np.uint8)
    head[8 : 8 + data.size] = data[:_SHORT]
  head = np.asarray(multihost_utils.broadcast_one_to_all(head))
  size = int(np.frombuffer(head[:8].tobytes(), np.int64)[0])
  if size <= _SHORT:
    return _read(head[8:])
  rest = np.zeros(_rounded(size), np.uint8)
  if is_first():
    rest[:size] = data
  return _read(np.asarray(multihost_utils.broadcast_one_to_all(rest)))


def _gather(value) -> list:
  """The `value` of every process; short ones."""
  data = _write(value)
  size = int(_all(np.array([data.size], np.int32)).max())
  padded = np.zeros(_rounded(size), np.uint8)
  padded[: data.size] = data
  return [_read(x) for x in _all(padded)]


def _rounded(size: int) -> int:
  """A power of two: few sizes, few programs."""
  return 1 << (size - 1).bit_length()


def _all(x: np.ndarray) -> np.ndarray:
  """[...] of each process -> [N, ...]"""
  return np.asarray(multihost_utils.process_allgather(x))
