"""The mathematics of HALRP (paper Sect. 4.1 to 4.4) as functions of arrays.

| symbol | argument     | shape              | meaning |
|--------|--------------|--------------------|---------|
| W      | `base`       | [*window, I, J]    | frozen kernel of the first task (Flax layout) |
| F      | `free`       | [*window, I, J]    | the same kernel after the warm-up on task t |
| R      | `R`          | [J]                | scale of the outputs |
| S      | `S`          | [I]                | scale of the inputs |
| U      | `U`          | [J, K]             | left factors, the first `rank` columns used |
| Sigma  | `sigma`      | [K] or None        | singular values; None: folded into U and V |
| V      | `V`          | [M, K]             | right factors, M = I or |window| I |

W_t[w, i, j] = R[j] W[w, i, j] S[i] + sum_k U[j, k] Sigma[k] V[i, k]. The low-rank part of a
convolution is the same at every position w of its window if V has I rows, as in the paper; with a
row for every input at every position (unfolded) it is sum_k U[j, k] Sigma[k] V[w, i, k]. `*window`
is empty for dense layers.

The functions check the ranks, shapes and types of their arguments with chex when they are called
or traced, and raise AssertionError.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

_LARGEST = 127  # largest integer that `quantized` makes
_TINY = 1e-20  # lower bound of the denominators, as in the authors' code
_OVERSAMPLING, _POWER_ITERATIONS = 16, 3  # of the randomised SVD


class Perturbation(NamedTuple):
  """Perturbation <R, S, U, Sigma, V> of one layer for one task (paper Eq. 2).

  U and V are floating point, or int8 (`quantized`).
  """

  R: jax.Array  # [J]
  S: jax.Array  # [I]
  U: jax.Array  # [J, K]
  sigma: jax.Array | None  # [K]; None: folded into U and V
  V: jax.Array  # [M, K]


class Decomposition(NamedTuple):
  """Warmed-up kernel of one layer as scaled base plus residual, from which ranks are chosen.

  `decompose` finds all m = min(M, J) singular triplets, `decompose_randomized` the largest m.
  """

  R: jax.Array  # [J]
  S: jax.Array  # [I]
  U: jax.Array  # [J, m]
  sigma: jax.Array  # [m] descending
  V: jax.Array  # [M, m]
  energy: jax.Array  # scalar, the sum of all squared singular values: |residual|_F^2


# --- checks of shapes and types, which cost nothing in a compiled function ------------------


def _check_kernels(**kernels: jax.Array) -> None:
  """Raises AssertionError if kernels are not floating point [*window, I, J], all of one shape."""
  for name, x in kernels.items():
    message = f"{name} must be a floating-point kernel [*window, I, J]"
    chex.assert_shape(x, (..., None, None), custom_message=message)
    chex.assert_type(x, float, custom_message=message)
  message = f"{' and '.join(kernels)} must have one shape"
  chex.assert_equal_shape([*kernels.values()], custom_message=message)


def _check_factors(p: Perturbation | Decomposition, base: jax.Array | None = None) -> None:
  """Raises AssertionError if R, S, U, sigma and V have shapes that do not fit together.

  Args:
    p: what they are fields of.
    base: the kernel [*window, I, J] that they must fit too, if given.
  """
  sizes: dict[str, int] = {} if base is None else dict(zip("IJ", base.shape[-2:], strict=True))
  if base is not None and p.V.shape[0] != base.shape[-2]:
    sizes["M"] = base.size // base.shape[-1]
  for name, axes in {"R": "J", "S": "I", "U": "JK", "sigma": "K", "V": "MK"}.items():
    if (x := getattr(p, name)) is None:
      continue
    message = f"{name} must be floating point [{', '.join(axes)}]"
    chex.assert_rank(x, len(axes), custom_message=message)
    if x.dtype != jnp.int8 or name not in "UV" or p.sigma is None:
      chex.assert_type(x, float, custom_message=message)
    shape = tuple(sizes.setdefault(a, n) for a, n in zip(axes, x.shape, strict=True))
    message += " with " + ", ".join(f"{a} = {n}" for a, n in sizes.items())
    chex.assert_shape(x, shape, custom_message=message)


# --- one layer ----------------------------------------------------------------------------


def low_rank_shape(base: jax.Array, unfold: bool) -> tuple[int, int]:
  """Returns (M, J): the number of rows of V, and of U.

  Args:
    base: kernel [*window, I, J].
    unfold: whether V has a row for every input at every position of the window.
  """
  _check_kernels(base=base)
  num_in, num_out = base.shape[-2:]
  return base.size // num_out if unfold else num_in, num_out


def identity(base: jax.Array, columns: int, fold: bool, unfold: bool = False) -> Perturbation:
  """Returns the perturbation that changes nothing: R = S = 1, U = Sigma = V = 0.

  Args:
    base: kernel [*window, I, J].
    columns: width K of U and V.
    fold: whether Sigma is None, folded into U and V.
    unfold: see `low_rank_shape`.
  """
  num_rows, num_out = low_rank_shape(base, unfold)
  sigma = None if fold else jnp.zeros((columns,), base.dtype)
  return Perturbation(
    R=jnp.ones((num_out,), base.dtype),
    S=jnp.ones(base.shape[-2:-1], base.dtype),
    U=jnp.zeros((num_out, columns), base.dtype),
    sigma=sigma,
    V=jnp.zeros((num_rows, columns), base.dtype),
  )


def compose(base: jax.Array, p: Perturbation) -> jax.Array:
  """Returns the perturbed kernel W_t of one layer (paper Eq. 2 and 7).

  Args:
    base: W [*window, I, J].
    p: the perturbation of the layer.

  Returns:
    [*window, I, J]
  """
  _check_kernels(base=base)
  _check_factors(p, base)
  p = dequantized(p)
  right = p.V if p.sigma is None else p.V * p.sigma[None]  # [M, K]
  low_rank = right @ p.U.T
  if low_rank.size == base.size:
    return _scaled(base, p.R, p.S) + low_rank.reshape(base.shape)
  return _scaled(base, p.R, p.S) + _expand(low_rank, base)


def quantized(p: Perturbation) -> Perturbation:
  """Rounds U and V to int8, so that each column has numbers from -127 to 127.

  The scales of the columns of U and V go into Sigma, which the result always has: an int8 number
  takes a fourth of a float32's bytes, and Sigma a float32 per column.

  Args:
    p: with floating-point U and V.
  """
  _check_factors(p)

  def scale_of(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x), 0) / _LARGEST

  def rounded(x: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.round(x / jnp.maximum(scale, _TINY)[None]).astype(jnp.int8)

  of_u, of_v = scale_of(p.U), scale_of(p.V)
  sigma = of_u * of_v if p.sigma is None else of_u * of_v * p.sigma
  return Perturbation(p.R, p.S, rounded(p.U, of_u), sigma, rounded(p.V, of_v))


def dequantized(p: Perturbation) -> Perturbation:
  """Returns a perturbation whose U and V are floating point, as its Sigma is."""
  if p.sigma is None:
    return p
  return p._replace(U=p.U.astype(p.sigma.dtype), V=p.V.astype(p.sigma.dtype))


def _expand(x: jax.Array, like: jax.Array) -> jax.Array:
  """Adds leading axes of length 1, so that `x` broadcasts against `like`."""
  return x.reshape((1,) * (like.ndim - x.ndim) + x.shape)


def _scaled(base: jax.Array, R: jax.Array, S: jax.Array) -> jax.Array:
  """Returns the scaled kernel R W S [*window, I, J]."""
  return base * _expand(R, base) * _expand(S[:, None], base)


def least_squares_scales(base: jax.Array, free: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the scales R [J] and S [I] by least squares (paper Eq. 3 and 4).

  R minimises |F - R W|^2; then S minimises |F - R W S|^2 for this R. There is one pass, as in the
  authors' code.

  Args:
    base: W [*window, I, J].
    free: F [*window, I, J].
  """
  _check_kernels(base=base, free=free)
  window = tuple(range(base.ndim - 2))
  over_in, over_out = (*window, base.ndim - 2), (*window, base.ndim - 1)
  R = jnp.sum(free * base, over_in) / jnp.maximum(jnp.sum(base**2, over_in), _TINY)
  scaled = base * _expand(R, base)
  S = jnp.sum(free * scaled, over_out) / jnp.maximum(jnp.sum(scaled**2, over_out), _TINY)
  return R, S


