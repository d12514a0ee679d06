"""What L2 and EWC share: one network for all tasks, with a penalty on leaving an anchor.

| here                       | meaning |
|----------------------------|---------|
| shared["params"]           | parameters that every task trains: all layers except the head |
| shared["stats"]            | BatchNorm's running statistics, if BatchNorm is shared |
| shared["anchor"]           | the earlier parameters and their weights, for training alone |

All tasks are predicted with the current shared parameters, hence these methods forget. Population
statistics stay those of the time when the task was learned.
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
from halrp_jax.types import Array, Method, Network, Params, Size, State, Task
from halrp_jax.weights import trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.NetworkConfig):
  """Config keys `method.*` that L2 and EWC share."""

  bn_scope: str = keys.one_of(
    "shared", ("shared", "task"), "whether all tasks share BatchNorm, or each task has its own"
  )


class TaskState(NamedTuple):
  """State of a task."""

  private: Params  # head, and BatchNorm with method.bn_scope = "task"
  stats: Params  # BatchNorm's statistics with bn_scope = "task" or population statistics, else {}
  num_classes: Array  # int32 []


class Anchor(NamedTuple):
  """Functions of an anchor, a pytree of the method that the shared parameters are held near."""

  first: Callable[[Params], Params]  # (shared parameters) -> anchor that penalises nothing
  # (shared parameters, anchor) -> penalty
  distance: Callable[[Params, Params], jax.Array | int | float]
  # (anchor, all parameters after a task, statistics, task) -> anchor for the next task
  following: Callable[[Params, Params, Params, Task], Params]


def make(config: Config, setup: Setup, anchors: Anchor) -> Method:
  """Builds a method with a penalty on leaving an anchor.

  Args:
    config: config of the method.
    setup: settings of the run.
    anchors: the functions in which the methods differ.
  """
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
    task_state = TaskState(private, stats if own_norm else {}, jnp.int32(task.num_classes))
    stats = {} if own_norm else stats
    return state.append(task_state, params=shared, stats=stats, anchor=anchor), {}

  def network(shared, task):
    params = trees.join_private(shared["params"], task.private)
    return Network(params, task.stats or shared["stats"])

  return Method(learn, size, network, serves=("params", "stats"))


def _warm_start(state: State, fresh: Params, own_norm: bool) -> tuple[Params, Params, Params]:
  """Returns the params, stats and anchor of the previous task, with a fresh head in the params."""
  previous = state.tasks[-1]
  private = networks.fresh_head(previous.private, fresh)
  params = trees.join_private(state.shared["params"], private)
  stats = previous.stats if own_norm else state.shared["stats"]
  return params, stats, state.shared["anchor"]


def size(state: State) -> Size:
  """Returns the size: later tasks add their heads, and BatchNorm if they have their own.

  Anchors are for training alone.
  """
  first, *later = state.tasks
  params = trees.join_private(state.shared["params"], first.private)
  base = sizes.network_count(*trees.split(params), int(first.num_classes))
  private = [sizes.count_rest(p.private, {}, int(p.num_classes)).counted for p in later]
  stats, unused = sizes.count_statistics(state)
  anchors = sizes.count_leaves(state.shared["anchor"])
  return sizes.dense_size(base, sum(private), stats, anchors + unused)
