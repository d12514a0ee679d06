"""The fusion barrier: what it is for is read from compiled programs, not from a clock."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from halrp_jax.nn import isolate

SHAPE = (32, 16, 16, 20)  # LeNet's second convolution: 5 slices of columns, 50 outputs for 5 rows
KERNEL = (100, 250)


def produce(x):
  """Normalises and applies ReLU: the operation `maximum` is counted below."""
  return jnp.maximum(1.7 * x + 0.3, 0)


def unfold(x):
  width = x.shape[2]
  x = jnp.pad(x, ((0, 0), (0, 0), (2, 2), (0, 0)))
  return jnp.concatenate([x[:, :, i : i + width] for i in range(5)], -1)


def without(x, kernel):
  return unfold(produce(x)) @ kernel


def with_barrier(x, kernel):
  return isolate.call(unfold, produce(x)) @ kernel


def with_optimization_barrier(x, kernel):
  return lax.optimization_barrier(unfold(lax.optimization_barrier(produce(x)))) @ kernel


def size(shape: str) -> int:
  """Returns the number of values of a shape as it stands in HLO, such as f32[32,16]{1,0}."""
  return math.prod(int(n) for n in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if n)


def times_computed(fn) -> int:
  """Returns how many fusions of a compiled function compute the whole of `produce(x)`."""
  with jax.default_device(jax.devices("cpu")[0]):
    text = jax.jit(fn).lower(jnp.ones(SHAPE), jnp.ones(KERNEL)).compile().as_text()
  computations = re.findall(r"^%\S+ \(.*?^\}$", text, re.MULTILINE | re.DOTALL)
  # one value of it is computed once more, for the condition of the barrier
  whole = [c for c in computations if size(re.search(r"ROOT \S+ = (\S+) ", c)[1]) > 1]
  assert len(whole) > 1
  return sum(" maximum(" in c for c in whole)


def test_xla_still_computes_a_producer_in_every_consumer():
  assert times_computed(without) > 1, (
    "XLA no longer computes a producer again in each of its consumers: delete nn/isolate.py, "
    "if benchmarks/fusion_barrier.py agrees"
  )


def test_behind_the_barrier_a_producer_is_computed_once():
  assert times_computed(with_barrier) == 1, (
    "XLA no longer keeps a conditional out of fusions: nn/isolate.py has no effect, delete it"
  )


@pytest.mark.skipif(
  jax.__version_info__ >= (0, 11),
  reason="jax 0.12.0.1 obeys lax.optimization_barrier on the CPU, jax 0.10.2 does not",
)
def test_the_barrier_of_xla_is_without_effect_in_the_oldest_jax():
  assert times_computed(with_optimization_barrier) > 1, (
    "XLA obeys lax.optimization_barrier on the CPU with the oldest jax of setup.cfg too: delete "
    "nn/isolate.py and use it, if benchmarks/fusion_barrier.py agrees"
  )


def test_values_and_gradients_are_those_without_the_barrier():
  x, dy = jax.random.normal(jax.random.key(0), (2, 4, 6, 6, 3))

  def loss(fn):
    return lambda x: jnp.sum(dy * fn(x))

  np.testing.assert_array_equal(isolate.call(jnp.sin, x), jnp.sin(x))
  np.testing.assert_array_equal(isolate.wrap(jnp.sin)(x), jnp.sin(x))
  got, want = jax.grad(loss(isolate.wrap(jnp.sin)))(x), jax.grad(loss(jnp.sin))(x)
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("where", [0, 5])
def test_a_nan_is_not_lost(where):
  x = jnp.ones(8).at[where].set(jnp.nan)
  assert jnp.isnan(isolate.call(jnp.sum, x))
