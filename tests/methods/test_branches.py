"""Claims of InfLoRA and SD-LoRA: where branches lie, what stays, and what they cost."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from halrp_jax import methods, models
from halrp_jax.config import resolve
from halrp_jax.data import load
from halrp_jax.methods import branches, inflora, sdlora
from halrp_jax.training import batches
from halrp_jax.types import UserError
from halrp_jax.weights import bases

from .test_methods import learn

SHORT = {"method.rank": 4, "epochs": 4}
LAYERS = {"fc1": (64, 256), "fc2": (256, 256)}


def moved(states, t, name):
  """Returns how task t changed a kernel, as a matrix [I, J]."""
  after, before = (np.asarray(states[i].shared["kernels"][name]) for i in (t, t - 1))
  return (after - before).reshape(-1, after.shape[-1])


def test_inflora_moves_kernels_by_low_rank_outside_earlier_inputs(digits_config):
  states, _, _ = learn(digits_config("inflora", **SHORT, **{"method.threshold": 0.8}))
  for t in range(1, len(states)):
    for name in LAYERS:
      change, shared = moved(states, t, name), states[t - 1].shared
      count = int(shared["num_directions"][name])
      basis = np.asarray(shared["basis"][name])
      assert 0 < count < len(basis) and not basis[:, count:].any()
      assert np.linalg.matrix_rank(change, tol=1e-4 * np.abs(change).max()) == 4
      assert np.abs(basis.T @ change).max() < 1e-5 * max(1, np.abs(change).max())
      np.testing.assert_array_equal(states[t].shared["basis"][name][:, :count], basis[:, :count])
  rests = [s.shared["rest"] for s in states]
  jax.tree.map(np.testing.assert_array_equal, rests[0], rests[-1])


def test_inflora_takes_the_leading_directions_of_what_is_left(digits_config):
  """Against the singular vectors of C - M M' C, as the authors' code computes them."""
  states, benchmark, _ = learn(digits_config("inflora", **SHORT, **{"method.threshold": 0.8}))
  task, first = benchmark.tasks[1], states[0]
  image = np.asarray(inputs_of(task))
  x = image.reshape(len(image), -1)  # what fc1 receives
  moment = x.T @ x / len(x)
  basis = np.asarray(first.shared["basis"]["fc1"], np.float64)
  left, _, _ = np.linalg.svd(moment - basis @ (basis.T @ moment))
  change = moved(states, 1, "fc1")
  inside = left[:, :4] @ (left[:, :4].T @ change)
  np.testing.assert_allclose(inside, change, atol=1e-4 * np.abs(change).max())


def inputs_of(task):
  """Returns all training images of a task as network input."""
  return batches.load_batch(task.train, task.inputs, np.arange(len(task.train.index)))[0]


@pytest.mark.parametrize("keep", ["used", "free"])
def test_keeping_the_complement_of_the_basis_changes_nothing(keep):
  """DualGPM stores the smaller of M and its complement; the projections are the same."""
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.normal(size=(9, 5)))[0]
  moment = (x := rng.normal(size=(30, 9))).T @ x
  outside = moment - basis @ (basis.T @ moment)
  if keep == "free":
    free = np.linalg.svd(basis)[0][:, 5:]
    outside = free @ (free.T @ moment)
  _, found, _ = bases.spectrum(basis.astype(np.float32), moment @ moment)
  left, _, _ = np.linalg.svd(outside)
  np.testing.assert_allclose(np.abs(np.sum(left[:, :3] * found[:, :3], 0)), 1, atol=1e-4)


def test_inflora_has_zero_columns_where_no_direction_is_left():
  """Null-space vectors would lie inside the basis, and the branch interfere with earlier tasks."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 9))  # inputs in 4 of 9 dimensions
  moment = x.T @ x / np.trace(x.T @ x)
  basis = bases.grow(np.zeros((9, 0), np.float32), moment @ moment, 0.9, first=True)
  assert 0 < basis.shape[1] < 4
  plan = branches.Plan({"fc": (9, 5)}, {"fc": 6})
  f = SimpleNamespace(plan=plan, input_moments=lambda params, stats, task: {"fc": moment})
  shared = {"kernels": {"fc": np.zeros((9, 5))}, "rest": {}}
  shared |= {"basis": {"fc": bases.pad(basis)}, "num_directions": {"fc": basis.shape[1]}}
  v = inflora.choose_directions(f, shared, {}, {}, None)["fc"]
  left = 4 - basis.shape[1]
  assert v.shape == (9, 6) and not v[:, left:].any() and np.abs(v[:, :left]).max() > 0.1
  assert np.abs(basis.T @ v).max() < 1e-6


