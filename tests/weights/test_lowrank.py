import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from halrp_jax.weights import lowrank


def kernels(key, shape=(3, 3, 4, 6)):
  """Base and warmed-up kernel of a convolution (or a dense layer)."""
  a, b = jax.random.split(jax.random.key(key))
  base = jax.random.normal(a, shape)
  return base, base + 0.3 * jax.random.normal(b, shape)


@pytest.mark.parametrize("shape", [(5, 7), (3, 3, 4, 6)])
def test_scales_against_a_least_squares_solver(shape):
  base, free = kernels(0, shape)
  R, S = lowrank.least_squares_scales(base, free)
  w, f = (np.asarray(x, np.float64).reshape(-1, *shape[-2:]) for x in (base, free))
  for j in range(shape[-1]):  # R with S = 1
    solution = np.linalg.lstsq(w[..., j].reshape(-1, 1), f[..., j].ravel(), rcond=None)[0]
    assert float(R[j]) == pytest.approx(solution[0], rel=1e-5)
  scaled = w * np.asarray(R, np.float64)
  for i in range(shape[-2]):  # S given R
    solution = np.linalg.lstsq(scaled[:, i].reshape(-1, 1), f[:, i].ravel(), rcond=None)[0]
    assert float(S[i]) == pytest.approx(solution[0], rel=1e-5)


def test_s_is_a_minimum_of_its_objective():
  base, free = kernels(1)
  R, S = lowrank.least_squares_scales(base, free)
  p = lowrank.identity(base, 1, fold=True)._replace(R=R)

  def objective(s):
    return float(jnp.sum((free - lowrank.compose(base, p._replace(S=jnp.asarray(s)))) ** 2))

  best = scipy.optimize.minimize(objective, np.ones(4), method="Nelder-Mead", tol=1e-3).fun
  assert objective(S) <= best + 1e-3


def test_a_zero_kernel_gives_finite_scales():
  R, S = lowrank.least_squares_scales(jnp.zeros((3, 4)), jnp.ones((3, 4)))
  chex.assert_tree_all_finite((R, S))


@pytest.mark.parametrize(
  ("shape", "unfold", "exact"),
  [((5, 7), False, True), ((3, 3, 4, 6), False, False), ((3, 3, 4, 6), True, True)],
)
def test_full_rank_reproduces_a_dense_kernel_and_an_unfolded_convolution(shape, unfold, exact):
  base, free = kernels(2, shape)
  d = lowrank.decompose(base, free, unfold=unfold)
  columns = min(lowrank.low_rank_shape(base, unfold))
  assert d.V.shape[0] == lowrank.low_rank_shape(base, unfold)[0]
  p = lowrank.truncate(d, columns, columns, fold=True)
  error = float(jnp.abs(lowrank.compose(base, p) - free).max())
  assert (error < 1e-5) == exact


def test_an_unfolded_truncation_is_the_best_of_its_rank():
  base, free = kernels(4, (3, 3, 4, 6))
  d = lowrank.decompose(base, free, unfold=True)
  scaled = np.asarray(base) * np.asarray(d.R) * np.asarray(d.S)[:, None]
  rest = (np.asarray(free) - scaled).reshape(-1, 6)
  for rank in range(7):
    p = lowrank.truncate(d, rank, 6, True)
    error = float(jnp.sum((lowrank.compose(base, p) - free) ** 2))
    tail = np.sum(np.linalg.svd(rest, compute_uv=False)[rank:] ** 2)
    np.testing.assert_allclose(error, tail, rtol=1e-3, atol=1e-6)
  found = lowrank.decompose_randomized(base, free, jax.random.key(0), 3, unfold=True)
  np.testing.assert_allclose(found.sigma[:3], d.sigma[:3], rtol=1e-4)


def test_the_window_mean_is_the_best_constant_in_the_window():
  base, free = kernels(3)
  d = lowrank.decompose(base, free)
  p = lowrank.truncate(d, 4, 4, fold=True)
  best = float(jnp.sum((free - lowrank.compose(base, p)) ** 2))
  for seed in range(5):
    other = p._replace(U=p.U + 0.01 * jax.random.normal(jax.random.key(seed), p.U.shape))
    assert best < float(jnp.sum((free - lowrank.compose(base, other)) ** 2))


