"""Training and evaluation shared out over the devices of this process.

Everything is written for one device. Where `parallel` says so, batches are laid out over all of
them and XLA derives the rest: each device computes its part of a batch, gradients are summed, and
BatchNorm's statistics are those of the whole batch, so that one device and many agree but for
rounding (design: jit with a mesh and NamedSharding).
"""

from collections.abc import Callable

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXIS = "batch"


def num_devices(config) -> int:
  """Devices that share a batch."""
  return 1 if config.parallel == "none" else jax.local_device_count()


def make_spread(config) -> Callable:
  """Builds spread(tree): its arrays [B, ...] laid out over the devices by their first axis.

  Inside jit and outside. Where B is no multiple of their number (the last batch of an epoch) every
  device has the whole array, and computes it: exact, and no faster. Numbers pass as they are.
  """
  count = num_devices(config)
  if count == 1:
    return lambda tree: tree
  mesh = jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.local_devices())
  shared_out, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(AXIS), PartitionSpec()))

  def place(x):
    if not x.ndim:
      return x
    sharding = whole if len(x) % count else shared_out
    if isinstance(x, jax.core.Tracer):
      return jax.lax.with_sharding_constraint(x, sharding)
    return jax.device_put(x, sharding)

  return lambda tree: jax.tree.map(place, tree)
