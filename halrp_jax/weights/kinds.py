"""Layers that can be perturbed: their kernels as matrices, and their outputs with a new kernel.

This module alone decides how a kernel is seen as a matrix [I, J]:

| layer                 | kernel             | I                    | J                       |
|-----------------------|--------------------|----------------------|-------------------------|
| nn.Dense              | [I, J]             | inputs               | outputs                 |
| nn.Conv, 1-D to n-D   | [*window, I, J]    | inputs of one group  | outputs of all groups   |
| nn.DenseGeneral       | [*axes, *features] | product of the axes  | product of the features |

A convolution has one matrix for each position of its window.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.linear import canonicalize_padding

from halrp_jax.nn import winograd
from halrp_jax.nn.conv import conv_general_dilated, patches, times
from halrp_jax.nn.pool import window_sum
from halrp_jax.types import Params, UserError
from halrp_jax.weights import lowrank

# Measured: the multiply-adds that take as long as reading or writing one number in memory.
_MEMORY_COST = 15


# --- kernels as matrices ------------------------------------------------------------------


def is_known(module: nn.Module) -> bool:
  """Returns whether layers of this type can be perturbed.

  Subclasses of these types may compute something else, so they can't.
  """
  return type(module) in (nn.Dense, nn.Conv, nn.DenseGeneral)


def matrix_shape(
  name: str, module: nn.Module, kernel: jax.Array | jax.ShapeDtypeStruct
) -> tuple[int, int]:
  """Returns the shape (I, J) of a layer's kernel as a matrix.

  Args:
    name: path of the layer, for error messages.
    module: the layer.
    kernel: its kernel, or the kernel's shape and dtype.

  Raises:
    UserError: if the layer can't be perturbed.
  """
  check_known(name, module)
  if not jnp.issubdtype(kernel.dtype, jnp.floating):
    raise UserError(
      f"{name}: a kernel of {kernel.dtype} is not perturbed, only floating-point kernels are"
    )
  if not isinstance(module, nn.DenseGeneral):
    return kernel.shape[-2], kernel.shape[-1]
  if module.batch_dims:
    raise UserError(f"{name}: DenseGeneral with batch_dims is not perturbed")
  num_axes = 1 if isinstance(module.axis, int) else len(module.axis)
  return math.prod(kernel.shape[:num_axes]), math.prod(kernel.shape[num_axes:])


def check_known(name: str, module: nn.Module) -> None:
  """Raises UserError if layers of this type can't be perturbed; `name` is the layer's path."""
  if not is_known(module):
    raise UserError(
      f"{name}: {type(module).__name__} is not perturbed, only Dense, Conv and DenseGeneral are"
    )


def guessed_matrix_shape(name: str, flat: Mapping[str, jax.Array]) -> tuple[int, int]:
  """Returns the shape (I, J) of a layer's kernel as a matrix, guessed from the parameters alone.

  A bias with several axes tells DenseGeneral from a convolution. The projections of an attention
  layer tell each other: query has a kernel [F, heads, dim], out one of [heads, dim, F].

  Args:
    name: path of the layer.
    flat: all parameters of the network by path.

  Raises:
    UserError: if the kernel has fewer than two axes.
  """
  kernel, bias = flat[f"{name}/kernel"], flat.get(f"{name}/bias")
  if kernel.ndim < 2:
    raise UserError(f"{name}/kernel: shape {kernel.shape}, expected at least two axes")
  parent, _, own = name.rpartition("/")
  kernels = {k: flat.get(f"{parent}/{k}/kernel") for k in ("query", "key", "value", "out")}
  query, out = kernels["query"], kernels["out"]
  num_out = 1 if bias is None else max(bias.ndim, 1)
  is_attention = own in kernels and all(w is not None and w.ndim == 3 for w in kernels.values())
  if is_attention and query is not None and out is not None and query.shape[1] == out.shape[0]:
    num_out = 1 if own == "out" else 2
  elif num_out == 1:
    return kernel.shape[-2], kernel.shape[-1]
  return math.prod(kernel.shape[:-num_out]), math.prod(kernel.shape[-num_out:])


def as_matrix(kernel: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Returns a kernel as [I, J], that of a convolution as [*window, I, J]; `shape` is (I, J)."""
  return kernel if kernel.shape[-2:] == shape else kernel.reshape(shape)


