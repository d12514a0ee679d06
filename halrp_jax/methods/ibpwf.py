"""IBPWF: rank-1 factors of weights; an Indian buffet process selects those that a task uses.

Update rule: W_t = A diag(b_t * r_t) B per layer, where b_t is binary. Adam minimises the negative
of a lower bound on the evidence: cross-entropy + (KL_b + KL_v + KL_r) / N with N training images.

| paper     | here                       | meaning |
|-----------|----------------------------|---------|
| A, B      | shared["A"], ["B"]         | [d, F], [F, J]; factors that a task has used are frozen |
| pi_t      | sigmoid of shared["p"]     | q(b_t[k] = 1) of the latest task; the next starts there |
| r_t       | shared["r"]                | weights of the factors after the latest task |
| b_t * r_t | tasks[t].z                 | in predictions pi_t * r_t where pi_t >= kappa, else 0 |
| c, d      | shared["log_c"], ["log_d"] | v_k ~ Kumaraswamy(c_k, d_k), sticks of the process |
| -         | shared["used"]             | [F], factors with pi >= kappa in any task so far |
| alpha     | method.alpha_share * F     | prior: v_k ~ Kumaraswamy(alpha, 1), pi_k = v_1 ... v_k |
| lambda    | method.temperature         | temperature of the relaxed b |
| kappa     | method.kappa               | probability from which on a factor is used |

Phases: (1) b is sampled as the relaxed variable sigmoid((p + logistic noise) / lambda). KL_b is
estimated from that sample and a sampled stick-breaking prior, KL_v is taken against c and d of the
previous task, and KL_r against N(0, 0.1^2). (2) The last method.fine_tune_epochs minimise the
cross-entropy alone, with z as in predictions. Used factors get no updates in either phase. Nothing
is forgotten.

The authors' code draws r_t anew for permuted MNIST (method.start = "fresh"). For split MNIST it
says that starting from r_{t-1} worked ("task_before"; here biases and BatchNorm start so too).

As in the authors' code, l2 on the kernels replaces KL_r: with l2 > 0 there is no KL_r. There are
these differences: an integral over 32 points with an error below 1e-4 replaces the series in KL_v;
biases belong to the task and are no row of A; lambda is constant; gradients are not clipped.

Reference: N. Mehta et al., "Continual learning using a Bayesian nonparametric dictionary of weight
factors", 2021, https://arxiv.org/abs/2004.10098. The HALRP paper does not give F, alpha and kappa.
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
from halrp_jax.training.fit import Fit, make_fit
from halrp_jax.training.setup import Setup
from halrp_jax.types import Method, Params, Size, State
from halrp_jax.weights import trees

_PRIOR_SCALE = 0.1  # standard deviation of r
_LEAST, _MOST = 0.001, 0.999  # range that probabilities in densities are clipped to
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(32)  # of the integral in KL_v


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(dictionary.Config):
  """Config keys `method.*` of IBPWF."""

  factors: int = keys.whole(
    400,
    1,
    None,
    "largest F of a layer; no more than its outputs, and for a dense layer its inputs",
  )
  # Found by `tune` with 25 % of the training images (docs/tuning.md); the paper has no value.
  alpha_share: float = keys.number(2.0, 0, None, "alpha / F of every layer", True)
  kappa: float = keys.number(0.5, 0, 1, "probability from which on a factor is used", True)
  temperature: float = keys.number(
    0.666, 0, None, "lambda: temperature of the relaxed binary variables", True
  )
  fine_tune_epochs: int = keys.whole(2, 0, None, "epochs without sampling, out of `epochs`")


def check(config: keys.Config) -> list[str]:
  """Returns the errors of a run's config that concern several keys of IBPWF."""
  assert isinstance(config.method, Config)
  epochs = config.method.fine_tune_epochs
  if epochs >= config.epochs:
    return [
      f"method.fine_tune_epochs = {epochs} must be less than epochs = {config.epochs}: the rest "
      "is for phase 1"
    ]
  return []


