"""What a method is made from besides its own config: the network, the protocol, the devices."""

# pyright: reportMissingParameterType=error, reportMissingTypeArgument=error

import dataclasses
from typing import NamedTuple

import flax.linen as nn

from halrp_jax import keys, models
from halrp_jax.devices import parallel
from halrp_jax.types import Params


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
  """A network that was trained elsewhere, from which every new network starts."""

  params: Params  # of the whole network
  stats: Params  # BatchNorm statistics; {} if the network has none
  has_head: bool  # whether its head is the file's; else it is drawn anew


class Setup(NamedTuple):
  """Settings of a run that all methods use. Made once per run by `methods.setup_of`."""

  model: nn.Module
  image_shape: tuple[int, int, int]  # [H, W, C] of the network's input
  num_tasks: int
  max_classes: int  # number of classes of the widest task
  epochs: int  # per task
  batch_size: int
  evaluation_batch_size: int
  learning_rate: float
  train_fraction: float  # fraction of each task's training images that is used
  batch_norm: str  # `method.batch_norm`
  loop: str  # `config.loop`
  protocol: keys.Protocol
  checkpoint: keys.Checkpoint
  layout: parallel.Layout
  base: Start | None = None  # None: new networks start from random parameters
  base_training: str = "all"  # `config.base_training`

  @property
  def measuring(self) -> nn.Module:
    """Returns the network for gradients, Fisher information and bases (`models.in_training`)."""
    return models.in_training(self.batch_norm, self.model)
