"""One run on several processes, on one machine or on many hosts.

All processes execute the same program and hold the same numbers. Only batches, in training
(`parallel`) and in evaluation, are sharded over them. A decision that depends on the clock, a
signal or a disk could differ between processes, so the leader (process 0) makes it for all; the
leader alone reads and writes the run's folder. Every function below that exchanges values is a
barrier: it waits until all processes have called it. In a single process these functions have no
effect beyond calling what they are given.
"""

import functools
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from halrp_jax import packing
from halrp_jax.devices import stop
from halrp_jax.types import Diverged, InUse, Stopped, UserError, brief, result_of

T = TypeVar("T")
P = ParamSpec("P")

_HEARTBEAT_SECONDS = 30  # a process that is silent for longer counts as ended
_CONNECT_SECONDS = 600  # long enough for hosts that first have to download a container image
_SHORT = 1000  # bytes; a message of at most this size is sent in one step

_position: tuple[int, int] | None = None  # index of this process and number of processes


# --- start and end --------------------------------------------------------------------


def start(coordinator: str, num_processes: str, process_id: str) -> None:
  """Connects this process with the others of the run. Must be called before JAX computes anything.

  With "auto" it starts JAX's backend, because only the backend knows how many processes there are.

  Args:
    coordinator: HOST:PORT of process 0; "auto": all three values are read from the environment
      (Cloud TPU, Slurm, Open MPI); "": there is one process only.
    num_processes: number of processes, if `coordinator` is HOST:PORT.
    process_id: index of this process from 0, if `coordinator` is HOST:PORT.

  Raises:
    UserError: if the arguments contradict one another, or process 0 can't be reached in time. If
      another process does not connect in time, JAX aborts this one.
  """
  if not coordinator:
    if num_processes or process_id:
      raise UserError("--num_processes and --process_id belong to --coordinator=HOST:PORT")
    return
  arguments = _initialize_arguments(coordinator, num_processes, process_id)
  if arguments:
    _wait_for_leader(coordinator, arguments)
  try:
    jax.distributed.initialize(
      **arguments,
      initialization_timeout=_CONNECT_SECONDS,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
    )
    global _position
    _position = (
      (arguments["process_id"], arguments["num_processes"])
      if arguments
      else (jax.process_index(), jax.process_count())
    )
  except Exception as e:  # with "auto", code for each kind of cluster may raise anything
    raise UserError(
      f"--coordinator={coordinator}: the processes can't connect ({brief(e)}); check that all were "
      "started and can reach this address"
    ) from e


def _initialize_arguments(coordinator: str, num_processes: str, process_id: str) -> dict[str, Any]:
  """Returns keyword arguments of `jax.distributed.initialize`; empty for "auto".

  Raises:
    UserError: names the flag that has a wrong value.
  """
  if coordinator == "auto":
    if num_processes or process_id:
      raise UserError("--coordinator=auto finds --num_processes and --process_id itself")
    return {}
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
    raise UserError(f"--coordinator={coordinator}: expected HOST:PORT of process 0, or auto")
  if not (num_processes.isdecimal() and int(num_processes)):
    raise UserError(f"--num_processes={num_processes}: expected a whole number from 1 on")
  if not (process_id.isdecimal() and int(process_id) < int(num_processes)):
    raise UserError(
      f"--process_id={process_id}: expected a whole number from 0 to {num_processes} - 1"
    )
  return {
    "coordinator_address": coordinator,
    "num_processes": int(num_processes),
    "process_id": int(process_id),
    "cluster_detection_method": "deactivate",
  }


def _wait_for_leader(coordinator: str, arguments: dict[str, Any]) -> None:
  """Waits until the leader's address accepts connections; the leader checks that its port is free.

  Without this check JAX would abort a process that waits for the others in vain.
  """
  host, _, port = coordinator.rpartition(":")
  me = f"process {arguments['process_id']} of {arguments['num_processes']}"
  if arguments["process_id"] == 0:
    try:
      socket.create_server(("", int(port))).close()
    except OSError as e:
      raise UserError(
        f"--coordinator={coordinator}: {me} can't listen there ({brief(e)}); choose a free port"
      ) from e
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
          f"({brief(e)}); check the address, and that process 0 was started"
        ) from e
    time.sleep(0.2)


def run_to_end(main: Callable[[], int]) -> int:
  """Runs main() and returns its exit code.

  If this process of a multi-process run fails, exits immediately so that the others notice. A
  regular exit would wait for the others, which in turn wait for this process.
  """
  try:
    code = main()
  except Exception as e:
    if count() == 1:
      raise
    if _is_lost_connection(e):
      print(
        f"error: process {index()} of {count()}: another one has ended or can't be reached "
        f"({brief(e)}); start all processes again to continue the run",
        file=sys.stderr,
      )
      code = stop.EXIT_CODE
    else:
      traceback.print_exc()
      code = 1
  if code and jax.distributed.is_initialized():  # count() may be unknown if `start` failed
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  return code


def _is_lost_connection(error: Exception) -> bool:
  """Returns whether an error means that another process can't be reached.

  The text must decide: the errors of the communication backends have no type of their own.
  """
  words = ("Gloo", "NCCL", "onnection", "UNAVAILABLE", "DEADLINE_EXCEEDED")
  return any(word in str(error) for word in words)


# --- index and number -----------------------------------------------------------------


def count() -> int:
  """Returns the number of processes.

  Does not start JAX's backend, unless a program other than ours initialized `jax.distributed`.
  """
  return _index_and_count()[1]