@pytest.mark.parametrize("fold", [True, False])
def test_the_error_of_a_truncation_is_the_tail_energy(fold):
  base, free = kernels(4, (6, 9))
  d = lowrank.decompose(base, free)
  for rank in range(7):
    p = lowrank.truncate(d, rank, 6, fold)
    error = jnp.sum((lowrank.compose(base, p) - free) ** 2)
    assert float(error) == pytest.approx(float(jnp.sum(d.sigma[rank:] ** 2)), abs=1e-4)


@pytest.mark.parametrize("fold", [True, False])
def test_padding_is_zero_in_all_factors(fold):
  d = lowrank.decompose(*kernels(5, (6, 9)))
  p = lowrank.truncate(d, 2, 5, fold)
  assert p.U.shape == (9, 5) and p.V.shape == (6, 5)
  for leaf in (p.U, p.V) if fold else (p.U, p.V, p.sigma[None]):
    assert not np.any(leaf[:, 2:]) and np.all(np.any(np.asarray(leaf[:, :2]), axis=0))


def test_folding_changes_the_parts_and_not_the_kernel():
  base, free = kernels(6)
  d = lowrank.decompose(base, free)
  folded, kept = (lowrank.truncate(d, 3, 4, fold) for fold in (True, False))
  assert folded.sigma is None and kept.sigma is not None
  a, b = lowrank.compose(base, folded), lowrank.compose(base, kept)
  np.testing.assert_allclose(a, b, atol=1e-5)


def test_truncate_pads_beyond_the_full_rank():
  d = lowrank.decompose(*kernels(7, (3, 9)))
  p = lowrank.truncate(d, 3, 8, fold=True)
  assert p.U.shape == (9, 8) and p.V.shape == (3, 8)


def test_identity_changes_no_bit():
  base, _ = kernels(8)
  for fold, unfold in itertools.product((True, False), repeat=2):
    p = lowrank.identity(base, 4, fold, unfold)
    np.testing.assert_array_equal(lowrank.compose(base, p), base)


def test_random_factors_use_only_the_rank():
  base, free = kernels(9)
  d = lowrank.decompose(base, free)
  p = lowrank.random_factors(jax.random.key(0), d, 2, 4)
  assert not np.any(p.U[:, 2:]) and not np.any(p.V[:, 2:]) and np.all(p.U[:, :2])
  assert np.abs(p.V).max() <= 0.5  # 1 / sqrt(4 inputs)
  np.testing.assert_array_equal(p.R, d.R)


# --- ranks --------------------------------------------------------------------------------


def brute_force(scores, alpha):
  """Fewest elements, taken from the front of each layer, that carry more than alpha of the sum."""
  total = sum(map(sum, scores))
  choices = itertools.product(*(range(len(s) + 1) for s in scores))
  enough = [
    k for k in choices if sum(sum(s[:n]) for s, n in zip(scores, k, strict=True)) > alpha * total
  ]
  return min(sum(k) for k in enough)


@pytest.mark.parametrize("seed", range(20))
def test_ranks_against_brute_force(seed):
  rng = np.random.default_rng(seed)
  scores = [np.sort(rng.exponential(size=n))[::-1] for n in rng.integers(1, 5, size=3)]
  alpha = rng.uniform(0, 1)
  ranks = lowrank.allocate_ranks(scores, alpha)
  assert sum(ranks) == brute_force([list(s) for s in scores], alpha)
  kept = sum(s[:k].sum() for s, k in zip(scores, ranks, strict=True))
  assert kept > alpha * sum(s.sum() for s in scores)


def test_ranks_by_hand():
  scores = [np.array([5.0, 1.0]), np.array([3.0, 1.0])]  # total 10
  assert lowrank.allocate_ranks(scores, 0.79) == [1, 1]  # 5 + 3 passes 7.9
  assert lowrank.allocate_ranks(scores, 0.8) == [2, 1]  # strictly greater: 8 is not enough
  assert lowrank.allocate_ranks(scores, 0.8, crossing=False) == [1, 1]
  assert lowrank.allocate_ranks(scores, 0.0) == [1, 0]
  assert lowrank.allocate_ranks(scores, 0.0, min_rank=1) == [1, 1]
  assert lowrank.allocate_ranks(scores, 0.0, crossing=False) == [0, 0]


