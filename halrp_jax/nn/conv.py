"""Convolutions that are fast on the CPU, too.

XLA:CPU has no fast gradient of a convolution, and inside `lax.scan` its gradient is tens of times
slower still. So on the CPU a convolution is computed as matrix products. Accelerators use XLA's own
operation. Both agree up to rounding (tests/nn/test_layers.py).
"""

import functools
import math
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from halrp_jax.nn import isolate, winograd

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
_FEW_CHANNELS = 4  # with at most so many input channels, 2 x 2 blocks (space to depth) are faster
_Padding = tuple[tuple[int, int], tuple[int, int]]  # (top, bottom), (left, right)


def depthwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolves every channel with its own kernel, with zero padding and stride 1.

  Args:
    x: [B, H, W, C]
    kernel: [h, w, C], h and w odd.

  Returns:
    [B, H, W, C]
  """
  kernel = kernel.astype(x.dtype)[:, :, None]
  numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, _DIMENSIONS)
  return conv_general_dilated(
    *(x, kernel, (1, 1), "SAME"), dimension_numbers=numbers, feature_group_count=x.shape[-1]
  )


def patches(
  x: jax.Array,
  window: Sequence[int],
  strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
) -> jax.Array:
  """Extracts the patch of the input that a convolution multiplies with its kernel, at each output.

  Args:
    x: [B, H, W, C]
    window: height h and width w of the kernel.
    strides: strides along height and width.
    padding: "SAME", "VALID" or ((top, bottom), (left, right)).

  Returns:
    [B, H', W', h * w * C], in the order of a kernel [h, w, C, J] seen as a matrix [h * w * C, J].
  """
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  size = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:3], window, strides, strict=True)]
  return jnp.concatenate(list(_taps(x, window, size, strides).values()), -1)


# --- convolution ------------------------------------------------------------------------


def conv_general_dilated(
  lhs: jax.Array,
  rhs: jax.Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
  feature_group_count: int = 1,
  precision: lax.PrecisionLike = None,
  preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
  """Computes what `lax.conv_general_dilated` does, also fast on the CPU.

  It is an argument for `nn.Conv(conv_general_dilated=...)`. The fast form covers 4-dimensional
  arrays in the layout NHWC, kernels in HWIO, strides 1 or 2, without dilation, and without groups
  or with a group for each channel (depthwise); all other convolutions are left to
  `lax.conv_general_dilated`.

  Args:
    lhs: input. [B, H, W, C]
    rhs: kernel. [h, w, C, J]
    window_strides: strides along height and width.
    padding: "SAME", "VALID" or ((top, bottom), (left, right)).
    lhs_dilation: see `lax.conv_general_dilated`.
    rhs_dilation: see `lax.conv_general_dilated`.
    dimension_numbers: see `lax.conv_general_dilated`.
    feature_group_count: see `lax.conv_general_dilated`.
    precision: see `lax.conv_general_dilated`; the fast form ignores it.
    preferred_element_type: see `lax.conv_general_dilated`; excludes the fast form.

  Returns:
    [B, H', W', J]
  """

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
      preferred_element_type=preferred_element_type,
    )

  strides = tuple(window_strides)
  is_depthwise = lhs.ndim == 4 and lhs.shape[-1] == feature_group_count == rhs.shape[-1] > 1
  is_simple = (
    lhs.ndim == 4
    and (feature_group_count == 1 or is_depthwise)
    and preferred_element_type is None
    and strides in ((1, 1), (2, 2))
    and all(d == 1 for f in (lhs_dilation, rhs_dilation) for d in f or (1,))
    and dimension_numbers == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _DIMENSIONS)
  )
  if not is_simple:
    return plain(lhs, rhs)
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
  rows, columns = ((int(a), int(b)) for a, b in padding)
  if not all(
    0 <= p < k for k, pair in zip(rhs.shape[:2], (rows, columns), strict=True) for p in pair
  ):
    return plain(lhs, rhs)
  form = _depthwise_conv if is_depthwise else _fast_conv
  fast = functools.partial(form, padding=(rows, columns), stride=strides[0])
  return lax.platform_dependent(lhs, rhs, cpu=fast, default=plain)


def _fast_conv(x: jax.Array, kernel: jax.Array, *, padding: _Padding, stride: int) -> jax.Array:
  """Convolves in the form that is fastest on the CPU, chosen by the shapes alone."""
  if kernel.shape[:2] == (1, 1):
    return times(x[:, ::stride, ::stride], kernel[0, 0])
  if x.shape[-1] <= _FEW_CHANNELS:
    return _blocked_conv(x, kernel, padding, stride)
  if stride == 2:
    windows = _unfold_windows(x, kernel.shape[:2], padding, x.shape[1:3])
    return times(windows, kernel.reshape(-1, kernel.shape[-1]))
  if winograd.suits(kernel.shape, _output_size(x, kernel, padding), x.dtype):
    return _winograd_conv(x, kernel, padding)
  return _product_conv(x, kernel, padding)


def _winograd_conv(x: jax.Array, kernel: jax.Array, padding: _Padding) -> jax.Array:
  """Convolves with stride 1 by Winograd's form, with rows and columns added to fill its tiles."""
  size = _output_size(x, kernel, padding)
  missing = (-n % winograd.TILE for n in size)
  pads = ((low, high + more) for (low, high), more in zip(padding, missing, strict=True))
  y = winograd.conv(jnp.pad(x, ((0, 0), *pads, (0, 0))), kernel)
  return y[:, : size[0], : size[1]]


