"""MTL: multi-task learning of all tasks together, in one network with a head for each task.

Update rule: Adam on the mean cross-entropy over the images of all tasks + l2 |W|^2, where W are the
kernels of all layers except the heads. An epoch is one pass over all images. This is not continual
learning, but a reference to compare it with.

| symbol | here             | meaning |
|--------|------------------|---------|
| W      | shared["params"] | all layers except the heads, for all tasks |
| -      | shared["stats"]  | BatchNorm's running statistics |

The accuracy matrix has one row, the last, so there is no backward transfer.

Reference: the multi-task baseline of the HALRP paper (Sect. 5.1). The paper does not say whether a
batch holds images of one task, as its loaders suggest, or of all tasks: `method.mix`. This matters
when BatchNorm uses the statistics of a batch.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from halrp_jax import keys
from halrp_jax.training import batches, losses, networks, sizes
from halrp_jax.training.fit import Fit, make_fit
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Method, Network, Params, Size, State
from halrp_jax.weights import trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.NetworkConfig):
  """Config keys `method.*` of MTL."""

  mix: str = keys.one_of(
    "single",
    ("single", "mixed"),
    "images of a batch: single: all of one task, and the tasks take turns; mixed: of all tasks",
  )


class TaskState(NamedTuple):
  """State of a task."""

  head: Params
  stats: Params  # BatchNorm's population statistics, {} until they are measured
  num_classes: Array  # int32 []


def make(config: Config, setup: Setup) -> Method:
  """Builds MTL."""
  width = setup.model.num_classes
  wide_model = setup.model.clone(num_classes=setup.num_tasks * width)  # all heads side by side
  wide = setup._replace(model=wide_model)
  initialize, fit = networks.make_initialize(wide), _joint_fit(wide, width)
  frozen = {"l2": networks.l2_coefficient(config)}

  def learn(state, tasks, key, store):
    init_key, fit_key = jax.random.split(key)
    params, stats = initialize(init_key)
    joint = batches.join_tasks(tasks, config.mix == "mixed")
    params, stats = fit(params, stats, frozen, joint, fit_key, setup.epochs, store.child("train"))
    features, heads = trees.split_private(params, norm=False)
    task_states = tuple(
      TaskState(_head_of(t, width, heads[trees.HEAD]), {}, jnp.int32(task.num_classes))
      for t, task in enumerate(tasks)
    )
    return State({"params": features, "stats": stats}, task_states), {}

  def network(shared, task):
    params = shared["params"] | {trees.HEAD: task.head}
    return Network(params, task.stats or shared["stats"])

  return Method(learn, size, network, serves=("params", "stats"), groups=_all_together)


def _joint_fit(wide: Setup, width: int) -> Fit:
  """Builds `fit` of a network with all heads side by side.

  The loss of an image is that of its task's head.

  Args:
    wide: settings of the run, with that network.
    width: number of outputs of one head.
  """
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


def _all_together(num_tasks: int) -> tuple[tuple[int, ...], ...]:
  """Returns all tasks in one group, for `Method.groups`."""
  return (tuple(range(num_tasks)),)


def size(state: State) -> Size:
  """Returns the size: later tasks add their heads."""
  first, *later = state.tasks
  kernels, rest = trees.split(state.shared["params"] | {trees.HEAD: first.head})
  base = sizes.network_count(kernels, rest, int(first.num_classes))
  heads = [sizes.count_rest({trees.HEAD: p.head}, {}, int(p.num_classes)) for p in later]
  stats, unused = sizes.count_statistics(state)
  return sizes.dense_size(base, sum(count.counted for count in heads), stats, unused)