def test_a_basis_that_shall_carry_everything_stays_orthonormal():
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.normal(size=(20, 5)))[0].astype(np.float32)
  x = rng.normal(size=(50, 8)) @ rng.normal(size=(8, 20))
  grown = bases.grow(basis, x.T @ x, 1.0, first=False)
  assert grown.shape == (20, 13)
  np.testing.assert_allclose(grown.T @ grown, np.eye(13), atol=1e-5)


@pytest.mark.parametrize("method_name", ["inflora", "sdlora", "halrp"])
def test_a_budget_without_room_for_a_column_is_refused(method_name, digits_config):
  config = resolve(digits_config(method_name, epochs=2, **{"method.budget": 1e-3}))
  with pytest.raises(UserError, match=r"leaves no room for one column .* at least 0.0038, or"):
    learn(config)


def test_sdlora_keeps_earlier_directions_and_only_weighs_them_anew(digits_config):
  states, benchmark, method = learn(digits_config("sdlora", **SHORT))
  for t in range(1, len(states)):
    before, after = states[t - 1].shared, states[t].shared
    for name, (num_in, num_out) in LAYERS.items():
      for k, rows in (("U", num_out), ("V", num_in)):
        x, old = (np.asarray(s[k][name]) for s in (after, before))
        assert x.shape == (rows, 4 * len(benchmark.tasks))
        np.testing.assert_array_equal(x[:, : 4 * t], old[:, : 4 * t])
        assert np.linalg.norm(x[:, 4 * t : 4 * t + 4]) == pytest.approx(1, abs=1e-5)
        assert not x[:, 4 * (t + 1) :].any()
      magnitudes = np.asarray(after["magnitudes"][name])
      assert magnitudes[t] > 0 and not magnitudes[t + 1 :].any()
      if t > 1:
        assert magnitudes[t - 1] != np.asarray(before["magnitudes"][name])[t - 1]
    jax.tree.map(np.testing.assert_array_equal, before["kernels"], after["kernels"])
  image = inputs_of(benchmark.tasks[0])
  shared, task = method.served(states[-1]), states[-1].tasks[0]
  network = method.network(shared, task)
  model = models.of_config(resolve(digits_config("sdlora")), benchmark.max_classes)
  plain = model.apply({"params": network.params}, image[:20], train=False)
  np.testing.assert_allclose(plain, method.logits(shared, task, image[:20]), atol=1e-4)


def test_the_size_counts_each_branch(digits_config):
  states, _, method = learn(digits_config("sdlora", **SHORT))
  head = 256 * 10 + 10
  branch = sum(4 * (i + j) + 1 for i, j in LAYERS.values())
  for t, state in enumerate(states):
    size = method.size(state)
    assert size.paper - size.base == t * (head + branch)
  states, _, method = learn(digits_config("inflora", **SHORT))
  assert method.size(states[2]).paper - method.size(states[2]).base == 2 * head


def test_layers_without_a_low_rank_branch_stay_in_the_rest():
  shapes = {"a": (2, 3)}
  params = {"a": {"kernel": np.ones((2, 3))}, "b": {"kernel": np.ones(4)}, "head": {"kernel": 1}}
  state = branches.open_base(params, {}, branches.Plan(shapes, {"a": 1}))
  assert set(state.shared["kernels"]) == {"a"} and set(state.shared["rest"]) == {"b"}
  whole = branches.whole(state.shared, params["head"])
  assert jax.tree.all(jax.tree.map(np.array_equal, whole, params))


def test_a_state_with_fewer_slots_is_widened():
  plan = branches.Plan({"a": (2, 3)}, {"a": 2})
  state = branches.open_base({"a": {"kernel": np.ones((2, 3))}, "head": {}}, {}, plan)
  first = sdlora.with_slots(state, plan, num_tasks=1)
  assert first.shared["U"]["a"].shape == (3, 2) and first.shared["magnitudes"]["a"].shape == (1,)
  more = sdlora.with_slots(first, plan, num_tasks=3)
  assert more.shared["V"]["a"].shape == (2, 6) and more.shared["magnitudes"]["a"].shape == (3,)
  assert sdlora.with_slots(more, plan, 1).shared["U"]["a"].shape == (3, 6)


@pytest.mark.parametrize("method_name", ["inflora", "sdlora"])
def test_a_budget_is_divided_equally(method_name, digits_config):
  """Of 2 % of the base, 1,700 numbers, each layer gets two columns: 1,664 numbers."""
  config = resolve(digits_config(method_name, **{"method.budget": 0.02}))
  benchmark, model = load(config), models.of_config(config, 10)
  plan = branches.make_plan(config.method, methods.setup_of(config, model, benchmark))
  assert plan.shapes == LAYERS
  base = 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10
  used = sum(k * sum(LAYERS[n]) for n, k in plan.ranks.items())
  assert 0.02 * base - min(map(sum, LAYERS.values())) < used <= 0.02 * base
  assert max(plan.ranks.values()) - min(plan.ranks.values()) <= 1
