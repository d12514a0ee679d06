"""Runs of one config that are learned at once: one program with a leading axis for the runs.

Every run is written for itself and has a thread. Where it has work that others may have too (an
epoch of training) it hands it in and waits; when all have, the last one does it for all of them.
"""

import threading
from collections.abc import Callable

from halrp_jax.types import result_of


class Gang:
  """Threads that get their work done together; those that end must `leave`."""

  def __init__(self, size: int):
    self._size = size
    self._changed = threading.Condition()
    self._waiting = {}  # thread -> (fn, arguments)
    self._results = {}  # thread -> its result, or the exception

  def together(self, fn: Callable[[list[tuple]], list], args: tuple):
    """This thread's part of fn([args of every thread that called with this fn])."""
    me = threading.get_ident()
    with self._changed:
      self._waiting[me] = fn, args
      self._work_if_all_wait()
      self._changed.wait_for(lambda: me in self._results)
      return result_of(self._results.pop(me))

  def leave(self) -> None:
    with self._changed:
      self._size -= 1
      self._work_if_all_wait()

  def _work_if_all_wait(self) -> None:
    if not self._waiting or len(self._waiting) < self._size:
      return
    waiting, self._waiting = self._waiting, {}
    for fn in {id(fn): fn for fn, _ in waiting.values()}.values():
      same = {me: args for me, (f, args) in waiting.items() if f is fn}
      try:
        results = fn([*same.values()])
      except Exception as e:  # each thread ends with it, as it would alone
        results = [e] * len(same)
      self._results |= dict(zip(same, results, strict=True))
    self._changed.notify_all()


def run_all(jobs: list[Callable[[Callable], None]]) -> None:
  """Runs every job(together) in a thread of its own; a job must not raise."""
  gang = Gang(len(jobs))

  def work(job):
    try:
      job(gang.together)
    finally:
      gang.leave()

  threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
