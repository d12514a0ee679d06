"""A fusion barrier for XLA:CPU.

XLA:CPU fuses a cheap producer (normalisation, ReLU, padding) into every consumer, and computes it
again for each value that the consumer reads: once for every slice of a convolution's unfolded
input. It never fuses across the branches of a conditional. So a function is put into one branch of
a `lax.cond` whose condition XLA cannot foresee: whether the first value is NaN. The other branch
returns NaN everywhere, so a NaN spreads further than without the barrier and never gets lost.

`lax.optimization_barrier` does not help: XLA:CPU removes it before its fusion passes, and the
compiled fusions are those without it.

Measured with jax and jaxlib 0.10.2 on 2 cores of an x86-64 CPU, a training step of 128 images
(`python benchmarks/fusion_barrier.py --rounds=9 --repeats=4`: the forms take turns; medians; the
ratio is to the first form within a round):

| step, ms of wall clock (compile s) | this barrier | optimization_barrier | none             |
|------------------------------------|--------------|----------------------|------------------|
| LeNet, STL                         | 152 (4.6)    | 180 (4.2): 1.15      | 170 (4.1): 1.13  |
| LeNet, HALRP                       | 74 (10.1)    | 88 (9.8): 1.14       | 87 (8.9): 1.11   |
| AlexNet at 32 pixels, STL          | 193 (5.8)    | 256 (4.1): 1.30      | 253 (4.0): 1.29  |
| AlexNet at 32 pixels, HALRP        | 187 (13.6)   | 243 (13.8): 1.36     | 240 (13.0): 1.35 |

Other programs were running, LeNet's first row the most disturbed; the CPU time of a step, which
they disturb less, has the same ratios. tests/nn/test_isolate.py fails when XLA no longer needs it.
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
