"""Convolution, BatchNorm and pooling as the models use them: the same numbers on every platform.

XLA:CPU has no fast gradient of a convolution (and inside `lax.scan` one that is tens of times
slower still), so on the CPU a convolution is written as matrix products. Accelerators get the
plain operation. Both agree to rounding (tests/test_layers.py).
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
_FEW_CHANNELS = 4  # up to here a convolution is faster on 2x2 blocks (space to depth)


def uniform_fan_in(fan_in: int | None = None):
  """PyTorch's default initialisation, which the paper's networks start from.

  Uniform in +-1/sqrt(fan_in); for kernels fan_in is the product of all axes but the last.
  """

  def init(key, shape, dtype=float):
    bound = 1 / math.sqrt(fan_in if fan_in is not None else math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def dense(features: int, num_in: int, name: str) -> nn.Dense:
  """A dense layer as PyTorch initialises it."""
  return nn.Dense(
    features, kernel_init=uniform_fan_in(), bias_init=uniform_fan_in(num_in), name=name
  )


def conv(
  features: int, width: int, num_in: int, padding: int, stride: int = 1, *, name: str
) -> nn.Conv:
  """A square convolution as PyTorch initialises it, fast on every platform."""
  return nn.Conv(
    features,
    (width, width),
    (stride, stride),
    padding,
    kernel_init=uniform_fan_in(),
    bias_init=uniform_fan_in(width * width * num_in),
    conv_general_dilated=conv_general_dilated,
    name=name,
  )


class BatchNorm(nn.Module):
  """Batch normalisation over all axes but the last, then ReLU and max pooling if asked for.

  Training uses the batch's mean and biased variance; the running variance takes the *unbiased*
  one (flax.linen.BatchNorm keeps the biased one). With `running=False` there are no running
  statistics and evaluation uses the batch's too.
  """

  running: bool = True
  relu: bool = False
  pool: int = 1  # width of the max pooling window; 1: none
  momentum: float = 0.1  # weight of the new batch in the running statistics
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    features = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (features,))
    bias = self.param("bias", nn.initializers.zeros, (features,))
    if self.running:
      mean_ = self.variable("batch_stats", "mean", jnp.zeros, (features,))
      var_ = self.variable("batch_stats", "var", jnp.ones, (features,))
    if self.running and not train:
      return _affine(x, mean_.value, var_.value, scale, bias, self.epsilon, self.relu, self.pool)
    forms = [
      functools.partial(f, epsilon=self.epsilon, relu=self.relu, pool=self.pool)
      for f in (_fused_batch_norm, _plain_batch_norm)
    ]
    y, mean, var = lax.platform_dependent(x, scale, bias, cpu=forms[0], default=forms[1])
    if self.running and not self.is_initializing():
      count = x.size // features
      unbiased = var * count / max(count - 1, 1)
      mean_.value = (1 - self.momentum) * mean_.value + self.momentum * mean
      var_.value = (1 - self.momentum) * var_.value + self.momentum * unbiased
    return y


def max_pool(x: jax.Array, window: int = 2) -> jax.Array:
  """Non-overlapping max pooling, odd remainders dropped. [B, H, W, C] -> [B, H//w, W//w, C]

  Maximum of slices: on the CPU the gradient of reduce_window is some twenty times slower.
  """
  b, h, w, c = x.shape
  h, w = h // window, w // window
  x = x[:, : h * window, : w * window].reshape(b, h, window, w, window, c)
  parts = [x[:, :, i, :, j] for i in range(window) for j in range(window)]
  return functools.reduce(jnp.maximum, parts)


# --- BatchNorm, ReLU and max pooling ----------------------------------------------------


def _channels(v: jax.Array, like: jax.Array) -> jax.Array:
  """[C] -> [1, ..., 1, C], to broadcast against `like`."""
  return v.reshape((1,) * (like.ndim - 1) + (-1,))


def _affine(x, mean, var, scale, bias, epsilon, relu, pool):
  factor = lax.rsqrt(var + epsilon) * scale
  y = (x - _channels(mean, x)) * _channels(factor, x) + _channels(bias, x)
  y = nn.relu(y) if relu else y
  return max_pool(y, pool) if pool > 1 else y


def _plain_batch_norm(x, scale, bias, *, epsilon, relu, pool):
  """-> output, mean [C], biased variance [C] of the batch"""
  axes = tuple(range(x.ndim - 1))
  mean, var = x.mean(axes), x.var(axes)
  return _affine(x, mean, var, scale, bias, epsilon, relu, pool), mean, var


def _fused_batch_norm(x, scale, bias, *, epsilon, relu, pool):
  return _batch_norm_relu_pool(x, scale, bias, epsilon, relu, pool)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _batch_norm_relu_pool(x, scale, bias, epsilon, relu, pool):
  """`_plain_batch_norm` with one gradient for all three: fewer passes over the activations."""
  return _plain_batch_norm(x, scale, bias, epsilon=epsilon, relu=relu, pool=pool)


def _batch_norm_relu_pool_fwd(x, scale, bias, epsilon, relu, pool):
  out = _plain_batch_norm(x, scale, bias, epsilon=epsilon, relu=relu, pool=pool)
  y, mean, var = out
  return out, (x, y if relu else None, mean, lax.rsqrt(var + epsilon), scale)


def _batch_norm_relu_pool_bwd(epsilon, relu, pool, saved, gradients):
  """dz: gradient of the normalised values. The winner of a window is found in the stored input,
  never by comparing recomputed values: those may differ in the last bit from fusion to fusion.
  """
  x, y, mean, inverse, scale = saved
  dy = gradients[0]  # mean and variance only feed the running statistics
  if relu:
    dy = jnp.where(y > 0, dy, 0)
  dz = _unpool(x * _channels(jnp.where(scale < 0, -1.0, 1.0), x), dy, pool) if pool > 1 else dy
  axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
  d_bias = dy.sum(axes)
  d_scale = ((dz * x).sum(axes) - mean * d_bias) * inverse
  slope = scale * inverse
  linear = -slope * inverse * d_scale / count
  constant = -slope * d_bias / count - linear * mean
  dx = _channels(slope, x) * dz + _channels(linear, x) * x + _channels(constant, x)
  return dx, d_scale, d_bias


_batch_norm_relu_pool.defvjp(_batch_norm_relu_pool_fwd, _batch_norm_relu_pool_bwd)


def _unpool(x, dy, window):
  """The gradient of `max_pool(x)`; the first of equal values takes it all."""
  b, h, w, c = x.shape
  ph, pw = h // window, w // window
  cells = x[:, : ph * window, : pw * window].reshape(b, ph, window, pw, window, c)
  parts = [cells[:, :, i, :, j] for i in range(window) for j in range(window)]
  highest = functools.reduce(jnp.maximum, parts)
  free, dx = jnp.ones(dy.shape, bool), []
  for part in parts:
    wins = free & (part == highest)
    dx.append(jnp.where(wins, dy, 0))
    free &= ~wins
  dx = jnp.stack(dx, axis=3).reshape(b, ph, pw, window, window, c).transpose(0, 1, 3, 2, 4, 5)
  dx = dx.reshape(b, ph * window, pw * window, c)
  return jnp.pad(dx, ((0, 0), (0, h - ph * window), (0, w - pw * window), (0, 0)))


# --- convolution ------------------------------------------------------------------------


def conv_general_dilated(
  lhs,
  rhs,
  window_strides,
  padding,
  lhs_dilation=None,
  rhs_dilation=None,
  dimension_numbers=None,
  feature_group_count=1,
  precision=None,
  **kwargs,
):
  """`lax.conv_general_dilated` for `nn.Conv(conv_general_dilated=...)`, fast on the CPU too."""

  def plain(lhs, rhs):
    return lax.conv_general_dilated(
      lhs,
      rhs,
      window_strides,
      padding,
      lhs_dilation=lhs_dilation,
      rhs_dilation=rhs_dilation,
      dimension_numbers=dimension_numbers,
      feature_group_count=feature_group_count,
      precision=precision,
      **kwargs,
    )

  strides = tuple(window_strides)
  simple = (
    lhs.ndim == 4
    and feature_group_count == 1
    and strides in ((1, 1), (2, 2))
    and all(d == 1 for f in (lhs_dilation, rhs_dilation) for d in f or (1,))
    and dimension_numbers in (None, lax.conv_dimension_numbers(lhs.shape, rhs.shape, _DIMENSIONS))
  )
  if not simple:
    return plain(lhs, rhs)
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
  padding = tuple((int(a), int(b)) for a, b in padding)
  if not all(0 <= p < k for k, pair in zip(rhs.shape[:2], padding, strict=True) for p in pair):
    return plain(lhs, rhs)
  fast = functools.partial(_fast_conv, padding=padding, stride=strides[0])
  return lax.platform_dependent(lhs, rhs, cpu=fast, default=plain)


def _fast_conv(x, kernel, *, padding, stride):
  """Which form is fastest on the CPU, by shape alone."""
  if kernel.shape[:2] == (1, 1):
    return _product_conv(x[:, ::stride, ::stride], kernel, padding)
  if stride == 2 or x.shape[-1] <= _FEW_CHANNELS:
    return _blocked_conv(x, kernel, padding, stride)
  return _product_conv(x, kernel, padding)


# --- convolutions as matrix products (NHWC, HWIO) ---------------------------------------
# Only the width is unfolded, never the whole window: a full unfolding is bound by memory writes.


def _shifted(x, axis, offsets, length):
  """The slices of `x` that start at each offset, side by side on the channel axis."""
  return jnp.concatenate([lax.slice_in_dim(x, o, o + length, axis=axis) for o in offsets], axis=-1)


def _chunks(*arrays):
  """[B, ...] -> [n, B/n, ...], n chunks of the batch.

  A loop over chunks is the only thing that keeps XLA:CPU from fusing what comes before a
  convolution (BatchNorm, padding) into every one of its slices and computing it again each time.
  """
  n = next(n for n in (4, 3, 2, 1) if arrays[0].shape[0] % n == 0)
  return tuple(x.reshape(n, -1, *x.shape[1:]) for x in arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product_conv(x, kernel, padding):
  (chunks,) = _chunks(x)
  y = lax.map(lambda x: _chunk_conv(x, kernel, padding), chunks)
  return y.reshape(-1, *y.shape[2:])


def _chunk_conv(x, kernel, padding):
  (top, bottom), (left, right) = padding
  kh, kw, num_in, num_out = kernel.shape
  b, h, w, _ = x.shape
  h_out, w_out = h + top + bottom - kh + 1, w + left + right - kw + 1
  wide = jnp.pad(x, ((0, 0), (0, 0), (left, right), (0, 0)))
  unfolded = _shifted(wide, 2, range(kw), w_out)  # [B, H, W', kw*I]
  matrix = kernel.transpose(1, 2, 0, 3).reshape(kw * num_in, kh * num_out)
  z = (unfolded.reshape(-1, kw * num_in) @ matrix).reshape(b, h, w_out, kh, num_out)
  z = jnp.pad(z, ((0, 0), (top, bottom), (0, 0), (0, 0), (0, 0)))
  return sum(z[:, i : i + h_out, :, i] for i in range(kh))


def _product_conv_fwd(x, kernel, padding):
  return _product_conv(x, kernel, padding), (x, kernel)


def _product_conv_bwd(padding, saved, dy):
  x, kernel = saved

  def add(d_kernel, chunk):
    dx, more = _chunk_gradients(*chunk, kernel, padding)
    return d_kernel + more, dx

  d_kernel, dx = lax.scan(add, jnp.zeros_like(kernel), _chunks(x, dy))
  return dx.reshape(x.shape), d_kernel


def _chunk_gradients(x, dy, kernel, padding):
  (top, bottom), (left, _) = padding
  kh, kw, num_in, num_out = kernel.shape
  b, h, w, _ = x.shape
  h_out, w_out = dy.shape[1:3]
  # D[b, h', w, (j, o)] = dy[b, h', w + left - j, o]: shared by both gradients
  dy = jnp.pad(dy, ((0, 0), (0, 0), (kw - 1 - left, w + left - w_out), (0, 0)))
  d = _shifted(dy, 2, range(kw - 1, -1, -1), w).reshape(-1, kw * num_out)
  tall = jnp.pad(x, ((0, 0), (top, bottom), (0, 0), (0, 0)))
  unfolded = _shifted(tall, 1, range(kh), h_out).reshape(-1, kh * num_in)
  d_kernel = (unfolded.T @ d).reshape(kh, num_in, kw, num_out).transpose(0, 2, 1, 3)
  matrix = kernel.transpose(1, 3, 0, 2).reshape(kw * num_out, kh * num_in)
  zx = (d @ matrix).reshape(b, h_out, w, kh, num_in)
  zx = jnp.pad(zx, ((0, 0), (kh - 1 - top, h + top - h_out), (0, 0), (0, 0), (0, 0)))
  dx = sum(zx[:, kh - 1 - i : kh - 1 - i + h, :, i] for i in range(kh))
  return dx, d_kernel


_product_conv.defvjp(_product_conv_fwd, _product_conv_bwd)


def _blocked_conv(x, kernel, padding, stride):
  """The same convolution on 2x2 blocks of pixels: 4 times the channels, a quarter of the places.

  The kernel is embedded at the places of a block where an output starts (four with stride 1, one
  with stride 2); its gradient flows back through that.
  """
  kh, kw, num_in, num_out = kernel.shape
  b, h, w, _ = x.shape
  (top, bottom), (left, right) = padding
  h_out, w_out = (h + top + bottom - kh) // stride + 1, (w + left + right - kw) // stride + 1
  m = 2 // stride  # outputs per block and axis
  bh, bw = -(-h_out // m), -(-w_out // m)  # blocks of the output
  qh, qw = (kh + m) // 2, (kw + m) // 2  # blocks under the kernel, wherever in a block it starts
  rows, cols = 2 * (bh + qh - 1), 2 * (bw + qw - 1)
  x = x[:, : rows - top, : cols - left]
  below, beside = rows - top - x.shape[1], cols - left - x.shape[2]
  x = jnp.pad(x, ((0, 0), (top, below), (left, beside), (0, 0)))
  x = x.reshape(b, rows // 2, 2, cols // 2, 2, num_in).transpose(0, 1, 3, 2, 4, 5)
  x = x.reshape(b, rows // 2, cols // 2, 4 * num_in)
  placed = jnp.stack(
    [
      jnp.pad(kernel, ((i, 2 * qh - kh - i), (j, 2 * qw - kw - j), (0, 0), (0, 0)))
      for i in range(m)
      for j in range(m)
    ],
    axis=-2,
  )  # [2*qh, 2*qw, I, m*m, J]
  placed = placed.reshape(qh, 2, qw, 2, num_in, m * m * num_out).transpose(0, 2, 1, 3, 4, 5)
  placed = placed.reshape(qh, qw, 4 * num_in, m * m * num_out)
  y = _product_conv(x, placed, ((0, 0), (0, 0)))
  y = y.reshape(b, bh, bw, m, m, num_out).transpose(0, 1, 3, 2, 4, 5)
  return y.reshape(b, m * bh, m * bw, num_out)[:, :h_out, :w_out]
