"""APD's two claims of its own: the closed form of an old tau, and hierarchical consolidation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from halrp_jax.config import resolve
from halrp_jax.methods import apd
from halrp_jax.types import State, UserError

L1, A = 0.3, 2.0


@pytest.mark.parametrize("x", [-1.0, -0.15, -0.1, 0.0, 0.05, 0.149, 0.151, 0.9])
def test_soft_threshold_is_what_an_optimiser_finds(x):
  def objective(tau):
    return L1 * abs(tau) + 0.5 * A * (tau - x) ** 2

  found = optimize.minimize_scalar(
    objective, bounds=(-2, 2), method="bounded", options={"xatol": 1e-9}
  )
  assert float(apd.soft(jnp.float32(x), L1 / A)) == pytest.approx(found.x, abs=1e-5)
  assert float(apd.huber(jnp.float32(x), L1, A)) == pytest.approx(found.fun, abs=1e-6)


def task_of(tau):
  """Builds the state of a task that is in no cluster yet."""
  tau, mask = jnp.asarray(tau), jnp.ones(np.shape(tau)[-1:])
  return apd.TaskState({"a": mask}, {"a": tau}, {"a": jnp.int32(0)}, {}, {}, jnp.int32(10))


def state_of(taus):
  """Builds a state of tasks whose tau are the rows of `taus`, before any consolidation."""
  tasks, shape = tuple(task_of(x) for x in taus), taus.shape[1:]
  return State({"kernels": {"a": jnp.zeros(shape)}, "local": {"a": jnp.zeros((1, *shape))}}, tasks)


def full_taus(state):
  return [p.tau["a"] + state.shared["local"]["a"][p.cluster["a"]] for p in state.tasks]


# two near one another, one far from both; the third value of the two differs by more than beta
TAUS = np.array(
  [[[1.0, 2.0], [0.5, 0.0]], [[1.01, 2.0], [0.9, 0.0]], [[-5.0, -5.0], [-5.0, 3.0]]], np.float32
)


@pytest.mark.parametrize("seed", range(5))
def test_what_a_cluster_has_in_common_is_stored_once(seed):
  state = apd.consolidate(state_of(TAUS), 2, 0.05, seed)
  first, second, alone = (int(p.cluster["a"]) for p in state.tasks)
  assert first == second != alone and 0 not in (first, alone)
  local = np.asarray(state.shared["local"]["a"])
  assert local.shape == (3, 2, 2) and not local[0].any() and not local[alone].any()
  np.testing.assert_allclose(local[first], [[1.005, 2.0], [0.0, 0.0]], atol=1e-6)
  np.testing.assert_allclose(state.tasks[0].tau["a"], [[0, 0], [0.5, 0]])
  np.testing.assert_allclose(state.tasks[1].tau["a"], [[0, 0], [0.9, 0]], atol=1e-6)
  np.testing.assert_array_equal(state.tasks[2].tau["a"], TAUS[2])
  for tau, before in zip(full_taus(state), TAUS, strict=True):
    assert np.abs(tau - before).max() <= 0.05 / 2 + 1e-6


def test_later_consolidation_renews_what_is_shared_and_keeps_its_centroids():
  state = apd.consolidate(state_of(TAUS), 2, 0.05, 0)
  new = [task_of(jnp.full((2, 2), x)) for x in (20.0, 20.01)]
  before = [*full_taus(state), *(p.tau["a"] for p in new)]
  state = apd.consolidate(State(state.shared, (*state.tasks, *new)), 2, 0.05, 0)
  assert state.shared["local"]["a"].shape == (5, 2, 2)  # twice as many clusters
  clusters = [int(p.cluster["a"]) for p in state.tasks]
  assert clusters[0] == clusters[1] and clusters[2] not in clusters[:2]
  assert set(clusters[3:]).isdisjoint(clusters[:3])
  for tau, want in zip(full_taus(state), before, strict=True):
    assert np.abs(tau - want).max() <= 0.05 / 2 + 1e-6


def test_more_clusters_than_a_consolidation_has_tasks_are_refused(digits_config):
  config = digits_config("apd", **{"method.every": 3, "method.clusters": 4})
  with pytest.raises(UserError, match="method.clusters = 4 must be at most method.every = 3"):
    resolve(config)


@pytest.mark.parametrize(
  "old_tau", ["trained", pytest.param("closed_form", marks=pytest.mark.slow)]
)
def test_old_tasks_stay_where_they_were(old_tau, digits_config):
  """However strongly new ones pull: within what pruning and consolidation may do."""
  from .test_methods import learn, logits

  config = digits_config("apd", **{"method.old_tau": old_tau, "method.every": 0, "epochs": 3})
  states, benchmark, method = learn(config)
  before, after = (logits(method, s, benchmark, 0) for s in (states[0], states[-1]))
  agreed = np.mean(before.argmax(-1) == after.argmax(-1))
  assert agreed > 0.97 and not np.array_equal(before, after)
  moved = [
    np.abs(states[-1].shared["kernels"][n] - w).max()
    for n, w in states[0].shared["kernels"].items()
  ]
  assert min(moved) > 1e-3  # sigma goes on learning
  assert jax.tree.leaves(states[-1].tasks[0].tau)