TaskState = dictionary.TaskState


def make(config: Config, setup: Setup) -> Method:
  """Builds IBPWF, and compiles its functions once for all tasks."""
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
    z = prediction_z(config, params)
    task_state = TaskState(z, params["rest"], stats, jnp.int32(task.num_classes))
    shared = {k: params[k] for k in ("A", "B", "p", "r")} | sticks
    shared |= {"used": {n: jnp.maximum(x, z[n] != 0) for n, x in frozen["used"].items()}}
    return state.append(task_state, **shared), {"ranks": dictionary.in_use(task_state)}

  network = dictionary.make_network(f.shapes)
  return Method(learn, lambda state: size(f, state), network, serves=dictionary.SERVES)


# --- the start of a task, and the size --------------------------------------------------
# `f` are the shapes and the compiled functions.


def first_dictionary(f: "_Functions", config: Config, key: jax.Array) -> dict[str, Params]:
  """Returns what tasks share before the first one, without r.

  A and B are drawn, p starts at the mean of the prior, and no factor is used.
  """
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


def begin(
  f: "_Functions",
  config: Config,
  state: State,
  shared: dict[str, Params],
  init_key: jax.Array,
  r_key: jax.Array,
) -> tuple[Params, Params]:
  """Returns the trained parameters and the statistics of a task before its first step.

  Args:
    f: the shapes and the compiled functions.
    config: config of the method.
    state: method state before the task.
    shared: shared state of all tasks.
    init_key: random key for a fresh network.
    r_key: random key for r.
  """
  fresh, stats = f.initialize(init_key)
  params = {k: x for k, x in shared.items() if k not in ("used", "r")}
  if state.tasks and config.start == "task_before":
    previous = state.tasks[-1]
    rest = networks.fresh_head(previous.rest, fresh)
    return params | {"r": shared["r"], "rest": rest}, previous.stats
  return params | {"r": _draw_r(r_key, f.num_factors), "rest": trees.split(fresh)[1]}, stats


def prediction_z(config: Config, params: Params) -> dict[str, jax.Array]:
  """Returns z [F] by layer, as in predictions and in phase 2."""
  return {n: z_of(p, params["r"][n], config.kappa) for n, p in params["p"].items()}


