"""The mathematics of HALRP (paper Sect. 4.1 to 4.4). Arrays in, arrays out.

| symbol | argument     | shape              | meaning |
|--------|--------------|--------------------|---------|
| W      | `base`       | [*window, I, J]    | frozen kernel of the first task (Flax layout) |
| F      | `free`       | [*window, I, J]    | the same kernel after the warm-up on task t |
| R      | `R`          | [J]                | scale of the outputs |
| S      | `S`          | [I]                | scale of the inputs |
| U      | `U`          | [J, K]             | left factors, the first `rank` columns used |
| Sigma  | `sigma`      | [K] or None        | singular values; None: folded into U and V |
| V      | `V`          | [I, K]             | right factors |

W_t[w, i, j] = R[j] W[w, i, j] S[i] + sum_k U[j, k] Sigma[k] V[i, k]; a convolution's low-rank part
is the same at every position w of its window. `*window` is empty for dense layers.

All functions of arrays check ranks, shapes and types with chex when they are called or traced.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

_TINY = 1e-20  # the authors' lower clamp of the denominators


class Perturbation(NamedTuple):
  """<R, S, U, Sigma, V> of one layer for one task."""

  R: jax.Array
  S: jax.Array
  U: jax.Array
  sigma: jax.Array | None
  V: jax.Array


class Decomposition(NamedTuple):
  """A warmed-up kernel as scaled base plus residual: input of the rank choice.

  The exact one has all m = min(I, J) singular triplets, the randomised one the largest m.
  """

  R: jax.Array  # [J]
  S: jax.Array  # [I]
  U: jax.Array  # [J, m]
  sigma: jax.Array  # [m] descending
  V: jax.Array  # [I, m]
  energy: jax.Array  # scalar, sum of *all* squared singular values: |residual|_F^2


# --- checks: of shapes and types alone, so they cost nothing in a compiled function ---------


def _check_kernels(**kernels) -> None:
  """Raises AssertionError if kernels are not floating point [*window, I, J], all of one shape."""
  for name, x in kernels.items():
    message = f"{name} must be a floating-point kernel [*window, I, J]"
    chex.assert_shape(x, (..., None, None), custom_message=message)
    chex.assert_type(x, float, custom_message=message)
  message = f"{' and '.join(kernels)} must have one shape"
  chex.assert_equal_shape([*kernels.values()], custom_message=message)


def _check_factors(p, base: jax.Array | None = None) -> None:
  """Raises AssertionError if the arrays of a perturbation or decomposition do not fit together.

  Args:
    p: its R, S, U, sigma and V.
    base: the kernel [*window, I, J] that they belong to, if it is at hand.
  """
  sizes = {} if base is None else dict(zip("IJ", base.shape[-2:], strict=True))
  for name, axes in {"R": "J", "S": "I", "U": "JK", "sigma": "K", "V": "IK"}.items():
    if (x := getattr(p, name)) is None:
      continue
    message = f"{name} must be floating point [{', '.join(axes)}]"
    chex.assert_rank(x, len(axes), custom_message=message)
    chex.assert_type(x, float, custom_message=message)
    shape = tuple(sizes.setdefault(a, n) for a, n in zip(axes, x.shape, strict=True))
    message += " with " + ", ".join(f"{a} = {n}" for a, n in sizes.items())
    chex.assert_shape(x, shape, custom_message=message)


# --- one layer ----------------------------------------------------------------------------


def identity(base: jax.Array, columns: int, fold: bool) -> Perturbation:
  """The perturbation that changes nothing: R = S = 1, no low-rank part."""
  _check_kernels(base=base)
  num_in, num_out = base.shape[-2:]
  sigma = None if fold else jnp.zeros((columns,), base.dtype)
  return Perturbation(
    R=jnp.ones((num_out,), base.dtype),
    S=jnp.ones((num_in,), base.dtype),
    U=jnp.zeros((num_out, columns), base.dtype),
    sigma=sigma,
    V=jnp.zeros((num_in, columns), base.dtype),
  )


def compose(base: jax.Array, p: Perturbation) -> jax.Array:
  """W_t of one layer (paper Eq. 2 and 7). [*window, I, J] -> [*window, I, J]"""
  _check_kernels(base=base)
  _check_factors(p, base)
  right = p.V if p.sigma is None else p.V * p.sigma[None]  # [I, K]
  return _scaled(base, p.R, p.S) + _expand(right @ p.U.T, base)


def _expand(x: jax.Array, like: jax.Array) -> jax.Array:
  """Leading axes of length 1, so that `x` broadcasts against `like`."""
  return x.reshape((1,) * (like.ndim - x.ndim) + x.shape)


def _scaled(base: jax.Array, R: jax.Array, S: jax.Array) -> jax.Array:
  """R W S. [*window, I, J]"""
  return base * _expand(R, base) * _expand(S[:, None], base)


def least_squares_scales(base: jax.Array, free: jax.Array) -> tuple[jax.Array, jax.Array]:
  """R that minimises |F - R W|^2, then S that minimises |F - R W S|^2 given R (paper Eq. 3, 4).

  One pass, as in the authors' code. Returns R [J], S [I].
  """
  _check_kernels(base=base, free=free)
  window = tuple(range(base.ndim - 2))
  over_in, over_out = (*window, base.ndim - 2), (*window, base.ndim - 1)
  R = jnp.sum(free * base, over_in) / jnp.maximum(jnp.sum(base**2, over_in), _TINY)
  scaled = base * _expand(R, base)
  S = jnp.sum(free * scaled, over_out) / jnp.maximum(jnp.sum(scaled**2, over_out), _TINY)
  return R, S


def residual(base: jax.Array, free: jax.Array, R: jax.Array, S: jax.Array) -> jax.Array:
  """What R and S leave over, averaged over the window: the least-squares optimum of a
  perturbation that is constant in the window (paper Sect. 4.2). -> [J, I]
  """
  _check_kernels(base=base, free=free)
  chex.assert_shape((R, S), (base.shape[-1:], base.shape[-2:-1]), custom_message="R [J], S [I]")
  rest = free - _scaled(base, R, S)
  return rest.mean(tuple(range(rest.ndim - 2))).T


def decompose(base: jax.Array, free: jax.Array) -> Decomposition:
  """Steps 4 and 5 of Algorithm 1: scales, residual, thin SVD."""
  R, S = least_squares_scales(base, free)
  rest = residual(base, free, R, S)
  U, sigma, Vt = jnp.linalg.svd(rest, full_matrices=False)
  return Decomposition(R, S, U, sigma, Vt.T, jnp.sum(rest**2))


_OVERSAMPLING, _POWER_ITERATIONS = 16, 3


def decompose_randomized(
  base: jax.Array, free: jax.Array, key: jax.Array, rank: int
) -> Decomposition:
  """`decompose` for the largest `rank` singular triplets only (Halko, Martinsson, Tropp 2011,
  Alg. 4.4: subspace iteration). The exact one where that would be hardly more than all of them.
  """
  with jax.default_matmul_precision("float32"):  # accelerators take less by default
    return _decompose_randomized(base, free, key, rank)


def _decompose_randomized(base, free, key, rank):
  _check_kernels(base=base, free=free)
  num_in, num_out = base.shape[-2:]
  width = rank + _OVERSAMPLING
  if width >= min(num_in, num_out):
    return decompose(base, free)
  R, S = least_squares_scales(base, free)
  rest = residual(base, free, R, S)  # [J, I]
  Q, _ = jnp.linalg.qr(rest @ jax.random.normal(key, (num_in, width)))
  for _ in range(_POWER_ITERATIONS):
    P, _ = jnp.linalg.qr(rest.T @ Q)
    Q, _ = jnp.linalg.qr(rest @ P)
  U, sigma, Vt = jnp.linalg.svd(Q.T @ rest, full_matrices=False)
  U = Q @ U
  return Decomposition(R, S, U[:, :rank], sigma[:rank], Vt[:rank].T, jnp.sum(rest**2))


def squared_singular_values(d: Decomposition) -> np.ndarray:
  """All min(I, J) of them, descending. float64

  Those that a randomised decomposition has not found share the energy that is left, each as large
  as it can be: the last one found. So the rank choice is the exact one if it keeps none of these.
  """
  _check_factors(d)
  found = np.asarray(d.sigma, np.float64) ** 2
  missing = min(d.U.shape[0], d.V.shape[0]) - found.size
  left = max(float(d.energy) - found.sum(), 0.0)
  tail = np.clip(left - found[-1] * np.arange(missing), 0, found[-1])
  return np.concatenate([found, tail])


def truncate(d: Decomposition, rank: jax.Array, columns: int, fold: bool) -> Perturbation:
  """Keeps `rank` singular triplets (paper Eq. 6), padded with zeros to `columns`.

  Columns from `rank` on are zero in U, Sigma and V *together*, which makes them a fixed point
  of training: with two of the three zero every gradient of the third is zero too. (With
  orthonormal U and V, zeroing Sigma alone would not do: dL/dSigma = u' dL/dB v.)

  Args:
    d: the decomposition.
    rank: int scalar, 0 <= rank <= min(columns, m); may be traced.
    columns: static width K of the result.
    fold: sqrt(Sigma) goes into U and V and Sigma is None (the authors' code); otherwise it stays.
  """
  _check_factors(d)
  chex.assert_rank(rank, 0, custom_message="rank must be a scalar")
  used = jnp.arange(d.sigma.shape[0]) < rank
  sigma = jnp.where(used, d.sigma, 0)
  left, right = (jnp.sqrt(sigma),) * 2 if fold else (used, used)

  def fit(x):  # [..., m] -> [..., columns]
    x = x[..., :columns]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, columns - x.shape[-1])])

  return Perturbation(
    d.R, d.S, fit(d.U * left[None]), None if fold else fit(sigma), fit(d.V * right[None])
  )


def random_factors(key: jax.Array, d: Decomposition, rank: int, columns: int) -> Perturbation:
  """Random-LRP ablation (paper Table 6): least-squares R and S, random U and V.

  The paper does not say how; here both are uniform as a fresh dense layer of their width would
  be: V in +-1/sqrt(I), U in +-1/sqrt(rank). Sigma is folded.
  """
  _check_factors(d)
  key_u, key_v = jax.random.split(key)
  used = jnp.arange(columns) < rank

  def draw(key, rows, fan_in):
    bound = 1 / math.sqrt(max(fan_in, 1))
    x = jax.random.uniform(key, (rows, columns), minval=-bound, maxval=bound)
    return jnp.where(used[None], x, 0)

  rows_u, rows_v = d.U.shape[0], d.V.shape[0]
  return Perturbation(d.R, d.S, draw(key_u, rows_u, rank), None, draw(key_v, rows_v, rows_v))


def allocate_ranks(
  scores: list[np.ndarray],
  alpha: float,
  *,
  crossing: bool = True,
  min_rank: int = 0,
  upper_rank: int = 0,
) -> list[int]:
  """Greedy water-filling of one rank budget over all layers (paper Eq. 11).

  The scores of all layers are pooled and poured out in descending order until their sum passes
  `alpha` of the total. Ties keep the order of layers and columns.

  Args:
    scores: per layer [m_l], descending: ||g_l||^2 sigma_lk^2 (times the window's area).
    alpha: share of the total score to keep; >= 1 keeps everything.
    crossing: the element that first carries the sum past alpha is kept too.
    min_rank: no layer gets less (the authors' code: 1).
    upper_rank: no layer gets more; what the cap frees is not given to others. 0: no cap.

  Returns:
    A rank per layer, at most m_l.

  Raises:
    ValueError: if a score is negative or not finite.
  """
  scores = [np.asarray(s, np.float64) for s in scores]
  chex.assert_rank(scores, 1, custom_message="scores must be one array [m] per layer")
  pooled = np.concatenate(scores)
  if not np.isfinite(pooled).all() or (pooled < 0).any():
    raise ValueError("scores must be finite and not negative")
  layer = np.repeat(np.arange(len(scores)), [len(s) for s in scores])
  order = np.argsort(-pooled, kind="stable")
  total = pooled.sum()
  num_kept = len(pooled)
  if alpha < 1 and total > 0:
    # strictly greater: the first element is kept even at alpha = 0
    beyond = np.cumsum(pooled[order]) / total > alpha
    if beyond.any():
      num_kept = int(np.argmax(beyond)) + bool(crossing)
  kept = np.bincount(layer[order[:num_kept]], minlength=len(scores))
  return [
    min(max(int(k), min_rank), upper_rank or len(s), len(s))
    for k, s in zip(kept, scores, strict=True)
  ]


PRUNE_RULES = {
  # rule: (what shares one percentile, whether the absolute threshold counts too)
  "none": (None, False),
  "absolute": (None, True),
  "relative": ("layer", False),
  "relative_all_layers": ("task", False),
  "relative_all_layers_all_tasks": ("all", False),
  "mixed": ("layer", True),
  "mixed_all_layers": ("task", True),
  "mixed_all_layers_all_tasks": ("all", True),
}


def prune_rate(rule: str, bound: float | None, increment: float) -> float | None:
  """Share of the low-rank values to prune, or None: nothing is pruned this time.

  Args:
    rule: "excess" (the authors' boundAlltask: nothing below the bound, above it the share
      1 - bound / increment that would bring the *dense* growth back to the bound), "fixed" (always
      1 - bound), "fixed_above_bound" (1 - bound, only above it: paper Alg. 1 line 9 and
      Sect. 4.4 (2), "the (1 - gamma)-percentile").
    bound: growth that is allowed, as a fraction of the base; None: any.
    increment: dense growth now (zeros count), as a fraction of the base.
  """
  if bound is None:
    return 0.0
  if rule != "fixed" and increment < bound:
    return None
  return 1 - bound / increment if rule == "excess" else 1 - bound


def prune_thresholds(
  values: list[dict[str, np.ndarray]], rule: str, absolute: float, rate: float
) -> list[dict[str, float]]:
  """Thresholds tau per task and layer; entries with |x| <= tau are to be zeroed (Sect. 4.4).

  Args:
    values: per task a dict layer -> 1-D array of all its low-rank values, old zeros included,
      padding excluded.
    rule: a key of `PRUNE_RULES`.
    absolute: the absolute threshold.
    rate: share of the pool below the percentile, 0..1; 0: no percentile.

  Returns:
    The same structure with one float per layer; -1 prunes nothing.
  """
  arrays = [v for task in values for v in task.values()]
  chex.assert_rank(arrays, 1, custom_message="values must be one array [n] per task and layer")
  pool, use_absolute = PRUNE_RULES[rule]
  floor = absolute if use_absolute else -1.0

  def percentile(pooled):
    magnitudes = np.abs(np.concatenate(pooled)) if pooled else np.zeros(0)
    if pool is None or rate <= 0 or not magnitudes.size:
      return floor
    return max(floor, float(np.percentile(magnitudes, 100 * rate)))

  if pool == "all":
    tau = percentile(arrays)
    return [dict.fromkeys(task, tau) for task in values]
  if pool == "task":
    return [dict.fromkeys(task, percentile(list(task.values()))) for task in values]
  return [{layer: percentile([v]) for layer, v in task.items()} for task in values]


def prune(p: Perturbation, tau: jax.Array) -> Perturbation:
  """Zeroes the entries of U and V whose magnitude does not exceed `tau`."""
  _check_factors(p)
  chex.assert_rank(tau, 0, custom_message="tau must be a scalar")

  def keep(x):
    return jnp.where(jnp.abs(x) > tau, x, 0)

  return p._replace(U=keep(p.U), V=keep(p.V))
