"""BE: BatchEnsemble for lifelong learning, a frozen base times a rank-1 matrix per task.

Update rule: W_t = W * (r_t s_t'), by element, the same for all positions of a convolution's window.
Task 0 trains W; every later task trains r_t, s_t, biases, BatchNorm and head.

| paper | here                     | meaning |
|-------|--------------------------|---------|
| W     | shared["kernels"][layer] | kernels after the first task, then frozen |

This is HALRP at rank 0 without warm-up. r_0 and s_0 are 1 and not trained: Eq. 6 trains them
together with W, which they only rescale.

Reference: Y. Wen et al., "BatchEnsemble: an alternative approach to efficient ensemble and lifelong
learning", 2020, Eq. 1, 6, 7. The HALRP paper does not say whether biases and BatchNorm belong to
the task; here they do.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from halrp_jax import keys
from halrp_jax.training import contract, losses, networks, sizes
from halrp_jax.training.fit import make_fit, plain_fit
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Method, Params
from halrp_jax.weights import kinds, lowrank, trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.NetworkConfig):
  """Config keys `method.*` of BE."""

  l2_scales: float = keys.number(0.0, 0, None, "L2 coefficient on r and s")


class TaskState(NamedTuple):
  """State of a task."""

  # by layer r as R and s as S, the scales of outputs and of inputs; U and V have no columns
  perturbation: dict[str, lowrank.Perturbation]
  rest: Params  # biases, BatchNorm and head
  stats: Params  # BatchNorm's statistics
  num_classes: Array  # int32 []


def make(config: Config, setup: Setup) -> Method:
  """Builds BE."""
  initialize = networks.make_initialize(setup)
  make_ones = _make_ones(setup)
  fit_base = plain_fit(setup, networks.l2_coefficient(config))
  apply_scaled = networks.perturbed_network(setup.model)
  fit_scaled = make_fit(setup, apply_scaled, _make_penalty(config))

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, fit_key = jax.random.split(key)
    params, stats = initialize(init_key)
    num_classes = jnp.int32(task.num_classes)
    if not state.tasks:  # Eq. 6: the first task trains W
      params, stats = fit_base(params, stats, task, fit_key, store.child("base"))
      kernels, rest = trees.split(params)
      task_state = TaskState(make_ones(params), rest, stats, num_classes)
      return state.append(task_state, kernels=kernels), {}
    # Eq. 7: a later task trains r_t and s_t
    first, store = state.tasks[0], store.child("scales")
    start = {
      "perturbation": first.perturbation,
      "rest": networks.fresh_head(first.rest, params),
    }
    args = (start, first.stats, state.shared, task, fit_key, setup.epochs, store)
    trained, stats = fit_scaled(*args)
    return state.append(TaskState(**trained, stats=stats, num_classes=num_classes)), {}

  logits = networks.perturbed_logits(setup.model)
  size_of = sizes.perturbed_task
  return Method(learn, sizes.perturbed, networks.merged, logits, ("kernels",), size_of=size_of)


def _make_penalty(config: Config) -> Callable:
  """Builds penalty_fn: method.l2_scales (|r|^2 + |s|^2), halved with method.l2_half."""
  half = 0.5 if config.l2_half else 1.0

  def penalty(params, frozen):
    scales = [(p.R, p.S) for p in params["perturbation"].values()]
    return half * config.l2_scales * losses.sum_squares(scales)

  return penalty


def _make_ones(setup: Setup) -> Callable[[Params], dict[str, lowrank.Perturbation]]:
  """Builds a function of params that returns r = s = 1 for every layer, which change nothing."""
  shapes_fn = contract.make_matrix_shapes(setup.model, setup.image_shape, setup.max_classes)

  def ones(params):
    kernels, shapes = trees.split(params)[0], shapes_fn(params)
    return {
      name: lowrank.identity(kinds.as_matrix(w, shapes[name]), 0, fold=True)
      for name, w in kernels.items()
    }

  return ones