def index() -> int:
  """Returns the index of this process, from 0."""
  return _index_and_count()[0]


def _index_and_count() -> tuple[int, int]:
  """Returns the index of this process and the number of processes."""
  if _position:
    return _position
  if jax.distributed.is_initialized():  # by a program that imports this package
    return jax.process_index(), jax.process_count()
  return 0, 1


def is_leader() -> bool:
  """Returns whether this is process 0, which reads and writes the run's folder and prints."""
  return index() == 0


# --- exchange of values (each function is a barrier) -----------------------------------


def run_on_leader(fn: Callable[[], T]) -> T:
  """Returns fn() as the leader computed it, in every process.

  Raises:
    UserError, InUse, Stopped, Diverged: in every process, if fn raised it in the leader.
  """
  if count() == 1:
    return fn()
  if is_leader():
    outcome: T | Exception = _result_or_error(fn)
    _broadcast(outcome)
  else:
    outcome = _broadcast(None)
  return result_of(outcome)


def on_leader(fn: Callable[P, T]) -> Callable[P, T]:
  """Wraps a function so that the leader alone runs it and all processes get the result."""

  @functools.wraps(fn)
  def call(*args: P.args, **kwargs: P.kwargs) -> T:
    return run_on_leader(lambda: fn(*args, **kwargs))

  return call


def run_on_all(fn: Callable[[], T]) -> T:
  """Returns fn() of this process, after all processes have run theirs.

  Raises:
    UserError, InUse, Stopped, Diverged: in every process, if fn raised it in one of them.
  """
  if count() == 1:
    return fn()
  outcome = _result_or_error(fn)
  error = outcome if isinstance(outcome, Exception) else None
  for i, other in enumerate(_gather(error)):
    if other and error is None:
      raise type(other)(f"process {i}: {other}")
  return result_of(outcome)


def any_process(flag: bool) -> bool:
  """Returns whether `flag` is true in at least one process."""
  return flag if count() == 1 else any(_gather(bool(flag)))


def require_same(what: str, fn: Callable[[], str]) -> None:
  """Checks that fn() is the same text in all processes.

  Args:
    what: what a differing process has, for the error message, such as "other images".
    fn: returns the text to compare.

  Raises:
    UserError: in every process; names the first process that differs from process 0.
  """
  if count() == 1:
    return
  texts = _gather(fn())
  if other := [i for i, text in enumerate(texts) if text != texts[0]]:
    raise UserError(
      f"process {other[0]} has {what} than process 0: all must be started with the same arguments, "
      "data and software, on machines of one kind"
    )


def total(numbers: np.ndarray) -> np.ndarray:
  """Returns the sum of an int32 array over all processes."""
  return numbers if count() == 1 else _gather_arrays(numbers).sum(0)


_ERRORS = {kind.__name__: kind for kind in (InUse, UserError, Stopped, Diverged)}


def _result_or_error(fn: Callable[[], T]) -> T | Exception:
  """Returns fn(), or the exception if it is one of `_ERRORS`."""
  try:
    return fn()
  except tuple(_ERRORS.values()) as e:
    return e


# --- messages -------------------------------------------------------------------------


def _encode(value: object) -> np.ndarray:
  """Returns a value, or an exception of one of `_ERRORS`, as uint8 bytes [n]."""
  if isinstance(value, Exception):
    name = next(name for name, kind in _ERRORS.items() if isinstance(value, kind))
    value = {"error": name, "text": str(value)}
  else:
    value = {"value": value}
  return np.frombuffer(packing.to_bytes(value), np.uint8)


def _decode(data: np.ndarray):
  """Returns what `_encode` was given; an exception is returned, not raised."""
  value = packing.from_bytes(data.tobytes())
  return _ERRORS[value["error"]](value["text"]) if "error" in value else value["value"]


def _broadcast(value: T | Exception | None) -> T | Exception:
  """Returns the leader's `value` in every process; what the others pass is ignored.

  The size of the message goes first, together with the beginning of the message. The rest follows
  in a second step if there is any.
  """
  data = _encode(value if is_leader() else None)
  head = np.zeros(8 + _SHORT, np.uint8)
  if is_leader():
    head[:8] = np.frombuffer(np.int64(data.size).tobytes(), np.uint8)
    head[8 : 8 + data.size] = data[:_SHORT]
  head = np.asarray(multihost_utils.broadcast_one_to_all(head))
  size = int(np.frombuffer(head[:8].tobytes(), np.int64)[0])
  if size <= _SHORT:
    return cast("T | Exception", _decode(head[8:]))
  rest = np.zeros(_next_power_of_two(size), np.uint8)
  if is_leader():
    rest[:size] = data
  return cast("T | Exception", _decode(np.asarray(multihost_utils.broadcast_one_to_all(rest))))


def _gather(value: object) -> list[Any]:
  """Returns the `value` of every process, by index. Meant for short values."""
  data = _encode(value)
  size = int(_gather_arrays(np.array([data.size], np.int32)).max())
  padded = np.zeros(_next_power_of_two(size), np.uint8)
  padded[: data.size] = data
  return [_decode(x) for x in _gather_arrays(padded)]


def _next_power_of_two(size: int) -> int:
  """Returns the smallest power of two >= size: few sizes of messages, few compiled programs."""
  return 1 << (size - 1).bit_length()


def _gather_arrays(x: np.ndarray) -> np.ndarray:
  """Returns the arrays of all processes, stacked along a new first axis: [...] -> [N, ...]."""
  return np.asarray(multihost_utils.process_allgather(x))
