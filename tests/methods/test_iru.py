"""IRU's claims of its own: earlier factors stay, sizes are the paper's, the notebook's setting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halrp_jax import arguments, data, methods, models
from halrp_jax.config import resolve
from halrp_jax.methods import dictionary, iru
from halrp_jax.training import batches
from halrp_jax.training.fit import protocol_recipe
from halrp_jax.types import State

from ..conftest import ROOT
from .test_methods import learn

FEW = {"method.first_factors": 11, "method.factors": 1}  # the published ones


def test_factors_of_earlier_tasks_stay_the_same_bits(digits_config):
  r1, r2 = 7, 3
  config = digits_config("iru", **{"method.first_factors": r1, "method.factors": r2})
  states, *_ = learn(config)
  last = states[-1].shared
  for t, state in enumerate(states):
    old, new = r1 + (t - 1) * r2 if t else 0, r1 + t * r2
    for n, a in state.shared["A"].items():
      b = state.shared["B"][n]
      np.testing.assert_array_equal(a[:, :new], last["A"][n][:, :new])
      np.testing.assert_array_equal(b[:new], last["B"][n][:new])
      assert np.abs(a[:, old:new]).min(0).max() > 0 and not np.any(a[:, new:]) and not b[new:].any()
      z = np.asarray(state.tasks[t].z[n])
      assert z[:new].all() and not z[new:].any()  # the selector of earlier factors is trained


def test_a_task_starts_with_new_factors_alone(digits_config):
  """Orthonormal ones, and an orthogonal head; told by a learning rate that moves nothing."""
  config = digits_config(
    "iru",
    train_fraction=0.1,
    **{"method.start": "fresh", "learning_rate": 1e-12, "method.first_factors": 11},
  )
  states, benchmark, method = learn(config)
  z = np.asarray(states[1].tasks[1].z["fc1"])
  np.testing.assert_allclose(z, np.isin(np.arange(len(z)), range(11, 15)), atol=1e-6)
  a, b = (np.asarray(states[1].shared[k]["fc1"]) for k in "AB")
  np.testing.assert_allclose(a[:, 11:15].T @ a[:, 11:15], np.eye(4), atol=1e-5)
  np.testing.assert_allclose(b[11:15] @ b[11:15].T, np.eye(4), atol=1e-5)
  rest = states[1].tasks[1].rest
  head = np.asarray(rest["head"]["kernel"])
  np.testing.assert_allclose(head.T @ head, np.eye(10), atol=1e-5)
  np.testing.assert_allclose(rest["fc1"]["bias"], 0, atol=1e-9)


def test_a_task_can_start_where_the_one_before_ended(digits_config):
  config = digits_config(
    "iru",
    train_fraction=0.1,
    **{"method.start": "task_before", "learning_rate": 1e-12, **FEW},
  )
  states, *_ = learn(config)
  for _, z in states[-1].tasks[-1].z.items():
    np.testing.assert_allclose(z[:13], 1, atol=1e-6)
  fresh = [task.rest["head"]["kernel"] for task in states[-1].tasks]
  assert not np.allclose(fresh[0], fresh[1])


def test_mean_squared_error_of_the_softmax():
  logits = jnp.array([[1.0, 2.0, 0.5, 9.0], [0.0, -1.0, 3.0, 9.0]])
  label = jnp.array([1, 0])
  p = np.exp(np.asarray(logits)[:, :3])
  p /= p.sum(1, keepdims=True)
  want = np.mean((p - np.eye(3)[[1, 0]]) ** 2)
  got = iru.mean_squared_error(logits, label, jnp.int32(3))
  assert float(got) == pytest.approx(want, rel=1e-5)
  gradient = jax.grad(iru.mean_squared_error)(logits, label, jnp.int32(3))
  assert np.isfinite(gradient).all() and not gradient[:, 3].any()


def test_twenty_tasks_have_the_size_of_the_published_network():
  """784-256-256-10 with r1 = 11, r2 = 1: 109,020 numbers, those of its notebook."""
  shapes = {"fc1": jnp.zeros((784, 256)), "fc2": jnp.zeros((256, 256))}
  rest = {n: {"bias": jnp.zeros(256)} for n in shapes}
  rest["head"] = {"kernel": jnp.zeros((256, 10)), "bias": jnp.zeros(10)}
  task = dictionary.TaskState({}, rest, {}, jnp.int32(10))
  selectors = 2 * sum(11 + t for t in range(20))
  got = dictionary.size(State({}, (task,) * 20), shapes, {"fc1": 30, "fc2": 30}, selectors, 0, 0)
  assert got.dense == 109_020 and got.base == 269_322
  assert got.paper == got.dense - 19 * 512  # without later tasks' biases


def test_the_notebooks_config_is_the_notebooks(real_data):
  config = arguments.parse_config(["x", f"--config={ROOT}/configs/iru_pmnist20.py"], {}, {}).config
  config.data_dir = real_data
  config = resolve(config)
  benchmark = data.load(config)
  tasks = benchmark.tasks
  assert [task.id for task in tasks] == list(range(20))
  assert all(len(task.train.index) == 60_000 and not len(task.valid.index) for task in tasks)
  recipe = protocol_recipe(methods.setup_of(config, models.make("mlp", 10), benchmark))
  assert recipe.learning_rate == 1e-4 and recipe.gradient_scale == 1 and recipe.keep == "last"


@pytest.mark.parametrize("normalise", [True, False])
def test_raw_pixels_reach_the_network_as_they_are_stored(normalise, digits_config):
  config = digits_config("iru", **{"data.normalise": normalise})
  task = data.load(resolve(config)).tasks[1]
  rows = np.arange(20)
  image, _ = batches.load_batch(task.test, task.inputs, rows)
  stored = np.asarray(task.test.image)[np.asarray(task.test.index)[rows]].reshape(20, -1)
  if task.inputs.permutation is not None:
    stored = stored[:, np.asarray(task.inputs.permutation)]
  same = np.allclose(np.asarray(image).reshape(20, -1), stored, rtol=1e-6)
  assert same != normalise and stored.max() > 200