def residual(
  base: jax.Array, free: jax.Array, R: jax.Array, S: jax.Array, unfold: bool = False
) -> jax.Array:
  """Returns the residual F - R W S [J, M] (paper Sect. 4.2).

  Its average over the window is the least-squares optimum of a perturbation that is constant there;
  an unfolded one needs no average.

  Args:
    base: W [*window, I, J].
    free: F [*window, I, J].
    R: [J]
    S: [I]
    unfold: see `low_rank_shape`.
  """
  _check_kernels(base=base, free=free)
  chex.assert_shape((R, S), (base.shape[-1:], base.shape[-2:-1]), custom_message="R [J], S [I]")
  rest = free - _scaled(base, R, S)
  if unfold:
    return rest.reshape(-1, rest.shape[-1]).T
  return rest.mean(tuple(range(rest.ndim - 2))).T


def decompose(
  base: jax.Array, free: jax.Array, scales: bool = True, unfold: bool = False
) -> Decomposition:
  """Returns scales, residual and its thin SVD (paper Alg. 1, lines 4 and 5).

  Args:
    base: W [*window, I, J].
    free: F [*window, I, J].
    scales: whether R and S are those of least squares; otherwise they are 1.
    unfold: see `low_rank_shape`.
  """
  R, S = _scales(base, free, scales)
  rest = residual(base, free, R, S, unfold)
  U, sigma, Vt = jnp.linalg.svd(rest, full_matrices=False)
  return Decomposition(R, S, U, sigma, Vt.T, jnp.sum(rest**2))


