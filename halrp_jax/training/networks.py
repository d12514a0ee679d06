"""Networks as `fit` takes them: plain, with a trained head alone, with perturbed kernels."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from halrp_jax.keys import NetworkConfig
from halrp_jax.nn.norm import MOMENTUM
from halrp_jax.training import contract, losses
from halrp_jax.training.setup import Setup
from halrp_jax.types import Network, Params
from halrp_jax.weights import perturb, trees

# --- the plain network: first tasks, single-task learning, warm-up --------------------


def initialize(model, key: jax.Array, image_shape: tuple[int, ...]) -> tuple[Params, Params]:
  """Returns fresh (params, stats) of a model. `image_shape` is [H, W, C]."""
  contract.check_call(model)
  variables = model.init({"params": key}, jnp.zeros((1, *image_shape)), train=False)
  variables = nn.meta.unbox(variables)
  return variables["params"], variables.get("batch_stats", {})


def statistics_of(model, image_shape: tuple[int, ...]) -> Params:
  """Returns shapes and types of a model's BatchNorm statistics; empty without BatchNorm."""
  return jax.eval_shape(lambda key: initialize(model, key, image_shape), jax.random.key(0))[1]


def make_initialize(setup: Setup) -> Callable:
  """Builds the jitted `initialize(key) -> params, stats`."""
  return jax.jit(lambda key: initialize(setup.model, key, setup.image_shape))


def l2_coefficient(config: NetworkConfig) -> float:
  """Returns what |W|^2 is multiplied by. `config`: of the method, with `l2` and `l2_half`."""
  return config.l2 * (0.5 if config.l2_half else 1.0)


def apply_model(model, params, stats, image, train, key):
  """Applies a model with stored statistics; returns logits [B, K] and new statistics."""
  variables = {"params": params, "batch_stats": stats}
  if not train:
    return model.apply(variables, image, train=False), stats
  logits, updates = model.apply(
    variables, image, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
  )
  return logits, updates.get("batch_stats", {})


def fix_batch_statistics(model, params, image):
  """Returns a model that evaluates with stored statistics, and those of a batch to be stored.

  Of no effect on a network without BatchNorm.
  """
  if not hasattr(model, "running"):
    return model, {}
  mapped = {"axis_name": None} if hasattr(model, "axis_name") else {}  # this is no mapped step
  running = model.clone(running=True, **mapped)
  start = running.init(jax.random.key(0), image[:1], train=False)["batch_stats"]
  # after one step s1 = (1 - momentum) s0 + momentum b: solve for the batch's b
  variables = {"params": params, "batch_stats": start}
  _, updates = running.apply(
    variables, image, train=True, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"]
  )
  momentum = MOMENTUM
  stats = jax.tree.map(
    lambda new, old: (new - (1 - momentum) * old) / momentum, updates["batch_stats"], start
  )
  return running, jax.lax.stop_gradient(stats)


def plain_network(model) -> tuple[Callable, Callable]:
  """Builds (apply_fn, penalty_fn) of the plain network; `frozen` is {"l2": coefficient}.

  The penalty is l2 |W|^2 over the kernels of the features: no head, no bias, no BatchNorm.
  """

  def apply_fn(params, frozen, stats, image, train, key):
    return apply_model(model, params, stats, image, train, key)

  def penalty_fn(params, frozen):
    kernels, _ = trees.split(params)
    return frozen["l2"] * losses.sum_squares(kernels)

  return apply_fn, penalty_fn


def head_network(model) -> tuple[Callable, Callable]:
  """Builds (apply_fn, penalty_fn) that train the head alone, the network being in evaluation.

  `params` is {"head": its parameters}; `frozen` {"params": the others}.
  """
  contract.check_call(model)

  def apply_fn(params, frozen, stats, image, train, key):
    return apply_model(model, frozen["params"] | params, stats, image, False, key)

  return apply_fn, lambda params, frozen: 0.0


def perturbed_network(model) -> Callable:
  """Builds apply_fn of the network with perturbed kernels.

  `params` is {"perturbation": by layer, "rest": all but the kernels}; `frozen` has "kernels".
  """

  def apply_fn(params, frozen, stats, image, train, key):
    variables = {"params": params["rest"], "batch_stats": stats}
    args = (model, frozen["kernels"], params["perturbation"], variables, image)
    if not train:
      return perturb.apply(*args, train=False), stats
    logits, new = perturb.apply(*args, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
    return logits, new.get("batch_stats", {})

  return apply_fn


def perturbed_logits(model) -> Callable:
  """Builds `Method.logits` of tasks with a `perturbation` of shared kernels and a `rest`."""
  apply_fn = perturbed_network(model)

  def logits(shared, task, image):
    params = {"perturbation": task.perturbation, "rest": task.rest}
    return apply_fn(params, shared, task.stats, image, False, None)[0]

  return logits


def merged(shared, task) -> Network:
  """Returns the `Method.network` of a task with a `perturbation` of shared kernels and a `rest`."""
  return Network(perturb.merge(shared["kernels"], task.perturbation, task.rest), task.stats)


def fresh_head(rest: Params, fresh: Params) -> Params:
  """Returns `rest` with the head of freshly drawn parameters."""
  return rest | {trees.HEAD: fresh[trees.HEAD]}
