"""Several runs at once: one program with a leading axis [R] for the runs, sharded over the devices.

Runs that differ only in order and seed are the same computation on other numbers. Each has a thread
of its own (`run_all`) and is written as if it were the only one; the threads are a `Gang`. Where a
run trains an epoch (`make_epoch`), its thread hands in the arguments and waits. As soon as all
threads wait, one of them stacks the arguments, trains all epochs as one program and gives every
thread its result.
"""

import functools
import threading
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax.devices import parallel
from halrp_jax.types import Split, result_of

# --- threads ----------------------------------------------------------------------------


class Gang:
  """Threads that do their common work at once; one that ends must `leave`."""

  def __init__(self, size: int):
    self._size = size
    self._changed = threading.Condition()
    self._waiting = {}  # thread -> (fn, arguments)
    self._results = {}  # thread -> its result, or the exception
    self._building = threading.Lock()
    self._built = None  # what the first call of `build` has built

  def gather(self, fn: Callable[[list[tuple]], list], args: tuple):
    """Returns this thread's part of fn([args of every thread that called with this fn]).

    An exception in the place of a result is raised in its thread; one that fn raises, in all.
    """
    me = threading.get_ident()
    with self._changed:
      self._waiting[me] = fn, args
      self._work_if_all_wait()
      self._changed.wait_for(lambda: me in self._results)
      return result_of(self._results.pop(me))

  def leave(self) -> None:
    """Tells the others not to wait for this thread any more."""
    with self._changed:
      self._size -= 1
      self._work_if_all_wait()

  def build(self, build_one: Callable, config) -> tuple:
    """Returns build_one(config), a benchmark and what belongs to it, sharing what can be shared.

    The threads' configs differ in order and seed alone. So the first one's model, method and
    layout, with their compiled functions, are those of all, and equal images are held once.
    """
    with self._building:
      benchmark, *others = build_one(config)
      if self._built is None:
        self._built = benchmark, *others
        return self._built
      images, own = (b.tasks[0].train.image for b in (self._built[0], benchmark))
      if own.shape != images.shape or not bool((own == images).all()):
        return benchmark, *others
      shared = jax.tree.map(lambda x: images if x is own else x, benchmark)
      return shared, *self._built[1:]

  def _work_if_all_wait(self) -> None:
    if not self._waiting or len(self._waiting) < self._size:
      return
    waiting, self._waiting = self._waiting, {}
    for fn in {id(fn): fn for fn, _ in waiting.values()}.values():
      same = {me: args for me, (f, args) in waiting.items() if f is fn}
      try:
        results = fn([*same.values()])
      except Exception as e:
        results = [e] * len(same)
      self._results |= dict(zip(same, results, strict=True))
    self._changed.notify_all()


def run_all(jobs: list[Callable[[Gang], None]]) -> None:
  """Runs every job(gang) in a thread of its own; then raises the first exception of a job."""
  gang, raised = Gang(len(jobs)), []

  def work(job):
    try:
      job(gang)
    except Exception as e:
      raised.append(e)
    finally:
      gang.leave()

  threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for e in raised:
    raise e


def serialize(fn: Callable) -> Callable:
  """Builds call(): it calls fn(), of several threads one after another."""
  lock = threading.Lock()

  def call():
    with lock:
      fn()

  return call


# --- epochs of training -----------------------------------------------------------------


class Parts(NamedTuple):
  """What an epoch of one run is made of; `data[0]` is the `Split` with the images."""

  begin: Callable  # (state, frozen, data, blocks, key) -> carry, rows, args
  steps: Callable  # (carry, batches, start, stop, *args) -> carry; pure
  finish: Callable  # (carry, rows, progress, steps, *args) -> carry, which is (state, sums)


