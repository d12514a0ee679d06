"""Initialisation of parameters."""

import math

import jax
from flax.typing import Initializer


def uniform_fan_in(fan_in: int | None = None) -> Initializer:
  """Builds PyTorch's default initialiser, which the paper's networks use.

  It draws from the uniform distribution on [-1/sqrt(fan_in), 1/sqrt(fan_in)].

  Args:
    fan_in: number of inputs of the layer. None: the product of all axes of the shape but the last,
      as for a kernel.
  """

  def init(key, shape, dtype=float):
    bound = 1 / math.sqrt(fan_in if fan_in is not None else math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init
