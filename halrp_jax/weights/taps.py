"""What reaches the layers of a network, and what they give."""

from collections.abc import Iterable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from halrp_jax.types import Params
from halrp_jax.weights import kinds, trees


def layer_inputs(
  model: nn.Module, names: Iterable[str], variables: Mapping[str, Params], image: jax.Array
) -> dict[str, jax.Array]:
  """What reaches the layers `names` in evaluation: rows that their kernels are multiplied with.

  -> by layer path [B, d], for a convolution its patches [B, H', W', d]; the kernel seen as a matrix
  is [d, J].
  """
  return _tapped(model, names, variables, image, lambda module, x, y: kinds.rows(module, x))


def layer_outputs(
  model: nn.Module, names: Iterable[str], variables: Mapping[str, Params], image: jax.Array
) -> dict[str, jax.Array]:
  """What the layers `names` give in evaluation, before anything else: by layer path [B, .., J]."""
  return _tapped(model, names, variables, image, lambda module, x, y: y)


def _tapped(model, names, variables, image, tap_fn):
  """-> tap_fn(module, input, output) by layer path."""
  found = {}

  def intercept(next_fun, args, kwargs, context):
    module, name = context.module, trees.SEPARATOR.join(context.module.path)
    y = next_fun(*args, **kwargs)
    if name in names and context.method_name == "__call__":
      found[name] = tap_fn(module, args[0], y).astype(jnp.float32)
    return y

  with nn.intercept_methods(intercept):
    model.apply(variables, image, train=False)
  return found


def without_head():
  """A context in which `model.apply` returns what reaches the head, [B, F]; it needs no head."""

  def intercept(next_fun, args, kwargs, context):
    is_head = context.module.path == (trees.HEAD,) and context.method_name == "__call__"
    return args[0].astype(jnp.float32) if is_head else next_fun(*args, **kwargs)

  return nn.intercept_methods(intercept)
