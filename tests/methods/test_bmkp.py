"""Claims of BMKP: the basis of outputs, what is regularised, products that keep old bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halrp_jax import methods, models
from halrp_jax.config import resolve
from halrp_jax.methods import bmkp
from halrp_jax.runs import experiment
from halrp_jax.training import batches, networks
from halrp_jax.weights import perturb, trees

from .test_methods import QUIET, learn, logits
from .test_networks_and_methods import SMALL


def random_basis(rng, width, count):
  """[J, J]: orthonormal columns, then zeros."""
  columns = np.linalg.qr(rng.normal(size=(width, count)))[0]
  return np.pad(columns, ((0, 0), (0, width - count))).astype(np.float32)


@pytest.fixture(params=[(3, 3, 2, 7), (12, 7)], ids=["conv", "dense"])
def layer(request):
  """A kernel, a basis of three directions."""
  rng = np.random.default_rng(0)
  return rng.normal(size=request.param).astype(np.float32), random_basis(rng, 7, 3)


def test_what_lies_outside_is_orthogonal_to_the_basis(layer):
  kernel, basis = layer
  e = np.asarray(bmkp.outside(kernel, basis)).T  # [J, d]
  w = kernel.reshape(-1, 7).T
  np.testing.assert_allclose(basis.T @ e, 0, atol=1e-5)
  np.testing.assert_allclose(e, w - basis @ basis.T @ w, atol=1e-5)


def test_both_forms_and_their_slopes_against_explicit_matrices(layer):
  kernel, basis = layer

  def explicit(w, form):
    e = w - basis @ basis.T @ w
    m = e.T @ e if form == "paper" else basis @ basis.T + e @ e.T
    return jnp.trace(m) / (jnp.sum(jnp.abs(m)) if form == "paper" else jnp.sum(m))

  def got(kernel, form):
    e = bmkp.outside(kernel, basis)
    return bmkp.paper_form(e) if form == "paper" else bmkp.code_form(e, basis)

  for form in ("paper", "code"):
    want, slope = jax.value_and_grad(explicit)(kernel.reshape(-1, 7).T, form)
    value, gradient = jax.value_and_grad(got)(kernel, form)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(gradient.reshape(-1, 7).T, slope, rtol=1e-3, atol=1e-6)


def test_the_papers_form_is_least_where_one_direction_is_new():
  """1/d for a vector times equal signs, 1 for columns at right angles; 0 has a slope too."""
  one = np.outer(np.sign([1.0, -2, 3, 4]), [1.0, 2, 0, -1]).astype(np.float32)
  np.testing.assert_allclose(bmkp.paper_form(one), 1 / 4, rtol=1e-6)
  np.testing.assert_allclose(bmkp.paper_form(np.eye(4, dtype=np.float32)), 1, rtol=1e-6)
  zero = jnp.zeros((4, 4))
  assert bmkp.paper_form(zero) == 0 and not jax.grad(bmkp.paper_form)(zero).any()


def plain_rule(basis, z, threshold, first):
  """GPM's rule on columns z [J, n], by an SVD of what is left."""
  left = z - basis @ (basis.T @ z)
  u, s, _ = np.linalg.svd(left, full_matrices=False)
  total, num = np.sum(z**2), 0
  carried = 1 - np.sum(left**2) / total
  if first:
    num = int(np.sum(np.cumsum(s**2) / total < threshold))
  while not first and carried < threshold:
    carried += s[num] ** 2 / total
    num += 1
  return np.concatenate([basis, u[:, :num]], 1)


def test_bases_hold_what_layers_put_out(digits_config):
  """By the rule in numpy on the outputs W x + b of the working memory, 1000 images of each task."""
  config = digits_config("bmkp", **{"method.samples": 1000, "method.first_threshold": 0.9})
  states, benchmark, _ = learn(config)
  want = {name: np.zeros((256, 0)) for name in ("fc1", "fc2")}
  for t, state in enumerate(states):
    task, p = benchmark.tasks[t], state.shared["working"]["params"]
    key = jax.random.split(jax.random.key(t), 4)[2]
    rows = np.asarray(jax.random.permutation(key, len(task.train.index)))[:1000]
    x = np.asarray(batches.load_batch(task.train, task.inputs, rows)[0]).reshape(len(rows), -1)
    for name in want:
      z = x @ np.asarray(p[name]["kernel"]) + np.asarray(p[name]["bias"])
      want[name] = plain_rule(want[name], z.T.astype(np.float64), 0.96 if t else 0.9, not t)
      count, got = (
        int(state.shared["num_directions"][name]),
        np.asarray(state.shared["basis"][name]),
      )
      assert count == want[name].shape[1] == int(state.tasks[t].num_directions[name])
      assert 0 < count < 256 and not got[:, count:].any()
      np.testing.assert_allclose(got.T @ got, np.diag(np.arange(256) < count), atol=1e-5)
      np.testing.assert_allclose(got @ got.T, want[name] @ want[name].T, atol=1e-3)
      x = np.maximum(z, 0)


@pytest.fixture(scope="module")
def cache():
  return {}


