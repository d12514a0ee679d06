"""IBPWF: rank-1 factors of weights, which of them a task uses being drawn from an Indian buffet.

Update rule: W_t = A diag(b_t * r_t) B per layer, b_t binary. Adam minimises the negative of a bound
on the evidence: cross-entropy + (KL_b + KL_v + KL_r) / N, N training images.

| paper     | here                       | meaning |
|-----------|----------------------------|---------|
| A, B      | shared["A"], ["B"]         | [d, F], [F, J]; what a task has used is frozen |
| pi_t      | sigmoid of shared["p"]     | q(b_t[k] = 1) of the last task, where the next starts |
| r_t       | shared["r"]                | weights of the factors, as the last task left them |
| b_t * r_t | tasks[t].z                 | in prediction pi_t * r_t where pi_t >= kappa, else 0 |
| c, d      | shared["log_c"], ["log_d"] | v_k ~ Kumaraswamy(c_k, d_k), sticks of the buffet |
| -         | shared["used"]             | [F], factors with pi >= kappa in some task so far |
| alpha     | method.alpha_share * F     | prior: v_k ~ Kumaraswamy(alpha, 1), pi_k = v_1 ... v_k |
| lambda    | method.temperature         | of the relaxed b |
| kappa     | method.kappa               | |

Phases: 1. b is sampled, relaxed to sigmoid((p + logistic noise) / lambda); KL_b by that sample
against a sampled stick-breaking prior, KL_v against c, d of the task before, KL_r against
N(0, 0.1^2). 2. the last method.fine_tune_epochs are on the cross-entropy alone with z as in
prediction. Used factors get no updates in either. Nothing is forgotten.

Its program draws r_t anew for permuted MNIST (method.start = "fresh") and says that starting from
r_{t-1} did for split MNIST ("task_before", here with biases and BatchNorm).

As in its program l2 on the kernels takes the place of KL_r: with l2 > 0 there is none. Different
from it: the series in KL_v is an integral over 32 points, good to 1e-4; biases are the task's own
and no row of A; lambda does not fall and no gradient is clipped.

References: N. Mehta et al., "Continual learning using a Bayesian nonparametric dictionary of weight
factors", 2021, https://arxiv.org/abs/2004.10098. What the HALRP paper took for F, alpha, kappa is
not known.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax import keys
from halrp_jax.methods import dictionary
from halrp_jax.training import losses, networks
from halrp_jax.training.fit import make_fit
from halrp_jax.training.setup import Setup
from halrp_jax.types import Method, Params, Size, State
from halrp_jax.weights import trees

_PRIOR_SCALE = 0.1  # of r
_LEAST, _MOST = 0.001, 0.999  # probabilities in densities are held between
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(dictionary.Config):
  """The keys `method.*` of this method."""

  factors: int = keys.whole(
    400, 1, None, "F at most; a layer has no more than its outputs, a dense one than its inputs"
  )
  # 2 found by `tune` at 0.25 (docs/tuning.md); the paper gives no ratio
  alpha_share: float = keys.number(2.0, 0, None, "alpha / F of every layer", True)
  kappa: float = keys.number(0.5, 0, 1, "probability from which on a factor is used", True)
  temperature: float = keys.number(0.666, 0, None, "lambda of the relaxed binary variables", True)
  fine_tune_epochs: int = keys.whole(2, 0, None, "of the n epochs, those without sampling")


def check(config: keys.Config) -> list[str]:
  """Returns what is wrong with the keys together. `config`: of a run."""
  epochs = config.method.fine_tune_epochs
  if epochs >= config.epochs:
    return [f"method.fine_tune_epochs = {epochs} must be less than epochs = {config.epochs}"]
  return []


TaskState = dictionary.TaskState


def make(config: Config, setup: Setup) -> Method:
  """Builds IBPWF. Everything jitted is built here, once."""
  f = _build(config, setup)

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, draw_key, r_key, fit_key, tune_key = jax.random.split(key, 5)
    shared = state.shared or first_dictionary(f, config, draw_key)
    params, stats = begin(f, config, state, shared, init_key, r_key)
    frozen = {k: shared[k] for k in ("used", "log_c", "log_d")}
    frozen |= {"num_images": jnp.float32(len(task.train.index))}
    epochs = setup.epochs - config.fine_tune_epochs
    params, stats = f.fit_sampled(  # phase 1
      params, stats, frozen, task, fit_key, epochs, store.child("sampled")
    )
    sticks = {k: params.pop(k) for k in ("log_c", "log_d")}
    params, stats = f.fine_tune(  # phase 2
      params, stats, frozen, task, tune_key, config.fine_tune_epochs, store.child("fine_tune")
    )
    z = predicting_z(config, params)
    learned = TaskState(z, params["rest"], stats, jnp.int32(task.num_classes))
    shared = {k: params[k] for k in ("A", "B", "p", "r")} | sticks
    shared |= {"used": {n: jnp.maximum(x, z[n] != 0) for n, x in frozen["used"].items()}}
    return state.append(learned, **shared), {"ranks": dictionary.in_use(learned)}

  network = dictionary.make_network(f.shapes)
  return Method(learn, lambda state: size(f, state), network, serves=dictionary.SERVES)


# --- where a task begins, how it is counted ---------------------------------------------
# f: shapes and jitted functions


def first_dictionary(f, config: Config, key: jax.Array) -> dict[str, Params]:
  """Draws A and B, and starts p at the prior's mean; r is drawn for each task."""
  xavier = jax.nn.initializers.glorot_uniform()
  shared = {k: {} for k in ("A", "B", "p", "log_c", "log_d", "used")}
  for i, (n, s) in enumerate(f.shapes.items()):
    (num_in, num_out), num = dictionary.matrix_shape(s), f.num_factors[n]
    a_key, b_key = jax.random.split(jax.random.fold_in(key, i))
    alpha = config.alpha_share * num
    pi = np.clip((alpha / (alpha + 1)) ** np.arange(1, num + 1), _LEAST, _MOST)
    shared["A"][n] = xavier(a_key, (num_in, num))
    shared["B"][n] = xavier(b_key, (num, num_out))
    shared["p"][n] = jnp.asarray(np.log(pi / (1 - pi)), jnp.float32)
    shared["log_c"][n] = jnp.full(num, math.log(alpha), jnp.float32)
    shared["log_d"][n] = jnp.zeros(num)
    shared["used"][n] = jnp.zeros(num)
  return shared