def compose(kernel: jax.Array, p: lowrank.Perturbation) -> jax.Array:
  """Returns the perturbed kernel W_t of a layer (paper Eq. 2), in the shape of `kernel`."""
  shape = (p.S.size, p.R.size)
  return lowrank.compose(as_matrix(kernel, shape), p).reshape(kernel.shape)


# --- perturbed layers ----------------------------------------------------------------------


def apply(
  module: nn.Module,
  kernel: jax.Array,
  p: lowrank.Perturbation,
  bias: jax.Array | None,
  x: jax.typing.ArrayLike,
  *,
  form: str,
) -> jax.Array:
  """Returns the output of a layer with a perturbed kernel.

  Args:
    module: a layer that `is_known`; only its attributes are used.
    kernel: W, frozen.
    p: <R, S, U, Sigma, V>.
    bias: bias of the layer; None if it has none.
    x: the input of the layer.
    form: "factored", "composed", or "auto" for the cheaper one. A layer that can't be factored
      (`can_be_factored`) is always composed.
  """
  x, p = jnp.asarray(x), lowrank.dequantized(p)
  factored = form == "factored" or (form == "auto" and _factored_is_cheaper(module, kernel, p, x))
  if not (factored and x.size and can_be_factored(module)):
    params = {"kernel": compose(kernel, p)} | ({} if bias is None else {"bias": bias})
    return run_detached(module, params, x)
  dtype = module.dtype or jnp.result_type(*(v for v in (x, kernel, bias) if v is not None))
  without_bias = module.clone(use_bias=False, dtype=dtype)
  y = run_detached(without_bias, {"kernel": kernel}, x * _along_inputs(module, p.S, x))
  dtype, y = y.dtype, y * _along_features(module, p.R, kernel, y)
  if p.U.shape[1]:  # without columns there is no low-rank part
    y += _low_rank_branch(module, p, x, dtype).reshape(y.shape)
  y = y.astype(dtype)
  # the layer itself would add the bias in this dtype
  return y if bias is None else y + _along_features(module, bias, kernel, y).astype(y.dtype)


