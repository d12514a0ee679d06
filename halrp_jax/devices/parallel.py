"""Training and evaluation on several devices, of one process or of several (`processes`).

Everything is written for one device. A `Layout` says how many take part, by `config.parallel`:

* sharded: batches are sharded over all devices and XLA derives the rest (jit with a mesh and
  NamedSharding). BatchNorm's statistics are those of the whole batch by themselves.
* replicas: runs that are learned at once (`devices.replicas`) are; a batch stays on one device.
* pmap: `jax.pmap` runs the step on every device with its part of the batch; gradients, and in
  `nn.norm.BatchNorm` the statistics, are averaged over `Layout.axis_name`. Evaluation is as
  sharded.

One device and many agree but for rounding, dropout with pmap apart: each device draws its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXIS = "batch"


class Compiled(NamedTuple):
  """A compiled function of `Layout.compile`."""

  call: Callable  # (carry, batches [n, B], *args) -> carry; `carry` is donated
  lower: Callable  # the same arguments -> what jax.jit(...).lower gives


class Layout(NamedTuple):
  """How a run uses the devices. Built once for a run by `make_layout`, and handed down."""

  replicate: Callable  # tree -> the same, its arrays whole on every device here
  shard: Callable  # tree -> the same, its arrays [B, ...] shared out over the devices
  compile: Callable[[Callable], Compiled]  # fn(carry, batches, *args) -> carry
  axis_name: str | None = None  # of the devices that `compile` maps over; None: it does not map
  num_run_devices: int = 1  # over which runs that are learned at once are spread (`replicas`)

  def average(self, tree):
    """Returns the mean over the devices of a mapped function; elsewhere the tree itself."""
    return tree if self.axis_name is None else lax.pmean(tree, self.axis_name)

  def own_key(self, key: jax.Array) -> jax.Array:
    """Returns a key for each part of a batch in a mapped function; elsewhere the key itself."""
    if self.axis_name is None or lax.axis_size(self.axis_name) == 1:
      return key
    return jax.random.fold_in(key, lax.axis_index(self.axis_name))


def make_layout(mode: str) -> Layout:
  """Builds the layout of a run.

  Args:
    mode: `config.parallel`. Starts JAX's backend unless it is "none".
  """
  count = 1 if mode in ("none", "replicas") else jax.device_count()
  mapped = mode == "pmap" and count > 1
  if mapped:
    compile_fn = _compile_mapped
  else:
    compile_fn = _compile_over_processes if count > 1 and jax.process_count() > 1 else _compile
  return Layout(
    _make_replicate(count),
    _make_shard(count, mapped),
    compile_fn,
    AXIS if mapped else None,
    jax.local_device_count() if mode == "replicas" else 1,
  )


def shardings(devices) -> tuple[NamedSharding, NamedSharding]:
  """Returns shardings over some devices: by the first axis, and whole on every device."""
  mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
  return tuple(NamedSharding(mesh, spec) for spec in (PartitionSpec(AXIS), PartitionSpec()))


def _identity(x):
  return x


def _make_replicate(count: int) -> Callable:
  """Builds replicate(tree); what is one object in the tree stays one.

  Done once for the images: what lies on one device would be sent to the others in every call.
  """
  if count == 1 or jax.local_device_count() == 1:
    return _identity
  _, whole = shardings(jax.local_devices())

  def replicate(tree):
    placed = {}

    def place(x):
      if not isinstance(x, jax.Array | np.ndarray):
        return x
      if id(x) not in placed:
        placed[id(x)] = jax.device_put(x, whole)
      return placed[id(x)]

    return jax.tree.map(place, tree)

  return replicate


def _make_shard(count: int, mapped: bool) -> Callable:
  """Builds shard(tree): its arrays [B, ...] sharded over the devices by their first axis.

  Inside a compiled step over the devices of all processes, in a mapped one the part of the device
  that asks; outside over those of this process. Where B is no multiple of their number (the last
  batch of an epoch) every device has the whole array, and computes it: exact, and no faster.
  Numbers pass as they are.
  """
  if count == 1:
    return _identity
  here = jax.local_device_count()
  everywhere, locally = shardings(jax.devices()), shardings(jax.local_devices())

  def place(x):
    if not x.ndim:
      return x
    if not isinstance(x, jax.core.Tracer):
      return jax.device_put(x, locally[bool(len(x) % here)])
    if mapped:
      size = len(x) // lax.axis_size(AXIS)
      return lax.dynamic_slice_in_dim(x, lax.axis_index(AXIS) * size, size)
    return lax.with_sharding_constraint(x, everywhere[bool(len(x) % count)])

  return lambda tree: jax.tree.map(place, tree)


def _compile(fn: Callable) -> Compiled:
  """Compiles for one device, or for all of one process by sharding."""
  jitted = jax.jit(fn, donate_argnums=0)
  return Compiled(jitted, jitted.lower)


# --- several processes: arrays are whole in each of them, but inside a compiled step -----


def _compile_over_processes(fn: Callable) -> Compiled:
  """Compiles for all devices; arguments and result are arrays of this process.

  What is whole on every device here (`replicate`) is not copied on the way in.
  """
  _, here = shardings(jax.local_devices())
  _, everywhere = shardings(jax.devices())
  jitted = jax.jit(fn, donate_argnums=0, out_shardings=everywhere)

  def lay(x, sharding):
    parts = [part.data for part in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

  def join(args):
    return jax.tree.map(lambda x: lay(jax.device_put(jnp.asarray(x), here), everywhere), args)

  def call(*args):
    return jax.tree.map(lambda x: lay(x, here), jitted(*join(args)))

  return Compiled(call, lambda *args: jitted.lower(*join(args)))


# --- pmap -----------------------------------------------------------------------------


def _compile_mapped(fn: Callable) -> Compiled:
  """Compiles with jax.pmap where B is a multiple of the number of devices.

  Every device runs fn with a copy of all arguments, and all end with the same carry. Other batches
  are computed whole on every device of this process, as a mapped function with one part.
  """
  count, here = jax.device_count(), jax.local_device_count()
  mapped = jax.pmap(fn, AXIS, donate_argnums=0, devices=jax.devices())
  one_part = jax.make_mesh(
    (1, here), (AXIS, "copy"), axis_types=(AxisType.Auto,) * 2, devices=jax.local_devices()
  )
  spec = PartitionSpec()
  whole_batch = jax.jit(
    jax.shard_map(fn, mesh=one_part, in_specs=spec, out_specs=spec, check_vma=False),
    donate_argnums=0,
  )
  shared_out, whole = shardings(jax.local_devices())

  def copies(x):
    x = jax.device_put(jnp.asarray(x), whole)
    parts = [part.data[None] for part in x.addressable_shards]
    return jax.make_array_from_single_device_arrays((here, *x.shape), shared_out, parts)

  def one_of(x):
    parts = [part.data[0] for part in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape[1:], whole, parts)

  def call(carry, batches, *args):
    if batches.shape[-1] % count:
      return whole_batch(carry, batches, *args)
    return jax.tree.map(one_of, mapped(*jax.tree.map(copies, (carry, batches, *args))))

  return Compiled(call, whole_batch.lower)
