"""The networks by name, as plain Flax Linen modules that know nothing of methods.

To add one, write a file beside this one and add a line to `NETWORKS`. A network has the field
`num_classes`, the width of its head. With BatchNorm it has a field `running` too: whether it
evaluates with stored statistics.
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
  """Returns the network called `name`.

  Args:
    name: a key of `NETWORKS`.
    num_classes: width of the head.
    batch_norm: statistics that BatchNorm evaluates with. "population" and "running": stored ones;
      "batch": those of the batch; "own": as in the paper's network of that name. It has no effect
      on a network without BatchNorm.
    precision: "float32", or "bfloat16" for the products and outputs of all layers except the head;
      parameters, statistics and logits stay float32.
    axis_name: axis of the devices that share a training batch under jax.pmap (`Layout.axis_name`).
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
  """Returns whether a prediction depends on the other images of its batch."""
  return not getattr(model, "running", True)


def statistics(batch_norm: str, model: nn.Module) -> str:
  """Describes the statistics that BatchNorm evaluates with, for the record of a run.

  Args:
    batch_norm: `method.batch_norm`.
    model: the network.
  """
  if not hasattr(model, "running"):
    return "none"
  if evaluates_with_batch(model):
    return "test-batch statistics"
  if batch_norm == "population":
    return "those of each task's training images, taken when the task was learned"
  return "running statistics"


def with_stored_statistics(model: nn.Module) -> nn.Module:
  """Returns the network with BatchNorm that evaluates with stored statistics."""
  return model.clone(running=True) if evaluates_with_batch(model) else model


def with_batch_statistics(model: nn.Module) -> nn.Module:
  """Returns the network with BatchNorm that evaluates with the statistics of the batch."""
  return model.clone(running=False) if hasattr(model, "running") else model


def in_training(batch_norm: str, model: nn.Module) -> nn.Module:
  """Returns the network that a method uses on the images of the task that it is learning.

  Gradients, Fisher information and bases are computed between training steps, when the stored
  statistics do not fit the weights yet. With `method.batch_norm=population` they are computed with
  the statistics of the batch, as training steps are. So training is the same as with "batch",
  except where it depends on the validation accuracy or loss (`protocol.keep`,
  `protocol.schedule=plateau`).

  Args:
    batch_norm: `method.batch_norm`.
    model: the network.
  """
  return with_batch_statistics(model) if batch_norm == "population" else model
