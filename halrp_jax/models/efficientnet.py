"""EfficientNet-Lite0: inverted residual blocks without squeeze-and-excitation, and ReLU6.

The network of https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. It
has 3,371,008 parameters without the head, whatever the size of its images. Convolutions are padded
as by TensorFlow, and BatchNorm's epsilon is 1e-3; timm's `efficientnet_lite0`, which was trained
anew, pads evenly with 1e-5 (`padding="even"`, `epsilon=1e-5`).

References: https://arxiv.org/abs/1905.11946 (EfficientNet), the repository above (Lite).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from halrp_jax.nn import layers
from halrp_jax.nn.norm import BatchNorm

STAGES = (
  (16, 1, 1, 3, 1),
  (24, 2, 2, 3, 6),
  (40, 2, 2, 5, 6),
  (80, 3, 2, 3, 6),
  (112, 3, 1, 5, 6),
  (192, 4, 2, 5, 6),
  (320, 1, 1, 3, 6),
)


class InvertedResidual(nn.Module):
  """1 x 1 expansion, depthwise convolution, 1 x 1 projection, each with BatchNorm."""

  features: int  # channels of the output
  stride: int  # of the depthwise convolution
  width: int  # of its kernel
  expansion: int  # factor of the channels between; 1: there is no expansion
  padding: str  # "tensorflow" or "even"
  norm: functools.partial  # BatchNorm
  dtype: jax.typing.DTypeLike | None = None  # of products and activations; None for float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns [B, H / stride, W / stride, features] for `x` [B, H, W, C]."""
    conv = functools.partial(layers.conv, dtype=self.dtype)
    y, inner = x, self.expansion * x.shape[-1]
    if self.expansion > 1:
      y = conv(inner, 1, 0, name="expand")(y)
      y = nn.relu6(self.norm(name="bn_expand")(y, train))
    padding = pads(self.padding, y.shape[1:3], self.width, self.stride)
    y = conv(inner, self.width, padding, self.stride, groups=inner, name="depthwise")(y)
    y = nn.relu6(self.norm(name="bn_depthwise")(y, train))
    y = self.norm(name="bn_project")(conv(self.features, 1, 0, name="project")(y), train)
    return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
  """EfficientNet-Lite0: stem, 16 inverted residual blocks, 1 x 1 convolution, mean, head."""

  num_classes: int
  padding: str = "tensorflow"  # of convolutions: "tensorflow", or "even" (half the kernel's width)
  epsilon: float = 1e-3  # of BatchNorm
  dropout: float = 0.0  # in front of the head
  # per stage: output channels, blocks, stride of the first block, kernel, expansion
  stages: tuple[tuple[int, int, int, int, int], ...] = STAGES
  running: bool = True  # whether BatchNorm evaluates with stored statistics
  frozen: bool = False  # whether it trains with them too, and leaves them as they are
  axis_name: str | None = None  # of the devices that share a training batch under jax.pmap
  dtype: jax.typing.DTypeLike | None = None  # of products and activations; None for float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits [B, num_classes] of images [B, H, W, C]."""
    norm = functools.partial(
      *(BatchNorm, self.running),
      axis_name=self.axis_name,
      epsilon=self.epsilon,
      frozen=self.frozen,
    )
    conv = functools.partial(layers.conv, dtype=self.dtype)
    x = conv(32, 3, pads(self.padding, x.shape[1:3], 3, 2), 2, name="conv_stem")(x)
    x = nn.relu6(norm(name="bn_stem")(x, train))
    for stage, (features, num_blocks, stride, width, expansion) in enumerate(self.stages):
      for i in range(num_blocks):
        settings = (features, 1 if i else stride, width, expansion, self.padding, norm, self.dtype)
        x = InvertedResidual(*settings, name=f"stage{stage}_{i}")(x, train)
    x = nn.relu6(norm(name="bn_head")(conv(1280, 1, 0, name="conv_head")(x), train))
    x = x.astype(jnp.float32).mean((1, 2))
    x = layers.Dropout(self.dropout, name="dropout")(x, train)
    return layers.dense(self.num_classes, x.shape[-1], name="head")(x)


def pads(
  padding: str, size: tuple[int, ...], width: int, stride: int
) -> tuple[tuple[int, int], ...]:
  """Returns the zeros before and after each axis of a convolution's input.

  Args:
    padding: "even": half the kernel's width on both sides, as in PyTorch; "tensorflow": so many
      that the output has ceil(size / stride) pixels, the odd one after.
    size: height and width of the input.
    width: width and height of the kernel.
    stride: along both axes.
  """
  if padding == "even":
    return ((width // 2, width // 2),) * len(size)
  totals = [max((-(-n // stride) - 1) * stride + width - n, 0) for n in size]
  return tuple((total // 2, total - total // 2) for total in totals)
