"""MTL: all tasks at once, one network with a head for each (joint training).

Update rule: Adam on the mean cross-entropy over the images of all tasks + l2 |W|^2 (kernels of the
features). An epoch is one pass over all of them. No continual learning: what it may be compared to.

| symbol | here                    | meaning |
|--------|-------------------------|---------|
| W      | shared["params"]        | features, for all tasks |
| -      | shared["stats"]         | BatchNorm's running statistics |
| -      | tasks[t]["head"]        | head of task t |
| -      | tasks[t]["stats"]       | BatchNorm's statistics over the images of task t (population) |

The accuracy matrix has one row, the last; there is no backward transfer.

Reference: the multi-task baseline of the HALRP paper (Sect. 5.1); spec/baselines.md 3.2. The paper
does not say whether a batch holds images of one task (as its loaders suggest) or of all:
`method.mix`. It matters where BatchNorm takes the statistics of a batch.
"""

import dataclasses

import jax
import jax.numpy as jnp

from halrp_jax import keys
from halrp_jax.training import batches, losses, networks, sizes
from halrp_jax.training.fit import learning_rate_decay, make_fit
from halrp_jax.types import Method, State, nothing_learned
from halrp_jax.weights import trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.NetworkConfig):
  """The keys `method.*` of this method."""

  mix: str = keys.one_of(
    "single", ("single", "mixed"), "images in a batch: of one task, the tasks in turn; of all"
  )


def make(config, model, benchmark) -> Method:
  m, decay, width = config.method, learning_rate_decay(config, benchmark), model.num_classes
  wide = model.clone(num_classes=len(benchmark.tasks) * width)  # the heads side by side
  apply_fn, penalty_fn = networks.plain_network(wide)

  def objective(params, frozen, stats, batch, train_mode, key):
    logits, stats = apply_fn(params, frozen, stats, batch.image, train_mode, key)
    by_task = logits.reshape(len(logits), -1, width)  # [B, T, K]
    own = jnp.take_along_axis(by_task, batch.owner[:, None, None], 1)[:, 0]
    return losses.cross_entropy(own, batch.label, batch.num_classes), own, stats

  fit = make_fit(config, decay, apply_fn, penalty_fn, objective_fn=objective)
  frozen = {"l2": networks.l2_coefficient(m)}
  initialize = networks.make_initialize(wide, benchmark)

  def learn(state, tasks, key, store):
    init_key, fit_key = jax.random.split(key)
    params, stats = initialize(init_key)
    joint = batches.join_tasks(tasks, m.mix == "mixed")
    params, stats = fit(params, stats, frozen, joint, fit_key, config.epochs, store.child("train"))
    features, heads = trees.split_private(params, norm=False)
    learned = tuple(
      {
        "head": jax.tree.map(lambda x, t=t: x[..., t * width : (t + 1) * width], heads["head"]),
        "num_classes": jnp.int32(task.num_classes),
      }
      for t, task in enumerate(tasks)
    )
    return State({"params": features, "stats": stats}, learned), {}

  def network(shared, learned):
    params = shared["params"] | {trees.HEAD: learned["head"]}
    return params, learned.get("stats") or shared["stats"]

  def logits(shared, learned, image):
    return networks.apply_model(model, *network(shared, learned), image, False, None)[0]

  def merge(state, t):
    return network(state.shared, state.tasks[t])

  def groups(num_tasks):
    return (tuple(range(num_tasks)),)

  return Method(nothing_learned, groups, learn, logits, size, merge, ("params", "stats"))


def size(state: State):
  """Every task but the first adds its head."""
  first, *later = state.tasks
  kernels, rest = trees.split(state.shared["params"] | {trees.HEAD: first["head"]})
  base = sizes.network_count(kernels, rest, int(first["num_classes"]))
  heads = [sizes.count_rest({trees.HEAD: p["head"]}, {}, int(p["num_classes"])) for p in later]
  stats, unused = sizes.count_statistics(state)
  return sizes.dense_size(base, sum(count.counted for count in heads), stats, unused)
