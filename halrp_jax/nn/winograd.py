"""3 x 3 convolutions as a quarter of the multiplications, for the CPU.

Winograd's minimal filtering in the form F(4 x 4, 3 x 3) of Lavin and Gray (2016), "Fast algorithms
for convolutional neural networks", Sec. 4.3: Y = A^T [(G K G^T) * (B^T X B)] A for tiles Y of 4 x 4
outputs and X of 6 x 6 inputs that overlap by two. Summed over the input channels, the products at
each of the 36 positions of a tile are one matrix product. The gradient is the transpose of these
steps and uses the transformed output gradient for both of its matrix products.

The result differs from that of `lax.conv_general_dilated` by rounding of up to about 1e-5 of the
largest value, ten to twenty times that of a direct sum (tests/nn/test_winograd.py). A value that is
not finite spoils all outputs of its tiles.
"""

import math
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from halrp_jax.nn import isolate

SAVING = 4  # multiplications of a direct sum over those of this form: 16 * 9 / 36
TILE = 4  # rows and columns of outputs that one tile computes
_MANY_CHANNELS = 16  # with fewer input or output channels this form is not faster
_POINTS = TILE + 2  # rows and columns of inputs that it reads
_INPUT = np.array(  # B^T
  [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
  ]
)
_KERNEL = np.array(  # G
  [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
  ]
)
_OUTPUT = np.array(  # A^T
  [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
)


def suits(kernel_shape: tuple[int, ...], size: Sequence[int], dtype: DTypeLike) -> bool:
  """Returns whether a convolution with stride 1 is faster in this form.

  Args:
    kernel_shape: [h, w, C, J]
    size: height and width of the output. Tiles that are mostly outside of it are wasted.
    dtype: of the products. The transformations need more than the 8 bits of precision of bfloat16.
  """
  return (
    tuple(kernel_shape[:-2]) == (3, 3)
    and min(kernel_shape[-2:]) >= _MANY_CHANNELS
    and dtype in (jnp.float32, jnp.float64)
    and math.prod(-(-n // TILE) * TILE for n in size) <= 2 * math.prod(size)
  )


@jax.custom_vjp
def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolves with stride 1 and without padding.

  Args:
    x: [B, H, W, C], H - 2 and W - 2 multiples of `TILE`.
    kernel: [3, 3, C, J]

  Returns:
    [B, H - 2, W - 2, J]
  """
  witness = kernel[0, 0, 0, 0]
  products = _multiply(_from_inputs(x, witness), _from_kernel(kernel, witness))
  return _to_outputs(products, witness)


def _conv_bwd(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes the gradient of `conv` with respect to both arguments."""
  x, kernel = saved
  witness = kernel[0, 0, 0, 0]
  inputs, outputs = _from_inputs(x, witness), _from_outputs(dy, witness)
  points = _POINTS**2
  a, b = (v.reshape(points, -1, v.shape[-1]) for v in (inputs, outputs))
  d_kernel = jnp.einsum("nti,ntj->nij", a, b).reshape(_POINTS, _POINTS, *kernel.shape[2:])
  d_inputs = _multiply(outputs, _from_kernel(kernel.swapaxes(2, 3), witness))
  dx = _to_inputs(d_inputs, witness)[:, : x.shape[1], : x.shape[2]]
  return dx, _to_kernel(d_kernel, witness)


conv.defvjp(lambda x, kernel: (conv(x, kernel), (x, kernel)), _conv_bwd)


def _multiply(tiles: jax.Array, kernel: jax.Array) -> jax.Array:
  """Multiplies all tiles with the kernel: [6, 6, ..., C], [6, 6, C, J] -> [6, 6, ..., J]."""
  points = math.prod(kernel.shape[:2])
  rows = tiles.reshape(points, -1, tiles.shape[-1])
  products = rows @ kernel.reshape(points, *kernel.shape[2:])
  return products.reshape(*tiles.shape[:-1], kernel.shape[-1])


# --- the transformations ----------------------------------------------------------------
# Each works on the rows of the tiles and then on their columns, with a fusion barrier between the
# two (`isolate.call`), whose witness is a value of the kernel: a NaN in one image leaves the others
# alone. "to" and "from" of the same name are transposes of each other.


def _twice(rows: Callable, columns: Callable, x: jax.Array, witness: jax.Array) -> jax.Array:
  """Returns columns(rows(x)), with fusion barriers around both."""
  return isolate.call(columns, isolate.call(rows, x, witness=witness), witness=witness)


def _combine(parts: list[jax.Array], matrix: np.ndarray, axis: int) -> jax.Array:
  """Returns the combinations sum over i of matrix[k, i] * parts[i], with k along a new axis.

  The sum is element by element: XLA:CPU computes concatenated parts many times as slowly.
  """
  shape = [1] * (parts[0].ndim + 1)
  shape[axis] = len(matrix)
  terms = (
    jnp.asarray(column, part.dtype).reshape(shape) * jnp.expand_dims(part, axis)
    for column, part in zip(matrix.T, parts, strict=True)
  )
  return cast("jax.Array", sum(terms))  # not the int 0: there are terms


def _from_inputs(x: jax.Array, witness: jax.Array) -> jax.Array:
  """Computes B^T X B of all tiles: [B, H, W, C] -> [6, 6, B, (H - 2) / 4, (W - 2) / 4, C]."""
  height, width = (n - _POINTS + 1 for n in x.shape[1:3])  # past the last tile's first row, column

  def rows(x):
    return _combine([x[:, i : i + height : TILE] for i in range(_POINTS)], _INPUT, 0)

  def columns(x):
    return _combine([x[..., j : j + width : TILE, :] for j in range(_POINTS)], _INPUT, 1)

  return _twice(rows, columns, x, witness)


def _to_inputs(tiles: jax.Array, witness: jax.Array) -> jax.Array:
  """Computes the transpose of `_from_inputs`, and two more rows and columns of zeros."""
  _, _, b, height, width, channels = tiles.shape

  def rows(tiles):
    return _combine(list(tiles), _INPUT.T, 3)  # [6, B, height, 6, width, C]

  def columns(tiles):
    return _combine(list(tiles), _INPUT.T, 4)  # [B, height, 6, width, 6, C]

  def overlap(tiles):
    """Adds the last two rows and columns of each tile to the first two of the next one."""

    def pad_to(part, down, right):
      h, w = (TILE - part.shape[axis] for axis in (2, 4))
      return jnp.pad(part, ((0, 0), (down, 1 - down), (0, h), (right, 1 - right), (0, w), (0, 0)))

    first, last = slice(0, TILE), slice(TILE, _POINTS)
    return (
      pad_to(tiles[:, :, first, :, first], 0, 0)
      + pad_to(tiles[:, :, first, :, last], 0, 1)
      + pad_to(tiles[:, :, last, :, first], 1, 0)
      + pad_to(tiles[:, :, last, :, last], 1, 1)
    )

  x = isolate.call(overlap, _twice(rows, columns, tiles, witness))
  return x.reshape(b, TILE * (height + 1), TILE * (width + 1), channels)


def _to_outputs(tiles: jax.Array, witness: jax.Array) -> jax.Array:
  """Computes A^T M A of all tiles: [6, 6, B, h, w, J] -> [B, 4 * h, 4 * w, J]."""
  _, _, b, height, width, channels = tiles.shape

  def rows(tiles):
    return _combine(list(tiles), _OUTPUT, 3)  # [6, B, h, 4, w, J]

  def columns(tiles):
    return _combine(list(tiles), _OUTPUT, 4)  # [B, h, 4, w, 4, J]

  y = _twice(rows, columns, tiles, witness)
  return y.reshape(b, TILE * height, TILE * width, channels)


def _from_outputs(dy: jax.Array, witness: jax.Array) -> jax.Array:
  """Computes the transpose of `_to_outputs`."""
  b, height, width, channels = dy.shape

  def rows(dy):
    dy = dy.reshape(b, height // TILE, TILE, width, channels)
    return _combine([dy[:, :, i] for i in range(TILE)], _OUTPUT.T, 0)

  def columns(dy):
    dy = dy.reshape(*dy.shape[:3], width // TILE, TILE, channels)
    return _combine([dy[..., j, :] for j in range(TILE)], _OUTPUT.T, 1)

  return _twice(rows, columns, dy, witness)


def _from_kernel(kernel: jax.Array, witness: jax.Array) -> jax.Array:
  """Computes G K G^T: [3, 3, C, J] -> [6, 6, C, J]."""

  def rows(kernel):
    return _combine(list(kernel), _KERNEL, 0)

  def columns(kernel):
    return _combine([kernel[:, j] for j in range(3)], _KERNEL, 1)

  return _twice(rows, columns, kernel, witness)


def _to_kernel(points: jax.Array, witness: jax.Array) -> jax.Array:
  """Computes the transpose of `_from_kernel`."""

  def rows(points):
    return _combine(list(points), _KERNEL.T, 0)

  def columns(points):
    return _combine([points[:, j] for j in range(_POINTS)], _KERNEL.T, 1)

  return _twice(rows, columns, points, witness)
