"""The networks by name, as plain Flax Linen modules that know nothing of methods.

To add one, write a file beside this one and add a line to `NETWORKS`. A network has the field
`num_classes`, the width of its head. With BatchNorm it has a field `running` too: whether it
evaluates with stored statistics. Its other fields that are single values are options, which
the config key `network` can set (`parse`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from halrp_jax import keys
from halrp_jax.models import alexnet, efficientnet, lenet, mlp, resnet, resnet50, vit
from halrp_jax.types import UserError

NETWORKS: dict[str, Callable[..., nn.Module]] = {
  "lenet": lenet.LeNet,
  "wide_lenet": lenet.wide_lenet,
  "saha_lenet": lenet.SahaLeNet,
  "saha_lenet_without_lrn": lenet.saha_lenet_without_lrn,
  "alexnet": alexnet.AlexNet,
  "resnet18": resnet.ResNet18,
  "mlp": mlp.MLP,
  "efficientnet_lite0": efficientnet.EfficientNetLite0,
  "resnet50": resnet50.ResNet50,
  "vit_ti16": vit.vit_ti,
  "vit_s16": vit.vit_s,
  "vit_b16": vit.vit_b,
}

# Fields of a network that `make` sets from other keys.
_NO_OPTIONS = {"num_classes", "running", "axis_name", "dtype", "parent", "name"}
_CHOICES = {  # values of the options that are texts
  "padding": ("tensorflow", "even"),
  "pool": ("token", "mean", "gap"),
  "gelu": ("exact", "tanh"),
}


def parse(text: str) -> tuple[str, dict[str, str | int | float]]:
  """Splits NAME,OPTION=VALUE,..., the value of the config key `network`.

  Options are fields of the network's module: "vit_s16,patch=32,pool=mean".

  Returns:
    The name of the network, and the values of the options that are given.

  Raises:
    UserError: if the network or an option is unknown, or a value is out of range; one line names
      all of them.
  """
  name, *settings = text.split(",")
  keys.require(
    []
    if name in NETWORKS
    else [
      f"network must be one of {', '.join(NETWORKS)}, got {name!r}{keys.nearest(name, NETWORKS)}"
    ]
  )
  known, found, lines = options(name), {}, []
  for setting in settings:
    key, is_setting, value = setting.partition("=")
    if not is_setting or key not in known:
      hint = f"{name} has the options {', '.join(known)}" if known else f"{name} has no options"
      lines.append(
        f"network={text}: {setting!r} is no OPTION=VALUE{keys.nearest(key, known)}; {hint}"
      )
    elif key in found:
      lines.append(f"network={text}: {key} is given twice")
    else:
      found[key] = _typed(value, known[key])
      if (expected := _expected(key, known[key], found[key])) is not None:
        lines.append(f"network={text}: {key} must be {expected}, got {value!r}")
  values: dict[str, Any] = known | found
  if not lines and "num_heads" in values and values["features"] % values["num_heads"]:
    lines.append(
      f"network={text}: features = {values['features']} is no multiple of num_heads = "
      f"{values['num_heads']}"
    )
  keys.require(lines)
  return name, found


def options(name: str) -> dict[str, str | int | float]:
  """Returns the options of a network and their default values."""
  module = NETWORKS[name](num_classes=1)
  fields = [f.name for f in dataclasses.fields(module) if f.name not in _NO_OPTIONS]
  values = {f: getattr(module, f) for f in fields}
  kinds = (str, int, float)  # a bool is none of them
  return {f: x for f, x in values.items() if type(x) in kinds}


def _typed(text: str, like: str | int | float) -> str | int | float:
  """Returns a text as a value of the type of `like`, or unchanged if it is no such value."""
  try:
    return type(like)(text)
  except ValueError:
    return text


def _expected(key: str, default: str | int | float, value: str | int | float) -> str | None:
  """Returns in words which values an option has if it does not have `value`, else None."""
  if key in _CHOICES:
    return None if value in _CHOICES[key] else "one of " + ", ".join(_CHOICES[key])
  if key == "dropout":
    return None if isinstance(value, float) and 0 <= value < 1 else "a number >= 0 and < 1"
  kind = "a whole number" if isinstance(default, int) else "a number"
  is_good = isinstance(value, type(default)) and not isinstance(value, str) and 0 < value < 2**20
  return None if is_good else f"{kind} > 0"


def make(
  name: str,
  num_classes: int,
  batch_norm: str = "own",
  precision: str = "float32",
  axis_name: str | None = None,
) -> nn.Module:
  """Returns the network called `name`.

  Args:
    name: a key of `NETWORKS`, and options as for `parse`.
    num_classes: width of the head.
    batch_norm: statistics that BatchNorm evaluates with. "population" and "running": stored ones;
      "batch": those of the batch; "frozen": stored ones, which training uses too and never changes;
      "own": as in the paper's network of that name. It has no effect on a network without
      BatchNorm.
    precision: "float32", or "bfloat16" for the products and outputs of all layers except the head;
      parameters, statistics and logits stay float32.
    axis_name: axis of the devices that share a training batch under jax.pmap (`Layout.axis_name`).

  Raises:
    UserError: as `parse`, and if the network's BatchNorm can't be frozen.
  """
  name, chosen = parse(name)
  network = NETWORKS[name](num_classes=num_classes, **chosen)
  if hasattr(network, "axis_name"):
    network = network.clone(axis_name=axis_name)
  if precision != "float32":
    network = network.clone(dtype=jnp.dtype(precision))
  if batch_norm == "own" or not hasattr(network, "running"):
    return network
  if batch_norm == "frozen":
    if not hasattr(network, "frozen"):
      raise UserError(
        f"method.batch_norm = 'frozen': {name} can't freeze its BatchNorm; set running"
      )
    network = network.clone(frozen=True)
  return network.clone(running=batch_norm != "batch")


def of_config(config: keys.Config, num_classes: int, axis_name: str | None = None) -> nn.Module:
  """Returns the network of a config.

  Args:
    config: resolved.
    num_classes: outputs of its head.
    axis_name: axis of the devices that a training step is mapped over (`parallel.Layout`), or None.
  """
  return make(config.network, num_classes, config.method.batch_norm, config.precision, axis_name)


def require_image_shape(model: nn.Module, image_shape: tuple[int, ...]) -> None:
  """Raises UserError if a network that has patches can't cut images [H, W, C] into them."""
  patch = getattr(model, "patch", 1)
  if any(n % patch for n in image_shape[:2]):
    raise UserError(
      f"images of {image_shape[0]} x {image_shape[1]} pixels can't be cut into patches of {patch} "
      f"x {patch}: set data.image_size to a multiple of {patch}"
    )


def is_plain(model: nn.Module) -> bool:
  """Returns whether all layers of one of these networks are Dense or ordinary 2-D convolutions."""
  return not isinstance(model, efficientnet.EfficientNetLite0 | vit.ViT)


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
  if batch_norm == "frozen":
    return "those of the base"
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
