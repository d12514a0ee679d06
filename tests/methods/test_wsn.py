"""Claims of WSN: density of masks, frozen weights, the gradient through a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halrp_jax import models
from halrp_jax.methods import wsn

from .test_methods import learn


def test_largest_is_the_k_largest_of_a_sort():
  rng = np.random.default_rng(0)
  for i in range(100):
    share, shape = float(rng.uniform(0.01, 1)), (int(rng.choice([1, 2, 5, 18, 39])), 7)
    x = np.abs(rng.normal(size=shape)).astype(np.float32) ** (1 + i % 4)
    x = np.round(x) if i % 3 == 0 else x
    k = 1 + round((1 - share) * (x.size - 1))
    got = wsn.largest(jnp.asarray(x), share)
    np.testing.assert_array_equal(got, x >= np.sort(x.ravel())[k - 1], str(i))


@pytest.mark.parametrize("bn", ["task", "noaffine"])
def test_masks_hold_their_share_and_their_weights_stay(bn, digits_config):
  config = digits_config("wsn", **{"method.share": 0.2, "method.bn": bn})
  states, _, _ = learn(config)
  for before, after in zip(states, states[1:], strict=False):
    for name, kernel in before.shared["kernels"].items():
      used = np.asarray(before.shared["used"][name])
      new = np.asarray(after.shared["kernels"][name])
      np.testing.assert_array_equal(new[used], np.asarray(kernel)[used])
      assert (new[~used] != np.asarray(kernel)[~used]).mean() > 0.02
  state = states[-1]
  for learned in state.tasks:
    for name, kernel in state.shared["kernels"].items():
      mask = np.unpackbits(np.asarray(learned.mask[name]))[: kernel.size]
      assert mask.mean() == pytest.approx(0.2, abs=1e-3)
  union = [np.asarray(x).mean() for x in state.shared["used"].values()]
  assert all(0.2 < u <= 0.6 for u in union)


def test_norm_without_affine_parameters_is_not_trained():
  """On a network that has BatchNorm."""
  model = models.make("lenet", 3, "running")
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  trained, fixed = wsn._split_norm({n: x for n, x in params.items() if "bn" in n or n == "head"})
  assert set(trained) == {"head"} and set(fixed) == {"bn1", "bn2", "bn_fc1", "bn_fc2"}


def test_the_gradient_goes_straight_through_the_mask():
  """d loss / d |s| = d loss / d w * theta, for weights inside and outside of the mask."""
  rng = np.random.default_rng(0)
  theta, score, out = (jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for _ in range(3))

  def loss(theta, score):
    return jnp.sum(out * wsn.masked_kernel(theta, score, 0.5))

  by_theta, by_score = jax.grad(loss, (0, 1))(theta, score)
  mask = np.asarray(wsn.largest(jnp.abs(score), 0.5))
  np.testing.assert_allclose(by_theta, out * mask, rtol=1e-6)
  np.testing.assert_allclose(by_score, out * theta * jnp.sign(score), rtol=1e-6)
  np.testing.assert_array_equal(wsn.masked_kernel(theta, score, 0.5), theta * mask)


def test_scores_start_at_the_kernels_of_a_base(digits_config):
  """So the mask of the first task has the largest weights, but for those that training moves."""
  config = digits_config("wsn", epochs=1, learning_rate=1e-6, **{"method.scores": "kernels"})
  states, _, _ = learn(config)
  task, kernels = states[0].tasks[0], states[0].shared["kernels"]
  for name, kernel in kernels.items():
    mask = np.unpackbits(np.asarray(task.mask[name]))[: kernel.size].reshape(kernel.shape)
    largest = np.asarray(wsn.largest(jnp.abs(kernel), 0.5))
    assert (mask == largest).mean() > 0.99
