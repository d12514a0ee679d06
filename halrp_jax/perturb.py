"""Any Flax Linen model + frozen base kernels + <R, S, U, Sigma, V> per layer -> apply, merge.

The model stays an ordinary Flax module: while it is applied, `nn.intercept_methods` replaces the
call of each perturbed Dense and Conv. Two exact ways to compute such a layer:

* composed: W_t is formed and the ordinary layer applied;
* factored: y = R * layer(S * x, W) + U (Sigma (V' x)) + b. The gradient of the frozen W is never
  needed, which makes the backward pass a third cheaper.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from halrp_jax import lowrank
from halrp_jax.types import Params

HEAD = "head"  # never perturbed
_SEPARATOR = "/"


def layer_names(params: Params) -> tuple[str, ...]:
  """Paths of the layers that are perturbed: all that have a kernel but the head."""
  flat = traverse_util.flatten_dict(params, sep=_SEPARATOR)
  suffix = f"{_SEPARATOR}kernel"
  names = (path.removesuffix(suffix) for path in flat if path.endswith(suffix))
  return tuple(sorted(n for n in names if n.split(_SEPARATOR)[0] != HEAD))


def split(params: Params) -> tuple[dict[str, jax.Array], Params]:
  """Parameters -> (kernels of the perturbed layers by path, everything else)."""
  flat = traverse_util.flatten_dict(params, sep=_SEPARATOR)
  kernels = {name: flat.pop(f"{name}/kernel") for name in layer_names(params)}
  return kernels, traverse_util.unflatten_dict(flat, sep=_SEPARATOR)


def join(kernels: Mapping[str, jax.Array], rest: Params) -> Params:
  """The inverse of `split`."""
  flat = traverse_util.flatten_dict(rest, sep=_SEPARATOR)
  flat |= {f"{name}/kernel": kernel for name, kernel in kernels.items()}
  return traverse_util.unflatten_dict(flat, sep=_SEPARATOR)


def merge(
  kernels: Mapping[str, jax.Array],
  perturbation: Mapping[str, lowrank.Perturbation],
  rest: Params,
) -> Params:
  """Ordinary parameters of one task: the perturbed kernels W_t and everything else."""
  return join({n: lowrank.compose(w, perturbation[n]) for n, w in kernels.items()}, rest)


def apply(
  model: nn.Module,
  kernels: Mapping[str, jax.Array],
  perturbation: Mapping[str, lowrank.Perturbation],
  variables: Mapping[str, Params],
  *args,
  form: str = "auto",
  **kwargs,
):
  """`model.apply` with perturbed kernels.

  Args:
    model: any Linen model whose perturbed layers are nn.Dense or nn.Conv.
    kernels: frozen kernels by layer path (`split`).
    perturbation: <R, S, U, Sigma, V> by layer path.
    variables: {"params": everything but the perturbed kernels, other collections}.
    *args: passed to `model.apply`.
    form: "factored", "composed", or "auto": the cheaper one for each layer.
    **kwargs: passed to `model.apply`.

  Returns:
    What `model.apply` returns.
  """

  def intercept(next_fun, call_args, call_kwargs, context):
    module = context.module
    name = _SEPARATOR.join(module.path)
    if name not in kernels or context.method_name != "__call__":
      return next_fun(*call_args, **call_kwargs)
    bias = module.get_variable("params", "bias") if module.use_bias else None
    return _perturbed(module, kernels[name], perturbation[name], bias, *call_args, form=form)

  with nn.intercept_methods(intercept):
    return model.apply(variables, *args, **kwargs)


def _perturbed(module, kernel, p, bias, x, *, form):
  detached = module.clone(parent=None, name=None, use_bias=False)
  if form == "composed" or (form == "auto" and not _factored_is_cheaper(module, p, x)):
    y = detached.apply({"params": {"kernel": lowrank.compose(kernel, p)}}, x)
  else:
    y = detached.apply({"params": {"kernel": kernel}}, x * _channels(p.S, x))
    y = y * _channels(p.R, y) + _low_rank_branch(detached, p, x)
  return y if bias is None else y + _channels(bias, y)


def _channels(v, like):
  """[C] -> [1, ..., 1, C], to broadcast against `like`."""
  return v.reshape((1,) * (like.ndim - 1) + (-1,))


def _low_rank_branch(module, p, x):
  """U (Sigma (V' x)), for a convolution summed over its window (authors: 1x1, pool, 1x1)."""
  z = x @ p.V  # [..., K]
  if isinstance(module, nn.Conv):
    columns = z.shape[-1]
    ones = jnp.ones((*module.kernel_size, 1, columns), z.dtype)
    window_sum = module.clone(features=columns, feature_group_count=columns)
    z = window_sum.apply({"params": {"kernel": ones}}, z)
  return (z if p.sigma is None else z * _channels(p.sigma, z)) @ p.U.T


def _factored_is_cheaper(module, p, x) -> bool:
  """Multiply-adds of one training step: three products for a trained kernel, two for a frozen one.

  A convolution is always composed: its factored form saves a third of the products but pays three
  more passes over activations, which costs more (measured for LeNet, docs/measurements.md).
  """
  if isinstance(module, nn.Conv):
    return False
  num_in, num_out, columns = p.S.size, p.R.size, p.U.shape[-1]
  rows = x.size // num_in
  factored = 2 * rows * num_in * num_out + 3 * rows * columns * (num_in + num_out)
  composed = 3 * rows * num_in * num_out + 3 * columns * num_in * num_out
  return factored < composed
