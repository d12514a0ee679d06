"""The networks of halrp_jax.models written with the layers of Flax alone, for comparisons.

`from_ours` converts parameters, so that tests/models/test_models.py can compare the outputs.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from flax import traverse_util


class LeNet(nn.Module):
  """The plain form of halrp_jax.models.lenet."""

  num_classes: int
  channels: tuple = (20, 50)
  hidden: tuple = (800, 500)

  @nn.compact
  def __call__(self, x, train=False):
    """Returns the logits of images."""
    norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
    for i, features in enumerate(self.channels, 1):
      x = nn.Conv(features, (5, 5), padding=2, name=f"conv{i}")(x)
      x = nn.relu(norm(name=f"bn{i}")(x))
      x = nn.max_pool(x, (2, 2), (2, 2))
    x = x.reshape(len(x), -1)
    for i, features in enumerate(self.hidden, 1):
      x = nn.relu(norm(name=f"bn_fc{i}")(nn.Dense(features, name=f"fc{i}")(x)))
    return nn.Dense(self.num_classes, name="head")(x)


WideLeNet = functools.partial(LeNet, channels=(64, 128), hidden=(2500, 1500))


class AlexNet(nn.Module):
  """The plain form of halrp_jax.models.alexnet."""

  num_classes: int

  @nn.compact
  def __call__(self, x, train=False):
    """Returns the logits of images."""
    norm = functools.partial(nn.BatchNorm, use_running_average=False)
    blocks = zip((64, 128, 256), (4, 3, 2), (0.2, 0.2, 0.5), strict=True)
    for i, (features, width, rate) in enumerate(blocks, 1):
      x = nn.Conv(features, (width, width), padding="VALID", name=f"conv{i}")(x)
      x = nn.Dropout(rate, deterministic=not train)(nn.relu(norm(name=f"bn{i}")(x)))
      x = nn.max_pool(x, (2, 2), (2, 2))
    x = x.reshape(len(x), -1)
    for i in (1, 2):
      x = nn.relu(norm(name=f"bn_fc{i}")(nn.Dense(2048, name=f"fc{i}")(x)))
      x = nn.Dropout(0.5, deterministic=not train)(x)
    return nn.Dense(self.num_classes, name="head")(x)


class _Block(nn.Module):
  """A residual block of ResNet18."""

  features: int
  stride: int

  @nn.compact
  def __call__(self, x, train):
    """Returns the block's output."""
    norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
    strides = (self.stride, self.stride)
    y = nn.Conv(self.features, (3, 3), strides, padding=1, name="conv1")(x)
    y = nn.relu(norm(name="bn1")(y))
    y = norm(name="bn2")(nn.Conv(self.features, (3, 3), padding=1, name="conv2")(y))
    if x.shape != y.shape:
      x = nn.Conv(self.features, (1, 1), strides, padding="VALID", name="shortcut")(x)
      x = norm(name="bn_shortcut")(x)
    return nn.relu(x + y)


class ResNet18(nn.Module):
  """The plain form of halrp_jax.models.resnet."""

  num_classes: int

  @nn.compact
  def __call__(self, x, train=False):
    """Returns the logits of images."""
    x = nn.Conv(32, (3, 3), padding=1, name="conv1")(x)
    norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn1")
    x = nn.relu(norm(x))
    for stage in range(4):
      for i in range(2):
        stride = 2 if stage and not i else 1
        x = _Block(32 * 2**stage, stride, name=f"stage{stage + 1}_{i + 1}")(x, train)
    x = nn.avg_pool(x, (2, 2), (2, 2))
    return nn.Dense(self.num_classes, name="head")(x.reshape(len(x), -1))


class MLP(nn.Module):
  """The plain form of halrp_jax.models.mlp."""

  num_classes: int

  @nn.compact
  def __call__(self, x, train=False):
    """Returns the logits of images."""
    x = x.reshape(len(x), -1)
    for i in (1, 2):
      x = nn.relu(nn.Dense(256, name=f"fc{i}")(x))
    return nn.Dense(self.num_classes, name="head")(jnp.asarray(x))


NETWORKS = {
  "lenet": LeNet,
  "wide_lenet": WideLeNet,
  "alexnet": AlexNet,
  "resnet18": ResNet18,
  "mlp": MLP,
}


def from_ours(params):
  """Returns the parameters of a network of halrp_jax.models under the names of the plain network.

  The bias in our BatchNorm (bn1/input_bias) is that of the layer before it (conv1/bias).
  """
  flat = {}
  for path, x in traverse_util.flatten_dict(params).items():
    if path[-1] == "input_bias":
      layer = path[-2].replace("bn_fc", "fc").replace("bn_shortcut", "shortcut")
      path = (*path[:-2], layer.replace("bn", "conv"), "bias")
    flat[path] = x
  return traverse_util.unflatten_dict(flat)
