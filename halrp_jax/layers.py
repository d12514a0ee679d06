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

from halrp_jax import parallel

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


def dense(features: int, num_in: int, *, bias: bool = True, dtype=None, name: str) -> nn.Dense:
  """A dense layer as PyTorch initialises it. `dtype`: of the product and its result."""
  return nn.Dense(
    features,
    bias,
    dtype,
    kernel_init=uniform_fan_in(),
    bias_init=uniform_fan_in(num_in),
    name=name,
  )


def conv(
  features: int, width: int, padding: int, stride: int = 1, *, dtype=None, name: str
) -> nn.Conv:
  """A square convolution, fast on every platform. Its bias is kept by the BatchNorm behind it."""
  return nn.Conv(
    features,
    (width, width),
    (stride, stride),
    padding,
    use_bias=False,
    dtype=dtype,
    kernel_init=uniform_fan_in(),
    conv_general_dilated=conv_general_dilated,
    name=name,
  )


MOMENTUM = 0.1  # weight of the new batch in BatchNorm's running statistics


class BatchNorm(nn.Module):
  """Batch normalisation over all axes but the last, then max pooling and ReLU if asked for.

  Training uses the batch's mean and biased variance; the running variance takes the *unbiased*
  one (flax.linen.BatchNorm keeps the biased one). Evaluation uses the stored statistics
  ("batch_stats"), or, with `running=False`, those of the batch: a prediction then depends on the
  other images of its batch. The stored ones are kept either way.

  The bias of the layer before is a parameter here (`num_in`): training subtracts it again, so it is
  never added, only kept in the running mean. Its gradient is 0, not the noise of rounding.

  Statistics and normalisation are float32 whatever comes in; the result has the input's dtype.
  """

  running: bool = True  # evaluation uses the stored statistics
  relu: bool = False
  pool: int = 1  # width of the max pooling window; 1: none
  num_in: int = 0  # fan-in of the layer before; 0: it has no bias
  momentum: float = MOMENTUM
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
    forms = [
      functools.partial(f, epsilon=self.epsilon, relu=self.relu, pool=self.pool)
      for f in (_fused_batch_norm, _plain_batch_norm)
    ]
    y, mean, var = lax.platform_dependent(x, scale, bias, cpu=forms[0], default=forms[1])
    if train and not self.is_initializing():
      count = x.size // features * parallel.axis_size()
      unbiased = var * count / max(count - 1, 1)
      mean_.value = (1 - self.momentum) * mean_.value + self.momentum * (mean + shift)
      var_.value = (1 - self.momentum) * var_.value + self.momentum * unbiased
    return y.astype(dtype)


