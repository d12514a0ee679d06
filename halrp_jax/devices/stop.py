"""SIGTERM and SIGINT: stop at the next good place, soon in any case. For the command line only."""

import os
import signal
import threading

EXIT_CODE = 75  # "try again later": the same command goes on
_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_GRACE_SECONDS = 25.0


def listen():
  """Takes over both signals for the process. Call it before jax starts threads.

  A thread waits for them, since Python's own handlers don't run while XLA computes. After the
  first signal the function returned is True; 25 seconds later, or at a second signal, the process
  ends with exit code 75 at once: what is on disk is always whole.

  Returns:
    A function without arguments that tells if a signal has come.
  """
  signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
  asked = threading.Event()

  def wait():
    signal.sigwait(_SIGNALS)
    asked.set()
    signal.sigtimedwait(_SIGNALS, _GRACE_SECONDS)
    os._exit(EXIT_CODE)

  threading.Thread(target=wait, daemon=True, name="signals").start()
  return asked.is_set
