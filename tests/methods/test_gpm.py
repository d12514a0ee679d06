"""Claims of GPM: the update stays out of what earlier tasks see, in both modes."""

import jax
import numpy as np
import pytest

from halrp_jax.methods import gpm

from .test_methods import learn


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_kernels_move_only_outside_the_basis(optimizer, digits_config):
  config = digits_config("gpm", **{"method.optimizer": optimizer, "method.threshold": 0.9})
  states, _, _ = learn(config)
  for before, after in zip(states, states[1:], strict=False):
    for name, kernel in after.shared["kernels"].items():
      moved = np.asarray(kernel) - np.asarray(before.shared["kernels"][name])
      count = int(before.shared["num_directions"][name])
      basis = np.asarray(before.shared["basis"][name])
      assert 0 < count < len(basis) and not basis[:, count:].any()
      assert np.abs(moved).max() > 1e-4
      assert (
        np.abs(basis.T @ moved.reshape(-1, moved.shape[-1])).max()
        < 1e-4 * np.abs(moved).max() + 1e-5
      )
      assert int(after.shared["num_directions"][name]) >= count
      np.testing.assert_array_equal(after.shared["basis"][name][:, :count], basis[:, :count])
    others = (s.shared["others"] for s in (before, after))
    jax.tree.map(np.testing.assert_array_equal, *others)


def test_projecting_the_gradient_is_not_enough_for_adam():
  """Why Adam's update is projected, not its gradient: scaling by weight leaves the subspace."""
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.normal(size=(6, 3)))[0].astype(np.float32)
  gradient = np.asarray(gpm._project(rng.normal(size=(6, 2)).astype(np.float32), basis))
  np.testing.assert_allclose(basis.T @ gradient, 0, atol=1e-6)
  assert np.abs(basis.T @ np.sign(gradient)).max() > 0.1  # Adam's first step
