"""One epoch of training: the order of the images, and the loop over the optimizer steps."""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from halrp_jax.devices import processes, replicas
from halrp_jax.training import batches
from halrp_jax.training.setup import Setup

_CHUNK_SECONDS = 2.0  # time of the steps that are sent to the device at once
_IN_FLIGHT = 4  # batches of images on the host that are sent before a step is awaited


def make(setup: Setup, step: Callable) -> Callable:
  """Builds `epoch(gang, state, frozen, data, blocks, key, progress) -> state, sums over images`.

  `state` is donated. The steps are sent to the device in chunks of about two seconds, so that
  signals are handled and progress is shown in between. The division into chunks does not change a
  bit of the result. If the images are on the host, each step gets those of its batch alone, which
  are gathered and sent while earlier steps run; it is the same compiled step, with the same bits.

  `gang` is None, or stands for the threads of several runs, whose epochs then are one program
  (`devices.replicas`). `progress(state, sums, step, num_steps)` is called between chunks.

  Args:
    setup: its protocol, batch size, loop and layout are used.
    step: (state, rows [B], frozen, data, key) -> state, sums over the images of the batch.
  """
  epoch_rows = _make_epoch_rows(setup)

  def one_step(carry, rows, frozen, data, key):
    state, sums = carry
    state, more = step(state, rows, frozen, data, key)
    return state, sums + more

  def many_steps(carry, rows, start, stop, *args):
    return lax.fori_loop(start, stop, lambda i, c: one_step(c, rows[i], *args), carry)

  choose_loop = _make_choose_loop(setup, one_step, many_steps)
  run_steps, is_python_loop = None, setup.loop == "steps"

  def begin(state, frozen, data, blocks, key):
    shuffle_key, key = jax.random.split(key)
    rows = [part for part in epoch_rows(blocks, shuffle_key) if len(part)]
    return (state, jnp.zeros(2)), rows, (frozen, data, key)

  def loop_for(*args):
    nonlocal run_steps, is_python_loop
    if run_steps is None:
      run_steps, is_python_loop = choose_loop(*args)
    return run_steps

  def epoch(state, frozen, data, blocks, key, progress):
    carry, rows, args = begin(state, frozen, data, blocks, key)
    if data and batches.is_on_host(data[0]):
      return host_epoch(carry, rows, progress, *args)
    steps = loop_for(carry, rows[0], 0, 1, *args) if rows else None
    return _run_chunks(carry, rows, progress, steps, *args)

  def host_epoch(carry, rows, progress, frozen, data, key):
    split, *others = data
    order = (batch for part in rows for batch in np.asarray(part))
    windows = batches.windows(split, order, lambda x: setup.layout.replicate(jax.device_put(x)))
    own = [jnp.broadcast_to(jnp.arange(part.shape[1]), part.shape) for part in rows]
    with contextlib.closing(windows):
      return _run_chunks(carry, own, progress, steps_of_windows, frozen, windows, others, key)

  def steps_of_windows(carry, own, start, stop, frozen, windows, others, key):
    # `own` is as large as the rows of the epoch, or XLA would compile another loop
    for i, (split, _) in enumerate(itertools.islice(windows, stop - start)):
      args = carry, own, 0, 1, frozen, (split, *others), key
      carry = loop_for(*args)(*args)
      if i % _IN_FLIGHT == 0:
        jax.block_until_ready(carry)
    return carry

  parts = replicas.Parts(begin, many_steps, _run_chunks)
  num_devices = setup.layout.num_run_devices
  return replicas.make_epoch(epoch, parts, lambda: not is_python_loop, num_devices)


def _make_epoch_rows(setup: Setup) -> Callable:
  """Builds `epoch_rows(blocks, key)`, which returns the rows of all batches of an epoch."""
  drop = setup.protocol.last_batch == "drop"

  @functools.partial(jax.jit, static_argnums=0)
  def epoch_rows(blocks, key):
    """Returns arrays of rows: all full batches [n, B], then the smaller last ones by their size.

    A batch has images of one block. The full batches of the blocks take turns.
    """
    keys = (key,) if len(blocks) == 1 else jax.random.split(key, len(blocks))
    full, rest, turns, begin = [], {}, [], 0
    for t, (num_images, key) in enumerate(zip(blocks, keys, strict=True)):
      order = jnp.arange(num_images)
      order = begin + (jax.random.permutation(key, order) if setup.protocol.shuffle else order)
      whole = num_images // setup.batch_size * setup.batch_size
      full.append(order[:whole].reshape(-1, setup.batch_size))
      turns += [(i, t) for i in range(len(full[-1]))]
      if whole < num_images and not drop:
        rest.setdefault(num_images - whole, []).append(order[whole:])
      begin += num_images
    turn = np.array(sorted(range(len(turns)), key=turns.__getitem__), np.int32)
    return [jnp.concatenate(full)[turn], *map(jnp.stack, rest.values())]

  return epoch_rows


def _make_choose_loop(setup: Setup, one_step: Callable, many_steps: Callable) -> Callable:
  """Builds `choose_loop(*args of many_steps)`.

  It returns a function that does what `many_steps` does, and whether that is a Python loop over
  compiled steps rather than one compiled loop.
  """
  jit_one, jit_many = (setup.layout.compile(f) for f in (one_step, many_steps))

  def loop_over_steps(carry, rows, start, stop, *args):
    for i in range(start, stop):
      carry = jit_one.call(carry, rows[i], *args)
    return carry

  def choose_loop(*args):
    if setup.loop == "auto" and jax.default_backend() == "cpu":
      # XLA:CPU computes the gradient of a plain convolution tens of times slower inside a loop
      is_python_loop = "stablehlo.convolution" in jit_many.lower(*args).as_text()
    else:
      is_python_loop = setup.loop == "steps"
    return loop_over_steps if is_python_loop else jit_many.call, is_python_loop

  return choose_loop


@processes.on_leader
def _next_chunk(steps_per_second: float) -> int:
  """Returns the number of steps in the next chunk, the same in all processes."""
  return max(1, int(_CHUNK_SECONDS * steps_per_second))


def _run_chunks(carry, rows, progress, run_steps, *args):
  """Trains all steps of an epoch, chunk by chunk; returns the last carry."""
  for part in rows:
    done, chunk, num_steps = 0, 1, part.shape[-2]
    while done < num_steps:
      begin, stop = time.perf_counter(), min(done + chunk, num_steps)
      carry = jax.block_until_ready(run_steps(carry, part, done, stop, *args))
      steps_per_second = (stop - done) / (time.perf_counter() - begin)
      done = stop
      if done < num_steps:
        chunk = _next_chunk(steps_per_second)
      progress(*carry, done, num_steps)
  return carry
