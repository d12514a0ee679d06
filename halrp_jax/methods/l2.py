"""L2: one network for all tasks, held near the weights after the task before ("L2-transfer").

Update rule: Adam on the cross-entropy + wd + lambda |theta - theta*|^2, theta* being the shared
parameters when the task began; every task starts there with a fresh head.

| symbol     | here                       | meaning |
|------------|----------------------------|---------|
| theta      | shared["params"]           | features; heads are the tasks' own |
| theta*     | shared["anchor"]["params"] | the same after the task before |
| lambda     | method.strength            | 0 for the first task |
| wd         | method.l2                  | L2 coefficient on the kernels |

Reference: a baseline of the HALRP paper (Sect. 5.1) and of APD's (Yoon et al., 2020);
spec/baselines.md 3.3. Neither says lambda.
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


# found by `tune`: CIFAR100-Split, order A, seed 0, a quarter of the training images (the best
# of six decades, 1e-4 to 10; docs/tuning.md)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(anchored.Config):
  """The keys `method.*` of this method."""

  strength: float = keys.number(10.0, 0, None, "lambda: coefficient on the distance to the anchor")


TaskState = anchored.TaskState


def make(config: Config, setup: Setup) -> Method:
  def first(shared):
    return {"params": shared, "strength": jnp.float32(0)}

  def distance(shared, anchor):
    gaps = jax.tree.map(lambda x, a: x - a, shared, anchor["params"])
    return anchor["strength"] * losses.sum_squares(gaps)

  def following(anchor, params, stats, task):
    shared, _ = trees.split_private(params, config.bn_scope == "task")
    return {"params": shared, "strength": jnp.float32(config.strength)}

  return anchored.make(config, setup, anchored.Anchor(first, distance, following))
