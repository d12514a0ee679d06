"""EWC: one network for all tasks, each parameter held as firmly as the tasks before need it.

Update rule: Adam on the cross-entropy + wd + lambda/2 sum_k sum_p F_kp (theta_p - theta*_kp)^2,
theta*_k and F_k being the shared parameters and the diagonal Fisher information after task k.

| paper        | here                       | meaning |
|--------------|----------------------------|---------|
| theta        | shared["params"]           | features; heads are the tasks' own |
| sum_k F_k    | shared["anchor"]["fisher"] | A |
| theta*       | shared["anchor"]["center"] | sum_k F_k theta*_k / A |
| lambda       | method.strength            | |

The sum over tasks is A (theta - center)^2 and a constant, exactly: memory does not grow.
F = E_x [(d log p(y|x) / d theta)^2] over samples one by one, never of a batch's mean, with true
labels (empirical Fisher) or labels drawn from the model (method.fisher), BatchNorm in evaluation
mode (but for batch_norm=running with the statistics of a chunk of samples, held fixed).

Phases: training; after every task the Fisher information on method.fisher_samples training images.

References: J. Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", 2017,
Eq. 3; J. Schwarz et al., "Progress & compress", 2018 (online variant); spec/baselines.md 3.4.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax import keys, models
from halrp_jax.methods import anchored
from halrp_jax.training import batches, losses, networks
from halrp_jax.training.setup import Setup
from halrp_jax.types import Method
from halrp_jax.weights import trees

_CHUNK = 16  # samples that share the statistics of BatchNorm


# strength found by `tune`: CIFAR100-Split, order A, seed 0. With a quarter of the training images
# 1e3 and 1e4 are alike (53.1, 52.8), with 5 % 1e4 is the best by 6 points (docs/tuning.md)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(anchored.Config):
  """The keys `method.*` of this method."""

  strength: float = keys.number(1e4, 0, None, "lambda: coefficient on the Fisher-weighted distance")
  fisher: str = keys.one_of("true_label", ("true_label", "sampled_label"), "labels of the Fisher")
  fisher_samples: int = keys.whole(1000, 1, None, "training images of a task for its Fisher")
  accumulate: str = keys.one_of(
    "separate", ("separate", "online"), "separate: every task's own anchor; online: the last one's"
  )
  decay: float = keys.number(0.95, 0, 1, "accumulate=online: what earlier Fisher is multiplied by")


TaskState = anchored.TaskState


def make(config: Config, setup: Setup) -> Method:
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
    found = fisher(fisher_chunk, params, stats, task, config.fisher_samples, own_norm)
    here, _ = trees.split_private(params, own_norm)
    if config.accumulate == "online":
      total = jax.tree.map(lambda a, f: config.decay * a + f, anchor["fisher"], found)
      return {"fisher": total, "center": here}
    total = jax.tree.map(jnp.add, anchor["fisher"], found)
    center = jax.tree.map(_weighted, anchor["fisher"], anchor["center"], found, here)
    return {"fisher": total, "center": center}

  return anchored.make(config, setup, anchored.Anchor(first, distance, following))


def _weighted(a, x, b, y):
  """(a x + b y) / (a + b), and y where both weights are 0."""
  total = a + b
  return jnp.where(total > 0, (a * x + b * y) / jnp.where(total > 0, total, 1), y)


def fisher(fisher_chunk, params, stats, task, num_samples: int, own_norm: bool):
  """Diagonal Fisher information of the shared parameters, a mean over training images."""
  rows = np.arange(min(num_samples, len(task.train.index)))
  total = jax.tree.map(jnp.zeros_like, trees.split_private(params, own_norm)[0])
  for start in range(0, len(rows), _CHUNK):
    part = rows[start : start + _CHUNK]
    padded = np.resize(part, _CHUNK)  # one shape for all chunks
    weight = (np.arange(_CHUNK) < len(part)).astype(np.float32)
    image, label = batches.load_batch(task.train, task.inputs, padded)
    key = jax.random.fold_in(jax.random.key(task.id), start)
    squares = fisher_chunk(params, stats, image, label, weight, jnp.int32(task.num_classes), key)
    total = jax.tree.map(jnp.add, total, squares)
  return jax.tree.map(lambda x: x / len(rows), total)


def _fisher_of(model, own_norm: bool, sampled: bool):
  """Builds (params, stats, image, label, weight [B], num_classes, key) -> sum of squares."""

  def chunk(params, stats, image, label, weight, num_classes, key):
    shared, private = trees.split_private(params, own_norm)
    if models.evaluates_with_batch(model):  # the chunk's statistics, held fixed
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

    # one by one: vmapped gradients take ten times as long on the CPU, all of it moving memory
    zero = jax.tree.map(jnp.zeros_like, shared)
    return jax.lax.scan(add, zero, (image, label, weight))[0]

  return chunk
