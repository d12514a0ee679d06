"""A fusion barrier for XLA:CPU.

XLA:CPU fuses a cheap producer (normalisation, ReLU, padding) into every consumer, and computes it
again for each value that the consumer reads: once for every slice of a convolution's unfolded
input. It never fuses across the branches of a conditional. So a function is put into one branch of
a `lax.cond` whose condition XLA cannot foresee: whether the first value is NaN. The other branch
returns NaN everywhere, so a NaN spreads further than without the barrier and never gets lost.

`lax.optimization_barrier` does not help: with jaxlib 0.10.2 it is removed before the fusion passes
of XLA:CPU, and the compiled fusions are those without it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def call(fn, *args):
  """Returns fn(*args), computed once, in no fusion with what comes before or after.

  Args:
    fn: a function of arrays; its result must be floating point.
    *args: arrays, the first of them not empty. Where its first value is NaN, the whole result is.
  """

  def all_nan(*args):
    shapes = jax.eval_shape(fn, *args)
    return jax.tree.map(lambda y: jnp.full(y.shape, jnp.nan, y.dtype), shapes)

  return lax.cond(jnp.isnan(args[0][(0,) * args[0].ndim]), all_nan, fn, *args)


def wrap(fn):
  """Builds fn(x) with a fusion barrier around its value and another around its gradient.

  The gradient computes fn again from x, which is all that is stored for it.
  """

  def gradient(x, dy):
    return (call(lambda x, dy: jax.vjp(fn, x)[1](dy)[0], x, dy),)

  isolated = jax.custom_vjp(functools.partial(call, fn))
  isolated.defvjp(lambda x: (isolated(x), x), gradient)
  return isolated
