"""MTL: all tasks at once, one network with a head for each (joint training).

Update rule: Adam on the mean cross-entropy over the images of all tasks + l2 |W|^2 (kernels of the
features). An epoch is one pass over all of them. No continual learning: what it may be compared to.

| symbol | here             | meaning |
|--------|------------------|---------|
| W      | shared["params"] | features, for all tasks |
| -      | shared["stats"]  | BatchNorm's running statistics |

The accuracy matrix has one row, the last; there is no backward transfer.

Reference: the multi-task baseline of the HALRP paper (Sect. 5.1). It does not say whether a batch
holds images of one task (as its loaders suggest) or of all: `method.mix`. It matters where
BatchNorm takes the statistics of a batch.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from halrp_jax import keys
from halrp_jax.training import batches, losses, networks, sizes
from halrp_jax.training.fit import make_fit
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Method, Network, Params, Size, State
from halrp_jax.weights import trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.NetworkConfig):
  """The keys `method.*` of this method."""

  mix: str = keys.one_of(
    "single", ("single", "mixed"), "images in a batch: of one task, the tasks in turn; of all"
  )


class TaskState(NamedTuple):
  head: Params  # of the task
  stats: Params  # BatchNorm's statistics over the task's images, {} until they are measured
  num_classes: Array  # int32 []


def make(config: Config, setup: Setup) -> Method:
  width = setup.model.num_classes
  side_by_side = setup.model.clone(num_classes=setup.num_tasks * width)  # all heads
  wide = setup._replace(model=side_by_side)
  initialize, fit = networks.make_initialize(wide), _joint_fit(wide, width)
  frozen = {"l2": networks.l2_coefficient(config)}

  def learn(state, tasks, key, store):
    init_key, fit_key = jax.random.split(key)
    params, stats = initialize(init_key)
    joint = batches.join_tasks(tasks, config.mix == "mixed")
    params, stats = fit(params, stats, frozen, joint, fit_key, setup.epochs, store.child("train"))
    features, heads = trees.split_private(params, norm=False)
    learned = tuple(
      TaskState(_head_of(t, width, heads[trees.HEAD]), {}, jnp.int32(task.num_classes))
      for t, task in enumerate(tasks)
    )
    return State({"params": features, "stats": stats}, learned), {}

  def network(shared, task):
    params = shared["params"] | {trees.HEAD: task.head}
    return Network(params, task.stats or shared["stats"])

  return Method(learn, size, network, serves=("params", "stats"), groups=_all_at_once)


def _joint_fit(wide: Setup, width: int) -> Callable:
  """Builds `fit` for all heads side by side; the loss of an image is that of its task's head."""
  apply_fn, penalty_fn = networks.plain_network(wide.model)

  def objective(params, frozen, stats, batch, train, key):
    logits, stats = apply_fn(params, frozen, stats, batch.image, train, key)
    by_task = logits.reshape(len(logits), -1, width)  # [B, T, K]
    own = jnp.take_along_axis(by_task, batch.owner[:, None, None], 1)[:, 0]
    return losses.cross_entropy(own, batch.label, batch.num_classes), own, stats

  return make_fit(wide, apply_fn, penalty_fn, objective_fn=objective)


def _head_of(t: int, width: int, heads: Params) -> Params:
  """Cuts the head of task t out of all heads side by side."""
  return jax.tree.map(lambda x: x[..., t * width : (t + 1) * width], heads)


def _all_at_once(num_tasks: int) -> tuple[tuple[int, ...], ...]:
  return (tuple(range(num_tasks)),)


def size(state: State) -> Size:
  """Counts the features and the heads: every task but the first adds its own."""
  first, *later = state.tasks
  kernels, rest = trees.split(state.shared["params"] | {trees.HEAD: first.head})
  base = sizes.network_count(kernels, rest, int(first.num_classes))
  heads = [sizes.count_rest({trees.HEAD: p.head}, {}, int(p.num_classes)) for p in later]
  stats, unused = sizes.count_statistics(state)
  return sizes.dense_size(base, sum(count.counted for count in heads), stats, unused)
