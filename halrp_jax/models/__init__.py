"""The networks by name. They are plain Flax Linen modules and know nothing of methods.

To add one: a file beside this one and a line in `NETWORKS`.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from halrp_jax.models import alexnet, lenet, mlp, resnet

NETWORKS: dict[str, Callable[..., nn.Module]] = {
  "lenet": lenet.LeNet,
  "wide_lenet": lenet.wide_lenet,
  "saha_lenet": lenet.SahaLeNet,
  "saha_lenet_without_lrn": lenet.saha_lenet_without_lrn,
  "alexnet": alexnet.AlexNet,
  "resnet18": resnet.ResNet18,
  "mlp": mlp.MLP,
}


def make(
  name: str,
  num_classes: int,
  batch_norm: str = "own",
  precision: str = "float32",
  axis_name: str | None = None,
) -> nn.Module:
  """The network called `name` with `num_classes` outputs.

  Args:
    name: a key of `NETWORKS`.
    num_classes: width of the head.
    batch_norm: "population", "running": BatchNorm evaluates with the statistics that are stored;
      "batch": with those of the batch; "own": as the paper's network of that name does. No effect
      on a network without BatchNorm.
    precision: "float32", or "bfloat16": so are the products of all layers but the head, and what
      they give; parameters, statistics and logits stay float32.
    axis_name: of mapped devices that share a batch in training (`Layout.axis_name`).
  """
  network = NETWORKS[name](num_classes=num_classes)
  if hasattr(network, "axis_name"):
    network = network.clone(axis_name=axis_name)
  if precision != "float32":
    network = network.clone(dtype=jnp.dtype(precision))
  if batch_norm == "own" or not hasattr(network, "running"):
    return network
  return network.clone(running=batch_norm != "batch")


def evaluates_with_batch(model: nn.Module) -> bool:
  """Tells whether a prediction depends on the other images of its batch."""
  return not getattr(model, "running", True)


def statistics(batch_norm: str, model: nn.Module) -> str:
  """Says which statistics BatchNorm evaluates with, for the record of a run."""
  if not hasattr(model, "running"):
    return "none"
  if evaluates_with_batch(model):
    return "test-batch statistics"
  if batch_norm == "population":
    return "those of each task's training images, taken when the task was learned"
  return "running statistics"


def with_stored_statistics(model: nn.Module) -> nn.Module:
  """Returns the network that evaluates BatchNorm with the statistics that are stored."""
  return model.clone(running=True) if evaluates_with_batch(model) else model


def with_batch_statistics(model: nn.Module) -> nn.Module:
  """Returns the network that evaluates BatchNorm with the statistics of the batch."""
  return model.clone(running=False) if hasattr(model, "running") else model


def in_training(batch_norm: str, model: nn.Module) -> nn.Module:
  """Returns the network as a method uses it on the images of the task that it is learning.

  Gradients, Fisher information and bases are taken between training steps, when the stored
  statistics do not belong to the weights yet. With `method.batch_norm=population` they are taken
  with the statistics of the batch, as training steps are. Training is then that of "batch", but for
  what validation decides inside it (`keep`, `schedule=plateau`).
  """
  return with_batch_statistics(model) if batch_norm == "population" else model
