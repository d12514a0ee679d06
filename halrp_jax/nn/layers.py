"""Dense layers, convolutions and dropout as the models use them."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from halrp_jax.nn.conv import conv_general_dilated
from halrp_jax.nn.init import uniform_fan_in


def dense(
  features: int, num_in: int, *, bias: bool = True, dtype: DTypeLike | None = None, name: str
) -> nn.Dense:
  """Builds a dense layer with PyTorch's default initialisation.

  Args:
    features: number of outputs.
    num_in: number of inputs.
    bias: whether the layer has a bias.
    dtype: data type of the product and of its result. None: that of the inputs and parameters.
    name: name of the layer in the parameters.
  """
  return nn.Dense(
    features,
    bias,
    dtype,
    kernel_init=uniform_fan_in(),
    bias_init=uniform_fan_in(num_in),
    name=name,
  )


def conv(
  features: int,
  width: int,
  padding: int | Sequence[tuple[int, int]],
  stride: int = 1,
  *,
  bias: bool = False,
  groups: int = 1,
  dtype: DTypeLike | None = None,
  name: str,
) -> nn.Conv:
  """Builds a convolution with a square kernel that is fast on every platform.

  Args:
    features: number of output channels.
    width: width and height of the kernel.
    padding: rows and columns of zeros added on every side, or ((above, below), (left, right)).
    stride: stride along both axes.
    bias: whether the layer has a bias. In front of `nn.norm.BatchNorm` it is a parameter of that.
    groups: number of groups of channels that are convolved separately; as many as there are
      channels for a depthwise convolution.
    dtype: data type of the products and of the result. None: that of the inputs and parameters.
    name: name of the layer in the parameters.
  """
  return nn.Conv(
    features,
    (width, width),
    (stride, stride),
    padding,
    feature_group_count=groups,
    use_bias=bias,
    dtype=dtype,
    kernel_init=uniform_fan_in(),
    conv_general_dilated=conv_general_dilated,
    name=name,
  )


class Dropout(nn.Module):
  """Dropout: in training, sets values to 0 with probability `rate` and scales up the others.

  It draws 8 random bits for each value instead of 32, which is four times as fast where random
  numbers are slow (on the CPU they take an eighth of a training step of AlexNet). Therefore the
  rate is rounded to a multiple of 1/256. The scale uses the rounded rate, so the expectation of a
  value is exact. Dropout has no parameters.
  """

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns x [...] with dropout if `train`, else x itself. Uses the random stream "dropout"."""
    kept = 256 - round(256 * self.rate)
    if not train or kept == 256:
      return x
    words = jax.random.bits(self.make_rng("dropout"), (-(-x.size // 4),))
    octets = lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: x.size].reshape(x.shape)
    return jnp.where(octets < jnp.uint8(kept), x * (256 / kept), 0)