def run_detached(module: nn.Module, params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
  """Returns the output of a layer, taken out of its network, with other parameters."""
  apply_fn: Callable[..., Params] = module.clone(parent=None, name=None).apply
  return apply_fn({"params": params}, x)


def _input_axes(module: nn.Module, num_axes: int) -> tuple[int, ...]:
  """Returns the axes of a layer's input that its kernel is multiplied with; Flax sorts them.

  Args:
    module: the layer.
    num_axes: number of axes of its input.
  """
  if not isinstance(module, nn.DenseGeneral):
    return (num_axes - 1,)
  axes = (module.axis,) if isinstance(module.axis, int) else module.axis
  return tuple(sorted(axis % num_axes for axis in axes))


def _along_features(module: nn.Module, v: jax.Array, kernel: jax.Array, y: jax.Array) -> jax.Array:
  """Returns a vector of J numbers in a shape that broadcasts against the output `y` of a layer."""
  features = kernel.shape[-1:]
  if isinstance(module, nn.DenseGeneral):
    features = kernel.shape[1 if isinstance(module.axis, int) else len(module.axis) :]
  return v.reshape((1,) * (y.ndim - len(features)) + features)


def _along_inputs(module: nn.Module, v: jax.Array, x: jax.Array) -> jax.Array:
  """Returns a vector [I] in a shape that broadcasts against the input `x` of a layer."""
  axes = _input_axes(module, x.ndim)
  return v.reshape([n if i in axes else 1 for i, n in enumerate(x.shape)])


def _input_rows(module: nn.Module, x: jax.Array) -> jax.Array:
  """Returns the input of a layer as [..., I]: the axes that its kernel is multiplied with last."""
  axes = _input_axes(module, x.ndim)
  if axes == (x.ndim - 1,):
    return x
  x = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
  return x.reshape(*x.shape[: x.ndim - len(axes)], -1)


def channels(v: jax.Array, like: jax.Array) -> jax.Array:
  """Returns a vector [C] as [1, ..., 1, C], to broadcast against `like`."""
  return v.reshape((1,) * (like.ndim - 1) + (-1,))


def _low_rank_branch(
  module: nn.Module, p: lowrank.Perturbation, x: jax.Array, dtype: np.dtype
) -> jax.Array:
  """Returns U (Sigma (V' x)), for a convolution with the sum of x over its window.

  If V has a row for every input at every position of the window, x is all of them. The authors'
  code computes the sum as a 1x1 convolution, a pooling and a 1x1 convolution.

  Args:
    module: the layer.
    p: <R, S, U, Sigma, V>.
    x: the input of the layer.
    dtype: dtype of the layer's products.
  """
  u = p.U if p.sigma is None else p.U * channels(p.sigma, p.U)
  # sums over a window overflow in 8 bits and in integers; in float16 they do beyond 65504
  x = x.astype(jnp.promote_types(x.dtype, dtype))
  if dtype == jnp.float16:
    x, dtype = x.astype(jnp.float32), np.dtype(np.float32)
  if not isinstance(module, nn.Conv):
    return (_input_rows(module, x).astype(dtype) @ p.V.astype(dtype)) @ u.T.astype(dtype)
  if p.V.shape[0] != p.S.size:
    kernel = p.V.reshape(*_window(module), p.S.size, -1)
    branch = module.clone(features=kernel.shape[-1], use_bias=False, dtype=dtype)
    return times(run_detached(branch, {"kernel": kernel}, x), u.T.astype(dtype))
  if math.prod(_window(module)) > 1:
    total = _by_image(window_sum, module, x).astype(dtype)
    return times(total, (p.V @ u.T).astype(dtype))
  x = _by_image(_pixels, module, x).astype(dtype)
  return times(times(x, p.V.astype(dtype)), u.T.astype(dtype))


def _pixels(
  x: jax.Array,
  window: Sequence[int],
  strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
) -> jax.Array:
  """Returns the pixels [B, *spatial', C] of x [B, *spatial, C] that a 1 x 1 window meets."""
  pads = [(0, 0)] * len(window) if isinstance(padding, str) else padding
  x = jnp.pad(x, ((0, 0), *pads, (0, 0))) if any(map(any, pads)) else x
  return x[(slice(None), *(slice(None, None, s) for s in strides))]


def low_rank_inputs(module: nn.Module, x: jax.Array, num_in: int) -> jax.Array | None:
  """Returns the rows [N, I] that V' of a layer multiplies.

  Args:
    module: a layer that `is_known`.
    x: its input.
    num_in: I, the inputs of its kernel as a matrix.

  Returns:
    The inputs of a dense layer, the sums over the window of a convolution. None for a layer that
    can't be factored, whose V multiplies no input.
  """
  if not can_be_factored(module):
    return None
  is_conv = isinstance(module, nn.Conv)
  x = _by_image(window_sum, module, x) if is_conv else _input_rows(module, x)
  return x.reshape(-1, num_in)


def can_be_factored(module: nn.Module) -> bool:
  """Returns whether the factored form is known: for dense layers and ordinary convolutions.

  Convolutions may have any number of dimensions. A product supplied by the user (`dot_general`,
  `conv_general_dilated`) need not be linear, so such a layer can't be factored.
  """
  if not isinstance(module, nn.Dense | nn.Conv | nn.DenseGeneral):
    return False
  if module.promote_dtype is not type(module).promote_dtype:
    return False
  if not isinstance(module, nn.Conv):
    return module.dot_general is None and module.dot_general_cls is None
  own = module.conv_general_dilated
  padding, n = module.padding, len(_window(module))
  return (
    (own is None or own is conv_general_dilated)
    and module.conv_general_dilated_cls is None
    and module.feature_group_count == 1
    and module.mask is None
    and _per_axis(module.kernel_dilation, n) == _per_axis(module.input_dilation, n) == (1,) * n
    and (not isinstance(padding, str) or padding.upper() in ("SAME", "VALID", "SAME_LOWER"))
  )


def is_plain(module: nn.Module) -> bool:
  """Returns whether a layer is a Dense or an ordinary 2-D convolution."""
  if not is_known(module) or not can_be_factored(module):
    return False
  if isinstance(module, nn.DenseGeneral):
    return False
  return not isinstance(module, nn.Conv) or len(_window(module)) == 2


def rows(module: nn.Module, x: jax.Array) -> jax.Array:
  """Returns the rows [.., d] that the kernel [d, J] of a plain layer is multiplied with.

  Args:
    module: a layer that `is_plain`.
    x: its input.
  """
  return _by_image(patches, module, x) if isinstance(module, nn.Conv) else x


def _by_image(fn: Callable[..., jax.Array], module: nn.Conv, x: jax.Array) -> jax.Array:
  """Applies fn(x [B, *spatial, C], window, strides, padding) to the input of a convolution.

  The input may have any number of batch axes. Negative padding is cut off the input first.
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
    pads = [(int(low), int(high)) for low, high in canonicalize_padding(padding, n)]
    for axis, (low, high) in enumerate(pads, 1):
      if min(low, high) < 0:
        x = jax.lax.slice_in_dim(x, max(-low, 0), x.shape[axis] - max(-high, 0), axis=axis)
    padding = tuple((max(low, 0), max(high, 0)) for low, high in pads)
  y = fn(x, window, _per_axis(module.strides, n), padding)
  return y if len(batch) == 1 else y.reshape(*batch, *y.shape[1:])


def _window(module: nn.Conv) -> tuple[int, ...]:
  """Returns the size of a convolution's window along each axis."""
  size = module.kernel_size
  return (size,) if isinstance(size, int) else tuple(size)


def _per_axis(value: int | Sequence[int] | None, n: int) -> tuple[int, ...]:
  """Returns the strides or dilations of a convolution, in any form Flax takes, for each axis."""
  return (value or 1,) * n if value is None or isinstance(value, int) else tuple(value)


def _factored_is_cheaper(
  module: nn.Module, kernel: jax.Array, p: lowrank.Perturbation, x: jax.Array
) -> bool:
  """Returns whether one training step is cheaper in the factored form, judged by shapes alone.

  The costs are multiply-adds and passes over memory. The composed form takes three products with
  the kernel (output, gradient of the input, gradient of the kernel), and writes and reads the
  kernel several times. The factored form takes two products, the low-rank branch, and more passes
  over the activations. Winograd's form makes a product with the kernel cheaper, but not the branch.
  Only CPUs use that form; the choice is the same on all platforms, so that their numbers agree.
  """
  num_in, num_out, columns = p.S.size, p.R.size, p.U.shape[-1]
  positions, window = x.size // num_in, kernel.size // (num_in * num_out)
  product = kernel.size
  if isinstance(module, nn.Conv) and module.conv_general_dilated is conv_general_dilated:
    # the output has about the size of the input
    suits = winograd.suits(kernel.shape, x.shape[-3:-1], module.dtype or x.dtype)
    product //= winograd.SAVING if suits and _per_axis(module.strides, 2) == (1, 1) else 1
  saved = positions * product + _MEMORY_COST * 4 * kernel.size + 3 * columns * num_in * num_out
  if window == 1 or p.V.shape[0] > num_in:
    products, numbers = columns * (p.V.shape[0] + num_out), 2 * num_in + 2 * num_out
  else:
    products, numbers = num_in * num_out, 6 * num_in + 5 * num_out
  return 3 * positions * products + _MEMORY_COST * positions * numbers < saved
