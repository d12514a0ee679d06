"""Training and evaluation on several devices, of one process or of several (`processes`).

Methods and the training loop are written for one device. A `Layout` adapts them to the devices that
take part. The config key `parallel` chooses how:

* sharded: batches are sharded over all devices, and XLA partitions the program (jit with a mesh and
  NamedSharding). The statistics of BatchNorm are those of the whole batch without further code.
* replicas: several runs are learned at once (`devices.replicas`), and the runs are sharded over the
  devices; every batch stays on one device.
* pmap: `jax.pmap` runs the training step on every device with its part of the batch. Gradients,
  and the statistics in `nn.norm.BatchNorm`, are averaged over `Layout.axis_name`. Evaluation works
  as for sharded.
* none: everything runs on one device.

The results of one device and of several agree up to rounding. Dropout with pmap is an exception:
each device draws its own random bits.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from halrp_jax.types import Split

Tree = TypeVar("Tree")  # a pytree of arrays, returned with the same structure
AXIS = "batch"


class Compiled(NamedTuple):
  """A function compiled by `Layout.compile`."""

  call: Callable  # (carry, batches [n, B], *args) -> carry; `carry` is donated
  lower: Callable  # same arguments; returns what `jax.jit(...).lower` returns


class Layout(NamedTuple):
  """How a run uses the devices. `make_layout` builds it once for a run."""

  replicate: Callable  # tree -> tree, every array whole on every device of this process
  shard: Callable  # tree -> tree, every array [B, ...] sharded over the devices by its first axis
  compile: Callable[[Callable], Compiled]  # compiles fn(carry, batches, *args) -> carry
  axis_name: str | None = None  # mapped axis in functions that `compile` compiled; None: no pmap
  num_run_devices: int = 1  # devices over which simultaneous runs are sharded (`replicas`)

  def average(self, tree: Tree) -> Tree:
    """Returns the mean of a tree over the mapped devices; without pmap, the tree itself."""
    return tree if self.axis_name is None else lax.pmean(tree, self.axis_name)

  def own_key(self, key: jax.Array) -> jax.Array:
    """Returns a different random key for every mapped device; without pmap, the key itself."""
    if self.axis_name is None or lax.axis_size(self.axis_name) == 1:
      return key
    return jax.random.fold_in(key, lax.axis_index(self.axis_name))


def make_layout(mode: str) -> Layout:
  """Builds the layout of a run. Starts JAX's backend unless the mode is "none".

  Args:
    mode: the config key `parallel`; "auto" has the same effect as "sharded".
  """
  count = 1 if mode in ("none", "replicas") else jax.device_count()
  num_replicas = jax.local_device_count() if mode == "replicas" else 1
  local_devices = tuple(jax.local_devices()) if count > 1 else ()
  return _make_layout(count, local_devices, mode == "pmap" and count > 1, num_replicas)


@functools.lru_cache
def _make_layout(count: int, local_devices: tuple, is_mapped: bool, num_replicas: int) -> Layout:
  """Builds a layout: always the same object for the same devices, so that runs share programs."""
  if is_mapped:
    compile_fn = _compile_mapped
  else:
    compile_fn = _compile_over_processes if count > 1 and jax.process_count() > 1 else _compile
  return Layout(
    _make_replicate(count),
    _make_shard(count, is_mapped),
    compile_fn,
    AXIS if is_mapped else None,
    num_replicas,
  )


def shardings(devices: list) -> tuple[NamedSharding, NamedSharding]:
  """Returns two shardings over a list of devices: along the first axis, and replicated."""
  mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
  return NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())


def _identity(x: Tree) -> Tree:
  """Returns its argument."""
  return x


def _make_replicate(count: int) -> Callable:
  """Builds replicate(tree). An array object that occurs several times is copied only once.

  The images are replicated once per run. If they stayed on one device, every call of a compiled
  function would send them to the others. Images of a `Split` that are on the host stay there.
  """
  if count == 1 or jax.local_device_count() == 1:
    return _identity
  _, replicated = shardings(jax.local_devices())

  def is_split(x):
    return isinstance(x, Split)

  def replicate(tree):
    splits = [x for x in jax.tree.leaves(tree, is_leaf=is_split) if is_split(x)]
    copies = {id(x.image): x.image for x in splits if isinstance(x.image, np.ndarray)}

    def copy(x):
      if not isinstance(x, jax.Array | np.ndarray):
        return x
      if id(x) not in copies:
        copies[id(x)] = jax.device_put(x, replicated)
      return copies[id(x)]

    return jax.tree.map(copy, tree)

  return replicate


def _make_shard(count: int, is_mapped: bool) -> Callable:
  """Builds shard(tree), which shards arrays [B, ...] over the devices by their first axis.

  Inside a compiled step the devices are those of all processes; outside they are those of this
  process. Inside a mapped step every device gets its own part. If B is not a multiple of the number
  of devices, as in the last batch of an epoch, every device has the whole array and computes all of
  it: the result is exact, but no faster than on one device. Scalars are returned unchanged.
  """
  if count == 1:
    return _identity
  num_local = jax.local_device_count()
  all_shardings, local_shardings = shardings(jax.devices()), shardings(jax.local_devices())

  def shard(x):
    if not x.ndim:
      return x
    if not isinstance(x, Tracer):
      return jax.device_put(x, local_shardings[bool(len(x) % num_local)])
    if is_mapped:
      size = len(x) // lax.axis_size(AXIS)
      return lax.dynamic_slice_in_dim(x, lax.axis_index(AXIS) * size, size)
    return lax.with_sharding_constraint(x, all_shardings[bool(len(x) % count)])

  return lambda tree: jax.tree.map(shard, tree)


def _compile(fn: Callable) -> Compiled:
  """Compiles for one device, or for all devices of one process by sharding."""
  jitted = jax.jit(fn, donate_argnums=0)
  return Compiled(jitted, jitted.lower)


# --- several processes: between compiled steps, each process holds whole arrays ----------


def _compile_over_processes(fn: Callable) -> Compiled:
  """Compiles for the devices of all processes; arguments and results are local to this process.

  An argument that is already replicated over the devices of this process is not copied.
  """
  _, local = shardings(jax.local_devices())
  _, everywhere = shardings(jax.devices())
  jitted = jax.jit(fn, donate_argnums=0, out_shardings=everywhere)

  def reshard(x, sharding):
    parts = [part.data for part in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

  def to_everywhere(args):
    return jax.tree.map(lambda x: reshard(jax.device_put(jnp.asarray(x), local), everywhere), args)

  def call(*args):
    return jax.tree.map(lambda x: reshard(x, local), jitted(*to_everywhere(args)))

  return Compiled(call, lambda *args: jitted.lower(*to_everywhere(args)))


# --- pmap -----------------------------------------------------------------------------


def _compile_mapped(fn: Callable) -> Compiled:
  """Compiles with jax.pmap, for batches whose size is a multiple of the number of devices.

  Every device runs fn with a copy of all arguments, and all end with the same carry. A batch of
  another size is computed whole on every device of this process, as a mapped function with a single
  part, so that `axis_name` exists there, too.
  """
  count, num_local = jax.device_count(), jax.local_device_count()
  mapped = jax.pmap(fn, AXIS, donate_argnums=0, devices=jax.devices())
  single_part = jax.make_mesh(
    (1, num_local), (AXIS, "copy"), axis_types=(AxisType.Auto,) * 2, devices=jax.local_devices()
  )
  spec = PartitionSpec()
  whole_batch = jax.jit(
    jax.shard_map(fn, mesh=single_part, in_specs=spec, out_specs=spec, check_vma=False),
    donate_argnums=0,
  )
  by_device, replicated = shardings(jax.local_devices())

  def add_device_axis(x):
    x = jax.device_put(jnp.asarray(x), replicated)
    parts = [part.data[None] for part in x.addressable_shards]
    return jax.make_array_from_single_device_arrays((num_local, *x.shape), by_device, parts)

  def drop_device_axis(x):
    parts = [part.data[0] for part in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape[1:], replicated, parts)

  def call(carry, batches, *args):
    if batches.shape[-1] % count:
      return whole_batch(carry, batches, *args)
    copies = jax.tree.map(add_device_axis, (carry, batches, *args))
    return jax.tree.map(drop_device_axis, mapped(*copies))

  return Compiled(call, whole_batch.lower)
