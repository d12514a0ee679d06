"""Initialisation of parameters."""

import math

import jax


def uniform_fan_in(fan_in: int | None = None):
  """PyTorch's default initialisation, which the paper's networks start from.

  Uniform in +-1/sqrt(fan_in); for kernels fan_in is the product of all axes but the last.
  """

  def init(key, shape, dtype=float):
    bound = 1 / math.sqrt(fan_in if fan_in is not None else math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init