@pytest.fixture
def learned(cache, digits_config):
  """States after three tasks, benchmark, method."""
  if not cache:
    cache[0] = learn(digits_config("bmkp"))
  return cache[0]


def test_coefficients_start_at_the_projection_and_stay_in_their_columns(learned, digits_config):
  """Without retraining W_t = B B' W; with it later columns of A_t are still exactly 0."""
  states, _, _ = learn(digits_config("bmkp", **{"method.retrain_share": 0.0}))
  shared, last = states[-1].shared, states[-1].tasks[-1].params
  for name in ("fc1", "fc2"):
    w, b = (
      np.asarray(x) for x in (shared["working"]["params"][name]["kernel"], shared["basis"][name])
    )
    np.testing.assert_allclose(np.asarray(last[name]["kernel"]) @ b.T, w @ b @ b.T, atol=1e-5)
  states, _, _ = learned
  grew = False
  for p in states[-1].tasks:
    for name in ("fc1", "fc2"):
      count = int(p.num_directions[name])
      a = np.asarray(p.params[name]["kernel"])
      assert not a[:, count:].any() and a[:, :count].any()
      grew |= count < int(states[-1].shared["num_directions"][name])
  assert grew


def test_a_first_direction_that_carries_all_is_kept(digits_config):
  """GPM's first-task rule would leave such a layer no direction, and hence no output."""
  states, _, _ = learn(digits_config("bmkp", **{"method.first_threshold": 0.01}))
  assert {int(k) for k in states[0].shared["num_directions"].values()} == {1}


@pytest.mark.parametrize(
  "network", ["lenet", pytest.param("resnet18", marks=pytest.mark.slow), "mlp"]
)
@pytest.mark.parametrize("images", [2, 64])  # few places, many places
def test_products_are_the_composed_network_and_later_columns_change_no_bit(network, images):
  model = models.make(network, 3).clone(**SMALL[network])
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(images, 32, 32, 3)), jnp.float32)
  params, stats = jax.jit(lambda key: networks.initialize(model, key, x.shape[1:]))(
    jax.random.key(0)
  )
  kernels, rest = trees.split(params)
  full = {n: random_basis(rng, w.shape[-1], w.shape[-1]) for n, w in kernels.items()}
  half = {n: b * (np.arange(len(b)) < len(b) // 2)[None] for n, b in full.items()}
  coefficients = {n: w @ half[n] for n, w in kernels.items()}

  @jax.jit
  def apply(bases):
    variables = {"params": trees.join(coefficients, rest), "batch_stats": stats}
    return perturb.apply_in_bases(model, bases, variables, x, train=False)

  composed = {n: a @ half[n].T for n, a in coefficients.items()}
  variables = {"params": trees.join(composed, rest), "batch_stats": stats}
  want = jax.jit(functools.partial(model.apply, train=False))(variables, x)
  np.testing.assert_allclose(apply(half), want, atol=1e-4)
  np.testing.assert_array_equal(apply(half), apply(full))


def test_size_is_counted_by_hand(learned):
  states, _, method = learned
  inputs, head, biases = {"fc1": 64, "fc2": 256}, 2570, 512
  for state in states:
    counts = [{n: int(k) for n, k in p.num_directions.items()} for p in state.tasks]
    products = sum(256 * k for k in counts[-1].values())
    products += sum(inputs[n] * k for c in counts for n, k in c.items())
    size, num = method.size(state), len(counts)
    assert size.paper == products + num * head + biases
    assert size.dense == size.nonzero == products + num * (head + biases)
    assert size.training_only == 81920 + 512 and size.base == 85002


@pytest.mark.slow
def test_lambda_keeps_new_directions_few(digits_config):
  """What a much larger lambda leaves outside the basis has fewer directions that count."""

  def directions(strength):
    states, _, _ = learn(digits_config("bmkp", epochs=10, **{"method.strength": strength}))
    basis = states[0].shared["basis"]["fc1"]
    e = bmkp.outside(states[1].shared["working"]["params"]["fc1"]["kernel"], basis)
    squares = np.linalg.svd(np.asarray(e), compute_uv=False) ** 2
    return squares.sum() ** 2 / np.sum(squares**2)  # participation ratio

  assert directions(300.0) < directions(0.0) - 1


def test_a_layer_whose_basis_is_full_is_left_alone(digits_config):
  """Rounding outside a full basis has no direction: r would follow it at a boundless slope."""
  config = digits_config("bmkp", **{"method.threshold": 1.0, "method.first_threshold": 1.0})
  config = resolve(config)
  benchmark, *_ = experiment.build(config)
  model = models.make("mlp", 10).clone(hidden=(16, 12))
  method = methods.make(config, model, benchmark)
  state = method.init(jax.random.key(0), benchmark)
  for t in range(3):
    state, _ = method.learn(state, benchmark.tasks[t : t + 1], jax.random.key(t), QUIET)
  assert [int(k) for k in state.shared["num_directions"].values()] == [16, 12]
  assert all(not w for w in bmkp._weights(state.shared, 1.0).values())
  assert np.isfinite(logits(method, state, benchmark, 2)).all()