def scales_alone(
  base: jax.Array, free: jax.Array, scales: bool = True, unfold: bool = False
) -> Decomposition:
  """Returns the scales that `decompose` finds, without singular triplets: m and the energy are 0.

  Args:
    base: W [*window, I, J].
    free: F [*window, I, J].
    scales: see `decompose`.
    unfold: see `low_rank_shape`.
  """
  num_rows, num_out = low_rank_shape(base, unfold)
  R, S = _scales(base, free, scales)
  none = jnp.zeros((0,), base.dtype)
  U, V = (jnp.zeros((n, 0), base.dtype) for n in (num_out, num_rows))
  return Decomposition(R, S, U, none, V, jnp.zeros((), base.dtype))


def _scales(base: jax.Array, free: jax.Array, scales: bool) -> tuple[jax.Array, jax.Array]:
  """Returns R [J] and S [I] by least squares, or ones."""
  if scales:
    return least_squares_scales(base, free)
  return jnp.ones(base.shape[-1:], base.dtype), jnp.ones(base.shape[-2:-1], base.dtype)


def decompose_randomized(
  base: jax.Array,
  free: jax.Array,
  key: jax.Array,
  rank: int,
  scales: bool = True,
  unfold: bool = False,
) -> Decomposition:
  """Decomposes as `decompose` does, but finds only the largest `rank` singular triplets.

  They are found by randomised subspace iteration (Halko, Martinsson and Tropp, 2011, Alg. 4.4). A
  layer with hardly more singular values than `rank` is decomposed exactly.

  Args:
    base: W [*window, I, J].
    free: F [*window, I, J].
    key: random key for the start.
    rank: number of singular triplets.
    scales: see `decompose`.
    unfold: see `low_rank_shape`.
  """
  with jax.default_matmul_precision("float32"):  # accelerators take a lower one by default
    return _decompose_randomized(base, free, key, rank, scales, unfold)


def _decompose_randomized(
  base: jax.Array, free: jax.Array, key: jax.Array, rank: int, scales: bool, unfold: bool
) -> Decomposition:
  """Computes `decompose_randomized` in the current precision of products."""
  shape = low_rank_shape(base, unfold)
  width = rank + _OVERSAMPLING
  if width >= min(shape):
    return decompose(base, free, scales, unfold)
  R, S = _scales(base, free, scales)
  rest = residual(base, free, R, S, unfold)  # [J, M]
  q, _ = jnp.linalg.qr(rest @ jax.random.normal(key, (shape[0], width)))
  for _ in range(_POWER_ITERATIONS):
    p, _ = jnp.linalg.qr(rest.T @ q)
    q, _ = jnp.linalg.qr(rest @ p)
  left, sigma, Vt = jnp.linalg.svd(q.T @ rest, full_matrices=False)
  U = q @ left
  return Decomposition(R, S, U[:, :rank], sigma[:rank], Vt[:rank].T, jnp.sum(rest**2))


def squared_singular_values(d: Decomposition) -> np.ndarray:
  """Returns all min(M, J) squared singular values of the residual, descending, in float64.

  The values that a randomised decomposition has not found are replaced by an upper bound: the
  remaining energy is divided among them, each as large as the last one found until nothing remains.
  So the choice of ranks is the exact one if it keeps none of these.
  """
  _check_factors(d)
  found = np.asarray(d.sigma, np.float64) ** 2
  num_missing = min(d.U.shape[0], d.V.shape[0]) - found.size
  remaining = max(float(d.energy) - found.sum(), 0.0)
  tail = np.clip(remaining - found[-1] * np.arange(num_missing), 0, found[-1])
  return np.concatenate([found, tail])


