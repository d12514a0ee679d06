"""The reduced ResNet18 of the paper (spec b): half the standard width, biases everywhere.

2,807,690 parameters at 32 pixels and 10 classes, 2,838,410 at 64, 2,817,925 at 64 and 5 classes.
Average pooling is 2 x 2, not global.
"""

import functools

import flax.linen as nn
import jax

from halrp_jax.nn import layers
from halrp_jax.nn.norm import BatchNorm


class Block(nn.Module):
  """conv3x3-BN-ReLU-conv3x3-BN, plus the shortcut, ReLU."""

  features: int
  stride: int
  running: bool
  axis_name: str | None = None
  dtype: jax.typing.DTypeLike | None = None  # of products and activations; None: float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[B, H, W, C] -> [B, H/stride, W/stride, features]"""
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
  """Reduced ResNet18: conv3x3-BN-ReLU, stages of blocks, 2 x 2 average pooling, head."""

  num_classes: int
  width: int = 32
  stage_sizes: tuple[int, ...] = (2, 2, 2, 2)  # blocks
  running: bool = True
  axis_name: str | None = None  # of mapped devices that share a batch in training
  dtype: jax.typing.DTypeLike | None = None  # of products and activations; None: float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[B, H, W, C] -> logits [B, num_classes]"""
    num_in = 9 * x.shape[-1]
    x = layers.conv(self.width, 3, 1, dtype=self.dtype, name="conv1")(x)
    norm = BatchNorm(self.running, True, num_in=num_in, axis_name=self.axis_name, name="bn1")
    x = norm(x, train)
    for stage, num_blocks in enumerate(self.stage_sizes):
      for i in range(num_blocks):
        stride = 2 if stage and not i else 1
        name = f"stage{stage + 1}_{i + 1}"
        how = (self.running, self.axis_name, self.dtype)
        block = Block(self.width * 2**stage, stride, *how, name=name)
        x = block(x, train)
    x = nn.avg_pool(x, (2, 2), (2, 2))
    x = x.reshape(x.shape[0], -1)
    return layers.dense(self.num_classes, x.shape[-1], name="head")(x)
