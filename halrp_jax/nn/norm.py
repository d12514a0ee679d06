"""BatchNorm and local response normalisation.

On the CPU, BatchNorm is fused with the ReLU and the max pooling that follow it.
"""

import functools
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from halrp_jax.nn import isolate
from halrp_jax.nn.init import uniform_fan_in
from halrp_jax.nn.pool import max_pool, window_cells, window_max, window_max_gradient

_OutputAndMoments = tuple[jax.Array, jax.Array, jax.Array]
MOMENTUM = 0.1  # weight of the new batch in BatchNorm's running statistics


class BatchNorm(nn.Module):
  """Batch normalisation over all axes but the last, optionally followed by max pooling and ReLU.

  Training normalises with the mean and the biased variance of the batch. The running variance is
  updated with the *unbiased* variance, as in PyTorch (flax.linen.BatchNorm uses the biased one).
  Evaluation normalises with the running statistics ("batch_stats"), or with those of the batch if
  `running` is False; then a prediction depends on the other images of its batch. Training updates
  the running statistics in both cases. With `frozen`, training normalises with the running
  statistics as well, and leaves them as they are.

  The bias of the preceding layer is a parameter of this module if `num_in` is not 0. Normalisation
  with the statistics of a batch cancels that bias, so training does not add it but only includes it
  in the running mean. Its gradient is exactly 0 instead of rounding errors.

  With parallel=pmap, statistics are those of the whole batch and not of one device's part, if
  `axis_name` is `Layout.axis_name` (`models.make` sets it).

  Statistics and normalisation are computed in float32 for every input; the result has the dtype of
  the input.
  """

  running: bool = True  # evaluation uses the running statistics
  relu: bool = False
  pool: int = 1  # width of the max pooling window; 1: no pooling
  num_in: int = 0  # fan-in of the preceding layer; 0: that layer has no bias
  momentum: float = MOMENTUM
  axis_name: str | None = None  # mapped axis over which a batch is sharded in training
  epsilon: float = 1e-5
  frozen: bool = False  # training uses the running statistics, and does not change them

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Normalises x; in training it also updates "batch_stats".

    Args:
      x: [..., C]; [B, H, W, C] if `pool` is larger than 1.
      train: whether to normalise with the statistics of the batch and update the running ones.

    Returns:
      An array of the shape of x, or [B, H // pool, W // pool, C].
    """
    features, dtype = x.shape[-1], x.dtype
    train = train and not self.frozen
    x = x.astype(jnp.float32)
    scale = self.param("scale", nn.initializers.ones, (features,))
    bias = self.param("bias", nn.initializers.zeros, (features,))
    shift = 0.0
    if self.num_in:
      shift = self.param("input_bias", uniform_fan_in(self.num_in), (features,))
    stored = None
    if train or self.running or self.is_initializing():
      mean_ = self.variable("batch_stats", "mean", jnp.zeros, (features,))
      var_ = self.variable("batch_stats", "var", jnp.ones, (features,))
      stored = mean_, var_
    if stored and self.running and not train:
      mean_, var_ = stored
      y = _affine(x, mean_.value - shift, var_.value, scale, bias, self.epsilon)
      y = max_pool(y, self.pool) if self.pool > 1 else y
      return (nn.relu(y) if self.relu else y).astype(dtype)
    axis_name = self.axis_name if train and not self.is_initializing() else None
    settings = (self.epsilon, self.relu, self.pool, axis_name)
    y, mean, var = lax.platform_dependent(
      *(x, scale, bias),
      cpu=lambda x, scale, bias: _fused_batch_norm(x, scale, bias, *settings),
      default=lambda x, scale, bias: _plain_batch_norm(x, scale, bias, *settings),
    )
    if stored and train and not self.is_initializing():
      mean_, var_ = stored
      count = x.size // features * (1 if axis_name is None else lax.axis_size(axis_name))
      unbiased = var * count / max(count - 1, 1)
      mean_.value = (1 - self.momentum) * mean_.value + self.momentum * (mean + shift)
      var_.value = (1 - self.momentum) * var_.value + self.momentum * unbiased
    return y.astype(dtype)


def local_response_norm(
  x: jax.Array, size: int = 4, alpha: float = 0.001 / 9, beta: float = 0.75, k: float = 1.0
) -> jax.Array:
  """Normalises each channel by its neighbours, as PyTorch's local response normalisation does.

  Returns x / (k + alpha/size * sum of squares over `size` neighbouring channels)^beta.
  """

  def norm(x):
    pads = [(0, 0)] * (x.ndim - 1) + [(size // 2, (size - 1) // 2)]
    squares = jnp.pad(x * x, pads)
    total = k + alpha / size * sum(squares[..., i : i + x.shape[-1]] for i in range(size))
    # Two roots are several times as fast as a power.
    return x * (lax.rsqrt(total) * lax.rsqrt(jnp.sqrt(total)) if beta == 0.75 else total**-beta)

  return lax.platform_dependent(x, cpu=isolate.wrap(norm), default=norm)


# --- BatchNorm, ReLU and max pooling ----------------------------------------------------


def _channels(v: jax.Array, like: jax.Array) -> jax.Array:
  """Reshapes [C] to [1, ..., 1, C], with as many axes as `like`."""
  return v.reshape((1,) * (like.ndim - 1) + (-1,))


def _affine(
  x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
  """Normalises x with given statistics [C], and applies scale and bias [C]."""
  factor = lax.rsqrt(var + epsilon) * scale
  return x * _channels(factor, x) + _channels(bias - mean * factor, x)


def _moments(x: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
  """Computes mean [C] and biased variance [C] over all axes but the last and all mapped devices."""
  axes = tuple(range(x.ndim - 1))
  mean, var = x.mean(axes), x.var(axes)
  if axis_name is None:
    return mean, var
  whole = lax.pmean(mean, axis_name)
  return whole, lax.pmean(var + (mean - whole) ** 2, axis_name)


def _plain_batch_norm(
  x: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  epsilon: float,
  relu: bool,
  pool: int,
  axis_name: str | None,
) -> _OutputAndMoments:
  """Applies BatchNorm, max pooling and ReLU one after another.

  Returns:
    The output, and mean [C] and biased variance [C] of the batch.
  """
  mean, var = _moments(x, axis_name)
  y = _affine(x, mean, var, scale, bias, epsilon)
  y = max_pool(y, pool) if pool > 1 else y
  return nn.relu(y) if relu else y, mean, var


def _fused_batch_norm(
  x: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  epsilon: float,
  relu: bool,
  pool: int,
  axis_name: str | None,
) -> _OutputAndMoments:
  """Computes what `_plain_batch_norm` does, with a gradient that is fast on the CPU.

  If the pooling windows do not cover the image exactly, pooling is a separate step.
  """
  if pool > 1 and not (x.shape[1] % pool or x.shape[2] % pool):
    cells = window_cells(x, pool)
    return _batch_norm_relu_pool(cells, scale, bias, epsilon, relu, True, axis_name)
  out = _batch_norm_relu_pool(x, scale, bias, epsilon, relu, False, axis_name)
  y, mean, var = cast("_OutputAndMoments", out)  # `partial` does not pass the type on
  return max_pool(y, pool) if pool > 1 else y, mean, var


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _batch_norm_relu_pool(
  x: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  epsilon: float,
  relu: bool,
  pool: bool,
  axis_name: str | None,
) -> _OutputAndMoments:
  """Applies BatchNorm, the maximum over axis -2 if `pool`, and ReLU if `relu`.

  One gradient for all three reads and writes the activations fewer times than three gradients.

  Args:
    x: [..., C]; [..., n, C] if `pool`.
    scale: [C]
    bias: [C]
    epsilon: added to the variance.
    relu: whether to apply ReLU.
    pool: whether to take the maximum.
    axis_name: see `BatchNorm`.

  Returns:
    The output, and mean [C] and biased variance [C] of the batch.
  """
  mean, var = _moments(x, axis_name)
  y = _affine(x, mean, var, scale, bias, epsilon)
  y = window_max(y) if pool else y
  return nn.relu(y) if relu else y, mean, var


def _batch_norm_relu_pool_fwd(x, scale, bias, epsilon, relu, pool, axis_name):
  """Returns the output of `_batch_norm_relu_pool` and what its gradient needs."""
  out = _batch_norm_relu_pool(x, scale, bias, epsilon, relu, pool, axis_name)
  y, mean, var = cast("_OutputAndMoments", out)
  return out, (x, y if relu else None, mean, lax.rsqrt(var + epsilon), scale)


def _batch_norm_relu_pool_bwd(epsilon, relu, pool, axis_name, saved, gradients):
  """Computes the gradient of `_batch_norm_relu_pool` with respect to x, scale and bias.

  The maximum of a window is located in the stored input. Recomputed outputs would not do: between
  two fusions they may differ in the last bit.
  """
  x, y, mean, inverse, scale = saved
  dy = gradients[0]  # mean and variance enter the running statistics only, so have no gradient
  if relu:
    dy = jnp.where(y > 0, dy, 0)
  # dz: gradient of the values before pooling; with pooling it is 0 except at the maxima
  if pool:
    dz, product = isolate.call(_unpool_normalised, x, jnp.where(scale < 0, -1.0, 1.0), dy)
  else:
    dz, product = dy, dy * x
  count, axes = x.size // x.shape[-1], tuple(range(dy.ndim - 1))
  d_bias = dy.sum(axes)
  d_scale = (product.sum(axes) - mean * d_bias) * inverse
  slope = scale * inverse
  # x also changes the statistics that the other devices of a mapped axis use.
  sums = (d_scale, d_bias)
  of_scale, of_bias = sums if axis_name is None else lax.pmean(sums, axis_name)
  linear = -slope * inverse * of_scale / count
  constant = -slope * of_bias / count - linear * mean

  def combine(dz, x, slope, linear, constant):
    return _channels(slope, x) * dz + _channels(linear, x) * x + _channels(constant, x)

  dx = isolate.call(combine, dz, x, slope, linear, constant)
  return dx, d_scale, d_bias


def _unpool_normalised(x: jax.Array, sign: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes the gradient before pooling.

  Args:
    x: input of the normalisation. [..., n, C]
    sign: sign of BatchNorm's scale; where it is negative, the maximum of the output is at the
      minimum of the input. [C]
    dy: gradient after pooling. [..., C]

  Returns:
    The gradient before pooling [..., n, C], and the sum of its product with x per window [..., C].
  """
  signed = x * _channels(sign, x)
  return window_max_gradient(signed, dy), window_max(signed) * _channels(sign, dy) * dy


_batch_norm_relu_pool.defvjp(_batch_norm_relu_pool_fwd, _batch_norm_relu_pool_bwd)
