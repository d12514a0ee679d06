"""Losses and penalties."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from halrp_jax.training import batches
from halrp_jax.types import Array, Params


def mask_classes(logits: jax.Array, num_classes: Array) -> jax.Array:
  """Sets the logits of classes that a task does not have to -inf.

  Such classes are never predicted and get no gradient.

  Args:
    logits: [B, K], where K is the number of classes of the widest task.
    num_classes: int32 [] or [B, 1].
  """
  return jnp.where(jnp.arange(logits.shape[-1])[None] < num_classes, logits, -jnp.inf)


def cross_entropy_objective(apply_fn: Callable[..., tuple[jax.Array, Params]]) -> Callable:
  """Builds the objective that `fit` minimises by default, together with the penalty.

  Args:
    apply_fn: (params, frozen, stats, image, train, key) -> logits, stats

  Returns:
    (params, frozen, stats, batch, train, key) -> loss, logits [B, K], stats
  """

  def objective_fn(params, frozen, stats, batch, train, key):
    logits, stats = apply_fn(params, frozen, stats, batch.image, train, key)
    return cross_entropy(logits, batch.label, batch.num_classes), logits, stats

  return objective_fn


def cross_entropy(logits: jax.Array, label: jax.Array, num_classes: Array) -> jax.Array:
  """Returns the mean cross-entropy over a batch, a scalar.

  Args:
    logits: [B, K], where K is the number of classes of the widest task.
    label: int [B]
    num_classes: int32 [] or [B, 1].
  """
  log_p = jax.nn.log_softmax(mask_classes(logits, num_classes))
  return -jnp.mean(jnp.take_along_axis(log_p, label[:, None], axis=1))


def sum_absolute(tree: Params) -> jax.Array | int:
  """Returns the L1 norm over all leaves, with gradient 0 at 0; 0 for a tree without leaves.

  The gradient of jnp.abs in JAX is 1 at 0, which would move the zero columns of U and V.
  """
  return sum(jnp.sum(x * jnp.sign(x)) for x in jax.tree.leaves(tree))


def sum_squares(tree: Params) -> jax.Array | int:
  """Returns the squared L2 norm over all leaves; 0 for a tree without leaves."""
  return sum(jnp.sum(x * x) for x in jax.tree.leaves(tree))


def count_right(logits: jax.Array, batch: batches.Batch) -> jax.Array:
  """Returns how many images of a batch are classified correctly; `logits` is [B, K]."""
  return jnp.sum(jnp.argmax(mask_classes(logits, batch.num_classes), -1) == batch.label)
