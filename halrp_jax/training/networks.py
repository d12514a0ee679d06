"""Networks as functions of their parameters, for `fit`: plain, head only, or perturbed."""

from collections.abc import Callable
from typing import Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax.nn.norm import MOMENTUM
from halrp_jax.training import batches, contract, losses
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Network, Params, Task
from halrp_jax.weights import perturb, taps, trees

# For programs that run so seldom that compiling them takes longer. Initial weights keep their bits,
# the importance changes by rounding.
COMPILE_QUICKLY: dict[str, str | bool] = {"xla_backend_optimization_level": "1"}


class HasL2(Protocol):
  """Config of a method with an L2 term on kernels."""

  @property
  def l2(self) -> float:
    """Returns the coefficient."""
    ...

  @property
  def l2_half(self) -> bool:
    """Returns whether the term has a factor 1/2."""
    ...


# --- the plain network: first tasks, single-task learning, warm-up --------------------


def initialize(
  model: nn.Module, key: jax.Array, image_shape: tuple[int, ...]
) -> tuple[Params, Params]:
  """Returns fresh parameters and BatchNorm statistics of a network.

  Args:
    model: the network.
    key: random key for the parameters.
    image_shape: [H, W, C] of its input.

  Raises:
    UserError: if the network's call has no argument `train`.
  """
  contract.check_call(model)
  variables = model.init({"params": key}, jnp.zeros((1, *image_shape)), train=False)
  variables = nn.meta.unbox(variables)
  return variables["params"], variables.get("batch_stats", {})


def statistics_of(model: nn.Module, image_shape: tuple[int, ...]) -> Params:
  """Returns shapes and dtypes of a network's BatchNorm statistics; {} without BatchNorm."""
  return jax.eval_shape(lambda key: initialize(model, key, image_shape), jax.random.key(0))[1]


def make_initialize(setup: Setup) -> Callable[[jax.Array], tuple[Params, Params]]:
  """Builds `initialize(key) -> params, stats` of a new network.

  Its parameters are those of `Setup.base` with a fresh head, or random ones.
  """

  def draw(key: jax.Array) -> tuple[Params, Params]:
    return initialize(setup.model, key, setup.image_shape)

  if (base := setup.base) is None:
    return jax.jit(draw, compiler_options=COMPILE_QUICKLY)
  draw_head = jax.jit(lambda key: draw(key)[0][trees.HEAD], compiler_options=COMPILE_QUICKLY)
  return lambda key: (base.params | {trees.HEAD: draw_head(key)}, base.stats)


def l2_coefficient(config: HasL2) -> float:
  """Returns the coefficient of |W|^2 in the loss, from `method.l2` and `method.l2_half`."""
  return config.l2 * (0.5 if config.l2_half else 1.0)


def apply_model(
  model: nn.Module,
  params: Params,
  stats: Params,
  image: jax.Array,
  train: bool,
  key: jax.Array | None,
) -> tuple[jax.Array, Params]:
  """Applies a network; returns logits float32 [B, K] and new BatchNorm statistics.

  Args:
    model: the network.
    params: its parameters.
    stats: its BatchNorm statistics, {} if it has none.
    image: float32 [B, H, W, C]
    train: whether it is trained. If not, the statistics stay as they are.
    key: random key for dropout; None in evaluation.
  """
  apply_fn: Callable[..., Params] = model.apply
  variables = {"params": params, "batch_stats": stats}
  if not train:
    return apply_fn(variables, image, train=False), stats
  logits, updates = apply_fn(
    variables, image, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
  )
  return logits, updates.get("batch_stats", {})


def fix_batch_statistics(
  model: nn.Module, params: Params, image: jax.Array
) -> tuple[nn.Module, Params]:
  """Returns a network that evaluates with stored statistics, and the statistics of a batch.

  The statistics are constants: no gradient passes through them. A network without BatchNorm is
  returned as it is, with {}.

  Args:
    model: the network.
    params: its parameters.
    image: float32 [B, H, W, C], the batch.
  """
  if not hasattr(model, "running"):
    return model, {}
  # one device computes this, even if training is mapped over several
  single = model.clone(axis_name=None) if hasattr(model, "axis_name") else model
  running = single.clone(running=True)
  start = running.init(jax.random.key(0), image[:1], train=False)["batch_stats"]
  # one training step gives s1 = (1 - momentum) s0 + momentum b: solve for the batch's b
  variables = {"params": params, "batch_stats": start}
  _, updates = running.apply(
    variables, image, train=True, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"]
  )
  momentum = MOMENTUM
  stats = jax.tree.map(
    lambda new, old: (new - (1 - momentum) * old) / momentum, updates["batch_stats"], start
  )
  return running, jax.lax.stop_gradient(stats)


