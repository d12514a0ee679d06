"""Max pooling and sums over windows: the same numbers on every platform."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from halrp_jax.nn import isolate


def max_pool(x: jax.Array, window: int = 2) -> jax.Array:
  """Non-overlapping max pooling, odd remainders dropped. [B, H, W, C] -> [B, H//w, W//w, C]

  Maximum of slices: on the CPU the gradient of reduce_window is some twenty times slower.
  """
  h, w = (n // window * window for n in x.shape[1:3])
  cells = window_cells(x[:, :h, :w], window)
  return lax.platform_dependent(
    cells, cpu=lambda cells: _isolated_max(cells), default=lambda cells: window_max(cells)
  )


def overlapping_max_pool(x: jax.Array) -> jax.Array:
  """3 x 3 max pooling with stride 2 and padding 1. [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), C]"""

  def highest(x):
    h, w = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    return functools.reduce(
      jnp.maximum, [x[:, i : h + i : 2, j : w + j : 2] for i in range(3) for j in range(3)]
    )

  return lax.platform_dependent(x, cpu=isolate.wrap(highest), default=highest)


def window_cells(x, window):
  """[B, H, W, C] -> [B, H/w, W/w, w*w, C]: the places of a pooling window side by side."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // window, window, w // window, window, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // window, w // window, window**2, c)


def window_max(cells):
  """Maximum over axis -2, a slice at a time."""
  return functools.reduce(jnp.maximum, [cells[..., i, :] for i in range(cells.shape[-2])])


def window_max_gradient(cells, dy):
  """Returns the gradient of `window_max`; the first of equal values takes it all."""
  best, winner = cells[..., 0, :], jnp.zeros(dy.shape, jnp.int32)
  for i in range(1, cells.shape[-2]):
    wins = cells[..., i, :] > best
    best, winner = jnp.where(wins, cells[..., i, :], best), jnp.where(wins, i, winner)
  place = lax.broadcasted_iota(jnp.int32, cells.shape, cells.ndim - 2)
  return jnp.where(winner[..., None, :] == place, dy[..., None, :], 0)


@jax.custom_vjp
def _isolated_max(cells):
  return isolate.call(window_max, cells)


_isolated_max.defvjp(
  lambda cells: (_isolated_max(cells), cells),
  lambda cells, dy: (isolate.call(window_max_gradient, cells, dy),),
)


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

  return lax.platform_dependent(x, cpu=functools.partial(isolate.call, axis_by_axis), default=plain)
