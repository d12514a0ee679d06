"""The reduced ResNet18 of the paper: half the standard width, and biases in all layers.

The layers are those of the authors' code: average pooling is 2 x 2, not global. The network has
2,807,690 parameters for images of 32 x 32 pixels and 10 classes, 2,838,410 for 64 x 64 pixels and
10 classes, and 2,817,925 for 64 x 64 pixels and 5 classes.
"""

import functools

import flax.linen as nn
import jax

from halrp_jax.nn import layers
from halrp_jax.nn.norm import BatchNorm


class Block(nn.Module):
  """Residual block: ReLU of the sum of conv3x3-BN-ReLU-conv3x3-BN and the shortcut."""

  features: int  # channels of the output
  stride: int  # of the first convolution and the shortcut
  running: bool  # whether BatchNorm evaluates with stored statistics
  axis_name: str | None = None  # of the devices that share a training batch under jax.pmap
  dtype: jax.typing.DTypeLike | None = None  # of products and activations; None for float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns [B, H/stride, W/stride, features] for `x` [B, H, W, C]."""
    num_in = x.shape[-1]
    norm = functools.partial(BatchNorm, self.running, axis_name=self.axis_name)
    conv = functools.partial(layers.conv, dtype=self.dtype)
    y = conv(self.features, 3, 1, self.stride, name="conv1")(x)
    y = norm(relu=True, num_in=9 * num_in, name="bn1")(y, train)
    y = conv(self.features, 3, 1, name="conv2")(y)
    y = norm(num_in=9 * self.features, name="bn2")(y, train)
    if x.shape != y.shape:
      x = conv(self.features, 1, 0, self.stride, name="shortcut")(x)
      x = norm(num_in=num_in, name="bn_shortcut")(x, train)
    return nn.relu(x + y)


class ResNet18(nn.Module):
  """Reduced ResNet18: conv3x3-BN-ReLU, stages of residual blocks, 2 x 2 average pooling, head."""

  num_classes: int
  width: int = 32  # channels of the first stage
  stage_sizes: tuple[int, ...] = (2, 2, 2, 2)  # blocks per stage
  running: bool = True  # whether BatchNorm evaluates with stored statistics
  axis_name: str | None = None  # of the devices that share a training batch under jax.pmap
  dtype: jax.typing.DTypeLike | None = None  # of products and activations; None for float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits [B, num_classes] of images [B, H, W, C]."""
    num_in = 9 * x.shape[-1]
    x = layers.conv(self.width, 3, 1, dtype=self.dtype, name="conv1")(x)
    norm = BatchNorm(self.running, True, num_in=num_in, axis_name=self.axis_name, name="bn1")
    x = norm(x, train)
    for stage, num_blocks in enumerate(self.stage_sizes):
      for i in range(num_blocks):
        stride = 2 if stage and not i else 1
        name = f"stage{stage + 1}_{i + 1}"
        settings = (self.running, self.axis_name, self.dtype)
        x = Block(self.width * 2**stage, stride, *settings, name=name)(x, train)
    x = nn.avg_pool(x, (2, 2), (2, 2))
    x = x.reshape(x.shape[0], -1)
    return layers.dense(self.num_classes, x.shape[-1], name="head")(x)
