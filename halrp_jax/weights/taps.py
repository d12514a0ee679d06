"""Functions that record the inputs and the outputs of a network's layers."""

import contextlib
from collections.abc import Callable, Collection, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext

from halrp_jax.types import Params
from halrp_jax.weights import kinds, trees


def layer_inputs(
  model: nn.Module, names: Collection[str], variables: Mapping[str, Params], image: jax.Array
) -> dict[str, jax.Array]:
  """Returns the inputs of the layers `names` in evaluation mode.

  They are rows that multiply the kernel as a matrix [d, J] (d inputs, J outputs).

  Args:
    model: a network whose layers `names` are plain (`kinds.is_plain`).
    names: paths of layers.
    variables: variables of the network, {"params": ..., "batch_stats": ...}.
    image: network inputs [B, H, W, C].

  Returns:
    {layer path: float32 [.., d]}; for a convolution the patches [B, H', W', d].
  """
  return _record(model, names, variables, image, lambda module, x, y: kinds.rows(module, x))


def input_moments(
  model: nn.Module,
  shapes: Mapping[str, tuple[int, int]],
  variables: Mapping[str, Params],
  image: jax.Array,
) -> dict[str, jax.Array]:
  """Returns the second moments of what V' of each layer multiplies, in evaluation mode.

  Args:
    model: a network.
    shapes: (I, J) of the kernels as matrices, by layer path.
    variables: variables of the network, {"params": ..., "batch_stats": ...}.
    image: network inputs [B, H, W, C].

  Returns:
    {layer path: sum of x x' over all rows x, float32 [I, I]}, without layers whose V multiplies no
    input (`kinds.low_rank_inputs`).
  """

  def moment(module: nn.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    num_in = shapes[trees.SEPARATOR.join(module.path)][0]
    rows = kinds.low_rank_inputs(module, x.astype(jnp.float32), num_in)
    return jnp.zeros(()) if rows is None else rows.T @ rows

  found = _record(model, shapes, variables, image, moment)
  return {name: x for name, x in found.items() if x.ndim}


def layer_outputs(
  model: nn.Module, names: Collection[str], variables: Mapping[str, Params], image: jax.Array
) -> dict[str, jax.Array]:
  """Returns the outputs of the layers `names` in evaluation mode, before BatchNorm and ReLU.

  Args:
    model: a network.
    names: paths of layers.
    variables: variables of the network, {"params": ..., "batch_stats": ...}.
    image: network inputs [B, H, W, C].

  Returns:
    {layer path: float32 [B, .., J]}.
  """
  return _record(model, names, variables, image, lambda module, x, y: y)


def _record(
  model: nn.Module,
  names: Collection[str],
  variables: Mapping[str, Params],
  image: jax.Array,
  record_fn: Callable[[nn.Module, jax.Array, jax.Array], jax.Array],
) -> dict[str, jax.Array]:
  """Returns record_fn(module, input, output) of the layers `names`, by path, as float32."""
  found: dict[str, jax.Array] = {}

  def intercept(
    next_fun: Callable[..., Params],
    args: tuple[Params, ...],
    kwargs: dict[str, Params],
    context: InterceptorContext,
  ) -> Params:
    module, name = context.module, trees.SEPARATOR.join(context.module.path)
    y = next_fun(*args, **kwargs)
    if name in names and context.method_name == "__call__":
      found[name] = record_fn(module, args[0], y).astype(jnp.float32)
    return y

  with nn.intercept_methods(intercept):
    model.apply(variables, image, train=False)
  return found


def without_head() -> contextlib.AbstractContextManager[None]:
  """Returns a context in which `model.apply` returns the input of the head, float32 [B, F].

  The parameters of the head may be missing.
  """

  def intercept(
    next_fun: Callable[..., Params],
    args: tuple[Params, ...],
    kwargs: dict[str, Params],
    context: InterceptorContext,
  ) -> Params:
    is_head = context.module.path == (trees.HEAD,) and context.method_name == "__call__"
    return args[0].astype(jnp.float32) if is_head else next_fun(*args, **kwargs)

  return nn.intercept_methods(intercept)
