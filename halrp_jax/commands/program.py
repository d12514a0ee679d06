"""What all command lines have in common: streams, warnings, errors as one line and an exit code."""

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable

import halrp_jax
from halrp_jax.types import UserError, one_line

MISTAKE = 2  # exit code


def prepare() -> None:
  """Lets warnings be one line and the streams write any name. Call it once, in a program.

  What a terminal can't show, as Greek letters on an ASCII terminal, is written as \\xNN.
  """
  warnings.formatwarning = lambda message, *_: f"warning: {one_line(message)}\n"
  for stream in (sys.stdout, sys.stderr):
    if stream is not None:  # it is None if the process was started without
      stream.reconfigure(errors="backslashreplace")


def version() -> str:
  """Returns what --version prints."""
  return f"halrp_jax {halrp_jax.__version__ or '(not installed, hence without a version)'}"


def run(main: Callable[[], int]) -> int:
  """Calls main() and returns its exit code; an error that the user can mend is one line.

  Returns:
    2 after such an error, 130 after Ctrl-C, and 141, silently, if nobody reads the output any more:
    the codes of other programs.
  """
  try:
    code = main()
    if sys.stdout is not None:
      sys.stdout.flush()
    return code
  except BrokenPipeError:
    _discard(sys.stdout, sys.stderr)
    return 128 + signal.SIGPIPE
  except KeyboardInterrupt:
    print("stopped", file=sys.stderr)
    return 128 + signal.SIGINT
  except UserError as e:
    return _complain(str(e))
  except OSError as e:
    if not e.filename:
      _discard(sys.stdout)
    place = e.filename or "input or output"
    return _complain(f"{os.fsdecode(place)}: {e.strerror or e}")
  except Exception as e:
    from halrp_jax.devices import faults  # imports JAX, which what lists the verbs does without

    if line := faults.explain(e):
      return _complain(line)
    raise


def _complain(text: str) -> int:
  with contextlib.suppress(BrokenPipeError):
    print(f"error: {one_line(text)}", file=sys.stderr, flush=True)
  return MISTAKE


def _discard(*streams) -> None:
  """Lets what is still in the buffers go nowhere; else Python complains when it ends."""
  nowhere = os.open(os.devnull, os.O_WRONLY)
  for stream in streams:
    with contextlib.suppress(OSError, ValueError, AttributeError):
      os.dup2(nowhere, stream.fileno())
