"""BatchNorm, fused with ReLU and max pooling on the CPU, and local response normalisation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from halrp_jax.nn import isolate
from halrp_jax.nn.init import uniform_fan_in
from halrp_jax.nn.pool import max_pool, window_cells, window_max, window_max_gradient

MOMENTUM = 0.1  # weight of the new batch in BatchNorm's running statistics


class BatchNorm(nn.Module):
  """Batch normalisation over all axes but the last, then max pooling and ReLU if asked for.

  Training uses the batch's mean and biased variance; the running variance takes the *unbiased*
  one (flax.linen.BatchNorm keeps the biased one). Evaluation uses the stored statistics
  ("batch_stats"), or, with `running=False`, those of the batch: a prediction then depends on the
  other images of its batch. The stored ones are kept either way.

  The bias of the layer before is a parameter here (`num_in`): training subtracts it again, so it is
  never added, only kept in the running mean. Its gradient is 0, not the noise of rounding.

  With parallel=pmap the statistics are those of all parts of a batch if `axis_name` is
  `Layout.axis_name`, as `models.make` sets it.

  Statistics and normalisation are float32 whatever comes in; the result has the input's dtype.
  """

  running: bool = True  # evaluation uses the stored statistics
  relu: bool = False
  pool: int = 1  # width of the max pooling window; 1: none
  num_in: int = 0  # fan-in of the layer before; 0: it has no bias
  momentum: float = MOMENTUM
  axis_name: str | None = None  # of mapped devices that share a batch in training
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    features, dtype = x.shape[-1], x.dtype
    x = x.astype(jnp.float32)
    scale = self.param("scale", nn.initializers.ones, (features,))
    bias = self.param("bias", nn.initializers.zeros, (features,))
    shift = 0.0
    if self.num_in:
      shift = self.param("input_bias", uniform_fan_in(self.num_in), (features,))
    stored = train or self.running or self.is_initializing()
    if stored:
      mean_ = self.variable("batch_stats", "mean", jnp.zeros, (features,))
      var_ = self.variable("batch_stats", "var", jnp.ones, (features,))
    if self.running and not train:
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
    if train and not self.is_initializing():
      count = x.size // features * (1 if axis_name is None else lax.axis_size(axis_name))
      unbiased = var * count / max(count - 1, 1)
      mean_.value = (1 - self.momentum) * mean_.value + self.momentum * (mean + shift)
      var_.value = (1 - self.momentum) * var_.value + self.momentum * unbiased
    return y.astype(dtype)


def local_response_norm(
  x: jax.Array, size: int = 4, alpha: float = 0.001 / 9, beta: float = 0.75, k: float = 1.0
) -> jax.Array:
  """X / (k + alpha/size * sum of squares over `size` neighbouring channels)^beta, as in PyTorch."""

  def norm(x):
    pads = [(0, 0)] * (x.ndim - 1) + [(size // 2, (size - 1) // 2)]
    squares = jnp.pad(x * x, pads)
    total = k + alpha / size * sum(squares[..., i : i + x.shape[-1]] for i in range(size))
    # roots are several times faster than a power
    return x * (lax.rsqrt(total) * lax.rsqrt(jnp.sqrt(total)) if beta == 0.75 else total**-beta)

  return lax.platform_dependent(x, cpu=isolate.wrap(norm), default=norm)


# --- BatchNorm, ReLU and max pooling ----------------------------------------------------


def _channels(v: jax.Array, like: jax.Array) -> jax.Array:
  """[C] -> [1, ..., 1, C], to broadcast against `like`."""
  return v.reshape((1,) * (like.ndim - 1) + (-1,))


def _affine(x, mean, var, scale, bias, epsilon):
  factor = lax.rsqrt(var + epsilon) * scale
  return x * _channels(factor, x) + _channels(bias - mean * factor, x)


def _moments(x, axis_name):
  """Mean [C] and biased variance [C] over all axes but the last, and all parts of a batch."""
  axes = tuple(range(x.ndim - 1))
  mean, var = x.mean(axes), x.var(axes)
  if axis_name is None:
    return mean, var
  whole = lax.pmean(mean, axis_name)
  return whole, lax.pmean(var + (mean - whole) ** 2, axis_name)


def _plain_batch_norm(x, scale, bias, epsilon, relu, pool, axis_name):
  """-> output, mean [C], biased variance [C] of the batch"""
  mean, var = _moments(x, axis_name)
  y = _affine(x, mean, var, scale, bias, epsilon)
  y = max_pool(y, pool) if pool > 1 else y
  return nn.relu(y) if relu else y, mean, var


def _fused_batch_norm(x, scale, bias, epsilon, relu, pool, axis_name):
  if pool > 1 and not (x.shape[1] % pool or x.shape[2] % pool):
    cells = window_cells(x, pool)
    return _batch_norm_relu_pool(cells, scale, bias, epsilon, relu, True, axis_name)
  y, mean, var = _batch_norm_relu_pool(x, scale, bias, epsilon, relu, False, axis_name)
  return max_pool(y, pool) if pool > 1 else y, mean, var


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _batch_norm_relu_pool(x, scale, bias, epsilon, relu, pool, axis_name):
  """BatchNorm, ReLU, maximum over axis -2 if `pool`, with one gradient for all three.

  Fewer passes over the activations than one after another.
  """
  mean, var = _moments(x, axis_name)
  y = _affine(x, mean, var, scale, bias, epsilon)
  y = window_max(y) if pool else y
  return nn.relu(y) if relu else y, mean, var


def _batch_norm_relu_pool_fwd(x, scale, bias, epsilon, relu, pool, axis_name):
  out = _batch_norm_relu_pool(x, scale, bias, epsilon, relu, pool, axis_name)
  y, mean, var = out
  return out, (x, y if relu else None, mean, lax.rsqrt(var + epsilon), scale)


def _batch_norm_relu_pool_bwd(epsilon, relu, pool, axis_name, saved, gradients):
  """dz: gradient of the normalised values. The winner of a window is found in the stored input,
  never by comparing recomputed values: those may differ in the last bit from fusion to fusion.
  """
  x, y, mean, inverse, scale = saved
  dy = gradients[0]  # mean and variance only feed the running statistics
  if relu:
    dy = jnp.where(y > 0, dy, 0)
  if pool:  # dz is 0 but at the winners
    dz, product = isolate.call(_unpool_normalised, x, jnp.where(scale < 0, -1.0, 1.0), dy)
  else:
    dz, product = dy, dy * x
  count, places = x.size // x.shape[-1], tuple(range(dy.ndim - 1))
  d_bias = dy.sum(places)
  d_scale = (product.sum(places) - mean * d_bias) * inverse
  slope = scale * inverse
  of_all = (d_scale, d_bias)  # x moves the statistics of all parts
  of_scale, of_bias = of_all if axis_name is None else lax.pmean(of_all, axis_name)
  linear = -slope * inverse * of_scale / count
  constant = -slope * of_bias / count - linear * mean

  def combine(dz, x, slope, linear, constant):
    return _channels(slope, x) * dz + _channels(linear, x) * x + _channels(constant, x)

  dx = isolate.call(combine, dz, x, slope, linear, constant)
  return dx, d_scale, d_bias


def _unpool_normalised(x, sign, dy):
  """-> gradient before pooling [..., w*w, C], and the sum of its product with x per window."""
  signed = x * _channels(sign, x)
  return window_max_gradient(signed, dy), window_max(signed) * _channels(sign, dy) * dy


_batch_norm_relu_pool.defvjp(_batch_norm_relu_pool_fwd, _batch_norm_relu_pool_bwd)
