"""L2: one network for all tasks, held near its weights after the previous task ("L2-transfer").

Update rule: Adam on the cross-entropy + l2 |W|^2 + lambda |theta - theta*|^2, where theta* are the
shared parameters at the start of the task and W are the kernels. Every task starts from theta* with
a fresh head.

| symbol     | here                       | meaning |
|------------|----------------------------|---------|
| theta      | shared["params"]           | shared parameters: all layers except the head |
| theta*     | shared["anchor"]["params"] | shared parameters after the previous task |
| lambda     | method.strength            | coefficient of the penalty; 0 for the first task |

Reference: a baseline of the HALRP paper (Sect. 5.1) and of the APD paper (J. Yoon et al., 2020,
arXiv 1902.09432). Neither gives lambda.
"""

import dataclasses

import jax
import jax.numpy as jnp

from halrp_jax import keys
from halrp_jax.methods import anchored
from halrp_jax.training import losses
from halrp_jax.training.setup import Setup
from halrp_jax.types import Method
from halrp_jax.weights import trees


# The strength was found by `tune` on CIFAR100-Split, order A, seed 0, with 25 % of the training
# images: the best of the powers of ten from 1e-4 to 10 (docs/tuning.md).
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(anchored.Config):
  """Config keys `method.*` of L2."""

  strength: float = keys.number(10.0, 0, None, "lambda: coefficient on the distance to the anchor")


TaskState = anchored.TaskState


def make(config: Config, setup: Setup) -> Method:
  """Builds L2."""

  def first(shared):
    return {"params": shared, "strength": jnp.float32(0)}

  def distance(shared, anchor):
    gaps = jax.tree.map(lambda x, a: x - a, shared, anchor["params"])
    return anchor["strength"] * losses.sum_squares(gaps)

  def following(anchor, params, stats, task):
    shared, _ = trees.split_private(params, config.bn_scope == "task")
    return {"params": shared, "strength": jnp.float32(config.strength)}

  return anchored.make(config, setup, anchored.Anchor(first, distance, following))