def begin(f, config: Config, state: State, shared, init_key, r_key) -> tuple[Params, Params]:
  """Returns what a task trains, and its statistics, as they are before its first step."""
  fresh, stats = f.initialize(init_key)
  params = {k: x for k, x in shared.items() if k not in ("used", "r")}
  if state.tasks and config.start == "task_before":
    before = state.tasks[-1]
    rest = networks.fresh_head(before.rest, fresh)
    return params | {"r": shared["r"], "rest": rest}, before.stats
  return params | {"r": _draw_r(r_key, f.num_factors), "rest": trees.split(fresh)[1]}, stats


def predicting_z(config: Config, params: Params) -> dict[str, jax.Array]:
  """Returns z by layer as predictions and phase 2 have it."""
  return {n: z_of(p, params["r"][n], config.kappa) for n, p in params["p"].items()}


def size(f, state: State) -> Size:
  """Counts for training alone the factors that no task uses yet, p, r, c, d; a bit for `used`."""
  used = {n: int(x.sum()) for n, x in state.shared["used"].items()}
  lengths = {n: sum(dictionary.matrix_shape(s)) for n, s in f.shapes.items()}
  spare = sum((f.num_factors[n] - used[n]) * k for n, k in lengths.items())
  total = sum(f.num_factors.values())
  coefficients = sum(sum(dictionary.in_use(p).values()) for p in state.tasks)
  training = spare + 4 * total + -(-total // 32)
  return dictionary.size(state, f.shapes, used, coefficients, total * len(state.tasks), training)


def _num_factors(kernel, most: int) -> int:
  num_in, num_out = dictionary.matrix_shape(kernel)
  return min(most, num_out if kernel.ndim > 2 else min(num_in, num_out))


def _draw_r(key, num_factors):
  layer_keys = jax.random.split(key, len(num_factors))
  return {
    n: _PRIOR_SCALE * jax.random.normal(k, (num,))
    for k, (n, num) in zip(layer_keys, num_factors.items(), strict=True)
  }


# --- jitted functions -------------------------------------------------------------------


class _Functions(NamedTuple):
  shapes: dictionary.Shapes
  num_factors: dict[str, int]  # F by layer
  initialize: Callable  # (key) -> params, stats
  fit_sampled: Callable  # `make_fit` of phase 1
  fine_tune: Callable  # `make_fit` of phase 2


def _build(config: Config, setup: Setup) -> _Functions:
  initialize = networks.make_initialize(setup)
  shapes = dictionary.kernel_shapes(initialize)
  l2 = networks.l2_coefficient(config)

  def kernels_of(params, z):
    return dictionary.compose(params["A"], params["B"], z, shapes)

  def logits_of(kernels, params, stats, image, train, key):
    weights = trees.join(kernels, params["rest"])
    return networks.apply_model(setup.model, weights, stats, image, train, key)

  def apply_fn(params, frozen, stats, image, train, key):
    """Phase 2 and evaluation: nothing is drawn."""
    kernels = kernels_of(params, predicting_z(config, params))
    return logits_of(kernels, params, stats, image, train, key)

  expected = losses.cross_entropy_objective(apply_fn)

  def sampled(params, frozen, stats, batch, train, key):
    """Phase 1: the part of the bound that is drawn; `_penalty` is the other one."""
    if not train:
      return expected(params, frozen, stats, batch, train, key)
    key, draw_key = jax.random.split(key)
    z, kl_b = draw_z(draw_key, config, params, shapes)
    kernels = kernels_of(params, z)
    logits, stats = logits_of(kernels, params, stats, batch.image, train, key)
    loss = losses.cross_entropy(logits, batch.label, batch.num_classes)
    return loss + kl_b / frozen["num_images"] + l2 * losses.sum_squares(kernels), logits, stats

  penalty = _penalty(shapes, with_r=not l2)
  return _Functions(
    shapes=shapes,
    num_factors={n: _num_factors(s, config.factors) for n, s in shapes.items()},
    initialize=initialize,
    fit_sampled=make_fit(setup, apply_fn, penalty, objective_fn=sampled, edit_fn=_only_unused),
    fine_tune=make_fit(setup, apply_fn, lambda params, frozen: 0.0, edit_fn=_only_unused),
  )


def _penalty(shapes, with_r: bool) -> Callable:
  """Builds (KL_v + KL_r) / N; without KL_r if not `with_r`."""

  def penalty(params, frozen):
    kl = losses.sum_squares(params["r"]) / (2 * _PRIOR_SCALE**2) if with_r else 0.0
    for n in shapes:
      now, before = ((x["log_c"][n], x["log_d"][n]) for x in (params, frozen))
      kl += jnp.sum(kl_kumaraswamy(*now, *before))
    return kl / frozen["num_images"]

  return penalty


def _only_unused(updates, frozen):
  """Sets the updates of the factors to 0 that a task before uses."""
  free = {n: 1.0 - x for n, x in frozen["used"].items()}
  a = {n: u * free[n][None] for n, u in updates["A"].items()}
  b = {n: u * free[n][:, None] for n, u in updates["B"].items()}
  return updates | {"A": a, "B": b}


# --- the mathematics, but for `draw_z` of one layer and by factor [F] --------------------


def z_of(p: jax.Array, r: jax.Array, kappa: float) -> jax.Array:
  """Returns pi * r where pi >= kappa, else 0."""
  pi = jax.nn.sigmoid(p)
  return jnp.where(pi >= kappa, pi * r, 0.0)


def log1mexp(x: jax.Array) -> jax.Array:
  """Returns log(1 - exp(x)) for x < 0, also for x near 0 and far from it."""
  near = x > -math.log(2)
  of_near = jnp.log(-jnp.expm1(jnp.where(near, x, -1.0)))
  return jnp.where(near, of_near, jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


def draw_z(key, config: Config, params, shapes) -> tuple[dict[str, jax.Array], jax.Array]:
  """Draws the relaxed b_t * r_t by layer. -> z, KL_b by the same draw"""
  z, kl_b = {}, 0.0
  for i, n in enumerate(shapes):
    p, c, d = (params[k][n] for k in ("p", "log_c", "log_d"))
    x, kl = draw_logistic(jax.random.fold_in(key, i), p, c, d)
    z[n] = jax.nn.sigmoid(x / config.temperature) * params["r"][n]
    kl_b += kl
  return z, kl_b


def draw_logistic(key, p, log_c, log_d) -> tuple[jax.Array, jax.Array]:
  """Draws x = p + logistic noise, whose sign is b. -> x, KL_b by this draw

  KL_b is log q(x) - log p(x); the density p(x) is around log odds that are drawn from the prior.
  """
  noise_key, prior_key = jax.random.split(key)
  x = p + jax.random.logistic(noise_key, p.shape)
  prior = draw_prior(prior_key, log_c, log_d)
  return x, jnp.sum(log_density(x, p) - log_density(x, prior))


def draw_prior(key: jax.Array, log_c: jax.Array, log_d: jax.Array) -> jax.Array:
  """Draws sticks v_k ~ Kumaraswamy(c_k, d_k); returns the log odds of pi_k = v_1 ... v_k."""
  u = jax.random.uniform(key, log_c.shape, minval=1e-4, maxval=1 - 1e-4)
  log_v = log1mexp(jnp.log(u) * jnp.exp(-log_d)) * jnp.exp(-log_c)
  log_pi = jnp.clip(jnp.cumsum(log_v), math.log(_LEAST), math.log(_MOST))
  return log_pi - log1mexp(log_pi)


def log_density(x: jax.Array, log_odds: jax.Array) -> jax.Array:
  """Returns the log density of the logistic distribution around `log_odds`, which relaxes b."""
  bound = math.log(_MOST / (1 - _MOST))
  y = jnp.clip(log_odds, -bound, bound) - x
  return y - 2 * jax.nn.softplus(y)


def kl_kumaraswamy(log_a, log_b, log_alpha, log_beta) -> jax.Array:
  """Returns KL(Kumaraswamy(a, b) || Kumaraswamy(alpha, beta)).

  E log x = -(digamma(b) + 1/b + Euler's constant) / a and E log(1 - x^a) = -1/b are known;
  E log(1 - x^alpha) is -1/b too but for an integral that is 0 where a = alpha.
  """
  b, beta, log_ratio = jnp.exp(log_b), jnp.exp(log_beta), log_alpha - log_a
  harmonic = jax.scipy.special.digamma(b) + 1 / b + np.euler_gamma
  excess = _mean_excess(jnp.exp(log_ratio), b)
  known = log_b - log_beta - log_ratio + jnp.expm1(log_ratio) * harmonic + (beta - b) / b
  return known - (beta - 1) * excess


def _mean_excess(rho, b):
  """Returns E log(1 - x^alpha) + 1/b, rho = alpha / a: an integral over the uniform (1 - x^a)^b."""
  points = jnp.asarray((_POINTS + 1) / 2, jnp.float32)[:, None]
  # beyond 16 the excess is log(rho) to the last digit
  w = jnp.minimum(-jnp.log(points) / b[None], 16.0)  # -log(1 - x^a)
  excess = w + log1mexp(rho[None] * log1mexp(-w))
  return jnp.asarray(_WEIGHTS / 2, jnp.float32) @ excess
