"""Random parts of images, resized to the network's input (`protocol.augment=crop_resize_flip`)."""

import jax
import numpy as np
import pytest
from PIL import Image

from halrp_jax.data.tasks import resizing
from halrp_jax.training import batches
from halrp_jax.types import Inputs


def inputs_of(stored, size):
  resize = None if size == stored else resizing(stored, size)
  return Inputs(np.zeros(3, np.float32), np.ones(3, np.float32), None, resize)


def drawn(key, stored, size, count, least_area):
  """-> inputs with weights for each image."""
  draw = jax.jit(batches.crop_resize_flip, static_argnums=(2, 3, 4))
  return draw(jax.random.key(key), inputs_of(stored, size), stored, count, least_area)


def parts_of(key, stored, count, least_area):
  """-> top, left, height, width, mirrored of the parts that `drawn` cuts out."""
  draw = jax.jit(batches.draw_parts, static_argnums=(1, 2, 3))
  return [np.asarray(x) for x in draw(jax.random.key(key), stored, count, least_area)]


def random_images(shape):
  """Smooth, and so far from 0 and 255 that Pillow cuts off nothing between its two axes."""
  rng = np.random.default_rng(0)
  small = rng.integers(64, 192, (shape[0], shape[1] // 4, shape[2] // 4, 3), np.uint8)
  resized = [
    Image.fromarray(x).resize((shape[2], shape[1]), Image.Resampling.BICUBIC) for x in small
  ]
  return np.stack([np.asarray(x) for x in resized])


@pytest.mark.parametrize("size", [(40, 40), (75, 75), (24, 24)])
def test_whole_images_are_those_without_augmentation(size):
  """To 1e-5, or their mirror images; about half of them are mirrored."""
  image = random_images((200, 40, 40))
  inputs = inputs_of((40, 40), size)
  plain = np.asarray(batches.prepare_images(image, inputs))
  got = np.asarray(batches.prepare_images(image, drawn(0, (40, 40), size, 200, 1.0)))
  assert got.shape == (200, *size, 3)
  same = np.abs(got - plain).max((1, 2, 3)) < 1e-5
  mirrored = np.abs(got[:, :, ::-1] - plain).max((1, 2, 3)) < 1e-5
  assert (same ^ mirrored).all() and 70 < mirrored.sum() < 130


@pytest.mark.parametrize(("stored", "size"), [((48, 48), (32, 32)), ((48, 40), (100, 80))])
def test_parts_are_those_that_pillow_cuts_out_and_resizes(stored, size):
  """Pillow's box may have fractions of pixels, and its filter uses the pixels beside it, too."""
  image = random_images((30, *stored))
  got = np.asarray(batches.prepare_images(image, drawn(1, stored, size, 30, 0.2)))
  top, left, height, width, mirrored = parts_of(1, stored, 30, 0.2)
  assert 5 < mirrored.sum() < 25 and np.ptp(top) > 10 and np.ptp(height) > 10
  for i, x in enumerate(image):
    corners = left[i], top[i], left[i] + width[i], top[i] + height[i]
    corners = np.clip(corners, 0, (*stored[::-1], *stored[::-1]))
    want = Image.fromarray(x).resize(size[::-1], Image.Resampling.BICUBIC, box=tuple(corners))
    want = np.asarray(want)[:, :: -1 if mirrored[i] else 1] / 255
    assert np.abs(got[i] - want).max() < 2.5 / 255  # Pillow rounds after each axis


def test_areas_ratios_and_places_are_distributed_as_the_keys_say():
  count, side = 4000, 64
  top, left, height, width, mirrored = parts_of(2, (side, side), count, 0.35)
  area, ratio = height * width / side**2, width / height
  assert area.min() > 0.349 and area.max() < 1.001
  np.testing.assert_allclose(
    np.quantile(area, [0.25, 0.5, 0.75]), [0.5125, 0.675, 0.8375], atol=0.02
  )
  assert ratio.min() > 0.749 and ratio.max() < 1.335 and ratio.min() < 0.77 and ratio.max() > 1.3
  assert abs(np.log(ratio).mean()) < 0.01  # as many wide ones as high ones
  for start, length in ((top, height), (left, width)):
    assert start.min() > -0.01 and (start + length).max() < side + 0.01
    free = side - length
    np.testing.assert_allclose(np.mean(start[free > 5] / free[free > 5]), 0.5, atol=0.02)
  assert abs(mirrored.mean() - 0.5) < 0.03


@pytest.mark.parametrize("stored", [(20, 64), (64, 20), (64, 60)])
def test_parts_fit_into_images_of_any_shape(stored):
  top, left, height, width, _ = parts_of(3, stored, 500, 0.9)
  for start, length, n in ((top, height, stored[0]), (left, width, stored[1])):
    assert (length > n / 4).all() and start.min() >= 0 and (start + length).max() < n + 1e-3
  for weights in drawn(3, stored, (32, 32), 500, 0.9).resize:
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


def test_a_key_draws_the_same_parts_again_and_another_one_others():
  one, again, other = (drawn(key, (16, 16), (16, 16), 8, 0.35).resize for key in (4, 4, 5))
  for x, y, z in zip(one, again, other, strict=True):
    np.testing.assert_array_equal(x, y)
    assert not np.array_equal(x, z)
  first, second = (np.asarray(one[0])[i] for i in (0, 1))
  assert not np.array_equal(first, second)  # each image has a part of its own
