"""Claims of L2 and EWC: the penalty's gradient, the Fisher information, its sum over tasks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halrp_jax.methods import ewc
from halrp_jax.runs import experiment
from halrp_jax.training import batches, networks
from halrp_jax.types import Inputs, Split, Task

from .test_networks_and_methods import SMALL


class Softmax(nn.Module):
  """Softmax regression, the features being all there is."""

  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dense(3, name="fc1")(x.reshape(len(x), -1))


@pytest.fixture
def task():
  image = np.random.default_rng(0).integers(0, 256, (37, 2, 2, 1), np.uint8)
  label = np.random.default_rng(1).integers(0, 3, 37).astype(np.int32)
  split = Split(jnp.asarray(image), jnp.arange(37), jnp.asarray(label))
  inputs = Inputs(np.zeros(1, np.float32), np.ones(1, np.float32), None)
  return Task(0, "t", ("a", "b", "c"), inputs, split, split, split)


def test_fisher_of_softmax_regression_is_its_closed_form(task):
  """E over images of x_i^2 (p_j - y_j)^2, in chunks that don't divide the number of images."""
  model = Softmax()
  params = model.init(jax.random.key(0), jnp.zeros((1, 2, 2, 1)))["params"]
  chunk = jax.jit(ewc._fisher_of(model, False, False))
  got = ewc.fisher(chunk, params, {}, task, 1000, False)
  x, label = batches.load_batch(task.train, task.inputs, np.arange(37))
  x = np.asarray(x).reshape(37, 4)
  p = np.asarray(jax.nn.softmax(model.apply({"params": params}, x.reshape(37, 2, 2, 1))))
  error = (p - np.eye(3)[np.asarray(label)]) ** 2
  np.testing.assert_allclose(got["fc1"]["kernel"], (x**2).T @ error / 37, rtol=1e-4)
  np.testing.assert_allclose(got["fc1"]["bias"], error.mean(0), rtol=1e-4)


def test_sampled_labels_give_the_true_fisher_on_average(task):
  """With labels drawn from the model E (p - y)^2 = p (1 - p)."""
  model = Softmax()
  params = model.init(jax.random.key(0), jnp.zeros((1, 2, 2, 1)))["params"]
  chunk = jax.jit(ewc._fisher_of(model, False, True))
  x, label = batches.load_batch(task.train, task.inputs, np.arange(16))
  weight = np.ones(16, np.float32)
  total = sum(
    np.asarray(chunk(params, {}, x, label, weight, jnp.int32(3), jax.random.key(i))["fc1"]["bias"])
    for i in range(400)
  )
  p = np.asarray(jax.nn.softmax(model.apply({"params": params}, x)))
  np.testing.assert_allclose(total / 400, (p * (1 - p)).sum(0), rtol=0.05)


def test_many_anchors_are_one():
  """sum_k F_k (theta - theta_k)^2 and A (theta - center)^2 differ by a constant."""
  rng = np.random.default_rng(0)
  fishers, anchors = rng.random((5, 20)), rng.normal(size=(5, 20))
  a, center = np.zeros(20), np.zeros(20)
  for f, x in zip(fishers, anchors, strict=True):
    a, center = a + f, np.asarray(ewc._weighted_mean(a, center, f, x))
  one, other = rng.normal(size=(2, 20))

  def separate(theta):
    return (fishers * (theta - anchors) ** 2).sum()

  def joined(theta):
    return (a * (theta - center) ** 2).sum()

  assert separate(one) - separate(other) == pytest.approx(joined(one) - joined(other), rel=1e-5)
  np.testing.assert_array_equal(
    ewc._weighted_mean(np.zeros(2), np.ones(2), np.zeros(2), np.full(2, 3)), 3
  )


@pytest.mark.parametrize(
  "network", ["lenet", *(pytest.param(n, marks=pytest.mark.slow) for n in ("alexnet", "resnet18"))]
)
def test_fisher_of_networks_without_running_statistics(digits_config, network):
  """BatchNorm with the chunk's statistics: finite, positive, and 0 for a bias before BatchNorm."""
  model = experiment.models.make(network, 3, "batch").clone(**SMALL[network])
  image = jnp.asarray(np.random.default_rng(0).normal(size=(16, 32, 32, 3)), jnp.float32)
  params = jax.jit(model.init)(jax.random.key(0), image[:1])["params"]
  chunk = jax.jit(ewc._fisher_of(model, False, False))
  label = jnp.arange(16) % 3
  squares = chunk(
    params, {}, image, label, np.ones(16, np.float32), jnp.int32(3), jax.random.key(0)
  )
  flat = [np.asarray(x) for x in jax.tree.leaves(squares)]
  assert all(np.isfinite(x).all() and (x >= 0).all() for x in flat)
  assert sum(x.sum() for x in flat) > 0


def test_statistics_of_a_batch_are_held_fixed():
  """The network with the batch's statistics set evaluates as the one that takes them itself."""
  model = experiment.models.make("lenet", 3, "batch").clone(**SMALL["lenet"])
  image = jnp.asarray(np.random.default_rng(0).normal(size=(32, 32, 32, 3)), jnp.float32)
  params = jax.jit(model.init)(jax.random.key(0), image[:1])["params"]
  fixed, stats = networks.fix_batch_statistics(model, params, image)
  got, _ = networks.apply_model(fixed, params, stats, image, False, None)
  want, _ = networks.apply_model(model, params, {}, image, False, None)
  np.testing.assert_allclose(got, want, atol=6e-2)  # its variance is the unbiased one


def test_a_network_of_the_users_own_may_choose_its_statistics():
  """It has `running`, and knows nothing of mapped devices."""

  class Net(nn.Module):
    running: bool = False

    @nn.compact
    def __call__(self, x, train=False):
      x = nn.BatchNorm(use_running_average=self.running and not train)(x.reshape(len(x), -1))
      return nn.Dense(3, name="head")(x)

  image = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2, 2, 3)), jnp.float32)
  params = Net().init(jax.random.key(0), image, train=False)["params"]
  fixed, stats = networks.fix_batch_statistics(Net(), params, image)
  assert fixed.running and jax.tree.leaves(stats)


@pytest.mark.parametrize("method", ["l2", pytest.param("ewc", marks=pytest.mark.slow)])
def test_a_strong_anchor_holds_and_a_weak_one_does_not(method, digits_config, tmp_path):
  def forgetting(strength):
    config = digits_config(method, epochs=4, order="0,1,2", **{"method.strength": strength})
    return experiment.run(config, str(tmp_path / str(strength)))["forgetting"]

  assert forgetting(1e5) < 0.5 < 2 < forgetting(0.0)
