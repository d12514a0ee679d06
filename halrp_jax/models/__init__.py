"""The networks by name. They are plain Flax Linen modules and know nothing of methods.

To add one: a file beside this one and a line in `NETWORKS`.
"""

from collections.abc import Callable

import flax.linen as nn

from halrp_jax.models import lenet, mlp

NETWORKS: dict[str, Callable[..., nn.Module]] = {
  "lenet": lenet.LeNet,
  "mlp": mlp.MLP,
}


def make(name: str, num_classes: int) -> nn.Module:
  """The network called `name` with `num_classes` outputs."""
  return NETWORKS[name](num_classes=num_classes)