def size(f: "_Functions", state: State) -> Size:
  """Returns the size with the used factors and, for every task, the z of those that it uses.

  Training alone needs the factors that no task uses yet, p, r, c and d, and a bit per factor.
  """
  used = {n: int(x.sum()) for n, x in state.shared["used"].items()}
  lengths = {n: sum(dictionary.matrix_shape(s)) for n, s in f.shapes.items()}
  spare = sum((f.num_factors[n] - used[n]) * k for n, k in lengths.items())
  total = sum(f.num_factors.values())
  coefficients = sum(sum(dictionary.in_use(p).values()) for p in state.tasks)
  training = spare + 4 * total + -(-total // 32)
  return dictionary.size(state, f.shapes, used, coefficients, total * len(state.tasks), training)


def _num_factors(kernel: jax.Array | jax.ShapeDtypeStruct, most: int) -> int:
  """Returns F of a layer, at most `most`."""
  num_in, num_out = dictionary.matrix_shape(kernel)
  return min(most, num_out if kernel.ndim > 2 else min(num_in, num_out))


def _draw_r(key: jax.Array, num_factors: dict[str, int]) -> dict[str, jax.Array]:
  """Draws r [F] by layer from its prior."""
  layer_keys = jax.random.split(key, len(num_factors))
  return {
    n: _PRIOR_SCALE * jax.random.normal(k, (num,))
    for k, (n, num) in zip(layer_keys, num_factors.items(), strict=True)
  }


# --- jitted functions -------------------------------------------------------------------


class _Functions(NamedTuple):
  """Shapes of a network, and functions that are compiled once for all tasks."""

  shapes: dictionary.Shapes
  num_factors: dict[str, int]  # F by layer
  initialize: Callable  # (key) -> params, stats
  fit_sampled: Fit  # of phase 1
  fine_tune: Fit  # of phase 2


def _build(config: Config, setup: Setup) -> _Functions:
  """Builds the functions that are compiled once for all tasks."""
  initialize = networks.make_initialize(setup)
  shapes = dictionary.kernel_shapes(initialize)
  l2 = networks.l2_coefficient(config)

  def kernels_of(params, z):
    return dictionary.compose(params["A"], params["B"], z, shapes)

  def logits_of(kernels, params, stats, image, train, key):
    weights = trees.join(kernels, params["rest"])
    return networks.apply_model(setup.model, weights, stats, image, train, key)

  def apply_fn(params, frozen, stats, image, train, key):
    """Applies the network with z as in predictions, for phase 2 and evaluation."""
    kernels = kernels_of(params, prediction_z(config, params))
    return logits_of(kernels, params, stats, image, train, key)

  expected = losses.cross_entropy_objective(apply_fn)

  def sampled(params, frozen, stats, batch, train, key):
    """Returns the sampled part of the bound, for phase 1; `_make_penalty` has the other part."""
    if not train:
      return expected(params, frozen, stats, batch, train, key)
    key, draw_key = jax.random.split(key)
    z, kl_b = draw_z(draw_key, config, params, shapes)
    kernels = kernels_of(params, z)
    logits, stats = logits_of(kernels, params, stats, batch.image, train, key)
    loss = losses.cross_entropy(logits, batch.label, batch.num_classes)
    return loss + kl_b / frozen["num_images"] + l2 * losses.sum_squares(kernels), logits, stats

  penalty = _make_penalty(shapes, with_r=not l2)
  return _Functions(
    shapes=shapes,
    num_factors={n: _num_factors(s, config.factors) for n, s in shapes.items()},
    initialize=initialize,
    fit_sampled=make_fit(setup, apply_fn, penalty, objective_fn=sampled, edit_fn=_freeze_used),
    fine_tune=make_fit(setup, apply_fn, lambda params, frozen: 0.0, edit_fn=_freeze_used),
  )


def _make_penalty(shapes: dictionary.Shapes, with_r: bool) -> Callable:
  """Builds penalty_fn: (KL_v + KL_r) / N, or KL_v / N if not `with_r`."""

  def penalty(params, frozen):
    kl = losses.sum_squares(params["r"]) / (2 * _PRIOR_SCALE**2) if with_r else 0.0
    for n in shapes:
      now, before = ((x["log_c"][n], x["log_d"][n]) for x in (params, frozen))
      kl += jnp.sum(kl_kumaraswamy(*now, *before))
    return kl / frozen["num_images"]

  return penalty


def _freeze_used(updates: dict, frozen: dict) -> dict:
  """Sets the updates of the factors that an earlier task uses to 0."""
  free = {n: 1.0 - x for n, x in frozen["used"].items()}
  a = {n: u * free[n][None] for n, u in updates["A"].items()}
  b = {n: u * free[n][:, None] for n, u in updates["B"].items()}
  return updates | {"A": a, "B": b}


# --- the mathematics of one layer, for every factor [F] ----------------------------------


def z_of(p: jax.Array, r: jax.Array, kappa: float) -> jax.Array:
  """Returns pi * r where pi >= kappa and 0 elsewhere, with pi = sigmoid(p)."""
  pi = jax.nn.sigmoid(p)
  return jnp.where(pi >= kappa, pi * r, 0.0)


def log1mexp(x: jax.Array) -> jax.Array:
  """Returns log(1 - exp(x)) for x < 0, precise both near 0 and far from it."""
  near = x > -math.log(2)
  of_near = jnp.log(-jnp.expm1(jnp.where(near, x, -1.0)))
  return jnp.where(near, of_near, jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


def draw_z(
  key: jax.Array, config: Config, params: Params, shapes: dictionary.Shapes
) -> tuple[dict[str, jax.Array], jax.Array | float]:
  """Draws z = b_t * r_t of all layers, with relaxed b_t.

  Args:
    key: random key for the draw.
    config: config of the method.
    params: parameters p, log_c, log_d and r by layer.
    shapes: by layer.

  Returns:
    z [F] by layer, and the estimate of KL_b from the same draw.
  """
  z, kl_b = {}, 0.0
  for i, n in enumerate(shapes):
    p, c, d = (params[k][n] for k in ("p", "log_c", "log_d"))
    x, kl = draw_logistic(jax.random.fold_in(key, i), p, c, d)
    z[n] = jax.nn.sigmoid(x / config.temperature) * params["r"][n]
    kl_b += kl
  return z, kl_b


def draw_logistic(
  key: jax.Array, p: jax.Array, log_c: jax.Array, log_d: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Draws x = p + logistic noise, whose sign is b.

  Args:
    key: random key for the draw.
    p: log odds of b.
    log_c: log c_k of the prior's sticks v_k ~ Kumaraswamy(c_k, d_k).
    log_d: log d_k of the same.

  Returns:
    x [F], and the estimate log q(x) - log p(x) of KL_b, where the density p(x) has log odds that
    are drawn from the prior.
  """
  noise_key, prior_key = jax.random.split(key)
  x = p + jax.random.logistic(noise_key, p.shape)
  prior = draw_prior(prior_key, log_c, log_d)
  return x, jnp.sum(log_density(x, p) - log_density(x, prior))


def draw_prior(key: jax.Array, log_c: jax.Array, log_d: jax.Array) -> jax.Array:
  """Draws sticks v_k ~ Kumaraswamy(c_k, d_k), and returns the log odds of pi_k = v_1 ... v_k."""
  u = jax.random.uniform(key, log_c.shape, minval=1e-4, maxval=1 - 1e-4)
  log_v = log1mexp(jnp.log(u) * jnp.exp(-log_d)) * jnp.exp(-log_c)
  log_pi = jnp.clip(jnp.cumsum(log_v), math.log(_LEAST), math.log(_MOST))
  return log_pi - log1mexp(log_pi)


def log_density(x: jax.Array, log_odds: jax.Array) -> jax.Array:
  """Returns the log density at x of the relaxed b.

  It is the logistic distribution around `log_odds`.
  """
  bound = math.log(_MOST / (1 - _MOST))
  y = jnp.clip(log_odds, -bound, bound) - x
  return y - 2 * jax.nn.softplus(y)


def kl_kumaraswamy(
  log_a: jax.Array, log_b: jax.Array, log_alpha: jax.Array, log_beta: jax.Array
) -> jax.Array:
  """Returns KL(Kumaraswamy(a, b) || Kumaraswamy(alpha, beta)).

  E log x = -(digamma(b) + 1/b + Euler's constant) / a and E log(1 - x^a) = -1/b are known.
  E log(1 - x^alpha) differs from -1/b by an integral, which is 0 if a = alpha (`_mean_excess`).
  """
  b, beta, log_ratio = jnp.exp(log_b), jnp.exp(log_beta), log_alpha - log_a
  harmonic = jax.scipy.special.digamma(b) + 1 / b + np.euler_gamma
  excess = _mean_excess(jnp.exp(log_ratio), b)
  known = log_b - log_beta - log_ratio + jnp.expm1(log_ratio) * harmonic + (beta - b) / b
  return known - (beta - 1) * excess


def _mean_excess(rho: jax.Array, b: jax.Array) -> jax.Array:
  """Returns E log(1 - x^alpha) + 1/b, where rho is alpha / a.

  It is an integral over (1 - x^a)^b, which is uniform in [0, 1].
  """
  points = jnp.asarray((_POINTS + 1) / 2, jnp.float32)[:, None]
  # for larger w the excess equals log(rho) in float32
  w = jnp.minimum(-jnp.log(points) / b[None], 16.0)  # -log(1 - x^a)
  excess = w + log1mexp(rho[None] * log1mexp(-w))
  return jnp.asarray(_WEIGHTS / 2, jnp.float32) @ excess
