"""What L2 and EWC share: one network for all tasks, held near where the tasks before left it.

| here                       | meaning |
|----------------------------|---------|
| shared["params"]           | features, which every task goes on training |
| shared["stats"]            | running statistics, where BatchNorm is shared |
| shared["anchor"]           | what the penalty is made of, for training alone |

A task is predicted with the features as they are now, hence these methods forget. Population
statistics stay those of the features when the task was learned.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from halrp_jax import keys
from halrp_jax.training import networks, sizes
from halrp_jax.training.fit import make_fit
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Method, Network, Params, State, Task
from halrp_jax.weights import trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.NetworkConfig):
  """The keys `method.*` of the methods of this file."""

  bn_scope: str = keys.one_of(
    "shared", ("shared", "task"), "whether BatchNorm is one of the shared features or the task's"
  )


class TaskState(NamedTuple):
  private: Params  # head; BatchNorm too with method.bn_scope = "task"
  stats: Params  # its statistics then, and always with population statistics
  num_classes: Array  # int32 []


class Anchor(NamedTuple):
  """What holds the shared parameters, as functions of an anchor: a pytree of the method."""

  first: Callable[[Params], Params]  # (shared parameters) -> anchor that penalises nothing
  distance: Callable[[Params, Params], jax.Array]  # (shared parameters, anchor) -> penalty
  # (anchor, all parameters after a task, statistics, task) -> anchor for the next one
  following: Callable[[Params, Params, Params, Task], Params]


def make(config: Config, setup: Setup, anchors: Anchor) -> Method:
  """Builds a method with a penalty on leaving an anchor."""
  own_norm = config.bn_scope == "task"
  apply_fn, l2_penalty = networks.plain_network(setup.model)

  def penalty(params, frozen):
    shared, _ = trees.split_private(params, own_norm)
    return l2_penalty(params, frozen) + anchors.distance(shared, frozen["anchor"])

  fit = make_fit(setup, apply_fn, penalty)
  initialize = networks.make_initialize(setup)

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, fit_key = jax.random.split(key)
    params, stats = initialize(init_key)
    if state.tasks:
      params, stats, anchor = _warm_start(state, params, own_norm)
    else:
      anchor = anchors.first(trees.split_private(params, own_norm)[0])
    frozen = {"l2": networks.l2_coefficient(config), "anchor": anchor}
    params, stats = fit(params, stats, frozen, task, fit_key, setup.epochs, store.child("train"))
    anchor = store.once("anchor", lambda: anchors.following(anchor, params, stats, task))
    shared, private = trees.split_private(params, own_norm)
    learned = TaskState(private, stats if own_norm else {}, jnp.int32(task.num_classes))
    return state.append(learned, params=shared, stats={} if own_norm else stats, anchor=anchor), {}

  def network(shared, task):
    params = trees.join_private(shared["params"], task.private)
    return Network(params, task.stats or shared["stats"])

  return Method(learn, size, network, serves=("params", "stats"))


def _warm_start(state: State, fresh: Params, own_norm: bool) -> tuple[Params, Params, Params]:
  """Returns params, stats and anchor as the task before left them, but for a fresh head."""
  before = state.tasks[-1]
  private = networks.fresh_head(before.private, fresh)
  params = trees.join_private(state.shared["params"], private)
  stats = before.stats if own_norm else state.shared["stats"]
  return params, stats, state.shared["anchor"]


def size(state: State):
  """Later tasks add their heads, and BatchNorm where it is theirs; anchors are for training."""
  first, *later = state.tasks
  counts = []
  for learned in state.tasks:
    params = trees.join_private(state.shared["params"], learned.private)
    counts.append(sizes.network_count(*trees.split(params), int(learned.num_classes)))
  private = [sizes.count_rest(p.private, {}, int(p.num_classes)).counted for p in later]
  stats, unused = sizes.count_statistics(state)
  anchors = sizes.count_leaves(state.shared["anchor"])
  return sizes.dense_size(counts[0], sum(private), stats, anchors + unused)
