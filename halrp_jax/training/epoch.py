"""One epoch of training, of one run or of several at once (`replicas`), for `train.fit`."""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from halrp_jax.devices import parallel, processes
from halrp_jax.training.setup import Setup

_CHUNK_SECONDS = 2.0  # of training handed over to the device at once


def make(setup: Setup, step: Callable) -> Callable:
  """Builds `epochs(list of (state, frozen, data, blocks, key, progress))`, one for each run.

  -> a list of (state, sums over images). `state` is donated. Runs of equal shapes are one program
  with a leading axis. The steps are handed over in chunks of some two seconds, so that signals and
  progress get through; how an epoch is cut does not change a bit of it.

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

  def epoch(state, frozen, data, blocks, key, progress):
    nonlocal advance, is_loop
    shuffle_key, key = jax.random.split(key)
    carry = state, jnp.zeros(2)
    rows = [batches for batches in epoch_rows(blocks, shuffle_key) if len(batches)]
    if rows and advance is None:
      advance, is_loop = choose(carry, rows[0], 0, 1, frozen, data, key)
    return _run(carry, rows, progress, advance, frozen, data, key)

  together = _make_joint_epoch(setup.layout, epoch_rows, many_steps)

  def epochs(calls):
    if len(calls) == 1 or is_loop:
      return [_attempt(epoch, call) for call in calls]
    groups = {}
    for i, call in enumerate(calls):
      groups.setdefault(_shapes(call), []).append(i)
    results = [None] * len(calls)
    for members in groups.values():
      fn = together if len(members) > 1 else lambda calls: [_attempt(epoch, *calls)]
      for i, result in zip(members, fn([calls[i] for i in members]), strict=True):
        results[i] = result
    return results

  return epochs


def _make_rows(setup) -> Callable:
  """Builds `epoch_rows(blocks, key)`: the rows of an epoch's batches."""
  drop = setup.protocol.last_batch == "drop"

  @functools.partial(jax.jit, static_argnums=0)
  def epoch_rows(blocks, key):
    """Rows of one epoch: full batches [n, B], the blocks taking turns, then the smaller ones."""
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

  -> what does many steps, whether it is a Python loop over compiled ones
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
  """All steps of an epoch."""
  for batches in rows:
    done, chunk, num_steps = 0, 1, batches.shape[-2]
    while done < num_steps:
      start, stop = time.perf_counter(), min(done + chunk, num_steps)
      carry = jax.block_until_ready(advance(carry, batches, done, stop, *args))
      pace = (stop - done) / (time.perf_counter() - start)
      done = stop
      if done < num_steps:
        chunk = processes.first_does(lambda pace=pace: max(1, int(_CHUNK_SECONDS * pace)))
      progress(*carry, done, num_steps)
  return carry


def _attempt(fn, args):
  try:
    return fn(*args)
  except Exception as e:
    return e


def _shapes(call) -> tuple:
  """What calls of `epochs` must have in common to be one program."""
  state, frozen, data, blocks, *_ = call
  leaves, structure = jax.tree.flatten((state, frozen, data))
  return (
    id(data[0].image),
    blocks,
    structure,
    tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves),
  )


def _make_joint_epoch(
  layout: parallel.Layout, epoch_rows: Callable, many_steps: Callable
) -> Callable:
  """Builds the epoch of several runs, as one program with a leading axis [R]."""

  def steps(carry, batches, start, stop, frozen, data, key, image):
    data = (data[0]._replace(image=image), *data[1:])
    return many_steps(carry, batches, start, stop, frozen, data, key)

  axes = (0, 0, None, None, 0, 0, 0, None)
  advance = jax.jit(jax.vmap(steps, in_axes=axes), donate_argnums=0)
  stack = jax.jit(lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees))

  @functools.partial(jax.jit, static_argnums=1)
  def unstack(tree, num_runs):
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(num_runs)]

  def joint_epoch(calls):
    states, frozen, data, blocks, keys, progress = zip(*calls, strict=True)
    image, failed = layout.share(data[0][0].image), {}
    keys = [jax.random.split(key) for key in keys]
    rows = [epoch_rows(blocks[0], shuffle_key) for shuffle_key, _ in keys]
    carries = [(state, jnp.zeros(2)) for state in states]
    own = [(d[0]._replace(image=None), *d[1:]) for d in data]
    parts = [carries, frozen, own, [key for _, key in keys], rows]
    carry, frozen, own, keys, rows = (layout.shard_runs(stack(list(x))) for x in parts)

    def watch_all(state, sums, done, num_steps):
      sums = np.asarray(sums)
      for i, tell in enumerate(progress):
        if i not in failed:
          bad = None if np.isfinite(sums[i]).all() else jax.tree.map(lambda x, i=i: x[i], state)
          error = _attempt(tell, (bad, sums[i], done, num_steps))
          failed.update({i: error} if error else {})
      if len(failed) == len(progress):
        raise failed[0]

    carry = _run(carry, rows, watch_all, advance, frozen, own, keys, image)
    return [failed.get(i, part) for i, part in enumerate(unstack(carry, len(calls)))]

  return joint_epoch
