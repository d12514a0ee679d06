"""APDfix: APD with shared weights frozen after the first task; a mask and a sparse tau per task.

Update rule: theta_t = sigma * m_t + tau_t with m_t = sigmoid(v_t), trained with Adam on the
cross-entropy + l1 |tau_t| + l2 (|tau_t|^2 + |v_t|^2). sigma is from the network of task 0, trained
as in single-task learning. Here l2 stands for method.l2, halved if method.l2_half.

| paper | here                    | meaning |
|-------|-------------------------|---------|
| sigma | shared["kernels"]       | kernels after the first task, then frozen |

Phases: task 0; every later task starts from task 0's biases and BatchNorm, a fresh head, masks near
1/2 and tau = sigma (method.tau_start). Nothing is forgotten.

Reference: J. Yoon et al., "Scalable and order-robust continual learning with additive parameter
decomposition", 2020 (arXiv 1902.09432), APD-Fixed. The HALRP paper says "learn only the mask
vector" (method.train_tau = False). A mask per output is a special case of BE, yet the paper's
APDfix is better than its BE. So tau is trained too (method.train_tau = True).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from halrp_jax import keys
from halrp_jax.methods import additive
from halrp_jax.training import losses, networks
from halrp_jax.training.fit import Fit, make_fit, plain_fit
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Method, Network, Params, Size, State, Task
from halrp_jax.weights import trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(additive.Config):
  """Config keys `method.*` of APDfix."""

  train_tau: bool = keys.flag(True, "tau is learned; false: the mask alone")
  tau_start: str = keys.one_of("shared", ("shared", "zero"), "where tau starts: at sigma, or at 0")


class TaskState(NamedTuple):
  """State of a task."""

  mask: dict[str, Array]  # m_t by layer, [J]: a factor for every output; ones in task 0
  tau: dict[str, Array]  # tau_t by layer, in the kernel's shape, pruned; zeros in task 0
  rest: Params  # biases, BatchNorm and head
  stats: Params  # BatchNorm's statistics
  num_classes: Array  # int32 []


def make(config: Config, setup: Setup) -> Method:
  """Builds APDfix."""
  initialize = networks.make_initialize(setup)
  fit_base = plain_fit(setup, networks.l2_coefficient(config))
  fit_own = _make_fit_own(config, setup)

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, fit_key = jax.random.split(key)
    params, stats = initialize(init_key)
    if not state.tasks:
      params, stats = fit_base(params, stats, task, fit_key, store.child("base"))
      return _first_state(config, params, stats, task), {}
    start = _start(config, state, params, jax.random.fold_in(init_key, 1))
    stats, store = state.tasks[0].stats, store.child("own")
    trained, stats = fit_own(start, stats, state.shared, task, fit_key, setup.epochs, store)
    mask = additive.masks_of(trained["v"])
    tau = additive.prune(trained["tau"], config.l1)
    num_classes = jnp.int32(task.num_classes)
    return state.append(TaskState(mask, tau, trained["rest"], stats, num_classes)), {}

  def network(shared, task):
    kernels = additive.compose(shared["kernels"], task.mask, task.tau)
    return Network(trees.join(kernels, task.rest), task.stats)

  return Method(learn, size, network, serves=("kernels",))


def _make_fit_own(config: Config, setup: Setup) -> Fit:
  """Builds `fit` for a later task.

  `params` has "v", "tau" and "rest" with biases, BatchNorm and head; `frozen` has the "kernels".
  """
  l2 = networks.l2_coefficient(config)

  def apply_fn(params, frozen, *args):
    mask = additive.masks_of(params["v"])
    kernels = additive.compose(frozen["kernels"], mask, params["tau"])
    return networks.apply_model(setup.model, trees.join(kernels, params["rest"]), *args)

  def penalty(params, frozen):
    squares = losses.sum_squares((params["tau"], params["v"]))
    return config.l1 * losses.sum_absolute(params["tau"]) + l2 * squares

  return make_fit(setup, apply_fn, penalty)


def _first_state(config: Config, params: Params, stats: Params, task: Task) -> State:
  """Returns the method state after the first task, whose kernels become sigma."""
  kernels, rest = trees.split(params)
  ones: dict[str, Array] = {n: jnp.ones(w.shape[-1]) for n, w in kernels.items()}
  zeros = jax.tree.map(jnp.zeros_like, kernels) if config.train_tau else {}
  task_state = TaskState(ones, zeros, rest, stats, jnp.int32(task.num_classes))
  return State({"kernels": kernels}, (task_state,))


def _start(config: Config, state: State, fresh: Params, v_key: jax.Array) -> Params:
  """Returns the parameters that a later task trains, before its first step.

  Biases and BatchNorm are those of task 0.

  Args:
    config: config of the method.
    state: method state before the task.
    fresh: freshly initialized parameters, of which the head is used.
    v_key: random key for v.
  """
  kernels = state.shared["kernels"]
  tau = kernels if config.tau_start == "shared" else jax.tree.map(jnp.zeros_like, kernels)
  return {
    "v": additive.draw_v(v_key, kernels),
    "tau": tau if config.train_tau else {},
    "rest": networks.fresh_head(state.tasks[0].rest, fresh),
  }


def size(state: State) -> Size:
  """Returns the size: later tasks add masks, sparse tau, BatchNorm and heads."""
  first = state.tasks[0]._replace(mask={}, tau={})  # ones and zeros need not be stored
  return additive.size(State(state.shared, (first, *state.tasks[1:])), 0, 0, 0)
