"""Max pooling and sums over windows, equal on every platform up to rounding."""

import functools
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax

from halrp_jax.nn import isolate


def max_pool(x: jax.Array, window: int = 2) -> jax.Array:
  """Computes max pooling over windows that do not overlap.

  It is a maximum of slices: on the CPU the gradient of `lax.reduce_window` is about twenty times as
  slow.

  Args:
    x: [B, H, W, C]
    window: width and height w of a window. Rows and columns that fill no whole window are dropped.

  Returns:
    [B, H // w, W // w, C]
  """
  h, w = (n // window * window for n in x.shape[1:3])
  cells = window_cells(x[:, :h, :w], window)
  return lax.platform_dependent(
    cells, cpu=lambda cells: _isolated_max(cells), default=lambda cells: window_max(cells)
  )


def overlapping_max_pool(x: jax.Array) -> jax.Array:
  """Computes 3 x 3 max pooling with stride 2 and padding 1.

  Args:
    x: [B, H, W, C]

  Returns:
    [B, ceil(H / 2), ceil(W / 2), C]
  """

  def highest(x):
    h, w = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    return functools.reduce(
      jnp.maximum, [x[:, i : h + i : 2, j : w + j : 2] for i in range(3) for j in range(3)]
    )

  return lax.platform_dependent(x, cpu=isolate.wrap(highest), default=highest)


def window_cells(x: jax.Array, window: int) -> jax.Array:
  """Puts the pixels of each pooling window along one axis.

  Args:
    x: [B, H, W, C]
    window: width and height w of a window, which divides H and W.

  Returns:
    [B, H / w, W / w, w * w, C]
  """
  b, h, w, c = x.shape
  x = x.reshape(b, h // window, window, w // window, window, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // window, w // window, window**2, c)


def window_max(cells: jax.Array) -> jax.Array:
  """Returns the maximum over axis -2, one slice after another: [..., n, C] -> [..., C]."""
  return functools.reduce(jnp.maximum, [cells[..., i, :] for i in range(cells.shape[-2])])


def window_max_gradient(cells: jax.Array, dy: jax.Array) -> jax.Array:
  """Returns the gradient of `window_max`. Of equal maxima the first one gets the whole gradient.

  Args:
    cells: input of `window_max`. [..., n, C]
    dy: gradient of its output. [..., C]

  Returns:
    Gradient of its input. [..., n, C]
  """
  best, winner = cells[..., 0, :], jnp.zeros(dy.shape, jnp.int32)
  for i in range(1, cells.shape[-2]):
    wins = cells[..., i, :] > best
    best, winner = jnp.where(wins, cells[..., i, :], best), jnp.where(wins, i, winner)
  index = lax.broadcasted_iota(jnp.int32, cells.shape, cells.ndim - 2)
  return jnp.where(winner[..., None, :] == index, dy[..., None, :], 0)


@jax.custom_vjp
def _isolated_max(cells: jax.Array) -> jax.Array:
  """Computes `window_max` with fusion barriers around its value and around its gradient."""
  return isolate.call(window_max, cells)


_isolated_max.defvjp(
  lambda cells: (_isolated_max(cells), cells),
  lambda cells, dy: (isolate.call(window_max_gradient, cells, dy),),
)


def window_sum(
  x: jax.Array,
  window: Sequence[int],
  strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
) -> jax.Array:
  """Sums over sliding windows along any number of spatial axes.

  Args:
    x: [B, *spatial, C]
    window: width of the window along each spatial axis.
    strides: stride along each spatial axis.
    padding: "SAME", "VALID" or "SAME_LOWER", or (low, high) for each spatial axis, not negative.

  Returns:
    [B, *spatial', C]
  """
  pads_of_axes = (
    lax.padtype_to_pads(x.shape[1:-1], window, strides, padding)
    if isinstance(padding, str)
    else padding
  )

  def plain(x):
    pads = ((0, 0), *pads_of_axes, (0, 0))
    return lax.reduce_window(x, 0.0, lax.add, (1, *window, 1), (1, *strides, 1), pads)

  def axis_by_axis(x):
    for axis, (width, stride, pads) in enumerate(
      zip(window, strides, pads_of_axes, strict=True), 1
    ):
      x = jnp.pad(x, [pads if a == axis else (0, 0) for a in range(x.ndim)])
      last = x.shape[axis] - width
      parts = [lax.slice_in_dim(x, i, last + i + 1, stride, axis) for i in range(width)]
      x = cast("jax.Array", sum(parts))  # not the int 0: there are parts
    return x

  return lax.platform_dependent(x, cpu=functools.partial(isolate.call, axis_by_axis), default=plain)
