"""Losses and penalties."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from halrp_jax.training import batches
from halrp_jax.types import Params


def mask_classes(logits: jax.Array, num_classes: jax.Array) -> jax.Array:
  """Outputs beyond a task's own classes can't be predicted and get no gradient."""
  return jnp.where(jnp.arange(logits.shape[-1])[None] < num_classes, logits, -jnp.inf)


def cross_entropy_objective(apply_fn: Callable) -> Callable:
  """Builds what `fit` minimises by default, beside the penalty.

  objective_fn(params, frozen, stats, batch, train, key) -> loss, logits [B, K], stats
  """

  def objective_fn(params, frozen, stats, batch, train, key):
    logits, stats = apply_fn(params, frozen, stats, batch.image, train, key)
    return cross_entropy(logits, batch.label, batch.num_classes), logits, stats

  return objective_fn


def cross_entropy(logits: jax.Array, label: jax.Array, num_classes: jax.Array) -> jax.Array:
  """Returns the mean cross-entropy over a batch. logits [B, K_max], label [B]"""
  log_p = jax.nn.log_softmax(mask_classes(logits, num_classes))
  return -jnp.mean(jnp.take_along_axis(log_p, label[:, None], axis=1))


def sum_absolute(tree: Params) -> jax.Array:
  """Returns the L1 norm over all leaves, with gradient 0 at 0.

  jax.grad of jnp.abs is 1 at 0, which would wake up the zero columns of U and V.
  """
  return sum(jnp.sum(x * jnp.sign(x)) for x in jax.tree.leaves(tree))


def sum_squares(tree: Params) -> jax.Array:
  """Returns the squared L2 norm over all leaves."""
  return sum(jnp.sum(x * x) for x in jax.tree.leaves(tree))


def count_right(logits, batch: batches.Batch):
  return jnp.sum(jnp.argmax(mask_classes(logits, batch.num_classes), -1) == batch.label)