def test_ties_go_to_the_first_layer():
  assert lowrank.allocate_ranks([np.ones(2), np.ones(2)], 0.5) == [2, 1]


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_alpha_of_one_keeps_everything(alpha):
  assert lowrank.allocate_ranks([np.array([3.0, 0.0]), np.array([1.0])], alpha) == [2, 1]


def test_the_cap_frees_nothing_for_others():
  scores = [np.array([5.0, 4.0, 3.0]), np.array([1.0, 0.5])]
  free = lowrank.allocate_ranks(scores, 0.85)
  assert free == [3, 0]
  assert lowrank.allocate_ranks(scores, 0.85, upper_rank=2, min_rank=1) == [2, 1]


def test_a_minimum_never_exceeds_the_layer():
  assert lowrank.allocate_ranks([np.array([1.0]), np.array([1.0, 1.0])], 0.0, min_rank=5) == [1, 2]


def test_all_scores_zero():
  assert lowrank.allocate_ranks([np.zeros(3), np.zeros(2)], 0.9, upper_rank=2) == [2, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_scores_are_refused(bad):
  with pytest.raises(ValueError, match="finite"):
    lowrank.allocate_ranks([np.array([1.0, bad])], 0.9)


# --- pruning ------------------------------------------------------------------------------


def task_values():
  rng = np.random.default_rng(0)
  return [{"a": rng.normal(size=40) * (t + 1), "b": rng.normal(size=25) * 0.1} for t in range(3)]


POOLS = {
  "relative": lambda values, t, layer: values[t][layer],
  "relative_all_layers": lambda values, t, layer: np.concatenate([*values[t].values()]),
  "relative_all_layers_all_tasks": lambda values, t, layer: np.concatenate(
    [v for task in values for v in task.values()]
  ),
}


@pytest.mark.parametrize("rule", sorted(lowrank.PRUNE_RULES))
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
def test_thresholds_against_numpy(rule, rate):
  values, absolute = task_values(), 0.05
  thresholds = lowrank.prune_thresholds(values, rule, absolute, rate)
  pool = POOLS.get(rule.replace("mixed", "relative"))
  for t, task in enumerate(values):
    for layer, x in task.items():
      keep = np.ones(len(x), bool)
      if rule.startswith(("absolute", "mixed")):
        keep &= np.abs(x) > absolute
      if pool and rate:
        keep &= np.abs(x) > np.percentile(np.abs(pool(values, t, layer)), 100 * rate)
      np.testing.assert_array_equal(np.abs(x) > thresholds[t][layer], keep)


def test_none_prunes_not_even_zeros():
  values = [{"a": np.array([0.0, 1.0])}]
  assert lowrank.prune_thresholds(values, "none", 1.0, 0.5)[0]["a"] < 0


def test_prune_keeps_what_is_strictly_greater():
  p = lowrank.Perturbation(None, None, jnp.array([[1.0, -2.0]]), None, jnp.array([[-1.0, 0.5]]))
  pruned = lowrank.prune(p, 1.0)
  np.testing.assert_array_equal(pruned.U, [[0, -2]])
  np.testing.assert_array_equal(pruned.V, [[0, 0]])


def test_prune_rate():
  assert lowrank.prune_rate("excess", 0.2, 0.19) is None  # below the bound nothing is pruned
  assert lowrank.prune_rate("excess", 0.2, 0.8) == pytest.approx(0.75)
  assert lowrank.prune_rate("fixed", 0.2, 0.01) == pytest.approx(0.8)
  assert lowrank.prune_rate("fixed_above_bound", 0.2, 0.8) == pytest.approx(0.8)
  assert lowrank.prune_rate("fixed_above_bound", 0.2, 0.1) is None
  assert lowrank.prune_rate("excess", None, 9.0) == 0.0


def test_randomised_decomposition_finds_the_largest_triplets_and_the_whole_energy():
  rng = np.random.default_rng(0)
  base, noise = (rng.normal(size=(3, 3, 60, 90)).astype(np.float32) for _ in range(2))
  falling = (0.8 ** np.arange(60))[:, None].astype(np.float32)
  free = base + noise * falling
  want = lowrank.decompose(base, free)
  got = lowrank.decompose_randomized(base, free, jax.random.key(0), 12)
  np.testing.assert_allclose(got.sigma, want.sigma[:12], rtol=1e-4)
  np.testing.assert_allclose(got.energy, np.sum(np.asarray(want.sigma) ** 2), rtol=1e-5)
  np.testing.assert_allclose(
    (got.U * got.sigma[None]) @ got.V.T,
    (want.U[:, :12] * want.sigma[None, :12]) @ want.V[:, :12].T,
    atol=1e-4,
  )
  squares = lowrank.squared_singular_values(got)
  assert squares.size == 60 and squares.sum() == pytest.approx(float(want.energy), rel=1e-5)
  assert (np.diff(squares) <= 0).all()
  np.testing.assert_allclose(
    lowrank.squared_singular_values(want), np.asarray(want.sigma, np.float64) ** 2
  )


def test_a_randomised_decomposition_of_nearly_all_is_the_exact_one():
  rng = np.random.default_rng(0)
  base, free = (rng.normal(size=(20, 30)).astype(np.float32) for _ in range(2))
  got = lowrank.decompose_randomized(base, free, jax.random.key(0), 10)
  np.testing.assert_array_equal(got.sigma, lowrank.decompose(base, free).sigma)


@pytest.mark.parametrize("fold", [True, False])
def test_int8_factors_are_near_and_as_their_columns_were(fold):
  base, free = kernels(4, (3, 3, 4, 6))
  d = lowrank.decompose(base, free, unfold=True)
  p = lowrank.truncate(d, 4, 6, fold)
  rounded = lowrank.quantized(p)
  assert rounded.U.dtype == rounded.V.dtype == jnp.int8 and not np.any(rounded.sigma[4:])
  for name in "UV":
    x, got = np.asarray(getattr(p, name))[:, :4], np.asarray(getattr(rounded, name))[:, :4]
    scale = np.abs(x).max(0) / 127
    assert (np.abs(got * scale - x) <= 0.501 * scale).all()
  want, got = lowrank.compose(base, p), lowrank.compose(base, rounded)
  assert 0 < np.abs(want - got).max() < 0.01 * np.abs(want - base).max()
  u, sigma, v = (np.asarray(x, np.float32) for x in (rounded.U, rounded.sigma, rounded.V))
  by_hand = base * p.R[None, None, None] * p.S[None, None, :, None]
  by_hand += ((v * sigma) @ u.T).reshape(base.shape)
  np.testing.assert_allclose(got, by_hand, rtol=1e-5, atol=1e-6)
  with pytest.raises(AssertionError, match="U must be floating point"):
    lowrank.compose(base, rounded._replace(sigma=None))


# --- what the functions are given -------------------------------------------------------


def given(shape=(3, 3, 4, 6)):
  """Returns base, warmed-up kernel, decomposition and perturbation that fit together."""
  base, free = kernels(0, shape)
  d = lowrank.decompose(base, free)
  return base, free, d, lowrank.truncate(d, 2, 3, fold=False)


@pytest.mark.parametrize(
  "call",
  [
    lambda base, free, p: lowrank.identity(base, 2, True),
    lambda base, free, p: lowrank.compose(base, p),
    lambda base, free, p: lowrank.least_squares_scales(base, free),
    lambda base, free, p: lowrank.residual(base, free, p.R, p.S),
    lambda base, free, p: lowrank.decompose(base, free),
    lambda base, free, p: lowrank.decompose_randomized(base, free, jax.random.key(0), 1),
  ],
)
def test_kernels_of_another_kind_are_refused(call):
  base, free, _, p = given()
  for of_base, message in (
    (base[0, 0, 0], r"\[base must be a floating-point kernel \[\*window, I, J\]"),
    (base.astype(jnp.int32), r"\[base must be a floating-point kernel"),
  ):
    with pytest.raises(AssertionError, match=message):
      call(of_base, free, p)
    with pytest.raises(AssertionError, match=message):
      jax.eval_shape(call, of_base, free, p)  # while it is traced


@pytest.mark.parametrize(
  "call",
  [
    lowrank.least_squares_scales,
    lambda base, free: lowrank.residual(base, free, jnp.ones(6), jnp.ones(4)),
    lowrank.decompose,
    lambda base, free: lowrank.decompose_randomized(base, free, jax.random.key(0), 1),
  ],
)
def test_kernels_of_two_shapes_are_refused(call):
  base, free, *_ = given()
  with pytest.raises(AssertionError, match="base and free must have one shape"):
    call(base, free[:1])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"R": jnp.ones(4)}, r"R must be floating point \[J\] with I = 4, J = 6"),
    ({"S": jnp.ones((1, 4))}, r"S must be floating point \[I\]"),
    ({"U": jnp.ones((4, 3))}, r"U must be floating point \[J, K\] with I = 4, J = 6, K = 3"),
    ({"V": jnp.ones((4, 2))}, r"V must be floating point \[M, K\] with I = 4, J = 6, K = 3"),
    ({"V": jnp.ones((8, 3))}, r"V must be floating point \[M, K\] with I = 4, J = 6, M = 36"),
    ({"sigma": jnp.ones(2)}, r"sigma must be floating point \[K\]"),
    ({"V": jnp.ones((4, 3), jnp.int32)}, "V must be floating point"),
  ],
)
def test_factors_that_do_not_fit_a_kernel_are_refused(change, message):
  base, _, _, p = given()
  lowrank.compose(base, p)
  lowrank.compose(base, p._replace(sigma=None))
  with pytest.raises(AssertionError, match=message):
    lowrank.compose(base, p._replace(**change))