# --- depthwise convolutions -------------------------------------------------------------


def _depthwise_conv(
  x: jax.Array, kernel: jax.Array, *, padding: _Padding, stride: int
) -> jax.Array:
  """Convolves every channel with its own kernel [h, w, 1, C]."""
  return _shifted_sum(x, kernel[:, :, 0], padding, stride)


def _plain_shifted_sum(
  x: jax.Array, kernel: jax.Array, padding: _Padding, stride: int
) -> jax.Array:
  """Computes a depthwise convolution as the sum of shifted inputs times a row of the kernel.

  Args:
    x: [B, H, W, C]
    kernel: [h, w, C]
    padding: zeros added above and below, left and right.
    stride: along both axes.

  Returns:
    [B, H', W', C]
  """
  size = _output_size(x, kernel, padding, stride)
  return isolate.call(
    functools.partial(_sum_of_taps, size=size, stride=stride), _padded(x, padding), kernel
  )


@functools.partial(jax.jit, static_argnames=("size", "stride"))
def _sum_of_taps(x: jax.Array, kernel: jax.Array, size: tuple[int, int], stride: int) -> jax.Array:
  """Returns the sum over the window of shifted inputs times a row of the kernel.

  It is traced once for all layers of the same shapes.

  Args:
    x: padded input. [B, H, W, C]
    kernel: [h, w, C]
    size: height H' and width W' of the output.
    stride: along both axes.
  """
  taps = _taps(x, kernel.shape[:2], size, (stride, stride))
  parts = [part * kernel[i][None, None, None] for i, part in taps.items()]
  return functools.reduce(jnp.add, parts)


_shifted_sum = jax.custom_vjp(_plain_shifted_sum, nondiff_argnums=(2, 3))


