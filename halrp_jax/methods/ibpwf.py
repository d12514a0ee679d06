"""IBPWF: rank-1 factors of weights, which of them a task uses being drawn from an Indian buffet.

Update rule: W_t = A diag(b_t * r_t) B per layer, b_t binary. Maximised is a bound on the evidence:
cross-entropy + (KL_b + KL_v + KL_r) / N, N training images.

| paper    | here                    | meaning |
|----------|-------------------------|---------|
| A, B     | shared["A"], ["B"]      | [d, F], [F, J]; what a task has used is frozen |
| pi_t     | sigmoid of shared["p"]  | q(b_t[k] = 1) of the last task, where the next starts |
| r_t      | shared["r"]             | weights of the factors, as the last task left them |
| b_t * r_t | tasks[t]["z"]          | in prediction pi_t * r_t where pi_t >= kappa, else 0 |
| c, d     | shared["log_c"], ["log_d"] | v_k ~ Kumaraswamy(c_k, d_k), sticks of the buffet |
| -        | shared["used"]          | [F], factors with pi >= kappa in some task so far |
| alpha    | method.alpha_share * F  | prior: v_k ~ Kumaraswamy(alpha, 1), pi_k = v_1 ... v_k |
| lambda   | method.temperature      | of the relaxed b |
| kappa    | method.kappa            | |

Phases: 1. b is sampled, relaxed to sigmoid((p + logistic noise) / lambda); KL_b by that sample
against a sampled stick-breaking prior, KL_v against c, d of the task before, KL_r against
N(0, 0.1^2). 2. the last method.fine_tune_epochs are on the cross-entropy alone with z as in
prediction. Used factors get no updates in either. Nothing is forgotten.

Its program draws r_t anew for permuted MNIST (method.start = "fresh") and says that starting from
r_{t-1} did for split MNIST ("task_before", here with biases and BatchNorm).

As in its program l2 on the kernels takes the place of KL_r: with l2 > 0 there is none. Different
from it: the series in KL_v is an integral over 32 places, good to 1e-4; biases are the task's own
and no row of A; lambda does not fall and no gradient is clipped.

References: N. Mehta et al., "Continual learning using a Bayesian nonparametric dictionary of weight
factors", 2021; spec/baselines.md 3.9. What the HALRP paper took for F, alpha, kappa is not known.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax import keys
from halrp_jax.methods import dictionary
from halrp_jax.training import losses, networks
from halrp_jax.training.fit import learning_rate_decay, make_fit
from halrp_jax.types import Method, State, nothing_learned, one_at_a_time
from halrp_jax.weights import trees

_PRIOR_SCALE = 0.1  # of r
_LEAST, _MOST = 0.001, 0.999  # probabilities in densities are held between
_PLACES, _WEIGHTS = np.polynomial.legendre.leggauss(32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(dictionary.Config):
  """The keys `method.*` of this method."""

  factors: int = keys.whole(
    400, 1, None, "F at most; a layer has no more than its outputs, a dense one than its inputs"
  )
  # 2 found by `tune` at .25 (docs/measurements.md); the paper gives no ratio
  alpha_share: float = keys.number(2.0, 0, None, "alpha / F of every layer", True)
  kappa: float = keys.number(0.5, 0, 1, "probability from which on a factor is used", True)
  temperature: float = keys.number(0.666, 0, None, "lambda of the relaxed binary variables", True)
  fine_tune_epochs: int = keys.whole(2, 0, None, "of the n epochs, those without sampling")


def check(config) -> list[str]:
  epochs = config.method.fine_tune_epochs
  if epochs >= config.epochs:
    return [f"method.fine_tune_epochs = {epochs} must be less than epochs = {config.epochs}"]
  return []


def make(config, model, benchmark) -> Method:
  m, decay = config.method, learning_rate_decay(config, benchmark)
  initialize = networks.make_initialize(model, benchmark)
  shapes = dictionary.kernel_shapes(initialize)
  num_factors = {n: _num_factors(s, m.factors) for n, s in shapes.items()}
  l2 = networks.l2_coefficient(m)

  def apply_fn(params, frozen, stats, image, train_mode, key):
    """The second phase and evaluation: nothing is drawn."""
    z = {n: z_of(p, params["r"][n], m.kappa) for n, p in params["p"].items()}
    return network(kernels_of(params, z), params, stats, image, train_mode, key)

  def network(kernels, params, stats, image, train_mode, key):
    weights = trees.join(kernels, params["rest"])
    return networks.apply_model(model, weights, stats, image, train_mode, key)

  def kernels_of(params, z):
    return dictionary.compose(params["A"], params["B"], z, shapes)

  expected = losses.cross_entropy_objective(apply_fn)

  def sampled(params, frozen, stats, batch, train_mode, key):
    """The first phase, but for what is no chance in it (`penalty`)."""
    if not train_mode:
      return expected(params, frozen, stats, batch, train_mode, key)
    key, draw_key = jax.random.split(key)
    z, kl_b = {}, 0.0
    for i, n in enumerate(shapes):
      p, c, d = (params[k][n] for k in ("p", "log_c", "log_d"))
      x, kl = draw_logistic(jax.random.fold_in(draw_key, i), p, c, d)
      z[n] = jax.nn.sigmoid(x / m.temperature) * params["r"][n]
      kl_b += kl
    kernels = kernels_of(params, z)
    logits, stats = network(kernels, params, stats, batch.image, train_mode, key)
    loss = losses.cross_entropy(logits, batch.label, batch.num_classes)
    return loss + kl_b / frozen["num_images"] + l2 * losses.sum_squares(kernels), logits, stats

  def penalty(params, frozen):
    kl = 0.0 if l2 else losses.sum_squares(params["r"]) / (2 * _PRIOR_SCALE**2)
    for n in shapes:
      now, before = ((x["log_c"][n], x["log_d"][n]) for x in (params, frozen))
      kl += jnp.sum(kl_kumaraswamy(*now, *before))
    return kl / frozen["num_images"]

  def only_unused(updates, frozen):
    free = {n: 1.0 - x for n, x in frozen["used"].items()}
    a = {n: u * free[n][None] for n, u in updates["A"].items()}
    b = {n: u * free[n][:, None] for n, u in updates["B"].items()}
    return updates | {"A": a, "B": b}

  fit = make_fit(config, decay, apply_fn, penalty, objective_fn=sampled, edit_fn=only_unused)
  fine_tune = make_fit(config, decay, apply_fn, lambda params, frozen: 0.0, edit_fn=only_unused)

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, draw_key, r_key, fit_key, tune_key = jax.random.split(key, 5)
    params, stats = initialize(init_key)
    shared = state.shared or _draw(draw_key, shapes, num_factors, m.alpha_share)
    start = {k: x for k, x in shared.items() if k not in ("used", "r")}
    start |= {"r": _draw_r(r_key, num_factors), "rest": trees.split(params)[1]}
    if state.tasks and m.start == "task_before":
      before, head = state.tasks[-1], params[trees.HEAD]
      start |= {"r": shared["r"], "rest": before["rest"] | {trees.HEAD: head}}
      stats = before["stats"]
    frozen = {k: shared[k] for k in ("used", "log_c", "log_d")}
    frozen |= {"num_images": jnp.float32(len(task.train.index))}
    epochs = config.epochs - m.fine_tune_epochs
    got, stats = fit(start, stats, frozen, task, fit_key, epochs, store.child("sampled"))
    sticks = {k: got.pop(k) for k in ("log_c", "log_d")}
    phase = store.child("fine_tune")
    got, stats = fine_tune(got, stats, frozen, task, tune_key, m.fine_tune_epochs, phase)
    z = {n: z_of(p, got["r"][n], m.kappa) for n, p in got["p"].items()}
    used = {n: jnp.maximum(x, z[n] != 0) for n, x in shared["used"].items()}
    num_classes = jnp.int32(task.num_classes)
    learned = {"z": z, "rest": got["rest"], "stats": stats, "num_classes": num_classes}
    shared = {k: got[k] for k in ("A", "B", "p", "r")} | sticks | {"used": used}
    return State(shared, (*state.tasks, learned)), {"ranks": dictionary.in_use(learned)}

  def size(state):
    """`training_only`: the factors that no task uses yet, p, r, c, d; a bit for `used`."""
    used = {n: int(x.sum()) for n, x in state.shared["used"].items()}
    lengths = {n: sum(dictionary.matrix_shape(s)) for n, s in shapes.items()}
    spare = sum((num_factors[n] - used[n]) * k for n, k in lengths.items())
    total = sum(num_factors.values())
    coefficients = sum(sum(dictionary.in_use(p).values()) for p in state.tasks)
    training = spare + 4 * total + -(-total // 32)
    return dictionary.size(state, shapes, used, coefficients, total * len(state.tasks), training)

  logits, merge = dictionary.make_network(model, shapes)
  serves = dictionary.SERVES
  return Method(nothing_learned, one_at_a_time, learn, logits, size, merge, serves)


# --- the mathematics, all of one layer and by factor [F] --------------------------------


def z_of(p: jax.Array, r: jax.Array, kappa: float) -> jax.Array:
  """pi * r where pi >= kappa, else 0."""
  pi = jax.nn.sigmoid(p)
  return jnp.where(pi >= kappa, pi * r, 0.0)


def log1mexp(x: jax.Array) -> jax.Array:
  """log(1 - exp(x)), x < 0; near 0 and far from it."""
  near = x > -math.log(2)
  of_near = jnp.log(-jnp.expm1(jnp.where(near, x, -1.0)))
  return jnp.where(near, of_near, jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


def draw_logistic(key, p, log_c, log_d) -> tuple[jax.Array, jax.Array]:
  """x = p + logistic noise, whose sign is b; log q(x) - log p(x), p(x) around drawn log odds."""
  noise_key, prior_key = jax.random.split(key)
  x = p + jax.random.logistic(noise_key, p.shape)
  prior = draw_prior(prior_key, log_c, log_d)
  return x, jnp.sum(log_density(x, p) - log_density(x, prior))


def draw_prior(key: jax.Array, log_c: jax.Array, log_d: jax.Array) -> jax.Array:
  """Log odds of pi_k = v_1 ... v_k, sticks v_k drawn from Kumaraswamy(c_k, d_k)."""
  u = jax.random.uniform(key, log_c.shape, minval=1e-4, maxval=1 - 1e-4)
  log_v = log1mexp(jnp.log(u) * jnp.exp(-log_d)) * jnp.exp(-log_c)
  log_pi = jnp.clip(jnp.cumsum(log_v), math.log(_LEAST), math.log(_MOST))
  return log_pi - log1mexp(log_pi)


def log_density(x: jax.Array, log_odds: jax.Array) -> jax.Array:
  """Of the logistic distribution around `log_odds`, by which b is relaxed."""
  bound = math.log(_MOST / (1 - _MOST))
  y = jnp.clip(log_odds, -bound, bound) - x
  return y - 2 * jax.nn.softplus(y)


def kl_kumaraswamy(log_a, log_b, log_alpha, log_beta) -> jax.Array:
  """KL(Kumaraswamy(a, b) || Kumaraswamy(alpha, beta)).

  E log x = -(digamma(b) + 1/b + Euler's constant) / a and E log(1 - x^a) = -1/b are known;
  E log(1 - x^alpha) is -1/b too but for an integral that is 0 where a = alpha.
  """
  b, beta, log_ratio = jnp.exp(log_b), jnp.exp(log_beta), log_alpha - log_a
  harmonic = jax.scipy.special.digamma(b) + 1 / b + np.euler_gamma
  excess = _mean_excess(jnp.exp(log_ratio), b)
  known = log_b - log_beta - log_ratio + jnp.expm1(log_ratio) * harmonic + (beta - b) / b
  return known - (beta - 1) * excess


def _mean_excess(rho, b):
  """E log(1 - x^alpha) + 1/b, rho = alpha / a, as an integral over the uniform (1 - x^a)^b."""
  places = jnp.asarray((_PLACES + 1) / 2, jnp.float32)[:, None]
  # beyond 16 the excess is log(rho) to the last digit
  w = jnp.minimum(-jnp.log(places) / b[None], 16.0)  # -log(1 - x^a)
  excess = w + log1mexp(rho[None] * log1mexp(-w))
  return jnp.asarray(_WEIGHTS / 2, jnp.float32) @ excess


# --- how it begins ----------------------------------------------------------------------


def _num_factors(kernel, most: int) -> int:
  num_in, num_out = dictionary.matrix_shape(kernel)
  return min(most, num_out if kernel.ndim > 2 else min(num_in, num_out))


def _draw(key, shapes, num_factors, alpha_share: float):
  xavier = jax.nn.initializers.glorot_uniform()
  shared = {k: {} for k in ("A", "B", "p", "log_c", "log_d", "used")}
  for i, (n, s) in enumerate(shapes.items()):
    (d, j), f = dictionary.matrix_shape(s), num_factors[n]
    a_key, b_key = jax.random.split(jax.random.fold_in(key, i))
    alpha = alpha_share * f
    pi = np.clip((alpha / (alpha + 1)) ** np.arange(1, f + 1), _LEAST, _MOST)
    shared["A"][n], shared["B"][n] = xavier(a_key, (d, f)), xavier(b_key, (f, j))
    shared["p"][n] = jnp.asarray(np.log(pi / (1 - pi)), jnp.float32)
    shared["log_c"][n], shared["log_d"][n] = jnp.full(f, math.log(alpha), jnp.float32), jnp.zeros(f)
    shared["used"][n] = jnp.zeros(f)
  return shared


def _draw_r(key, num_factors):
  keys = jax.random.split(key, len(num_factors))
  return {
    n: _PRIOR_SCALE * jax.random.normal(k, (f,))
    for k, (n, f) in zip(keys, num_factors.items(), strict=True)
  }
