"""The networks of halrp_jax.models written plainly: what a newcomer would write in Flax.

`from_ours` gives them the same parameters, so that both can be compared
(tests/models/test_models.py).
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from flax import traverse_util


class LeNet(nn.Module):
  num_classes: int
  channels: tuple = (20, 50)
  hidden: tuple = (800, 500)

  @nn.compact
  def __call__(self, x, train=False):
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
  num_classes: int

  @nn.compact
  def __call__(self, x, train=False):
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
  features: int
  stride: int

  @nn.compact
  def __call__(self, x, train):
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
  num_classes: int

  @nn.compact
  def __call__(self, x, train=False):
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
  num_classes: int

  @nn.compact
  def __call__(self, x, train=False):
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
  """The same parameters under the plain networks' names: the bias that our BatchNorm keeps
  (bn1/input_bias) belongs to the layer before it (conv1/bias)."""
  flat = {}
  for path, x in traverse_util.flatten_dict(params).items():
    if path[-1] == "input_bias":
      layer = path[-2].replace("bn_fc", "fc").replace("bn_shortcut", "shortcut")
      path = (*path[:-2], layer.replace("bn", "conv"), "bias")
    flat[path] = x
  return traverse_util.unflatten_dict(flat)
