"""Training and evaluation shared out over devices, of one process or of several (`processes`).

Everything is written for one device. `parallel` says how many take part:

* sharded: batches are laid out over all devices and XLA derives the rest (jit with a mesh and
  NamedSharding). BatchNorm's statistics are those of the whole batch by themselves.
* replicas: runs that are learned at once (`devices.replicas`) are; a batch stays on one device.
* pmap: `jax.pmap` runs the step on every device with its part of the batch; gradients, and in
  `layers.BatchNorm` the statistics, are averaged over the axis `AXIS`. Evaluation is as sharded.

One device and many agree but for rounding, dropout with pmap apart: each device draws its own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXIS = "batch"


def num_devices(config) -> int:
  """Devices that share a batch, of all processes."""
  return 1 if config.parallel in ("none", "replicas") else jax.device_count()


def shardings(devices) -> tuple[NamedSharding, NamedSharding]:
  """Returns two shardings: by the first axis, and whole on every device."""
  mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
  return tuple(NamedSharding(mesh, spec) for spec in (PartitionSpec(AXIS), PartitionSpec()))


def _is_array(x) -> bool:
  return isinstance(x, jax.Array | np.ndarray)


def replicate(config, tree):
  """A pytree with its arrays whole on every device here; what is one object stays one.

  Done once for the images: what lies on one device would be sent to the others in every call.
  """
  devices = jax.local_devices()
  if num_devices(config) == 1 or len(devices) == 1:
    return tree
  _, whole = shardings(devices)
  placed = {}

  def place(x):
    if not _is_array(x):
      return x
    if id(x) not in placed:
      placed[id(x)] = jax.device_put(x, whole)
    return placed[id(x)]

  return jax.tree.map(place, tree)


def make_spread(config) -> Callable:
  """Builds spread(tree): its arrays [B, ...] laid out over the devices by their first axis.

  Inside a compiled step over the devices of all processes, with pmap the part of the device that
  asks; outside over those of this process. Where B is no multiple of their number (the last batch
  of an epoch) every device has the whole array, and computes it: exact, and no faster. Numbers pass
  as they are.
  """
  count, here = num_devices(config), jax.local_device_count()
  if count == 1:
    return lambda tree: tree
  everywhere, locally = shardings(jax.devices()), shardings(jax.local_devices())

  def place(x):
    if not x.ndim:
      return x
    if not isinstance(x, jax.core.Tracer):
      return jax.device_put(x, locally[bool(len(x) % here)])
    if is_mapped():
      size = len(x) // count
      return lax.dynamic_slice_in_dim(x, lax.axis_index(AXIS) * size, size)
    if config.parallel == "pmap":
      return x
    return lax.with_sharding_constraint(x, everywhere[bool(len(x) % count)])

  return lambda tree: jax.tree.map(place, tree)


# --- several processes: arrays are whole in each of them, but inside a compiled step -----


def _over_processes(fn: Callable) -> Callable:
  """A function over all devices whose arguments and result are arrays of this process.

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

  call.lower = lambda *args: jitted.lower(*join(args))
  return call


# --- pmap -----------------------------------------------------------------------------


def axis_size() -> int:
  """How many devices run what is being traced, each with its part of a batch; 1: not mapped."""
  try:
    return lax.axis_size(AXIS)
  except NameError:  # JAX has no other way to ask
    return 1


def is_mapped() -> bool:
  return axis_size() > 1


def average(tree):
  """The mean over the devices of a mapped function; elsewhere the tree itself."""
  return lax.pmean(tree, AXIS) if is_mapped() else tree


def own_key(key: jax.Array) -> jax.Array:
  """A key for each device of a mapped function; elsewhere the key itself."""
  return jax.random.fold_in(key, lax.axis_index(AXIS)) if is_mapped() else key


def compile_step(config, fn: Callable) -> Callable:
  """Compiles fn(carry, batches [n, B], *args) -> carry; `carry` is donated.

  With parallel=pmap and B a multiple of the number of devices every device runs fn with a copy of
  all arguments, and all end with the same carry.
  """
  jitted, count = jax.jit(fn, donate_argnums=0), num_devices(config)
  if config.parallel != "pmap" or count == 1:
    return jitted if jax.process_count() == 1 else _over_processes(fn)
  mapped = jax.pmap(fn, AXIS, donate_argnums=0, devices=jax.devices())
  here = jax.local_device_count()
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
      return jitted(carry, batches, *args)
    return jax.tree.map(one_of, mapped(*jax.tree.map(copies, (carry, batches, *args))))

  call.lower = jitted.lower
  return call
