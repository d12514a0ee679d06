"""What L2 and EWC share: one network for all tasks, held near where the tasks before left it.

| here                       | meaning |
|----------------------------|---------|
| shared["params"]           | features, which every task goes on training |
| shared["stats"]            | running statistics, where BatchNorm is shared |
| shared["anchor"]           | what the penalty is made of, for training alone |
| tasks[t]["private"]        | head; BatchNorm too with method.bn_scope = "task" |
| tasks[t]["stats"]          | its statistics then, and always with population statistics |

A task is predicted with the features as they are now, hence these methods forget. Population
statistics stay those of the features when the task was learned.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from halrp_jax import keys
from halrp_jax.training import networks, sizes
from halrp_jax.training.fit import learning_rate_decay, make_fit
from halrp_jax.types import Method, Params, State, nothing_learned, one_at_a_time
from halrp_jax.weights import trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.NetworkConfig):
  """The keys `method.*` of the methods of this file."""

  bn_scope: str = keys.one_of(
    "shared", ("shared", "task"), "whether BatchNorm is one of the shared features or the task's"
  )


def make(
  config,
  model,
  benchmark,
  first_anchor: Callable[[Params], Params],
  distance: Callable[[Params, Params], jax.Array],
  next_anchor: Callable[[Params, Params, Params, object], Params],
) -> Method:
  """A method with a penalty on leaving an anchor.

  Args:
    config, model, benchmark: as in every method.
    first_anchor: (shared parameters) -> anchor that penalises nothing.
    distance: (shared parameters, anchor) -> penalty.
    next_anchor: (anchor, all parameters after a task, statistics, task) -> anchor for the next one.
  """
  m, decay = config.method, learning_rate_decay(config, benchmark)
  own_norm = m.bn_scope == "task"
  apply_fn, l2_penalty = networks.plain_network(model)

  def penalty(params, frozen):
    shared, _ = trees.split_private(params, own_norm)
    return l2_penalty(params, frozen) + distance(shared, frozen["anchor"])

  fit = make_fit(config, decay, apply_fn, penalty)
  initialize = networks.make_initialize(model, benchmark)

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, fit_key = jax.random.split(key)
    params, stats = initialize(init_key)
    if state.tasks:
      params, stats, anchor = _warm_start(state, params, own_norm)
    else:
      anchor = first_anchor(trees.split_private(params, own_norm)[0])
    frozen = {"l2": networks.l2_coefficient(m), "anchor": anchor}
    params, stats = fit(params, stats, frozen, task, fit_key, config.epochs, store.child("train"))
    anchor = store.once("anchor", lambda: next_anchor(anchor, params, stats, task))
    shared, private = trees.split_private(params, own_norm)
    learned = {
      "private": private,
      "stats": stats if own_norm else {},
      "num_classes": jnp.int32(task.num_classes),
    }
    shared = {"params": shared, "stats": {} if own_norm else stats, "anchor": anchor}
    return State(shared, (*state.tasks, learned)), {}

  def network(shared, learned):
    params = trees.join_private(shared["params"], learned["private"])
    return params, learned["stats"] or shared["stats"]

  def logits(shared, learned, image):
    return networks.apply_model(model, *network(shared, learned), image, False, None)[0]

  def merge(state, t):
    return network(state.shared, state.tasks[t])

  serves = ("params", "stats")
  return Method(nothing_learned, one_at_a_time, learn, logits, size, merge, serves)


def _warm_start(state, fresh, own_norm: bool):
  """Everything as the task before left it, but for a fresh head. -> params, stats, anchor"""
  before = state.tasks[-1]
  private = before["private"] | {trees.HEAD: fresh[trees.HEAD]}
  params = trees.join_private(state.shared["params"], private)
  stats = before["stats"] if own_norm else state.shared["stats"]
  return params, stats, state.shared["anchor"]


def size(state: State):
  """Later tasks add their heads, and BatchNorm where it is theirs; anchors are for training."""
  first, *later = state.tasks
  counts = []
  for learned in state.tasks:
    params = trees.join_private(state.shared["params"], learned["private"])
    counts.append(sizes.network_count(*trees.split(params), int(learned["num_classes"])))
  private = [sizes.count_rest(p["private"], {}, int(p["num_classes"])).counted for p in later]
  stats, unused = sizes.count_statistics(state)
  anchors = sizes.count_leaves(state.shared["anchor"])
  return sizes.dense_size(counts[0], sum(private), stats, anchors + unused)
