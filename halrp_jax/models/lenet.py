"""LeNets: the paper's (spec b), its wide form, and that of GPM and WSN (spec/baselines.md 6.4)."""

import functools

import flax.linen as nn
import jax

from halrp_jax.nn import layers
from halrp_jax.nn.norm import BatchNorm, local_response_norm
from halrp_jax.nn.pool import overlapping_max_pool


class LeNet(nn.Module):
  """LeNet: conv5x5-BN-ReLU-pool twice, dense-BN-ReLU twice, head; biases everywhere.

  CIFAR-100 and P-MNIST, 3 x 32 x 32: 2,995,620 parameters with 10 classes, 2,993,115 with 5.
  """

  num_classes: int
  channels: tuple[int, int] = (20, 50)
  hidden: tuple[int, int] = (800, 500)
  running: bool = True  # BatchNorm evaluates with stored statistics
  axis_name: str | None = None  # of mapped devices that share a batch in training
  dtype: jax.typing.DTypeLike | None = None  # of products and activations; None: float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[B, H, W, C] -> logits [B, num_classes]"""
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
  """Wide LeNet: LeNet with 64 and 128 channels, 2500 and 1500 hidden units (Omniglot-Rotation).

  1 x 32 x 32: 24,466,988 parameters with 12 classes.
  """
  return LeNet(num_classes, channels=(64, 128), hidden=(2500, 1500))


class SahaLeNet(nn.Module):
  """LeNet of GPM (Saha et al. 2021): local response normalisation (LRN), no BatchNorm, no biases.

  conv5x5-ReLU-LRN-pool twice, dense-ReLU twice, head; 2,991,500 parameters with 10 classes.
  """

  num_classes: int
  channels: tuple[int, int] = (20, 50)
  hidden: tuple[int, int] = (800, 500)
  lrn: bool = True
  dtype: jax.typing.DTypeLike | None = None  # of products and activations; None: float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[B, H, W, C] -> logits [B, num_classes]"""
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
  """LeNet of WSN: that of GPM without local response normalisation."""
  return SahaLeNet(num_classes, lrn=False)
