"""ResNet-50 as in torchvision and timm: bottleneck blocks whose 3 x 3 convolution has the stride.

It has 23,508,032 parameters without the head. The variant with the stride in the 3 x 3 convolution
is also called v1.5.

Reference: https://arxiv.org/abs/1512.03385.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from halrp_jax.nn import layers
from halrp_jax.nn.norm import BatchNorm
from halrp_jax.nn.pool import overlapping_max_pool


class Bottleneck(nn.Module):
  """1 x 1, 3 x 3 and 1 x 1 convolutions with BatchNorm, and ReLU of the sum with the shortcut."""

  features: int  # channels of the 3 x 3 convolution; a quarter of the output's
  stride: int  # of the 3 x 3 convolution and the shortcut
  is_first: bool  # whether the shortcut is a convolution
  norm: functools.partial  # BatchNorm
  dtype: jax.typing.DTypeLike | None = None  # of products and activations; None for float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns [B, H / stride, W / stride, 4 * features] for `x` [B, H, W, C]."""
    conv = functools.partial(layers.conv, dtype=self.dtype)
    y = conv(self.features, 1, 0, name="conv1")(x)
    y = self.norm(relu=True, name="bn1")(y, train)
    y = conv(self.features, 3, 1, self.stride, name="conv2")(y)
    y = self.norm(relu=True, name="bn2")(y, train)
    y = self.norm(name="bn3")(conv(4 * self.features, 1, 0, name="conv3")(y), train)
    if self.is_first:
      x = conv(4 * self.features, 1, 0, self.stride, name="shortcut")(x)
      x = self.norm(name="bn_shortcut")(x, train)
    return nn.relu(x + y)


class ResNet50(nn.Module):
  """ResNet-50: conv7x7-BN-ReLU, max pooling, stages of bottleneck blocks, mean, head."""

  num_classes: int
  stage_sizes: tuple[int, ...] = (3, 4, 6, 3)  # blocks per stage
  running: bool = True  # whether BatchNorm evaluates with stored statistics
  frozen: bool = False  # whether it trains with them too, and leaves them as they are
  axis_name: str | None = None  # of the devices that share a training batch under jax.pmap
  dtype: jax.typing.DTypeLike | None = None  # of products and activations; None for float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits [B, num_classes] of images [B, H, W, C]."""
    norm = functools.partial(BatchNorm, self.running, axis_name=self.axis_name, frozen=self.frozen)
    x = layers.conv(64, 7, 3, 2, dtype=self.dtype, name="conv1")(x)
    x = overlapping_max_pool(norm(relu=True, name="bn1")(x, train))
    for stage, num_blocks in enumerate(self.stage_sizes):
      for i in range(num_blocks):
        stride = 2 if stage and not i else 1
        settings = (64 * 2**stage, stride, not i, norm, self.dtype)
        x = Bottleneck(*settings, name=f"stage{stage + 1}_{i}")(x, train)
    x = x.astype(jnp.float32).mean((1, 2))
    return layers.dense(self.num_classes, x.shape[-1], name="head")(x)
