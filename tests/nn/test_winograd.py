"""Winograd's form: its transformations are transposes of each other, its error is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halrp_jax.nn import winograd

TILES = (6, 6, 2, 3, 2, 4)  # of images with 12 x 8 outputs and 4 channels


def normal(seed, shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
  ("forward", "backward", "shape", "transformed"),
  [
    (winograd._from_inputs, winograd._to_inputs, (2, 14, 10, 4), TILES),
    (winograd._from_outputs, winograd._to_outputs, (2, 12, 8, 4), TILES),
    (winograd._from_kernel, winograd._to_kernel, (3, 3, 4, 5), (6, 6, 4, 5)),
  ],
)
def test_the_transformations_are_transposes_of_each_other(forward, backward, shape, transformed):
  x, y = normal(0, shape), normal(1, transformed)
  witness = jnp.float32(0)
  back = np.asarray(backward(y, witness))[tuple(slice(n) for n in shape)]
  np.testing.assert_allclose(np.vdot(forward(x, witness), y), np.vdot(x, back), rtol=1e-4)


@pytest.mark.parametrize("channels", [16, 256])
def test_the_error_is_about_1e_5_of_the_largest_value(channels):
  x, kernel = normal(0, (4, 6, 6, channels)), normal(1, (3, 3, channels, 16))
  y = winograd.conv(x, kernel)
  exact = np.zeros((4, 4, 4, 16))
  for i in range(3):
    for j in range(3):
      exact += np.float64(x[:, i : i + 4, j : j + 4]) @ np.float64(kernel[i, j])
  assert np.abs(y - exact).max() < 2e-5 * np.abs(exact).max()


def test_the_error_in_float64_is_that_of_float64():
  with jax.enable_x64(True):
    x = np.random.default_rng(0).normal(size=(1, 6, 6, 16))
    kernel = np.random.default_rng(1).normal(size=(3, 3, 16, 16))
    exact = sum(x[:, i : i + 4, j : j + 4] @ kernel[i, j] for i in range(3) for j in range(3))
    assert np.abs(winograd.conv(jnp.asarray(x), jnp.asarray(kernel)) - exact).max() < 1e-12


def test_it_is_used_for_3_x_3_kernels_of_many_channels_in_float32():
  assert winograd.suits((3, 3, 16, 16), (4, 8), jnp.float32)
  assert not winograd.suits((3, 3, 15, 16), (4, 8), jnp.float32)
  assert not winograd.suits((3, 3, 16, 15), (4, 8), jnp.float32)
  assert not winograd.suits((5, 3, 16, 16), (4, 8), jnp.float32)
  assert not winograd.suits((3, 3, 16, 16), (5, 5), jnp.float32)  # 64 positions for 25 outputs
  assert not winograd.suits((3, 3, 16, 16), (4, 8), jnp.bfloat16)
  assert not winograd.suits((3, 3, 16, 16), (4, 8), jnp.int32)


def test_a_nan_in_the_first_image_stays_there_and_reaches_its_outputs():
  x = normal(0, (2, 6, 6, 16))
  x[0, 2, 2, 5] = np.nan
  y = np.asarray(jax.jit(winograd.conv)(x, normal(1, (3, 3, 16, 16))))
  assert np.isnan(y[0, :3, :3]).all()
  assert np.isfinite(y[1]).all()