def truncate(
  d: Decomposition, rank: jax.typing.ArrayLike, columns: int, fold: bool
) -> Perturbation:
  """Returns the perturbation with the largest `rank` singular triplets (paper Eq. 6).

  The columns from `rank` on are zero in U, Sigma and V together. This makes them a fixed point of
  training: with two of the three zero, every gradient of the third is zero too. Zeros in Sigma
  alone would not be enough: its gradient is u' dL/dB v with the singular vectors u and v.

  Args:
    d: the decomposition.
    rank: int scalar, 0 <= rank <= min(columns, m); may be traced.
    columns: static width K of the result.
    fold: whether sqrt(Sigma) goes into both U and V and Sigma is None, as in the authors' code.
  """
  _check_factors(d)
  chex.assert_rank(rank, 0, custom_message="rank must be a scalar")
  used = jnp.arange(d.sigma.shape[0]) < rank
  sigma = jnp.where(used, d.sigma, 0)
  left, right = (jnp.sqrt(sigma),) * 2 if fold else (used, used)

  def resize(x: jax.Array) -> jax.Array:  # [..., m] -> [..., columns]
    x = x[..., :columns]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, columns - x.shape[-1])])

  return Perturbation(
    d.R, d.S, resize(d.U * left[None]), None if fold else resize(sigma), resize(d.V * right[None])
  )


