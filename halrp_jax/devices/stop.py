"""Handling of SIGTERM and SIGINT: a run stops at a point from which it can be resumed.

For the command line only.
"""

import os
import signal
import threading
from collections.abc import Callable

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command resumes the run
_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_GRACE_SECONDS = 25.0


def listen() -> Callable[[], bool]:
  """Takes over SIGTERM and SIGINT for the whole process. Must be called before JAX starts threads.

  A thread waits for the signals, because Python's own handlers don't run while XLA computes. The
  first signal only makes the returned function return True. 25 seconds later, or at a second
  signal, the process exits at once with code 75. That is safe at any moment: files are written
  whole or not at all.

  Returns:
    A function without arguments: whether a signal has been received.
  """
  signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
  received = threading.Event()

  def wait() -> None:
    signal.sigwait(_SIGNALS)
    received.set()
    signal.sigtimedwait(_SIGNALS, _GRACE_SECONDS)
    os._exit(EXIT_CODE)

  threading.Thread(target=wait, daemon=True, name="signals").start()
  return received.is_set
