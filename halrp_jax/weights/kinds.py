"""Kinds of layers: how each one's kernel is a matrix, and how it computes with a perturbed kernel.

This module alone decides how a kernel is seen as a matrix [I, J]:

| layer                 | kernel           | I                    | J                       |
|-----------------------|------------------|----------------------|-------------------------|
| nn.Dense              | [I, J]           | inputs               | outputs                 |
| nn.Conv, 1-D to n-D   | [*window, I, J]  | inputs of one group  | outputs of all groups   |
| nn.DenseGeneral       | [*axes, *features] | product of the axes | product of the features |

A convolution has one matrix for each position of its window.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.linear import canonicalize_padding

from halrp_jax.nn.conv import conv_general_dilated, patches, times
from halrp_jax.nn.pool import window_sum
from halrp_jax.types import UserError
from halrp_jax.weights import lowrank

_PASS = 15  # multiply-adds in the time of reading or writing one number, on a CPU


# --- kernels as matrices ------------------------------------------------------------------


def is_known(module: nn.Module) -> bool:
  """Whether layers of this type can be perturbed. Subclasses may compute anything: they are not."""
  return type(module) in (nn.Dense, nn.Conv, nn.DenseGeneral)


def matrix_shape(name: str, module: nn.Module, kernel) -> tuple[int, int]:
  """Returns (I, J) of a layer; `kernel` is its own or its shape and dtype.

  Raises:
    UserError: if the layer `name` can't be perturbed.
  """
  if not is_known(module):
    raise UserError(
      f"{name}: {type(module).__name__} is not perturbed, only Dense, Conv and DenseGeneral are"
    )
  if not jnp.issubdtype(kernel.dtype, jnp.floating):
    raise UserError(f"{name}: a kernel of {kernel.dtype} is not perturbed, only real numbers are")
  if type(module) is not nn.DenseGeneral:
    return tuple(kernel.shape[-2:])
  if module.batch_dims:
    raise UserError(f"{name}: DenseGeneral with batch_dims is not perturbed")
  num_axes = 1 if isinstance(module.axis, int) else len(module.axis)
  return math.prod(kernel.shape[:num_axes]), math.prod(kernel.shape[num_axes:])


def guessed_matrix_shape(name: str, flat: dict) -> tuple[int, int]:
  """Returns (I, J) of a layer as far as its parameters tell.

  They tell DenseGeneral from a convolution by a bias with several axes, and the projections of an
  attention by one another: query [F, heads, dim] beside out [heads, dim, F].

  Args:
    name: the layer's path.
    flat: parameters by path.
  """
  kernel, bias = flat[f"{name}/kernel"], flat.get(f"{name}/bias")
  parent, _, own = name.rpartition("/")
  of = {k: flat.get(f"{parent}/{k}/kernel") for k in ("query", "key", "value", "out")}
  num_out = 1 if bias is None else max(bias.ndim, 1)
  in_attention = own in of and all(w is not None and w.ndim == 3 for w in of.values())
  if in_attention and of["query"].shape[1] == of["out"].shape[0]:
    num_out = 1 if own == "out" else 2
  elif num_out == 1:
    return tuple(kernel.shape[-2:])
  return math.prod(kernel.shape[:-num_out]), math.prod(kernel.shape[-num_out:])


def as_matrix(kernel: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Returns a kernel as [I, J], a convolution's as [*window, I, J]; `shape` is (I, J)."""
  return kernel if kernel.shape[-2:] == shape else kernel.reshape(shape)


def compose(kernel: jax.Array, p: lowrank.Perturbation) -> jax.Array:
  """Returns W_t of a layer, in its kernel's own shape."""
  shape = (p.S.size, p.R.size)
  return lowrank.compose(as_matrix(kernel, shape), p).reshape(kernel.shape)


# --- perturbed layers ----------------------------------------------------------------------


def apply(module: nn.Module, kernel, p: lowrank.Perturbation, bias, x, *, form: str) -> jax.Array:
  """Returns what a layer gives with its kernel perturbed.

  Args:
    module: a layer that `is_known`; only its attributes are used.
    kernel: W, frozen.
    p: <R, S, U, Sigma, V>.
    bias: None if it has none.
    x: its input.
    form: "factored", "composed", or "auto": the cheaper one. What can't be factored is composed.
  """
  x = jnp.asarray(x)
  factored = form == "factored" or (form == "auto" and _factored_is_cheaper(kernel, p, x))
  if not (factored and x.size and can_be_factored(module)):
    params = {"kernel": compose(kernel, p)} | ({} if bias is None else {"bias": bias})
    return module.clone(parent=None, name=None).apply({"params": params}, x)
  dtype = module.dtype or jnp.result_type(*(v for v in (x, kernel, bias) if v is not None))
  detached = module.clone(parent=None, name=None, use_bias=False, dtype=dtype)
  y = detached.apply({"params": {"kernel": kernel}}, x * channels(p.S, x))
  branch = _low_rank_branch(module, p, x, y.dtype)
  y = (y * channels(p.R, y) + branch).astype(y.dtype)
  # in the layer's own dtype, as it would add it
  return y if bias is None else y + channels(bias, y).astype(y.dtype)