def with_low_rank_inputs(setup: Setup, shapes: contract.Shapes) -> tuple[str, ...]:
  """Returns the paths of the layers whose inputs V' of a perturbation multiplies.

  Args:
    setup: whose network is meant.
    shapes: (I, J) of its kernels as matrices, by layer path.
  """

  def moments(key: jax.Array) -> dict[str, jax.Array]:
    params, stats = initialize(setup.model, key, setup.image_shape)
    variables = {"params": params, "batch_stats": stats}
    return taps.input_moments(setup.model, shapes, variables, jnp.zeros((1, *setup.image_shape)))

  return tuple(jax.eval_shape(moments, jax.random.key(0)))


def make_input_moments(
  setup: Setup, shapes_of: Callable[[Params], contract.Shapes]
) -> Callable[[Params, Params, Task], dict[str, np.ndarray]]:
  """Builds `input_moments(params, stats, task)`: second moments of what V' multiplies, by layer.

  They are the sums of x x' [I, I] over all rows x of the task's training images, in evaluation
  mode (`taps.input_moments`).

  Args:
    setup: its network and batch size are used.
    shapes_of: (params) -> (I, J) of the kernels as matrices, by layer path.
  """

  @jax.jit
  def of_batch(params, stats, image):
    variables = {"params": params, "batch_stats": stats}
    return taps.input_moments(setup.measuring, shapes_of(params), variables, image)

  def input_moments(params: Params, stats: Params, task: Task) -> dict[str, np.ndarray]:
    total: dict[str, np.ndarray] = {}
    parts = batches.consecutive(len(task.train.index), setup.batch_size)
    for image, _ in batches.load_batches(task.train, task.inputs, parts):
      found = jax.tree.map(np.asarray, of_batch(params, stats, image))
      total = {n: x.astype(np.float64) + total.get(n, 0) for n, x in found.items()}
    return total

  return input_moments


def plain_network(model: nn.Module) -> tuple[Callable, Callable]:
  """Builds apply_fn and penalty_fn of the plain network, for `make_fit`.

  The penalty is l2 |W|^2 over the kernels of all layers except the head; biases and BatchNorm have
  none. `frozen` is {"l2": coefficient}.
  """

  def apply_fn(params, frozen, stats, image, train, key):
    return apply_model(model, params, stats, image, train, key)

  def penalty_fn(params, frozen):
    kernels, _ = trees.split(params)
    return frozen["l2"] * losses.sum_squares(kernels)

  return apply_fn, penalty_fn


def head_network(model: nn.Module) -> tuple[Callable, Callable]:
  """Builds apply_fn and penalty_fn for training the head alone, for `make_fit`.

  The rest of the network is in evaluation mode, and there is no penalty. `params` is
  {"head": its parameters}, `frozen` is {"params": the other parameters}.

  Raises:
    UserError: if the network's call has no argument `train`.
  """
  contract.check_call(model)

  def apply_fn(params, frozen, stats, image, train, key):
    return apply_model(model, frozen["params"] | params, stats, image, False, key)

  return apply_fn, lambda params, frozen: 0.0


def perturbed_network(model: nn.Module) -> Callable:
  """Builds apply_fn of the network with perturbed kernels, for `make_fit`.

  `params` is {"perturbation": by layer path, "rest": all parameters except the kernels}, `frozen`
  has the "kernels" by layer path.
  """

  def apply_fn(params, frozen, stats, image, train, key):
    variables = {"params": params["rest"], "batch_stats": stats}
    args = (model, frozen["kernels"], params["perturbation"], variables, image)
    if not train:
      return perturb.apply(*args, train=False), stats
    logits, new = perturb.apply(*args, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
    return logits, new.get("batch_stats", {})

  return apply_fn


def perturbed_logits(model: nn.Module) -> Callable[[dict, Params, Array], Array]:
  """Builds `Method.logits` for task states with `perturbation` of the shared kernels and `rest`."""
  apply_fn = perturbed_network(model)

  def logits(shared, task, image):
    params = {"perturbation": task.perturbation, "rest": task.rest}
    return apply_fn(params, shared, task.stats, image, False, None)[0]

  return logits


def merged(shared: dict, task: Params) -> Network:
  """Returns the plain network of a task: `Method.network` for perturbed kernels.

  Args:
    shared: shared state with the frozen "kernels".
    task: a task state with `perturbation`, `rest` and `stats`.
  """
  return Network(perturb.merge(shared["kernels"], task.perturbation, task.rest), task.stats)


def fresh_head(rest: Params, fresh: Params) -> Params:
  """Returns the parameters `rest` with the head of the freshly drawn parameters `fresh`."""
  return rest | {trees.HEAD: fresh[trees.HEAD]}