def random_factors(key: jax.Array, d: Decomposition, rank: int, columns: int) -> Perturbation:
  """Returns least-squares R and S with random U and V: Random LRP of the paper's Table 6.

  The paper does not say how U and V are drawn. Here they are uniform like the kernels of fresh
  dense layers: V within +-1/sqrt(M), U within +-1/sqrt(rank). Sigma is folded.

  Args:
    key: random key for U and V.
    d: the decomposition, of which R and S are used.
    rank: number of columns that are drawn; the others are zero.
    columns: width K of U and V.
  """
  _check_factors(d)
  key_u, key_v = jax.random.split(key)
  used = jnp.arange(columns) < rank

  def draw(key: jax.Array, rows: int, fan_in: int) -> jax.Array:
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
  """Returns a rank for every layer, chosen for all layers together (paper Eq. 11).

  The scores of all layers are pooled and taken in descending order until their sum exceeds the
  share `alpha` of the total. The rank of a layer is the number of its scores that are taken. Of
  equal scores, those of earlier layers and columns come first.

  Args:
    scores: one array [m_l] per layer, descending: ||g_l||^2 sigma_lk^2 (times the window's area).
    alpha: share of the total score to keep; 1 or more keeps everything.
    crossing: whether the score that first carries the sum past `alpha` is kept too.
    min_rank: smallest rank of a layer; 1 in the authors' code.
    upper_rank: largest rank of a layer, 0 for no limit. The ranks that it cuts off are not given to
      other layers.

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
    # strictly greater, so that the first score is kept even at alpha = 0
    beyond = np.cumsum(pooled[order]) / total > alpha
    if beyond.any():
      num_kept = int(np.argmax(beyond)) + bool(crossing)
  kept = np.bincount(layer[order[:num_kept]], minlength=len(scores))
  return [
    min(max(int(k), min_rank), upper_rank or len(s), len(s))
    for k, s in zip(kept, scores, strict=True)
  ]


def allocate_budget(
  priorities: list[np.ndarray],
  costs: Sequence[float],
  budget: float,
  upper_rank: int = 0,
) -> list[int]:
  """Returns ranks whose U and V have at most `budget` numbers, chosen for all layers together.

  Columns are taken greedily in descending priority as long as they fit. Of equal priorities, those
  of earlier layers come first.

  Args:
    priorities: one array [m_l] per layer, descending: of its first, second, ... column.
    costs: numbers that one column of a layer adds.
    budget: most numbers of all layers together.
    upper_rank: largest rank of a layer, 0 for no limit.
  """
  ranks, left = [0] * len(priorities), budget
  columns = [
    (-priority, layer)
    for layer, p in enumerate(priorities)
    for priority in p[: upper_rank or len(p)]
  ]
  for _, layer in sorted(columns, key=lambda column: column[0]):
    if costs[layer] <= left:
      ranks[layer] += 1
      left -= costs[layer]
  return ranks


def equal_priorities(widths: list[int]) -> list[np.ndarray]:
  """Returns priorities that give all layers equal ranks, up to one column that fits no more.

  Args:
    widths: largest possible rank of each layer.
  """
  return [-np.arange(n, dtype=np.float64) for n in widths]


def explained(moment: jax.typing.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """Returns shares and directions of the variance of a layer's inputs (EVA, arXiv 2410.07170).

  Args:
    moment: sum of x x' over inputs x. [I, I]

  Returns:
    Shares of the total, descending, float64 [I], and the directions as columns, float32 [I, I].
  """
  values, vectors = np.linalg.eigh(np.asarray(moment, np.float64))
  values = np.maximum(values[::-1], 0)
  return values / max(values.sum(), _TINY), vectors[:, ::-1].astype(np.float32)


def allocate_count(scores: list[np.ndarray], count: int, upper_rank: int) -> list[int]:
  """Returns a rank for every layer, `count` together: the largest of all scores are taken.

  Args:
    scores: one array [m_l] per layer, descending.
    count: sum of all ranks, or less if the layers have no room for it.
    upper_rank: largest rank of a layer.
  """
  scores = [np.asarray(s, np.float64)[:upper_rank] for s in scores]
  layer = np.repeat(np.arange(len(scores)), [len(s) for s in scores])
  order = np.argsort(-np.concatenate(scores), kind="stable")[:count]
  return np.bincount(layer[order], minlength=len(scores)).tolist()


def directions(d: Decomposition, vectors: np.ndarray, rank: int, columns: int) -> Perturbation:
  """Returns the perturbation with U = 0 and the first `rank` of some directions as V.

  Args:
    d: the decomposition, of which R and S are used.
    vectors: [I, I] orthonormal columns.
    rank: number of columns of V that are used; the others are zero.
    columns: width K of U and V.
  """
  _check_factors(d)
  v = np.zeros((d.V.shape[0], columns), np.float32)
  v[:, :rank] = vectors[:, :rank]
  return Perturbation(d.R, d.S, jnp.zeros((d.U.shape[0], columns)), None, jnp.asarray(v))


PRUNE_RULES: dict[str, tuple[str | None, bool]] = {
  # rule: (values that share one percentile, whether the absolute threshold applies too)
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
  """Returns the share of the low-rank values to prune, or None if nothing is to be pruned.

  Args:
    rule: one of

      * "excess": below the bound None, above it the share 1 - bound / increment that would bring
        the dense growth back to the bound (the authors' option boundAlltask);
      * "fixed": always 1 - bound;
      * "fixed_above_bound": below the bound None, above it 1 - bound (paper Alg. 1, line 9, and
        Sect. 4.4 (2): "the (1 - gamma)-percentile").
    bound: growth that is allowed, as a fraction of the base; None allows any.
    increment: dense growth of the model, in which zeros count, as a fraction of the base.
  """
  if bound is None:
    return 0.0
  if rule != "fixed" and increment < bound:
    return None
  return 1 - bound / increment if rule == "excess" else 1 - bound


def prune_thresholds(
  values: list[dict[str, np.ndarray]], rule: str, absolute: float, rate: float
) -> list[dict[str, float]]:
  """Returns thresholds tau per task and layer: entries with |x| <= tau are pruned (Sect. 4.4).

  Args:
    values: one 1-D array per task and layer, with all low-rank values and the zeros of earlier
      pruning, but without padding.
    rule: a key of `PRUNE_RULES`.
    absolute: the absolute threshold.
    rate: share of the pooled values below the percentile, from 0 to 1; 0 for no percentile.

  Returns:
    For every task and layer a threshold; -1 prunes nothing.
  """
  arrays = [v for task in values for v in task.values()]
  chex.assert_rank(arrays, 1, custom_message="values must be one array [n] per task and layer")
  pool, use_absolute = PRUNE_RULES[rule]
  floor = absolute if use_absolute else -1.0

  def percentile(pooled: list[np.ndarray]) -> float:
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


def prune(p: Perturbation, tau: jax.typing.ArrayLike) -> Perturbation:
  """Sets the entries of U and V to 0 whose magnitude does not exceed the scalar `tau`."""
  _check_factors(p)
  chex.assert_rank(tau, 0, custom_message="tau must be a scalar")

  def zero_small(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(x) > tau, x, 0)

  return p._replace(U=zero_small(p.U), V=zero_small(p.V))
