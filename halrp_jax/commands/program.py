"""The common part of all command lines: output streams, warnings, errors and exit codes."""

import contextlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import TextIO

import halrp_jax
from halrp_jax.types import UserError, one_line

MISTAKE = 2  # exit code after an error that the user can mend
COMPILE_CACHE = (  # help of --compile_cache
  "folder for compiled programs, or off; default: halrp_jax in $XDG_CACHE_HOME or ~/.cache"
)


def prepare() -> None:
  r"""Makes warnings one line each, and lets the output streams write any character.

  Characters that the encoding of a stream doesn't have are written as escapes such as \u03b1. Call
  this once, at the start of a program.
  """
  warnings.formatwarning = lambda message, *_: f"warning: {one_line(message)}\n"
  for stream in (sys.stdout, sys.stderr):  # None if the process was started without it
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="backslashreplace")


def version() -> str:
  """Returns the line that --version prints."""
  return f"halrp_jax {halrp_jax.__version__ or '(not installed, hence without a version)'}"


def run(main: Callable[[], int]) -> int:
  """Calls main() and prints an error that the user can mend as one line.

  Args:
    main: returns an exit code.

  Returns:
    The exit code of main(); 2 after an error that the user can mend, 130 after Ctrl-C, and 141 if
    the reader of the output has closed it, as in `... | head`.
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
    return _print_error(str(e))
  except OSError as e:
    if not e.filename:
      _discard(sys.stdout)
    file = e.filename or "input or output"
    return _print_error(f"{os.fsdecode(file)}: {e.strerror or e}")
  except Exception as e:
    from halrp_jax.devices import faults  # imports JAX, which listing the verbs does not need

    if line := faults.explain(e):
      return _print_error(line)
    raise


def _print_error(text: str) -> int:
  """Prints an error and returns the exit code."""
  with contextlib.suppress(BrokenPipeError):
    print(f"error: {one_line(text)}", file=sys.stderr, flush=True)
  return MISTAKE


def _discard(*streams: TextIO | None) -> None:
  """Redirects streams to nowhere; otherwise Python prints an error when it flushes them at exit."""
  nowhere = os.open(os.devnull, os.O_WRONLY)
  for stream in streams:
    if stream is not None:
      with contextlib.suppress(OSError, ValueError, AttributeError):  # notebooks replace them
        os.dup2(nowhere, stream.fileno())
