"""The LeNet of the paper (spec b): CIFAR-100 and P-MNIST, 3 x 32 x 32.

2,995,620 parameters with 10 classes, 2,993,115 with 5.
"""

import flax.linen as nn
import jax

from halrp_jax import layers


class LeNet(nn.Module):
  """LeNet: conv5x5-BN-ReLU-pool twice, dense-BN-ReLU twice, head; biases everywhere."""

  num_classes: int
  channels: tuple[int, int] = (20, 50)
  hidden: tuple[int, int] = (800, 500)
  running: bool = True  # BatchNorm keeps running statistics and evaluates with them

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[B, H, W, C] -> logits [B, num_classes]"""
    for i, features in enumerate(self.channels, 1):
      x = nn.Conv(
        features,
        (5, 5),
        padding=2,
        kernel_init=layers.uniform_fan_in(),
        bias_init=layers.uniform_fan_in(25 * x.shape[-1]),
        conv_general_dilated=layers.conv_general_dilated,
        name=f"conv{i}",
      )(x)
      norm = layers.BatchNorm(self.running, relu=True, pool=2, name=f"bn{i}")
      x = norm(x, train)  # [B, H/2, W/2, features]
    x = x.reshape(len(x), -1)
    for i, features in enumerate(self.hidden, 1):
      x = nn.Dense(
        features,
        kernel_init=layers.uniform_fan_in(),
        bias_init=layers.uniform_fan_in(x.shape[-1]),
        name=f"fc{i}",
      )(x)
      x = layers.BatchNorm(self.running, relu=True, name=f"bn_fc{i}")(x, train)
    return nn.Dense(
      self.num_classes,
      kernel_init=layers.uniform_fan_in(),
      bias_init=layers.uniform_fan_in(x.shape[-1]),
      name="head",
    )(x)
