"""STL: single-task learning, an independent network for every task.

Update rule: Adam on the cross-entropy + l2 |W|^2, where W are the kernels of all layers except the
head. Every task starts from a fresh network. Nothing is shared and nothing is forgotten; the model
grows by a whole network per task.

Reference: the baseline in all tables of the HALRP paper (Sect. 5.1).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from halrp_jax import keys
from halrp_jax.training import networks, sizes
from halrp_jax.training.fit import plain_fit
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Method, Network, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.NetworkConfig):
  """Config keys `method.*` of STL."""


class TaskState(NamedTuple):
  """State of a task."""

  params: Params  # of the whole network, its head included
  stats: Params  # BatchNorm's statistics
  num_classes: Array  # int32 []


def make(config: Config, setup: Setup) -> Method:
  """Builds STL."""
  fit = plain_fit(setup, networks.l2_coefficient(config))
  initialize = networks.make_initialize(setup)

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, fit_key = jax.random.split(key)
    params, stats = fit(*initialize(init_key), task, fit_key, store.child("train"))
    return state.append(TaskState(params, stats, jnp.int32(task.num_classes))), {}

  def network(shared, task):
    return Network(task.params, task.stats)

  return Method(learn, sizes.whole_networks, network)