def make_epoch(
  epoch: Callable, parts: Parts, can_join: Callable[[], bool], num_devices: int
) -> Callable:
  """Builds epoch(gang, *args), which trains the epochs of all the gang's threads at once.

  Epochs of equal shapes over the same images are one program; others run one after another.
  `state` is donated.

  Args:
    epoch: (state, frozen, data, blocks, key, progress) -> state, sums: of one run.
    parts: the same in parts.
    can_join: says whether several epochs may be one program.
    num_devices: over which the runs are spread.
  """
  joint_epoch = _make_joint_epoch(parts, num_devices)

  def each(calls):
    return [_attempt(epoch, call) for call in calls]

  def all_epochs(calls):
    if len(calls) == 1 or not can_join():
      return each(calls)
    groups, results = {}, [None] * len(calls)
    for i, call in enumerate(calls):
      groups.setdefault(_kind(*call), []).append(i)
    for members in groups.values():
      train = joint_epoch if len(members) > 1 else each
      for i, result in zip(members, train([calls[i] for i in members]), strict=True):
        results[i] = result
    return results

  def call(gang: Gang | None, *args):
    return epoch(*args) if gang is None else gang.gather(all_epochs, args)

  return call


def _attempt(fn, args):
  """Returns fn(*args), or the exception that it raises."""
  try:
    return fn(*args)
  except Exception as e:
    return e


def _kind(state, frozen, data, blocks, key, progress) -> tuple:
  """Returns what epochs must have in common to be one program."""
  leaves, structure = jax.tree.flatten((state, frozen, data))
  shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
  return id(data[0].image), blocks, structure, shapes


def _with_image(tree, image):
  """Returns a tree in which every split has another array of images."""

  def is_split(x):
    return isinstance(x, Split)

  return jax.tree.map(
    lambda x: x._replace(image=image) if is_split(x) else x, tree, is_leaf=is_split
  )


def _make_joint_epoch(parts: Parts, num_devices: int) -> Callable:
  """Builds the epoch of several runs: arguments of each -> result or exception of each.

  All arrays get a leading axis [R], but for the images, which the runs share.
  """

  def steps(carry, batches, start, stop, args, image):
    return parts.steps(carry, batches, start, stop, *_with_image(args, image))

  joint_steps = jax.jit(jax.vmap(steps, in_axes=(0, 0, None, None, 0, None)), donate_argnums=0)
  stack = jax.jit(lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees))
  shard, replicate = _make_placing(num_devices)

  @functools.partial(jax.jit, static_argnums=1)
  def unstack(tree, num_runs):
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(num_runs)]

  def begin(state, frozen, data, blocks, key, progress):
    return parts.begin(state, frozen, _with_image(data, None), blocks, key)

  def joint_epoch(calls):
    failed, watchers = {}, [call[-1] for call in calls]
    image = replicate(calls[0][2][0].image)
    carry, rows, args = shard(stack([begin(*call) for call in calls]))

    def watch_all(state, sums, done, num_steps):
      sums = np.asarray(sums)
      for i, watch in enumerate(watchers):
        if i not in failed:
          bad = None if np.isfinite(sums[i]).all() else jax.tree.map(lambda x, i=i: x[i], state)
          error = _attempt(watch, (bad, sums[i], done, num_steps))
          failed.update({i: error} if error else {})
      if len(failed) == len(watchers):
        raise failed[0]

    carry = parts.finish(carry, rows, watch_all, joint_steps, args, image)
    return [failed.get(i, part) for i, part in enumerate(unstack(carry, len(calls)))]

  return joint_epoch


def _make_placing(num_devices: int) -> tuple[Callable, Callable]:
  """Builds shard(tree) and replicate(x) for runs that are learned at once.

  shard: spreads arrays [R, ...] over the devices by run, where their number divides R. replicate:
  puts an array whole on every device; one that comes again is there already.
  """
  if num_devices == 1:
    return (lambda tree: tree), (lambda x: x)
  by_first_axis, whole = parallel.shardings(jax.local_devices())
  last = []

  def replicate(x):
    if not last or last[0] is not x:
      last[:] = x, jax.device_put(x, whole)
    return last[1]

  def shard(tree):
    def place(x):
      return jax.device_put(x, whole if len(x) % num_devices else by_first_axis)

    return jax.tree.map(place, tree)

  return shard, replicate
