"""One epoch of training, for `training.fit`."""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from halrp_jax.devices import processes, replicas
from halrp_jax.training.setup import Setup

_CHUNK_SECONDS = 2.0  # of training handed over to the device at once


def make(setup: Setup, step: Callable) -> Callable:
  """Builds `epoch(gang, state, frozen, data, blocks, key, progress) -> state, sums over images`.

  `state` is donated. The steps are handed over in chunks of some two seconds, so that signals and
  progress get through; how an epoch is cut does not change a bit of it.

  `gang` is None, or the threads of several runs, whose epochs are then one program.

  Args:
    setup: its protocol, batch size, loop and layout.
    step: (state, rows [B], frozen, data, key) -> state, sums over the images of the batch.
  """
  epoch_rows = _make_rows(setup)

  def one_step(carry, rows, frozen, data, key):
    state, sums = carry
    state, more = step(state, rows, frozen, data, key)
    return state, sums + more

  def many_steps(carry, batches, start, stop, *args):
    return lax.fori_loop(start, stop, lambda i, c: one_step(c, batches[i], *args), carry)

  choose = _make_choose(setup, one_step, many_steps)
  advance, is_loop = None, setup.loop == "steps"

  def begin(state, frozen, data, blocks, key):
    shuffle_key, key = jax.random.split(key)
    rows = [batches for batches in epoch_rows(blocks, shuffle_key) if len(batches)]
    return (state, jnp.zeros(2)), rows, (frozen, data, key)

  def epoch(state, frozen, data, blocks, key, progress):
    nonlocal advance, is_loop
    carry, rows, args = begin(state, frozen, data, blocks, key)
    if rows and advance is None:
      advance, is_loop = choose(carry, rows[0], 0, 1, *args)
    return _run(carry, rows, progress, advance, *args)

  parts, devices = replicas.Parts(begin, many_steps, _run), setup.layout.num_run_devices
  return replicas.make_epoch(epoch, parts, lambda: not is_loop, devices)


def _make_rows(setup: Setup) -> Callable:
  """Builds `epoch_rows(blocks, key)`: the rows of an epoch's batches."""
  drop = setup.protocol.last_batch == "drop"

  @functools.partial(jax.jit, static_argnums=0)
  def epoch_rows(blocks, key):
    """Returns the rows of an epoch: full batches [n, B], the blocks taking turns, then the rest."""
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


def _make_choose(setup: Setup, one_step: Callable, many_steps: Callable) -> Callable:
  """Builds `choose(*args of many_steps)`.

  It returns what does many steps, and whether that is a Python loop over compiled ones.
  """
  jit_one, jit_many = (setup.layout.compile(f) for f in (one_step, many_steps))

  def loop_over_steps(carry, batches, start, stop, *args):
    for i in range(start, stop):
      carry = jit_one.call(carry, batches[i], *args)
    return carry

  def choose(*args):
    """XLA:CPU runs the gradient of a plain convolution tens of times slower inside a loop."""
    if setup.loop == "auto" and jax.default_backend() == "cpu":
      is_loop = "stablehlo.convolution" in jit_many.lower(*args).as_text()
    else:
      is_loop = setup.loop == "steps"
    return loop_over_steps if is_loop else jit_many.call, is_loop

  return choose


def _run(carry, rows, progress, advance, *args):
  """Trains all steps of an epoch; returns the last carry."""
  for batches in rows:
    done, chunk, num_steps = 0, 1, batches.shape[-2]
    while done < num_steps:
      start, stop = time.perf_counter(), min(done + chunk, num_steps)
      carry = jax.block_until_ready(advance(carry, batches, done, stop, *args))
      pace = (stop - done) / (time.perf_counter() - start)
      done = stop
      if done < num_steps:
        chunk = processes.run_on_leader(lambda pace=pace: max(1, int(_CHUNK_SECONDS * pace)))
      progress(*carry, done, num_steps)
  return carry
