"""The LeNet of the paper, its wide form, and the LeNets of the code of GPM and WSN."""

import functools

import flax.linen as nn
import jax

from halrp_jax.nn import layers
from halrp_jax.nn.norm import BatchNorm, local_response_norm
from halrp_jax.nn.pool import overlapping_max_pool


class LeNet(nn.Module):
  """LeNet: twice conv5x5-BN-ReLU-pool, twice dense-BN-ReLU, head; all layers have biases.

  For CIFAR-100 and P-MNIST. With images of 32 x 32 x 3 it has 2,995,620 parameters for 10 classes
  and 2,993,115 for 5.
  """

  num_classes: int
  channels: tuple[int, int] = (20, 50)
  hidden: tuple[int, int] = (800, 500)
  running: bool = True  # whether BatchNorm evaluates with stored statistics
  axis_name: str | None = None  # of the devices that share a training batch under jax.pmap
  dtype: jax.typing.DTypeLike | None = None  # of products and activations; None for float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits [B, num_classes] of images [B, H, W, C]."""
    norm = functools.partial(BatchNorm, self.running, relu=True, axis_name=self.axis_name)
    for i, features in enumerate(self.channels, 1):
      num_in = 5 * 5 * x.shape[-1]
      x = layers.conv(features, 5, padding=2, dtype=self.dtype, name=f"conv{i}")(x)
      x = norm(pool=2, num_in=num_in, name=f"bn{i}")(x, train)  # [B, H/2, W/2, features]
    x = x.reshape(x.shape[0], -1)
    for i, features in enumerate(self.hidden, 1):
      num_in = x.shape[-1]
      x = layers.dense(features, num_in, bias=False, dtype=self.dtype, name=f"fc{i}")(x)
      x = norm(num_in=num_in, name=f"bn_fc{i}")(x, train)
    return layers.dense(self.num_classes, x.shape[-1], name="head")(x)


def wide_lenet(num_classes: int) -> LeNet:
  """Returns the LeNet with 64 and 128 channels and 2500 and 1500 hidden units.

  For Omniglot-Rotation. With images of 32 x 32 x 1 and 12 classes it has 24,466,988 parameters.
  """
  return LeNet(num_classes, channels=(64, 128), hidden=(2500, 1500))


class SahaLeNet(nn.Module):
  """LeNet of GPM's code (Saha et al., 2021), without BatchNorm and biases.

  Twice conv5x5-ReLU-LRN-pool, twice dense-ReLU, head. LRN is local response normalisation. With
  images of 32 x 32 x 3 and 10 classes it has 2,991,500 parameters.
  """

  num_classes: int
  channels: tuple[int, int] = (20, 50)
  hidden: tuple[int, int] = (800, 500)
  lrn: bool = True  # whether it has local response normalisation
  dtype: jax.typing.DTypeLike | None = None  # of products and activations; None for float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits [B, num_classes] of images [B, H, W, C]."""
    for i, features in enumerate(self.channels, 1):
      x = nn.relu(layers.conv(features, 5, padding=2, dtype=self.dtype, name=f"conv{i}")(x))
      x = local_response_norm(x) if self.lrn else x
      x = overlapping_max_pool(x)  # [B, H/2, W/2, features]
    x = x.reshape(x.shape[0], -1)
    for i, features in enumerate(self.hidden, 1):
      x = nn.relu(
        layers.dense(features, x.shape[-1], bias=False, dtype=self.dtype, name=f"fc{i}")(x)
      )
    return layers.dense(self.num_classes, x.shape[-1], bias=False, name="head")(x)


def saha_lenet_without_lrn(num_classes: int) -> SahaLeNet:
  """Returns the LeNet of WSN's code: that of GPM without local response normalisation."""
  return SahaLeNet(num_classes, lrn=False)