def channels(v, like):
  """[C] -> [1, ..., 1, C], to broadcast against `like`."""
  return v.reshape((1,) * (like.ndim - 1) + (-1,))


def _low_rank_branch(module, p, x, dtype):
  """U (Sigma (V' x)), for a convolution on the sum over its window (authors: 1x1, pool, 1x1).

  `dtype`: of the layer's products.
  """
  u = p.U if p.sigma is None else p.U * channels(p.sigma, p.U)
  # sums over a window of 8 bits, or of integers, overflow; those of float16 do beyond 65504
  x = x.astype(jnp.promote_types(x.dtype, dtype))
  if dtype == jnp.float16:
    x, dtype = x.astype(jnp.float32), jnp.float32
  if not isinstance(module, nn.Conv):
    return (x.astype(dtype) @ p.V.astype(dtype)) @ u.T.astype(dtype)
  total = _by_image(window_sum, module, x)
  return times(total.astype(dtype), (p.V @ u.T).astype(dtype))


def can_be_factored(module: nn.Module) -> bool:
  """Whether the factored form knows this layer: Dense, and ordinary convolutions in any dimension.

  A product of the user's own (`dot_general`, `conv_general_dilated`) need not be linear.
  """
  if module.promote_dtype is not type(module).promote_dtype:
    return False
  if not isinstance(module, nn.Conv):
    own = (module.dot_general, module.dot_general_cls)
    return isinstance(module, nn.Dense) and own == (None, None)
  own = (module.conv_general_dilated, module.conv_general_dilated_cls)
  padding, n = module.padding, len(_window(module))
  return (
    own in ((None, None), (conv_general_dilated, None))
    and module.feature_group_count == 1
    and module.mask is None
    and _per_axis(module.kernel_dilation, n) == _per_axis(module.input_dilation, n) == (1,) * n
    and (not isinstance(padding, str) or padding.upper() in ("SAME", "VALID", "SAME_LOWER"))
  )


def is_plain(module: nn.Module) -> bool:
  """Whether a layer is a Dense or an ordinary 2-D convolution."""
  if not is_known(module) or not can_be_factored(module):
    return False
  return not isinstance(module, nn.Conv) or len(_window(module)) == 2


def rows(module: nn.Module, x: jax.Array) -> jax.Array:
  """Returns what the kernel [d, J] of a layer that `is_plain` is multiplied with: [.., d]."""
  return _by_image(patches, module, x) if isinstance(module, nn.Conv) else x


def _by_image(fn, module, x):
  """fn(x [B, *spatial, C], window, strides, padding) of a convolution's input with any batch axes.

  Negative padding cuts the input before.
  """
  window = _window(module)
  n = len(window)
  batch = x.shape[: -n - 1]
  if len(batch) != 1:
    x = x.reshape(-1, *x.shape[-n - 1 :])
  padding = module.padding
  if isinstance(padding, str):
    padding = padding.upper()
  else:
    padding = canonicalize_padding(padding, n)
    for axis, (low, high) in enumerate(padding, 1):
      if min(low, high) < 0:
        x = jax.lax.slice_in_dim(x, max(-low, 0), x.shape[axis] - max(-high, 0), axis=axis)
    padding = tuple((max(low, 0), max(high, 0)) for low, high in padding)
  y = fn(x, window, _per_axis(module.strides, n), padding)
  return y if len(batch) == 1 else y.reshape(*batch, *y.shape[1:])


def _window(module) -> tuple[int, ...]:
  size = module.kernel_size
  return (size,) if isinstance(size, int) else tuple(size)


def _per_axis(value, n: int) -> tuple[int, ...]:
  """Strides or dilations of a convolution as Flax takes them -> one for each axis."""
  return (value or 1,) * n if value is None or isinstance(value, int) else tuple(value)


def _factored_is_cheaper(kernel, p, x) -> bool:
  """Multiply-adds of one training step and passes over memory, by shape alone.

  Composed: three products with the kernel (output, input gradient, kernel gradient), and the kernel
  is written and read several times. Factored: two products, the low-rank branch, and more passes
  over the activations.
  """
  num_in, num_out, columns = p.S.size, p.R.size, p.U.shape[-1]
  places, window = x.size // num_in, kernel[..., 0, 0].size
  saved = places * kernel.size + _PASS * 4 * kernel.size + 3 * columns * num_in * num_out
  if window == 1:
    branch = 3 * places * columns * (num_in + num_out) + _PASS * places * (2 * num_in + 2 * num_out)
  else:
    branch = 3 * places * num_in * num_out + _PASS * places * (6 * num_in + 5 * num_out)
  return branch < saved