def _shifted_sum_bwd(
  padding: _Padding, stride: int, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Computes the gradient of `_shifted_sum`.

  XLA:CPU sums over images and pixels with one addition at a time. So eight images are added first,
  as vectors, and a matrix product adds what is left.
  """
  x, kernel = saved
  dx = _input_gradient(kernel, dy, (x.shape[1], x.shape[2]), padding, stride)
  b, h_out, w_out, channels = dy.shape
  group = math.gcd(b, 8)

  rows, columns = ((n - 1) * stride + 1 for n in (h_out, w_out))

  def product(x, dy, position):
    """Returns the gradient [C] at one position (i, j) of the window."""
    part = lax.dynamic_slice(x, (0, *position, 0), (b, rows, columns, channels))
    part = part[:, ::stride, ::stride]
    added = functools.reduce(jnp.add, [part[i::group] * dy[i::group] for i in range(group)])
    added = added.reshape(-1, w_out * channels)
    row = jnp.ones((1, len(added)), added.dtype) @ added
    return row.reshape(w_out, channels).sum(0)

  def products(x, dy):
    # a loop: written out, these products would be most of what XLA has to compile
    positions = jnp.stack(jnp.meshgrid(*map(jnp.arange, kernel.shape[:2]), indexing="ij"), -1)
    return lax.map(lambda p: product(x, dy, (p[0], p[1])), positions.reshape(-1, 2))

  return dx, isolate.call(products, _padded(x, padding), dy).reshape(kernel.shape)


def _input_gradient(
  kernel: jax.Array, dy: jax.Array, size: tuple[int, int], padding: _Padding, stride: int
) -> jax.Array:
  """Returns the gradient of `_shifted_sum` with respect to its input, again a sum of shifts.

  With zeros between its rows and columns if stride > 1, the gradient of the output is convolved
  with the flipped kernel.

  Args:
    kernel: [h, w, C]
    dy: gradient of the output. [B, H', W', C]
    size: height and width of the input.
    padding: of the convolution.
    stride: of the convolution.
  """
  pads = []
  for axis in (0, 1):
    begin, num_out = padding[axis][0], (dy.shape[1 + axis] - 1) * stride + 1
    pads.append((kernel.shape[axis] - 1 - begin, size[axis] + begin - num_out, stride - 1))
  spread = isolate.call(
    lambda dy: lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), *pads, (0, 0, 0))), dy
  )
  total = functools.partial(_sum_of_taps, size=size, stride=1)
  return isolate.call(total, spread, kernel[::-1, ::-1])


def _padded(x: jax.Array, padding: _Padding) -> jax.Array:
  """Returns x with zeros around height and width, computed once for all shifts."""
  return isolate.call(lambda x: jnp.pad(x, ((0, 0), *padding, (0, 0))), x)


def _taps(
  x: jax.Array, window: Sequence[int], size: Sequence[int], strides: Sequence[int]
) -> dict[tuple[int, int], jax.Array]:
  """Returns, for each position in the window, the inputs that are multiplied there.

  Args:
    x: padded input. [B, H, W, C]
    window: height and width of the kernel.
    size: height H' and width W' of the output.
    strides: along height and width.

  Returns:
    {position: [B, H', W', C]}
  """
  rows, columns = ((n - 1) * s + 1 for n, s in zip(size, strides, strict=True))
  return {
    (i, j): x[:, i : i + rows : strides[0], j : j + columns : strides[1]]
    for i in range(window[0])
    for j in range(window[1])
  }


# --- convolutions as matrix products (NHWC, HWIO) ---------------------------------------
# The columns are unfolded, a matrix product follows, and the rows are folded. The gradient goes the
# same way back: it unfolds the rows, multiplies, and folds the columns. With few input channels the
# whole window is unfolded instead, and nothing is folded. With stride 2, too; there the gradient
# folds the windows.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _unfold(x: jax.Array, axis: int, starts: tuple[int, ...], sizes: tuple[int, int]) -> jax.Array:
  """Concatenates shifted slices of x along the channels; beyond the edges there are zeros.

  Part i is part_i[k] = x[k + starts[i]] along `axis`.

  Args:
    x: [..., n, ..., C]
    axis: the axis of size n.
    starts: the shift of each part.
    sizes: n, and the size m of a part along `axis`.

  Returns:
    [..., m, ..., len(starts) * C]
  """
  n, m = sizes
  below, above = max(0, -min(starts)), max(0, max(starts) + m - n)

  def parts(x):
    x = jnp.pad(x, [(below, above) if a == axis else (0, 0) for a in range(x.ndim)])
    slices = [lax.slice_in_dim(x, below + s, below + s + m, axis=axis) for s in starts]
    return jnp.concatenate(slices, axis=-1)

  return isolate.call(parts, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _fold(z: jax.Array, axis: int, starts: tuple[int, ...], sizes: tuple[int, int]) -> jax.Array:
  """Computes the transpose of `_unfold`: y[k] = sum over i of part_i[k - starts[i]].

  Every part is cut and padded by itself, so that z is read only once.

  Args:
    z: [..., m, ..., len(starts) * C]
    axis: see `_unfold`.
    starts: see `_unfold`.
    sizes: see `_unfold`.

  Returns:
    [..., n, ..., C]
  """
  n, m = sizes

  def total(z):
    y = 0
    for part, s in zip(jnp.split(z, len(starts), axis=-1), starts, strict=True):
      part = lax.slice_in_dim(part, max(-s, 0), min(m, n - s), axis=axis)
      missing = (max(s, 0), max(n - s - m, 0))
      y += jnp.pad(part, [missing if a == axis else (0, 0) for a in range(z.ndim)])
    return cast("jax.Array", y)  # not the int 0: there are parts

  return isolate.call(total, z)


@jax.custom_vjp
def times(x: jax.Array, matrix: jax.Array) -> jax.Array:
  """Computes x @ matrix as one matrix product: [..., K] @ [K, N] -> [..., N]."""
  return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], matrix.shape[-1])


def _times_bwd(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes the gradient of `times`.

  If x has very many rows, the gradient of the matrix is computed as two products, because then
  XLA:CPU divides the work better between its threads.
  """
  x, matrix = saved
  num_rows, widest = math.prod(x.shape[:-1]), max(matrix.shape)
  n = 2 if num_rows % 2 == 0 and num_rows > 20 * widest else 1
  parts = (y.reshape(n, -1, y.shape[-1]) for y in (x, dy))
  return times(dy, matrix.T), jnp.einsum("nmi,nmj->nij", *parts).sum(0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _unfold_windows(
  x: jax.Array, window: tuple[int, int], padding: _Padding, size: tuple[int, int]
) -> jax.Array:
  """Computes the patches for stride 2: [B, *size, C] -> [B, H', W', h * w * C]."""
  return isolate.call(lambda x: patches(x, window, (2, 2), padding), x)


def _fold_windows(
  z: jax.Array, window: tuple[int, int], padding: _Padding, size: tuple[int, int]
) -> jax.Array:
  """Computes the transpose of `_unfold_windows`.

  A row of the input is seen by every other row of the windows, so rows and columns are summed for
  even and odd positions separately.
  """
  b, h_out, w_out, width = z.shape
  channels = width // math.prod(window)
  blocks = [n + (k - 1) // 2 for n, k in zip((h_out, w_out), window, strict=True)]

  def total(z):
    z = z.reshape(b, h_out, w_out, *window, channels)

    def pad_to(i, j):
      pads = (
        (k // 2, n - m - k // 2) for k, n, m in zip((i, j), blocks, (h_out, w_out), strict=True)
      )
      return jnp.pad(z[:, :, :, i, j], ((0, 0), *pads, (0, 0)))

    def phase(row, column):
      parts = [pad_to(i, j) for i in range(row, window[0], 2) for j in range(column, window[1], 2)]
      return (
        functools.reduce(jnp.add, parts) if parts else jnp.zeros((b, *blocks, channels), z.dtype)
      )

    return jnp.stack([jnp.stack([phase(r, c) for c in (0, 1)], 3) for r in (0, 1)], 2)

  x = isolate.call(total, z).reshape(b, 2 * blocks[0], 2 * blocks[1], channels)
  for axis, (n, (low, _)) in enumerate(zip(size, padding, strict=True), 1):
    x = lax.slice_in_dim(x, low, min(low + n, x.shape[axis]), axis=axis)
    missing = n - x.shape[axis]
    x = jnp.pad(x, [(0, missing) if a == axis else (0, 0) for a in range(4)])
  return x


_shifted_sum.defvjp(
  lambda x, kernel, *static: (_shifted_sum(x, kernel, *static), (x, kernel)), _shifted_sum_bwd
)
_unfold_windows.defvjp(
  lambda x, *static: (_unfold_windows(x, *static), None),
  lambda *args: (_fold_windows(args[-1], *args[:3]),),
)
_unfold.defvjp(
  lambda x, *static: (_unfold(x, *static), None), lambda *args: (_fold(args[-1], *args[:3]),)
)
_fold.defvjp(
  lambda z, *static: (_fold(z, *static), None), lambda *args: (_unfold(args[-1], *args[:3]),)
)
times.defvjp(lambda x, matrix: (times(x, matrix), (x, matrix)), _times_bwd)


def _product_conv(x: jax.Array, kernel: jax.Array, padding: _Padding) -> jax.Array:
  """Convolves with stride 1 as one matrix product between an unfold and a fold (or two unfolds)."""
  ((top, _), (left, _)), (kh, kw, num_in, num_out) = padding, kernel.shape
  (h, w), (h_out, w_out) = x.shape[1:3], _output_size(x, kernel, padding)
  columns = tuple(j - left for j in range(kw))
  # Both sides count the numbers that the form writes for each pixel.
  if kh * kw * num_in < kw * num_in + kh * num_out:
    rows = tuple(i - top for i in range(kh))
    x = _unfold(x, 1, rows, (h, h_out))
    x = _unfold(x, 2, columns, (w, w_out))
    return times(x, kernel.transpose(1, 0, 2, 3).reshape(-1, num_out))
  x = _unfold(x, 2, columns, (w, w_out))
  z = times(x, kernel.transpose(1, 2, 0, 3).reshape(kw * num_in, kh * num_out))
  return _fold(z, 1, tuple(top - i for i in range(kh)), (h_out, h))


def _output_size(
  x: jax.Array, kernel: jax.Array, padding: _Padding, stride: int = 1
) -> tuple[int, ...]:
  """Returns height and width of a convolution's output."""
  return tuple(
    (n + sum(pads) - k) // stride + 1
    for n, pads, k in zip(x.shape[1:3], padding, kernel.shape[:2], strict=True)
  )


def _blocked_conv(x: jax.Array, kernel: jax.Array, padding: _Padding, stride: int) -> jax.Array:
  """Convolves blocks of 2 x 2 pixels: four times the channels, a quarter of the positions.

  A block contains the starting positions of four outputs with stride 1, of one with stride 2. For
  each of them the kernel is embedded in a larger one, shifted by the position within the block.
  The gradient of the kernel flows back through this embedding.
  """
  kh, kw, num_in, num_out = kernel.shape
  b, _, _, _ = x.shape
  (top, _), (left, _) = padding
  h_out, w_out = _output_size(x, kernel, padding, stride)
  m = 2 // stride  # outputs per block and axis
  bh, bw = -(-h_out // m), -(-w_out // m)  # blocks of the output
  qh, qw = (kh + m) // 2, (kw + m) // 2  # blocks that the embedded kernel covers
  rows, cols = 2 * (bh + qh - 1), 2 * (bw + qw - 1)
  x = x[:, : rows - top, : cols - left]
  below, beside = rows - top - x.shape[1], cols - left - x.shape[2]
  x = jnp.pad(x, ((0, 0), (top, below), (left, beside), (0, 0)))
  x = x.reshape(b, rows // 2, 2, cols // 2, 2, num_in).transpose(0, 1, 3, 2, 4, 5)
  x = x.reshape(b, rows // 2, cols // 2, 4 * num_in)
  embedded = jnp.stack(
    [
      jnp.pad(kernel, ((i, 2 * qh - kh - i), (j, 2 * qw - kw - j), (0, 0), (0, 0)))
      for i in range(m)
      for j in range(m)
    ],
    axis=-2,
  )  # [2*qh, 2*qw, I, m*m, J]
  embedded = embedded.reshape(qh, 2, qw, 2, num_in, m * m * num_out).transpose(0, 2, 1, 3, 4, 5)
  embedded = embedded.reshape(qh, qw, 4 * num_in, m * m * num_out)
  y = _product_conv(x, embedded, ((0, 0), (0, 0)))
  y = y.reshape(b, bh, bw, m, m, num_out).transpose(0, 1, 3, 2, 4, 5)
  return y.reshape(b, m * bh, m * bw, num_out)[:, :h_out, :w_out]
