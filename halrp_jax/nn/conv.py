"""Convolution, BatchNorm and pooling as the models use them: the same numbers on every platform.

XLA:CPU has no fast gradient of a convolution (and inside `lax.scan` one that is tens of times
slower still), so on the CPU a convolution is written as matrix products. Accelerators get the
plain operation. Both agree to rounding (tests/nn/test_layers.py).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from halrp_jax.nn import isolate

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
_FEW_CHANNELS = 4  # up to here a convolution is faster on 2x2 blocks (space to depth)


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

  return isolate.call(parts, x)


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

  return isolate.call(total, z)


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
