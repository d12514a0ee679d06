"""BE: BatchEnsemble for lifelong learning, a frozen base times a rank-1 matrix per task.

Update rule: W_t = W * (r_t s_t'), the same for all positions of a convolution's window. Task 0
trains W; every later task trains r_t, s_t, biases, BatchNorm and head.

| paper | here                             | meaning |
|-------|----------------------------------|---------|
| W     | shared["kernels"][layer]         | kernels after the first task, frozen for ever |
| r, s  | tasks[t]["perturbation"][layer]  | R and S: scales of outputs and inputs, 1 at first |

It is HALRP at rank 0 without warm-up. r_0 and s_0 are 1 and belong to W (Eq. 6 trains them with
W, which they only rescale).

Reference: Y. Wen et al., "BatchEnsemble: an alternative approach to efficient ensemble and lifelong
learning", 2020, Eq. 1, 6, 7; spec/baselines.md 3.6. Biases and BatchNorm per task are our reading.
"""

import dataclasses

import jax
import jax.numpy as jnp

from halrp_jax import keys
from halrp_jax.training import contract, losses, networks, sizes
from halrp_jax.training.fit import learning_rate_decay, make_fit
from halrp_jax.types import Method, State, nothing_learned, one_at_a_time
from halrp_jax.weights import kinds, lowrank, perturb, trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.NetworkConfig):
  """The keys `method.*` of this method."""

  l2_scales: float = keys.number(0.0, 0, None, "L2 coefficient on r and s")


def make(config, model, benchmark) -> Method:
  m, decay = config.method, learning_rate_decay(config, benchmark)
  half = 0.5 if m.l2_half else 1.0

  def penalty(params, frozen):
    scales = [(p.R, p.S) for p in params["perturbation"].values()]
    return half * m.l2_scales * losses.sum_squares(scales)

  shapes_fn = contract.make_matrix_shapes(model, benchmark)
  initialize = networks.make_initialize(model, benchmark)
  apply_scaled = networks.perturbed_network(model)
  fit_base = make_fit(config, decay, *networks.plain_network(model))
  fit_scaled = make_fit(config, decay, apply_scaled, penalty)

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, fit_key = jax.random.split(key)
    params, stats = initialize(init_key)
    if not state.tasks:
      store = store.child("base")
      frozen = {"l2": half * m.l2}
      params, stats = fit_base(params, stats, frozen, task, fit_key, config.epochs, store)
      kernels, rest = trees.split(params)
      shapes = shapes_fn(params)
      ones = {
        name: lowrank.identity(kinds.as_matrix(w, shapes[name]), 0, fold=True)
        for name, w in kernels.items()
      }
      learned = _learned(task, {"perturbation": ones, "rest": rest}, stats)
      return State({"kernels": kernels}, (learned,)), {}
    first = state.tasks[0]
    start = {
      "perturbation": first["perturbation"],
      "rest": first["rest"] | {trees.HEAD: params[trees.HEAD]},
    }
    store = store.child("scales")
    trained, stats = fit_scaled(
      start, first["stats"], state.shared, task, fit_key, config.epochs, store
    )
    return State(state.shared, (*state.tasks, _learned(task, trained, stats))), {}

  def logits(shared, learned, image):
    return apply_scaled(learned, shared, learned["stats"], image, False, None)[0]

  def merge(state, t):
    p = state.tasks[t]
    return perturb.merge(state.shared["kernels"], p["perturbation"], p["rest"]), p["stats"]

  return Method(nothing_learned, one_at_a_time, learn, logits, size, merge, ("kernels",))


def _learned(task, trained, stats):
  return trained | {"stats": stats, "num_classes": jnp.int32(task.num_classes)}


def size(state: State):
  """Later tasks add r, s, BatchNorm and head; biases and statistics."""
  kernels, (first, *later) = state.shared["kernels"], state.tasks
  counts = [sizes.count_rest(p["rest"], kernels, int(p["num_classes"])) for p in later]
  scales = sizes.count_leaves([p["perturbation"] for p in later])
  uncounted = sizes.count_leaves([p["stats"] for p in state.tasks])
  base = sizes.network_count(kernels, first["rest"], int(first["num_classes"]))
  counted = scales + sum(c.counted for c in counts)
  return sizes.dense_size(base, counted, uncounted + sum(c.biases for c in counts))
