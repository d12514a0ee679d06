"""BN: a frozen base whose BatchNorm and head are trained anew for every task ("BN-Tuned").

Update rule: kernels and biases stay those of task 0. Each task trains BatchNorm's scale and bias
and a head with Adam on the cross-entropy, and has its own BatchNorm statistics.

| symbol | here              | meaning |
|--------|-------------------|---------|
| W      | shared["kernels"] | kernels after the first task, then frozen |

Phases: task 0 trains everything, as STL does. Every later task starts from task 0's BatchNorm
(method.start) and a fresh head, and trains these alone. Nothing is forgotten.

References: S. Ioffe and C. Szegedy, 2015 (arXiv 1502.03167), which the HALRP paper cites; the
lifelong-learning baseline of Y. Wen et al., "BatchEnsemble", 2020, Sect. 4.1. The HALRP paper does
not say whether biases are trained: `method.train_biases`.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from halrp_jax import keys
from halrp_jax.training import networks, sizes
from halrp_jax.training.fit import make_fit, plain_fit
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Method, Network, Params, Size, State
from halrp_jax.weights import trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.NetworkConfig):
  """Config keys `method.*` of BN."""

  start: str = keys.one_of(
    "task0",
    ("task0", "fresh"),
    "where a later task's BatchNorm starts: from task 0's, or freshly drawn",
  )
  train_biases: bool = keys.flag(False, "later tasks train biases of their own too")


class TaskState(NamedTuple):
  """State of a task."""

  rest: Params  # BatchNorm's scale gamma and bias beta, the head, and the biases of all layers
  stats: Params  # BatchNorm's statistics
  num_classes: Array  # int32 []


def make(config: Config, setup: Setup) -> Method:
  """Builds BN."""
  initialize = networks.make_initialize(setup)
  fit_base = plain_fit(setup, networks.l2_coefficient(config))
  fit_tuned = make_fit(setup, _tuned_network(setup.model), lambda params, frozen: 0.0)

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, fit_key = jax.random.split(key)
    params, stats = initialize(init_key)
    num_classes = jnp.int32(task.num_classes)
    if not state.tasks:  # the first task trains everything and gives the base
      params, stats = fit_base(params, stats, task, fit_key, store.child("base"))
      kernels, rest = trees.split(params)
      return state.append(TaskState(rest, stats, num_classes), kernels=kernels), {}
    start, stats, frozen = _start(config, state, params, stats)
    store = store.child("tune")
    tuned, stats = fit_tuned(start, stats, frozen, task, fit_key, setup.epochs, store)
    rest = trees.join_biases(frozen["biases"] | tuned["biases"], tuned["others"])
    return state.append(TaskState(rest, stats, num_classes)), {}

  def network(shared, task):
    return Network(trees.join(shared["kernels"], task.rest), task.stats)

  def size(state):
    return _size(state, config.train_biases)

  return Method(learn, size, network, serves=("kernels",))


def _tuned_network(model: nn.Module) -> Callable:
  """Builds apply_fn of the network with frozen kernels.

  `params` has the "biases" that are trained and "others", BatchNorm and head. `frozen` has
  "kernels" and all "biases".
  """

  def apply_fn(params, frozen, stats, image, train, key):
    rest = trees.join_biases(frozen["biases"] | params["biases"], params["others"])
    params = trees.join(frozen["kernels"], rest)
    return networks.apply_model(model, params, stats, image, train, key)

  return apply_fn


def _start(
  config: Config, state: State, params: Params, stats: Params
) -> tuple[dict, Params, dict]:
  """Returns `params`, `stats` and `frozen` of a later task before its first step.

  Args:
    config: config of the method.
    state: method state before the task.
    params: freshly initialized parameters.
    stats: freshly initialized statistics.
  """
  kernels, first = state.shared["kernels"], state.tasks[0]
  _, fresh = trees.split(params)
  rest, stats = (fresh, stats) if config.start == "fresh" else (first.rest, first.stats)
  biases, _ = trees.split_biases(first.rest, kernels)
  _, others = trees.split_biases(networks.fresh_head(rest, fresh), kernels)
  start = {"biases": biases if config.train_biases else {}, "others": others}
  return start, stats, {"kernels": kernels, "biases": biases}


def _size(state: State, train_biases: bool) -> Size:
  """Returns the size: later tasks add BatchNorm and head, and biases if they train them."""
  kernels, (first, *later) = state.shared["kernels"], state.tasks
  counts = [sizes.count_rest(p.rest, kernels, int(p.num_classes)) for p in later]
  uncounted = sizes.count_task_statistics(state)
  uncounted += sum(c.biases for c in counts) if train_biases else 0
  base = sizes.network_count(kernels, first.rest, int(first.num_classes))
  return sizes.dense_size(base, sum(c.counted for c in counts), uncounted)
