"""IBPWF's claims of its own: its densities, finite at any strength of the prior, frozen factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halrp_jax import methods
from halrp_jax.config import resolve
from halrp_jax.methods import ibpwf
from halrp_jax.runs import experiment
from halrp_jax.training import batches, fit
from halrp_jax.types import UserError

from ..conftest import building_anew
from .test_methods import QUIET, learn

PAIRS = [  # (a, b), (alpha, beta)
  ((1.0, 1.0), (1.0, 1.0)),
  ((2.0, 1.5), (2.0, 1.5)),
  ((3.0, 0.7), (1.2, 2.5)),
  ((0.6, 3.0), (2.0, 0.5)),
  ((40.0, 4.0), (60.0, 1.0)),
  ((700.0, 1.3), (650.0, 3.0)),
]


def log_of(*values):
  return [jnp.full(1, np.log(x)) for x in values]


@pytest.mark.parametrize(("q", "p"), PAIRS)
def test_kl_of_two_kumaraswamy_is_that_of_samples(q, p):
  (a, b), (alpha, beta) = q, p
  x_power = -np.expm1(np.log1p(-np.random.default_rng(0).uniform(size=2_000_000)) / b)  # x^a
  log_x = np.log(x_power) / a

  def log_density(a, b):
    return np.log(a * b) + (a - 1) * log_x + (b - 1) * np.log(-np.expm1(a * log_x))

  ratio = log_density(a, b) - log_density(alpha, beta)
  got = float(ibpwf.kl_kumaraswamy(*log_of(a, b, alpha, beta))[0])
  assert got == pytest.approx(ratio.mean(), abs=4 * ratio.std() / len(ratio) ** 0.5 + 2e-4)
  assert got > -1e-5 and (got < 1e-5) == (q == p)


def test_sticks_have_the_mean_of_the_prior():
  """E pi_k = (alpha / (alpha + 1))^k for v ~ Kumaraswamy(alpha, 1)."""
  alpha, num = 5.0, 8
  keys = jax.random.split(jax.random.key(0), 20_000)
  c, d = jnp.full(num, np.log(alpha)), jnp.zeros(num)
  odds = jax.vmap(lambda key: ibpwf.draw_prior(key, c, d))(keys)
  mean = np.asarray(jax.nn.sigmoid(odds)).mean(0)
  np.testing.assert_allclose(mean, (alpha / (alpha + 1)) ** np.arange(1, num + 1), rtol=0.01)


def test_log_density_integrates_to_one_around_the_odds():
  x = np.linspace(-60, 60, 20_001)
  for odds in (-3.0, 0.0, 5.0):
    density = np.exp(ibpwf.log_density(jnp.asarray(x, jnp.float32), jnp.float32(odds)))
    assert np.trapezoid(density, x) == pytest.approx(1, abs=1e-4)
    assert x[density.argmax()] == pytest.approx(odds, abs=0.01)


@pytest.mark.parametrize("alpha", [1e-3, 1.0, 700.0, 1e5])
@pytest.mark.parametrize("d", [1e-3, 1.0, 900.0])
def test_everything_is_finite_in_float32(alpha, d):
  """Values and gradients, with 1,000 factors."""
  num = 1000
  log_c, log_d = jnp.full(num, np.log(alpha)), jnp.full(num, np.log(d))
  p = jnp.linspace(-90, 90, num)
  for seed in range(20):
    both = value_and_gradient(log_c, log_d, p, jax.random.key(seed), log_c + 0.1, log_d + 0.1)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(both))


@jax.jit
def value_and_gradient(log_c, log_d, p, key, *before):
  def kl(log_c, log_d, p):
    _, kl_b = ibpwf.draw_logistic(key, p, log_c, log_d)
    return kl_b + ibpwf.kl_kumaraswamy(log_c, log_d, *before).sum()

  return jax.value_and_grad(kl, (0, 1, 2))(log_c, log_d, p)


@pytest.mark.slow
def test_a_strong_prior_is_learned_in_float32(digits_config):
  """alpha = 700 for the 64 factors of the narrowest layer."""
  config = digits_config("ibpwf", **{"method.alpha_share": 700 / 64, "method.l2": 0.0})
  states, *_ = learn(config)
  assert float(jnp.exp(states[0].shared["log_c"]["fc1"]).max()) > 600
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(states[-1]))


@pytest.fixture(scope="module")
def cache():
  return {}


@pytest.fixture
def some_left_over(cache, digits_config):
  """States after three tasks that leave some factors unused; benchmark, method."""
  if not cache:
    cache[0] = learn(digits_config("ibpwf", **{"method.alpha_share": 0.5}))
  return cache[0]


def test_used_factors_stay_the_same_bits_and_others_learn(some_left_over):
  states, *_ = some_left_over
  for before, after in zip(states, states[1:], strict=False):
    for n, used in before.shared["used"].items():
      used = np.asarray(used) > 0
      a, b = ([np.asarray(s.shared[k][n]) for s in (before, after)] for k in "AB")
      assert 0 < used.sum() < len(used)
      np.testing.assert_array_equal(a[0][:, used], a[1][:, used])
      np.testing.assert_array_equal(b[0][used], b[1][used])
      assert np.abs(a[0] - a[1]).max(0)[~used].min() > 0
      assert (np.asarray(after.shared["used"][n])[used] == 1).all()
      for s in (before, after):
        assert (np.asarray(s.tasks[-1].z[n]) != 0)[np.asarray(s.shared["used"][n]) == 0].sum() == 0


@pytest.mark.parametrize("start", ["fresh", "task_before"])
def test_a_task_starts_fresh_or_where_the_one_before_ended(start, digits_config):
  config = digits_config(
    "ibpwf", train_fraction=0.1, **{"method.start": start, "learning_rate": 1e-12}
  )
  states, *_ = learn(config)
  first, second = (s.shared["r"]["fc1"] for s in states[:2])
  biases = [task.rest["fc1"]["bias"] for task in states[1].tasks]
  for a, b in ((first, second), biases):
    assert np.allclose(a, b, atol=1e-6) == (start == "task_before")
  heads = [task.rest["head"]["kernel"] for task in states[1].tasks]
  assert not np.allclose(*heads)


def test_prediction_takes_what_is_probable_alone():
  p, r = jnp.array([-1.0, 0.0, 2.0]), jnp.array([1.0, 2.0, -3.0])
  want = [0, 0.5 * 2, -3 / (1 + np.exp(-2))]
  np.testing.assert_allclose(ibpwf.z_of(p, r, 0.5), want, rtol=1e-6)
  np.testing.assert_allclose(ibpwf.z_of(p, r, 0.6), [0, 0, want[2]], rtol=1e-6)


def test_size_counts_the_factors_in_use(some_left_over):
  states, _, method = some_left_over
  lengths = {"fc1": 64 + 256, "fc2": 512}
  for state in states:
    got, used = method.size(state), state.shared["used"]
    factors = sum(int((np.asarray(used[n]) > 0).sum()) * k for n, k in lengths.items())
    z = sum(int((np.asarray(x) != 0).sum()) for p in state.tasks for x in p.z.values())
    heads = len(state.tasks) * 2570
    assert got.paper == factors + z + heads + 512
    assert got.dense == got.paper + (len(state.tasks) - 1) * 512
    assert got.mask_bits == len(state.tasks) * (64 + 256)
    spare = sum(len(used[n]) * k for n, k in lengths.items()) - factors
    assert got.training_only == spare + 4 * 320 + 10


def test_the_sampled_phase_draws_anew_at_every_step_and_repeats(digits_config):
  """Two equal batches in one epoch give different losses; the same key the same."""
  config = resolve(digits_config("ibpwf", train_fraction=0.1))
  benchmark, model, *_ = experiment.build(config)
  seen = []

  def spy(*args, **kwargs):
    seen.append(kwargs.get("objective_fn"))
    return fit.make_fit(*args, **kwargs)

  with building_anew(), pytest.MonkeyPatch.context() as patch:
    patch.setattr(ibpwf, "make_fit", spy)
    method = methods.make(config, model, benchmark)
  task = benchmark.tasks[0]
  state, _ = method.learn(method.init(None, benchmark), (task,), jax.random.key(0), QUIET)
  objective, learned = seen[0], state.tasks[0]
  params = {k: state.shared[k] for k in ("A", "B", "p", "r", "log_c", "log_d")}
  params |= {"rest": learned.rest}
  image, label = batches.load_batch(task.train, task.inputs, np.arange(32))
  batch = batches.Batch(image, label, jnp.int32(10), None)
  frozen = {"num_images": jnp.float32(1000)}

  def loss(train, key):
    return float(objective(params, frozen, {}, batch, train, key)[0])

  first, again, other = (loss(True, jax.random.key(i)) for i in (0, 0, 1))
  assert first == again != other
  assert loss(False, None) == loss(False, None) and np.isfinite(loss(False, None))


def test_no_epoch_left_for_sampling_is_refused(digits_config):
  config = digits_config("ibpwf", **{"method.fine_tune_epochs": 2})
  with pytest.raises(UserError, match="fine_tune_epochs = 2 must be less than epochs = 2"):
    resolve(config)
