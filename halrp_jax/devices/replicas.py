"""Several runs learned at once: one compiled program over arrays with an axis [R] for the runs.

Runs that differ only in order and seed perform the same computation on different numbers. Each run
has a thread of its own (`run_all`), and its code is written as if it were the only run. The threads
form a `Gang`. Where a run trains an epoch (`make_epoch`), its thread submits the arguments and
waits. As soon as all threads wait, one of them stacks the arguments, trains all epochs as one
program, sharded over the devices by run, and hands every thread its result.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax.devices import parallel
from halrp_jax.types import Array, Split, result_of

T = TypeVar("T")
_CHUNK = 4096  # number of images that are compared in one step

# --- threads ----------------------------------------------------------------------------


class Gang:
  """Threads that do equal work at once. A thread that ends must call `leave`.

  Args:
    size: number of threads.
  """

  def __init__(self, size: int) -> None:
    self._size = size
    self._changed = threading.Condition()
    self._waiting: dict[int, tuple[Callable, tuple]] = {}  # thread -> (fn, arguments)
    self._results: dict[int, Any] = {}  # thread -> its result, or the exception
    self._building = threading.Lock()
    self._built: tuple | None = None  # result of the first call of `build`

  def gather(self, fn: Callable[[list[tuple]], list[T]], args: tuple) -> T:
    """Waits for the other threads, and returns this thread's part of a joint call of fn.

    Args:
      fn: takes the arguments of all threads that wait with this same function, and returns a list
        with a result for each of them. An exception in the list is raised in its thread alone.
      args: this thread's arguments.

    Raises:
      Exception: in all threads that wait with this function, if fn itself raises.
    """
    me = threading.get_ident()
    with self._changed:
      self._waiting[me] = fn, args
      self._work_if_all_wait()
      self._changed.wait_for(lambda: me in self._results)
      return result_of(self._results.pop(me))

  def leave(self) -> None:
    """Removes this thread from the gang, so that the others do not wait for it."""
    with self._changed:
      self._size -= 1
      self._work_if_all_wait()

  def build(self, build_one: Callable[[T], tuple], config: T) -> tuple:
    """Returns build_one(config), with as much as possible shared between the threads.

    The configs of the threads differ in order and seed only. So all threads use the model, method
    and layout of the first call, with their compiled functions. Images that are equal are stored
    once.

    Args:
      build_one: returns a tuple that begins with a `Benchmark`.
      config: the config of this thread's run.
    """
    with self._building:
      benchmark, *others = build_one(config)
      if self._built is None:
        self._built = benchmark, *others
        return self._built
      images, own = (b.tasks[0].train.image for b in (self._built[0], benchmark))
      if not _are_equal(own, images):
        return benchmark, *others
      shared = jax.tree.map(lambda x: images if x is own else x, benchmark)
      return shared, *self._built[1:]

  def _work_if_all_wait(self) -> None:
    """Calls each submitted function for all threads that wait with it, if all threads wait."""
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
  """Runs every job(gang) in a thread of its own, then raises the first exception of a job."""
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


def serialize(fn: Callable[[], object]) -> Callable[[], None]:
  """Wraps fn so that threads that call it at the same time run it one after another."""
  lock = threading.Lock()

  def call() -> None:
    with lock:
      fn()

  return call


def _are_equal(a: Array, b: Array) -> bool:
  """Returns whether two arrays of images are equal, without a third one of their size."""
  if a.shape != b.shape:
    return False
  parts = (slice(i, i + _CHUNK) for i in range(0, len(a), _CHUNK))
  return a is b or all(bool((a[part] == b[part]).all()) for part in parts)


# --- epochs of training -----------------------------------------------------------------


class Parts(NamedTuple):
  """The functions that make up an epoch of one run; `data[0]` is the `Split` with the images."""

  begin: Callable  # (state, frozen, data, blocks, key) -> carry, rows, args
  steps: Callable  # (carry, batches, start, stop, *args) -> carry; pure
  finish: Callable  # (carry, rows, progress, steps, *args) -> carry, which is (state, sums)


def make_epoch(
  epoch: Callable, parts: Parts, can_join: Callable[[], bool], num_devices: int
) -> Callable:
  """Builds epoch(gang, *args), which trains one epoch of every thread of the gang at once.

  Epochs with arrays of equal shapes over the same images become one program. Other epochs, and
  those whose images are on the host, run one after another. `state` is donated.

  Args:
    epoch: (state, frozen, data, blocks, key, progress) -> state, sums; an epoch of a single run.
    parts: the functions that `epoch` is made of.
    can_join: returns whether several epochs may become one program.
    num_devices: number of devices over which the runs are sharded.

  Returns:
    A function of a `Gang` (None: the run is the only one) and the arguments of `epoch`, which
    returns what `epoch` returns.
  """
  joint_epoch = _make_joint_epoch(parts, num_devices)

  def one_by_one(calls):
    return [_attempt(epoch, call) for call in calls]

  def all_epochs(calls):
    _, _, (split, *_), *_ = calls[0]  # all have the same config
    if len(calls) == 1 or isinstance(split.image, np.ndarray) or not can_join():
      return one_by_one(calls)
    groups: dict[tuple, list[int]] = {}
    results: list[Any] = [None] * len(calls)
    for i, call in enumerate(calls):
      groups.setdefault(_signature(*call), []).append(i)
    for members in groups.values():
      train = joint_epoch if len(members) > 1 else one_by_one
      for i, result in zip(members, train([calls[i] for i in members]), strict=True):
        results[i] = result
    return results

  def call(gang: Gang | None, *args):
    return epoch(*args) if gang is None else gang.gather(all_epochs, args)

  return call


def _attempt(fn: Callable[..., T], args: tuple) -> T | Exception:
  """Returns fn(*args), or the exception that it raises."""
  try:
    return fn(*args)
  except Exception as e:
    return e


def _signature(state, frozen, data, blocks, key, progress) -> tuple:
  """Returns a value that is equal for epochs that can become one program."""
  leaves, structure = jax.tree.flatten((state, frozen, data))
  shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
  return id(data[0].image), blocks, structure, shapes


def _with_image(tree, image):
  """Returns a tree in which the images of every `Split` are replaced by `image`."""

  def is_split(x):
    return isinstance(x, Split)

  return jax.tree.map(
    lambda x: x._replace(image=image) if is_split(x) else x, tree, is_leaf=is_split
  )


def _make_joint_epoch(parts: Parts, num_devices: int) -> Callable:
  """Builds the joint epoch of several runs.

  All arrays get a leading axis [R], except the images, which the runs share.

  Returns:
    A function of a list with the arguments of each run, which returns a list with the result or the
    exception of each run.
  """

  def steps(carry, batches, start, stop, args, image):
    return parts.steps(carry, batches, start, stop, *_with_image(args, image))

  joint_steps = jax.jit(jax.vmap(steps, in_axes=(0, 0, None, None, 0, None)), donate_argnums=0)
  stack = jax.jit(lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees))
  shard, replicate = _make_shard_and_replicate(num_devices)

  @functools.partial(jax.jit, static_argnums=1)
  def unstack(tree, num_runs):
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(num_runs)]

  def begin(state, frozen, data, blocks, key, progress):
    return parts.begin(state, frozen, _with_image(data, None), blocks, key)

  def joint_epoch(calls):
    failed, reports = {}, [call[-1] for call in calls]  # `progress` is the last argument
    image = replicate(calls[0][2][0].image)
    carry, rows, args = shard(stack([begin(*call) for call in calls]))

    def joint_progress(state, sums, done, num_steps):
      sums = np.asarray(sums)
      for i, report in enumerate(reports):
        if i not in failed:
          bad = None if np.isfinite(sums[i]).all() else jax.tree.map(lambda x, i=i: x[i], state)
          error = _attempt(report, (bad, sums[i], done, num_steps))
          failed.update({i: error} if error else {})
      if len(failed) == len(reports):
        raise failed[0]

    carry = parts.finish(carry, rows, joint_progress, joint_steps, args, image)
    return [failed.get(i, part) for i, part in enumerate(unstack(carry, len(calls)))]

  return joint_epoch


def _make_shard_and_replicate(num_devices: int) -> tuple[Callable, Callable]:
  """Builds shard(tree) and replicate(x) for runs that are learned at once.

  `shard` shards arrays [R, ...] over the devices by run, or replicates them if R is not a multiple
  of the number of devices. `replicate` copies an array to every device; if it gets the same array
  as in the last call, it returns the same copies.
  """
  if num_devices == 1:
    return (lambda tree: tree), (lambda x: x)
  by_run, replicated = parallel.shardings(jax.local_devices())
  last = []

  def replicate(x):
    if not last or last[0] is not x:
      last[:] = x, jax.device_put(x, replicated)
    return last[1]

  def shard(tree):
    def place(x):
      return jax.device_put(x, replicated if len(x) % num_devices else by_run)

    return jax.tree.map(place, tree)

  return shard, replicate
