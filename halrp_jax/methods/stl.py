"""STL: single-task learning, an independent network for every task.

Update rule: Adam on the cross-entropy + l2 |W|^2 (kernels of the features), from a fresh
initialisation for each task. Nothing is shared, nothing is forgotten; the model grows by a whole
network per task.

| symbol | here                    | meaning |
|--------|-------------------------|---------|
| W      | tasks[t]["params"]      | the network of task t, head included |
| -      | tasks[t]["stats"]       | its BatchNorm statistics |

Reference: the baseline of every table of the HALRP paper (Sect. 5.1); spec/baselines.md 3.1.
"""

import dataclasses

import jax
import jax.numpy as jnp

from halrp_jax import keys
from halrp_jax.training import networks, sizes
from halrp_jax.training.fit import learning_rate_decay, make_fit
from halrp_jax.types import Method, State, nothing_learned, one_at_a_time
from halrp_jax.weights import trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.NetworkConfig):
  """The keys `method.*` of this method."""


def make(config, model, benchmark) -> Method:
  m = config.method
  fit = make_fit(config, learning_rate_decay(config, benchmark), *networks.plain_network(model))
  frozen = {"l2": networks.l2_coefficient(m)}
  initialize = networks.make_initialize(model, benchmark)

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, fit_key = jax.random.split(key)
    params, stats = initialize(init_key)
    params, stats = fit(params, stats, frozen, task, fit_key, config.epochs, store.child("train"))
    learned = {"params": params, "stats": stats, "num_classes": jnp.int32(task.num_classes)}
    return State(state.shared, (*state.tasks, learned)), {}

  def logits(shared, learned, image):
    return networks.apply_model(model, learned["params"], learned["stats"], image, False, None)[0]

  def size(state):
    counts = [
      sizes.network_count(*trees.split(p["params"]), int(p["num_classes"])) for p in state.tasks
    ]
    stats = sizes.count_leaves([p["stats"] for p in state.tasks])
    return sizes.dense_size(counts[0], sum(counts[1:]), stats)

  def merge(state, t):
    return state.tasks[t]["params"], state.tasks[t]["stats"]

  return Method(nothing_learned, one_at_a_time, learn, logits, size, merge)