class Dropout(nn.Module):
  """Sets a share `rate` of the values to 0 in training and scales the others up; no parameters.

  Draws 8 random bits a value instead of 32, four times faster where random numbers are dear (an
  eighth of AlexNet's step on the CPU): the rate is rounded to 1/256, the expectation is exact.
  """

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    kept = 256 - round(256 * self.rate)
    if not train or kept == 256:
      return x
    words = jax.random.bits(self.make_rng("dropout"), (-(-x.size // 4),))
    octets = lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: x.size].reshape(x.shape)
    return jnp.where(octets < jnp.uint8(kept), x * (256 / kept), 0)


def max_pool(x: jax.Array, window: int = 2) -> jax.Array:
  """Non-overlapping max pooling, odd remainders dropped. [B, H, W, C] -> [B, H//w, W//w, C]

  Maximum of slices: on the CPU the gradient of reduce_window is some twenty times slower.
  """
  h, w = (n // window * window for n in x.shape[1:3])
  cells = _cells(x[:, :h, :w], window)
  return lax.platform_dependent(
    cells, cpu=lambda cells: _pool_apart(cells), default=lambda cells: _highest(cells)
  )


def overlapping_max_pool(x: jax.Array) -> jax.Array:
  """3 x 3 max pooling with stride 2 and padding 1. [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), C]"""

  def highest(x):
    h, w = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    return functools.reduce(
      jnp.maximum, [x[:, i : h + i : 2, j : w + j : 2] for i in range(3) for j in range(3)]
    )

  return lax.platform_dependent(x, cpu=_apart(highest), default=highest)


def depthwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Every channel by itself. [B, H, W, C], kernel [h, w, C] (odd) -> [B, H, W, C], zero-padded"""
  h, w, channels = kernel.shape
  kernel = kernel.astype(x.dtype)

  def plain(x, kernel):
    kernel = kernel[:, :, None]
    return lax.conv_general_dilated(
      x, kernel, (1, 1), "SAME", dimension_numbers=_DIMENSIONS, feature_group_count=channels
    )

  def shifted(x, kernel):
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (h // 2, h // 2), (w // 2, w // 2), (0, 0)))
    return sum(
      x[:, i : i + height, j : j + width] * kernel[i, j][None, None, None]
      for i in range(h)
      for j in range(w)
    )

  return lax.platform_dependent(x, kernel, cpu=shifted, default=plain)


def patches(x: jax.Array, window, strides, padding) -> jax.Array:
  """What a convolution's kernel is multiplied with, place by place.

  Args:
    x: [B, H, W, C]
    window: height and width of the kernel.
    strides: along height and width.
    padding: "SAME", "VALID" or ((top, bottom), (left, right)).

  Returns:
    [B, H', W', h * w * C], in the order of a kernel [h, w, C, J] seen as a matrix [h * w * C, J].
  """
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  last = [(n - k) // s * s + 1 for n, k, s in zip(x.shape[1:3], window, strides, strict=True)]
  parts = [
    x[:, i : i + last[0] : strides[0], j : j + last[1] : strides[1]]
    for i in range(window[0])
    for j in range(window[1])
  ]
  return jnp.concatenate(parts, -1)


def local_response_norm(
  x: jax.Array, size: int = 4, alpha: float = 0.001 / 9, beta: float = 0.75, k: float = 1.0
) -> jax.Array:
  """x / (k + alpha/size * sum of squares over `size` neighbouring channels)^beta, as in PyTorch."""

  def norm(x):
    pads = [(0, 0)] * (x.ndim - 1) + [(size // 2, (size - 1) // 2)]
    squares = jnp.pad(x * x, pads)
    total = k + alpha / size * sum(squares[..., i : i + x.shape[-1]] for i in range(size))
    # roots are several times faster than a power
    return x * (lax.rsqrt(total) * lax.rsqrt(jnp.sqrt(total)) if beta == 0.75 else total**-beta)

  return lax.platform_dependent(x, cpu=_apart(norm), default=norm)


def _cells(x, window):
  """[B, H, W, C] -> [B, H/w, W/w, w*w, C]: the places of a pooling window side by side."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // window, window, w // window, window, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // window, w // window, window**2, c)


def _highest(cells):
  """Maximum over axis -2, a slice at a time."""
  return functools.reduce(jnp.maximum, [cells[..., i, :] for i in range(cells.shape[-2])])


def _unpool(cells, dy):
  """The gradient of `_highest`; the first of equal values takes it all."""
  best, winner = cells[..., 0, :], jnp.zeros(dy.shape, jnp.int32)
  for i in range(1, cells.shape[-2]):
    wins = cells[..., i, :] > best
    best, winner = jnp.where(wins, cells[..., i, :], best), jnp.where(wins, i, winner)
  place = lax.broadcasted_iota(jnp.int32, cells.shape, cells.ndim - 2)
  return jnp.where(winner[..., None, :] == place, dy[..., None, :], 0)


@jax.custom_vjp
def _pool_apart(cells):
  return _alone(_highest, cells)


_pool_apart.defvjp(
  lambda cells: (_pool_apart(cells), cells), lambda cells, dy: (_alone(_unpool, cells, dy),)
)


# --- the means: fewer passes over memory on the CPU --------------------------------------


def _alone(fn, *args):
  """fn(*args), computed once and apart from what comes before and after.

  XLA:CPU would fuse what comes before a convolution (BatchNorm, padding) into every one of its
  slices, what comes before several reductions into each, and compute it again each time;
  `optimization_barrier` doesn't keep it from that. It never fuses into a branch, so this is one,
  on a condition that it can't foresee: not-a-number gives not-a-number either way.
  """

  def not_a_number(*args):
    shapes = jax.eval_shape(fn, *args)
    return jax.tree.map(lambda y: jnp.full(y.shape, jnp.nan, y.dtype), shapes)

  return lax.cond(jnp.isnan(args[0][(0,) * args[0].ndim]), not_a_number, fn, *args)


def _apart(fn):
  """fn(x), whose value and gradient are each computed `_alone`; the gradient from x again."""

  def back(x, dy):
    return (_alone(lambda x, dy: jax.vjp(fn, x)[1](dy)[0], x, dy),)

  apart = jax.custom_vjp(functools.partial(_alone, fn))
  apart.defvjp(lambda x: (apart(x), x), back)
  return apart


def window_sum(x: jax.Array, window, strides, padding) -> jax.Array:
  """Sums over sliding windows of the places. [B, *spatial, C] -> [B, *spatial', C]

  Args:
    x: [B, *spatial, C]; of any number of spatial axes.
    window: its width along each spatial axis.
    strides: along each spatial axis.
    padding: by name ("SAME", "VALID", "SAME_LOWER") or (low, high) for each spatial axis, not
      negative.
  """
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(x.shape[1:-1], window, strides, padding)

  def plain(x):
    pads = ((0, 0), *padding, (0, 0))
    return lax.reduce_window(x, 0.0, lax.add, (1, *window, 1), (1, *strides, 1), pads)

  def axis_by_axis(x):
    for axis, (width, stride, pads) in enumerate(zip(window, strides, padding, strict=True), 1):
      x = jnp.pad(x, [pads if a == axis else (0, 0) for a in range(x.ndim)])
      last = x.shape[axis] - width
      x = sum(lax.slice_in_dim(x, i, last + i + 1, stride, axis) for i in range(width))
    return x

  return lax.platform_dependent(x, cpu=functools.partial(_alone, axis_by_axis), default=plain)


# --- BatchNorm, ReLU and max pooling ----------------------------------------------------


def _channels(v: jax.Array, like: jax.Array) -> jax.Array:
  """[C] -> [1, ..., 1, C], to broadcast against `like`."""
  return v.reshape((1,) * (like.ndim - 1) + (-1,))


def _affine(x, mean, var, scale, bias, epsilon):
  factor = lax.rsqrt(var + epsilon) * scale
  return x * _channels(factor, x) + _channels(bias - mean * factor, x)


def _moments(x):
  """Mean [C] and biased variance [C] over all axes but the last, and all parts of a batch."""
  axes = tuple(range(x.ndim - 1))
  mean, var = x.mean(axes), x.var(axes)
  if not parallel.is_mapped():
    return mean, var
  whole = parallel.average(mean)
  return whole, parallel.average(var + (mean - whole) ** 2)


def _plain_batch_norm(x, scale, bias, *, epsilon, relu, pool):
  """-> output, mean [C], biased variance [C] of the batch"""
  mean, var = _moments(x)
  y = _affine(x, mean, var, scale, bias, epsilon)
  y = max_pool(y, pool) if pool > 1 else y
  return nn.relu(y) if relu else y, mean, var


def _fused_batch_norm(x, scale, bias, *, epsilon, relu, pool):
  if pool > 1 and not (x.shape[1] % pool or x.shape[2] % pool):
    return _batch_norm_relu_pool(_cells(x, pool), scale, bias, epsilon, relu, True)
  y, mean, var = _batch_norm_relu_pool(x, scale, bias, epsilon, relu, False)
  return max_pool(y, pool) if pool > 1 else y, mean, var


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _batch_norm_relu_pool(x, scale, bias, epsilon, relu, pool):
  """BatchNorm, ReLU, maximum over axis -2 if `pool`, with one gradient for all three.

  Fewer passes over the activations than one after another.
  """
  mean, var = _moments(x)
  y = _affine(x, mean, var, scale, bias, epsilon)
  y = _highest(y) if pool else y
  return nn.relu(y) if relu else y, mean, var


def _batch_norm_relu_pool_fwd(x, scale, bias, epsilon, relu, pool):
  out = _batch_norm_relu_pool(x, scale, bias, epsilon, relu, pool)
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
  if pool:  # dz is 0 but at the winners
    dz, product = _alone(_unpool_normalised, x, jnp.where(scale < 0, -1.0, 1.0), dy)
  else:
    dz, product = dy, dy * x
  count, places = x.size // x.shape[-1], tuple(range(dy.ndim - 1))
  d_bias = dy.sum(places)
  d_scale = (product.sum(places) - mean * d_bias) * inverse
  slope = scale * inverse
  of_scale, of_bias = parallel.average((d_scale, d_bias))  # x moves the statistics of all parts
  linear = -slope * inverse * of_scale / count
  constant = -slope * of_bias / count - linear * mean

  def combine(dz, x, slope, linear, constant):
    return _channels(slope, x) * dz + _channels(linear, x) * x + _channels(constant, x)

  dx = _alone(combine, dz, x, slope, linear, constant)
  return dx, d_scale, d_bias


def _unpool_normalised(x, sign, dy):
  """-> gradient before pooling [..., w*w, C], and the sum of its product with x per window."""
  signed = x * _channels(sign, x)
  return _unpool(signed, dy), _highest(signed) * _channels(sign, dy) * dy


_batch_norm_relu_pool.defvjp(_batch_norm_relu_pool_fwd, _batch_norm_relu_pool_bwd)


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
    return times(x[:, ::stride, ::stride], kernel[0, 0])
  if stride == 2 or x.shape[-1] <= _FEW_CHANNELS:
    return _blocked_conv(x, kernel, padding, stride)
  return _product_conv(x, kernel, padding)


# --- convolutions as matrix products (NHWC, HWIO) ---------------------------------------
# Unfold the columns, multiply, fold the rows; autodiff goes the same way back: unfold the rows,
# multiply, fold the columns. With few input channels the whole window is unfolded, nothing folded.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _unfold(x, axis, starts, sizes):
  """[..., n, ..., C] -> [..., m, ..., len(starts) * C], (n, m) = sizes; zeros beyond the edges.

  Part i is x shifted: part_i[k] = x[k + starts[i]] along `axis`.
  """
  n, m = sizes
  below, above = max(0, -min(starts)), max(0, max(starts) + m - n)

  def parts(x):
    x = jnp.pad(x, [(below, above) if a == axis else (0, 0) for a in range(x.ndim)])
    slices = [lax.slice_in_dim(x, below + s, below + s + m, axis=axis) for s in starts]
    return jnp.concatenate(slices, axis=-1)

  return _alone(parts, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _fold(z, axis, starts, sizes):
  """The transpose of `_unfold`: [..., m, ..., len(starts) * C] -> [..., n, ..., C].

  y[k] = sum_i part_i[k - starts[i]]. Every part is cut and padded by itself: one pass over z.
  """
  n, m = sizes

  def total(z):
    y = 0
    for part, s in zip(jnp.split(z, len(starts), axis=-1), starts, strict=True):
      part = lax.slice_in_dim(part, max(-s, 0), min(m, n - s), axis=axis)
      missing = (max(s, 0), max(n - s - m, 0))
      y += jnp.pad(part, [missing if a == axis else (0, 0) for a in range(z.ndim)])
    return y

  return _alone(total, z)


@jax.custom_vjp
def times(x, matrix):
  """[..., K] @ [K, N] as one matrix product."""
  return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], matrix.shape[-1])


def _times_bwd(saved, dy):
  """A product over very many places runs as two, which XLA:CPU's threads share better."""
  x, matrix = saved
  places, widest = math.prod(x.shape[:-1]), max(matrix.shape)
  n = 2 if places % 2 == 0 and places > 20 * widest else 1
  parts = (y.reshape(n, -1, y.shape[-1]) for y in (x, dy))
  return times(dy, matrix.T), jnp.einsum("nmi,nmj->nij", *parts).sum(0)


_unfold.defvjp(
  lambda x, *where: (_unfold(x, *where), None), lambda *args: (_fold(args[-1], *args[:3]),)
)
_fold.defvjp(
  lambda z, *where: (_fold(z, *where), None), lambda *args: (_unfold(args[-1], *args[:3]),)
)
times.defvjp(lambda x, matrix: (times(x, matrix), (x, matrix)), _times_bwd)


def _product_conv(x, kernel, padding):
  ((top, _), (left, _)), (kh, kw, num_in, num_out) = padding, kernel.shape
  (h, w), (h_out, w_out) = x.shape[1:3], _output_size(x, kernel, padding)
  columns = tuple(j - left for j in range(kw))
  if kh * kw * num_in < kw * num_in + kh * num_out:  # numbers written for a place
    rows = tuple(i - top for i in range(kh))
    x = _unfold(x, 1, rows, (h, h_out))
    x = _unfold(x, 2, columns, (w, w_out))
    return times(x, kernel.transpose(1, 0, 2, 3).reshape(-1, num_out))
  x = _unfold(x, 2, columns, (w, w_out))
  z = times(x, kernel.transpose(1, 2, 0, 3).reshape(kw * num_in, kh * num_out))
  return _fold(z, 1, tuple(top - i for i in range(kh)), (h_out, h))


def _output_size(x, kernel, padding, stride=1):
  return tuple(
    (n + sum(pads) - k) // stride + 1
    for n, pads, k in zip(x.shape[1:3], padding, kernel.shape[:2], strict=True)
  )


def _blocked_conv(x, kernel, padding, stride):
  """The same convolution on 2x2 blocks of pixels: 4 times the channels, a quarter of the places.

  The kernel is embedded at the places of a block where an output starts (four with stride 1, one
  with stride 2); its gradient flows back through that.
  """
  kh, kw, num_in, num_out = kernel.shape
  b, h, w, _ = x.shape
  (top, _), (left, _) = padding
  h_out, w_out = _output_size(x, kernel, padding, stride)
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