@pytest.mark.parametrize(
  "call",
  [
    lowrank.squared_singular_values,
    lambda d: lowrank.truncate(d, 1, 2, True),
    lambda d: lowrank.random_factors(jax.random.key(0), d, 1, 2),
    lambda d: lowrank.prune(lowrank.Perturbation(*d[:5]), 0.1),
  ],
)
def test_factors_that_do_not_fit_one_another_are_refused(call):
  d = given()[2]
  call(d)
  with pytest.raises(AssertionError, match=r"V must be floating point \[M, K\] with J = 6"):
    call(d._replace(V=d.V[:, :2]))


def test_scalars_and_lists_of_vectors_are_checked():
  *_, d, p = given()
  with pytest.raises(AssertionError, match="rank must be a scalar"):
    lowrank.truncate(d, jnp.ones(2, jnp.int32), 2, True)
  with pytest.raises(AssertionError, match="tau must be a scalar"):
    lowrank.prune(p, jnp.ones(2))
  with pytest.raises(AssertionError, match=r"scores must be one array \[m\] per layer"):
    lowrank.allocate_ranks([np.ones(3), np.ones((2, 2))], 0.9)
  with pytest.raises(AssertionError, match=r"values must be one array \[n\] per task and layer"):
    lowrank.prune_thresholds([{"a": np.ones((2, 2))}], "absolute", 0.1, 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_a_budget_is_filled_in_descending_priority(seed):
  rng = np.random.default_rng(seed)
  priorities = [np.sort(rng.uniform(size=n))[::-1] for n in (3, 5, 4)]
  costs, budget = [7, 3, 5], 28
  ranks = lowrank.allocate_budget(priorities, costs, budget, upper_rank=4)
  used = sum(k * cost for k, cost in zip(ranks, costs, strict=True))
  assert used <= budget and all(k <= 4 for k in ranks)
  taken = [x for p, k in zip(priorities, ranks, strict=True) for x in p[:k]]
  for p, k, cost in zip(priorities, ranks, costs, strict=True):
    if k < min(4, len(p)) and taken and p[k] > min(taken):
      assert used + cost > budget, "a column of higher priority than one taken did not fit"
    if k < min(4, len(p)) and used + cost <= budget:
      pytest.fail("a column that fits was left out")


def test_equal_priorities_give_equal_ranks():
  ranks = lowrank.allocate_budget(lowrank.equal_priorities([9, 9, 1]), [4, 4, 4], 31)
  assert ranks == [3, 3, 1]
