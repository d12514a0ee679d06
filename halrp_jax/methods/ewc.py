"""EWC: one network for all tasks; parameters that matter to earlier tasks are held more firmly.

Update rule: Adam on the cross-entropy + l2 |W|^2 + lambda/2 sum_k sum_p F_kp (theta_p -
theta*_kp)^2 over earlier tasks k and parameters p. theta*_k are the shared parameters after task k,
F_k is their diagonal Fisher information then, and W are the kernels.

| paper        | here                       | meaning |
|--------------|----------------------------|---------|
| theta        | shared["params"]           | shared parameters: all layers except the head |
| sum_k F_k    | shared["anchor"]["fisher"] | A |
| theta*       | shared["anchor"]["center"] | sum_k F_k theta*_k / A |
| lambda       | method.strength            | coefficient of the penalty |

The sum over tasks equals A (theta - center)^2 plus a constant, so memory does not grow with the
number of tasks. F = E_x [(d log p(y|x) / d theta)^2] is computed sample by sample, not from the
mean gradient of a batch. The labels y are the true ones (empirical Fisher) or are drawn from the
model (method.fisher). BatchNorm uses the statistics of a chunk of samples, through which no
gradient passes; with method.batch_norm = "running", it uses stored ones.

Phases: training; then the Fisher information on method.fisher_samples training images.

References: J. Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", 2017
(arXiv 1612.00796), Eq. 3; J. Schwarz et al., "Progress & compress: A scalable framework for
continual learning", 2018 (arXiv 1805.06370), for the online variant. The HALRP paper does not give
lambda.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax import keys, models
from halrp_jax.methods import anchored
from halrp_jax.training import batches, losses, networks
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Method, Params, Task
from halrp_jax.weights import trees

_CHUNK = 16  # samples that share BatchNorm statistics


# The strength was found by `tune` on CIFAR100-Split, order A, seed 0 (docs/tuning.md). With
# 25 % of the training images 1e3 and 1e4 give 53.1 % and 52.8 %; with 5 %, 1e4 is better than all
# other values by 6 points.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(anchored.Config):
  """Config keys `method.*` of EWC."""

  strength: float = keys.number(1e4, 0, None, "lambda: coefficient on the Fisher-weighted distance")
  fisher: str = keys.one_of(
    "true_label",
    ("true_label", "sampled_label"),
    "labels for the Fisher information: the true ones, or drawn from the model",
  )
  fisher_samples: int = keys.whole(
    1000, 1, None, "training images of a task for its Fisher information"
  )
  accumulate: str = keys.one_of(
    "separate",
    ("separate", "online"),
    "separate: an anchor for every earlier task; online: one, at the previous task's parameters",
  )
  decay: float = keys.number(
    0.95, 0, 1, "accumulate=online: factor on the Fisher information of earlier tasks"
  )


TaskState = anchored.TaskState


def make(config: Config, setup: Setup) -> Method:
  """Builds EWC."""
  own_norm, sampled = config.bn_scope == "task", config.fisher == "sampled_label"
  fisher_chunk = jax.jit(_fisher_of(setup.measuring, own_norm, sampled))

  def first(shared):
    return {"fisher": jax.tree.map(jnp.zeros_like, shared), "center": shared}

  def distance(shared, anchor):
    terms = jax.tree.map(
      lambda x, f, c: jnp.sum(f * (x - c) ** 2), shared, anchor["fisher"], anchor["center"]
    )
    return 0.5 * config.strength * sum(jax.tree.leaves(terms))

  def following(anchor, params, stats, task):
    new = fisher(fisher_chunk, params, stats, task, config.fisher_samples, own_norm)
    shared, _ = trees.split_private(params, own_norm)
    if config.accumulate == "online":
      total = jax.tree.map(lambda a, f: config.decay * a + f, anchor["fisher"], new)
      return {"fisher": total, "center": shared}
    total = jax.tree.map(jnp.add, anchor["fisher"], new)
    center = jax.tree.map(_weighted_mean, anchor["fisher"], anchor["center"], new, shared)
    return {"fisher": total, "center": center}

  return anchored.make(config, setup, anchored.Anchor(first, distance, following))


def _weighted_mean(a: Array, x: Array, b: Array, y: Array) -> jax.Array:
  """Returns (a x + b y) / (a + b), and y where both weights are 0."""
  total = a + b
  return jnp.where(total > 0, (a * x + b * y) / jnp.where(total > 0, total, 1), y)


def fisher(
  fisher_chunk: Callable[..., Params],
  params: Params,
  stats: Params,
  task: Task,
  num_samples: int,
  own_norm: bool,
) -> Params:
  """Returns the diagonal Fisher information of the shared parameters after a task.

  Args:
    fisher_chunk: the compiled function that `_fisher_of` builds.
    params: parameters of the whole network after the task.
    stats: its BatchNorm statistics.
    task: whose training images are used.
    num_samples: the number of images that the mean is taken over, at most.
    own_norm: whether BatchNorm belongs to the task.
  """
  rows = np.arange(min(num_samples, len(task.train.index)))
  total = jax.tree.map(jnp.zeros_like, trees.split_private(params, own_norm)[0])
  parts = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
  # one shape for all chunks, so that one function is compiled
  padded = [np.resize(part, _CHUNK) for part in parts]
  loaded = batches.load_batches(task.train, task.inputs, padded)
  for i, (part, (image, label)) in enumerate(zip(parts, loaded, strict=True)):
    weight = (np.arange(_CHUNK) < len(part)).astype(np.float32)
    key = jax.random.fold_in(jax.random.key(task.id), i * _CHUNK)
    squares = fisher_chunk(params, stats, image, label, weight, jnp.int32(task.num_classes), key)
    total = jax.block_until_ready(jax.tree.map(jnp.add, total, squares))
  return jax.tree.map(lambda x: x / len(rows), total)


def _fisher_of(model: nn.Module, own_norm: bool, sampled: bool) -> Callable[..., Params]:
  """Builds (params, stats, image, label, weight [B], num_classes, key) -> sum of squared gradients.

  Args:
    model: the network.
    own_norm: whether BatchNorm belongs to the task.
    sampled: whether labels are drawn from the model.
  """

  def chunk(params, stats, image, label, weight, num_classes, key):
    shared, private = trees.split_private(params, own_norm)
    if models.evaluates_with_batch(model):  # with the statistics of the chunk, as constants
      frozen_model, fixed = networks.fix_batch_statistics(model, params, image)
    else:
      frozen_model, fixed = model, stats
    if sampled:
      logits, _ = networks.apply_model(frozen_model, params, fixed, image, False, None)
      label = jax.random.categorical(key, losses.mask_classes(logits, num_classes))

    def log_likelihood(shared, x, y):
      params = trees.join_private(shared, private)
      logits, _ = networks.apply_model(frozen_model, params, fixed, x[None], False, None)
      return -losses.cross_entropy(logits, y[None], num_classes)

    def add(total, sample):
      x, y, w = sample
      gradient = jax.grad(log_likelihood)(shared, x, y)
      return jax.tree.map(lambda t, g: t + w * g * g, total, gradient), None

    # a loop, since gradients under jax.vmap take ten times as long on the CPU: they move memory
    zero = jax.tree.map(jnp.zeros_like, shared)
    return jax.lax.scan(add, zero, (image, label, weight))[0]

  return chunk
