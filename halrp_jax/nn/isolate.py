"""A fusion barrier for XLA:CPU.

XLA:CPU fuses a cheap producer (normalisation, ReLU, padding) into each of its consumers, so the
producer is computed again in every consumer: in a convolution, once for every slice of the unfolded
input. It never fuses across the branches of a conditional. So this module puts a function
into one branch of a `lax.cond` whose condition XLA cannot know when it compiles: whether a
number, by default the first value, is NaN. The other branch returns NaN everywhere. So a NaN there
spreads to the whole result; a NaN elsewhere passes through the function as without the barrier.

`lax.optimization_barrier` does not help with jax 0.10, the oldest version that setup.cfg admits:
XLA:CPU removes it before its fusion passes, and the compiled fusions are the same as without it.
From jax 0.12 on XLA:CPU obeys it. tests/nn/test_isolate.py reads the compiled programs and says
when no supported version needs this module any more.

The table shows the time of a training step with 128 images, with jax and jaxlib 0.10.2 on 2 cores
of an x86-64 CPU. It was measured by `python benchmarks/fusion_barrier.py --rounds=9 --repeats=4`,
which runs the three forms in turn, here with XLA's fusion emitters (`devices.environment`). Times
and ratios are medians over the rounds. A ratio is the time of a form divided by the time of this
barrier in the same round.

| ms of wall clock (s to compile)    | this barrier | optimization_barrier | none             |
|------------------------------------|--------------|----------------------|------------------|
| LeNet, STL                         | 152 (4.6)    | 180 (4.2): 1.15      | 170 (4.1): 1.13  |
| LeNet, HALRP                       | 74 (10.1)    | 88 (9.8): 1.14       | 87 (8.9): 1.11   |
| AlexNet at 32 pixels, STL          | 193 (5.8)    | 256 (4.1): 1.30      | 253 (4.0): 1.29  |
| AlexNet at 32 pixels, HALRP        | 187 (13.6)   | 243 (13.8): 1.36     | 240 (13.0): 1.35 |

Other programs ran at the same time, which affected the first row most. The CPU time of a step is
affected less and gives the same ratios.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Tree = TypeVar("Tree")  # an array or a pytree of arrays


def call(fn: Callable[..., Tree], *args: jax.Array, witness: jax.Array | None = None) -> Tree:
  """Returns fn(*args), computed once and not fused with what comes before or after.

  Args:
    fn: a function of arrays whose result is floating point.
    *args: arrays.
    witness: a number []; if it is NaN, the whole result is NaN. By default the first value of the
      first array, which must not be empty.
  """
  if witness is None:
    witness = args[0][(0,) * args[0].ndim]

  def all_nan(*args):
    shapes = jax.eval_shape(fn, *args)
    return jax.tree.map(lambda y: jnp.full(y.shape, jnp.nan, y.dtype), shapes)

  return lax.cond(jnp.isnan(witness), all_nan, fn, *args)


def wrap(fn: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
  """Builds a function that computes fn(x) with fusion barriers around its value and its gradient.

  Only x is stored for the gradient, which computes fn again.
  """

  def gradient(x, dy):
    return (call(lambda x, dy: jax.vjp(fn, x)[1](dy)[0], x, dy),)

  isolated = jax.custom_vjp(functools.partial(call, fn))
  isolated.defvjp(lambda x: (isolated(x), x), gradient)
  return isolated
