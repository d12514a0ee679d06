"""APDfix: APD with shared weights frozen after the first task; a mask and a sparse tau per task.

Update rule: theta_t = sigma * m_t + tau_t; Adam on the cross-entropy + l1 |tau_t| + l2 (|tau_t|^2 +
|v_t|^2), m_t = sigmoid(v_t). sigma is the network of task 0, trained as single-task learning does.

| paper | here                    | meaning |
|-------|-------------------------|---------|
| sigma | shared["kernels"]       | kernels after the first task, frozen for ever |
| m_t   | tasks[t]["mask"]        | one factor for every channel or unit of a layer's output |
| tau_t | tasks[t]["tau"]         | what is added, 0 where it is at most l1 |
| -     | tasks[t]["rest"], ["stats"] | biases, BatchNorm, head |

Phases: task 0; every later task starts from task 0's biases and BatchNorm, a fresh head, masks near
1/2 and tau = sigma (method.tau_start). Nothing is forgotten.

References: J. Yoon et al., "Scalable and order-robust continual learning with additive parameter
decomposition", 2020 (APD-Fixed); spec/baselines.md 3.8. The HALRP paper says "learn only the mask
vector" (method.train_tau = False); but a mask per output can't do better than BE, as its row does.
"""

import dataclasses

import jax
import jax.numpy as jnp

from halrp_jax import keys
from halrp_jax.methods import additive
from halrp_jax.training import losses, networks
from halrp_jax.training.fit import learning_rate_decay, make_fit
from halrp_jax.types import Method, State, nothing_learned, one_at_a_time
from halrp_jax.weights import trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(additive.Config):
  """The keys `method.*` of this method."""

  train_tau: bool = keys.flag(True, "tau is learned; false: the mask alone")
  tau_start: str = keys.one_of("shared", ("shared", "zero"), "where tau starts: at sigma, or at 0")


def make(config, model, benchmark) -> Method:
  m, decay = config.method, learning_rate_decay(config, benchmark)
  l2 = networks.l2_coefficient(m)

  def network(kernels, mask, tau, rest, stats, image, train_mode, key):
    weights = trees.join(additive.compose(kernels, mask, tau), rest)
    return networks.apply_model(model, weights, stats, image, train_mode, key)

  def apply_fn(params, frozen, *args):
    mask = additive.masks_of(params["v"])
    return network(frozen["kernels"], mask, params["tau"], params["rest"], *args)

  def penalty(params, frozen):
    squares = losses.sum_squares((params["tau"], params["v"]))
    return m.l1 * losses.sum_absolute(params["tau"]) + l2 * squares

  initialize = networks.make_initialize(model, benchmark)
  fit_base = make_fit(config, decay, *networks.plain_network(model))
  fit_own = make_fit(config, decay, apply_fn, penalty)

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, fit_key = jax.random.split(key)
    params, stats = initialize(init_key)
    if not state.tasks:
      phase = store.child("base")
      params, stats = fit_base(params, stats, {"l2": l2}, task, fit_key, config.epochs, phase)
      kernels, rest = trees.split(params)
      ones = {n: jnp.ones(w.shape[-1]) for n, w in kernels.items()}
      none = jax.tree.map(jnp.zeros_like, kernels) if m.train_tau else {}
      return State({"kernels": kernels}, (_learned(task, ones, none, rest, stats),)), {}
    kernels, first = state.shared["kernels"], state.tasks[0]
    tau = kernels if m.tau_start == "shared" else jax.tree.map(jnp.zeros_like, kernels)
    start = {
      "v": additive.draw_v(jax.random.fold_in(init_key, 1), kernels),
      "tau": tau if m.train_tau else {},
      "rest": first["rest"] | {trees.HEAD: params[trees.HEAD]},
    }
    phase = store.child("own")
    got, stats = fit_own(start, first["stats"], state.shared, task, fit_key, config.epochs, phase)
    mask, tau = additive.masks_of(got["v"]), additive.prune(got["tau"], m.l1)
    return State(state.shared, (*state.tasks, _learned(task, mask, tau, got["rest"], stats))), {}

  def logits(shared, learned, image):
    own = (learned[k] for k in ("mask", "tau", "rest", "stats"))
    return network(shared["kernels"], *own, image, False, None)[0]

  def size(state):
    first = state.tasks[0] | {"mask": {}, "tau": {}}  # of ones and zeros
    return additive.size(State(state.shared, (first, *state.tasks[1:])), 0, 0, 0)

  def merge(state, t):
    p = state.tasks[t]
    kernels = additive.compose(state.shared["kernels"], p["mask"], p["tau"])
    return trees.join(kernels, p["rest"]), p["stats"]

  return Method(nothing_learned, one_at_a_time, learn, logits, size, merge, ("kernels",))


def _learned(task, mask, tau, rest, stats):
  num_classes = jnp.int32(task.num_classes)
  return {"mask": mask, "tau": tau, "rest": rest, "stats": stats, "num_classes": num_classes}
