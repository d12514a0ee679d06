"""BN: a frozen base whose BatchNorm and head are trained anew for every task ("BN-Tuned").

Update rule: kernels and biases stay those of task 0; BatchNorm's scale and bias, its statistics
and the head are trained per task by Adam on the cross-entropy.

| symbol      | here                    | meaning |
|-------------|-------------------------|---------|
| W           | shared["kernels"]       | kernels after the first task, frozen for ever |
| gamma, beta | tasks[t]["rest"]        | BatchNorm's scale and bias, head; biases too |
| -           | tasks[t]["stats"]       | BatchNorm's statistics |

Phases: task 0 trains everything, as STL does; every later task starts from task 0's BatchNorm
(method.start) with a fresh head and trains these alone. Nothing is forgotten.

References: S. Ioffe and C. Szegedy, 2015, which the HALRP paper cites; the lifelong-learning
baseline of Y. Wen et al., "BatchEnsemble", 2020, Sect. 4.1; spec/baselines.md 3.5. The paper does
not say whether biases are trained: `method.train_biases`.
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

  start: str = keys.one_of(
    "task0", ("task0", "fresh"), "where a later task's BatchNorm starts: task 0's, or anew"
  )
  train_biases: bool = keys.flag(False, "later tasks train biases of their own too")


def make(config, model, benchmark) -> Method:
  m, decay = config.method, learning_rate_decay(config, benchmark)
  initialize = networks.make_initialize(model, benchmark)
  fit_all = make_fit(config, decay, *networks.plain_network(model))

  def apply_tuned(params, frozen, stats, image, train_mode, key):
    rest = trees.join_biases(frozen["biases"] | params["biases"], params["others"])
    params = trees.join(frozen["kernels"], rest)
    return networks.apply_model(model, params, stats, image, train_mode, key)

  fit_tuned = make_fit(config, decay, apply_tuned, lambda params, frozen: 0.0)

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, fit_key = jax.random.split(key)
    params, stats = initialize(init_key)
    if not state.tasks:
      frozen = {"l2": networks.l2_coefficient(m)}
      store = store.child("base")
      params, stats = fit_all(params, stats, frozen, task, fit_key, config.epochs, store)
      kernels, rest = trees.split(params)
      return State({"kernels": kernels}, (_learned(task, rest, stats),)), {}
    kernels, first = state.shared["kernels"], state.tasks[0]
    _, fresh = trees.split(params)
    rest, stats = (fresh, stats) if m.start == "fresh" else (first["rest"], first["stats"])
    biases, _ = trees.split_biases(first["rest"], kernels)
    _, others = trees.split_biases(rest | {trees.HEAD: fresh[trees.HEAD]}, kernels)
    trained = {"biases": biases if m.train_biases else {}, "others": others}
    frozen = {"kernels": kernels, "biases": biases}
    store = store.child("tune")
    trained, stats = fit_tuned(trained, stats, frozen, task, fit_key, config.epochs, store)
    rest = trees.join_biases(biases | trained["biases"], trained["others"])
    return State(state.shared, (*state.tasks, _learned(task, rest, stats))), {}

  def logits(shared, learned, image):
    params = trees.join(shared["kernels"], learned["rest"])
    return networks.apply_model(model, params, learned["stats"], image, False, None)[0]

  def size(state):
    kernels, (first, *later) = state.shared["kernels"], state.tasks
    counts = [sizes.count_rest(p["rest"], kernels, int(p["num_classes"])) for p in later]
    uncounted = sizes.count_leaves([p["stats"] for p in state.tasks])
    uncounted += sum(c.biases for c in counts) if m.train_biases else 0
    base = sizes.network_count(kernels, first["rest"], int(first["num_classes"]))
    return sizes.dense_size(base, sum(c.counted for c in counts), uncounted)

  def merge(state, t):
    p = state.tasks[t]
    return trees.join(state.shared["kernels"], p["rest"]), p["stats"]

  return Method(nothing_learned, one_at_a_time, learn, logits, size, merge, ("kernels",))


def _learned(task, rest, stats):
  return {"rest": rest, "stats": stats, "num_classes": jnp.int32(task.num_classes)}
