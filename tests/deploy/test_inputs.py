import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halrp_jax.deploy import inputs
from halrp_jax.types import UserError

IMAGE = np.zeros((2, 8, 8, 3), np.uint8)


def test_images_that_are_right_pass():
  for image in (IMAGE, jnp.asarray(IMAGE), IMAGE[:0]):
    inputs.require_images(image, ("B", 8, 8, 3), "f")
  inputs.require_images(IMAGE, (2, 8, 8, 3), "f")
  jax.jit(lambda x: inputs.require_images(x, ("B", 8, 8, 3), "f"))(IMAGE)


@pytest.mark.parametrize(
  ("image", "given"),
  [
    (IMAGE / np.float32(255), r"float32 \[2, 8, 8, 3\]"),
    (IMAGE[0], r"uint8 \[8, 8, 3\]"),
    (IMAGE[..., :1], r"uint8 \[2, 8, 8, 1\]"),
    (IMAGE.transpose(0, 3, 1, 2), r"uint8 \[2, 3, 8, 8\]"),
    (IMAGE.tolist(), "a list"),
    (None, "a NoneType"),
  ],
)
def test_other_images_are_refused_in_one_line(image, given):
  with pytest.raises(UserError, match=rf"^f: expected uint8 images \[B, 8, 8, 3\], given {given}$"):
    inputs.require_images(image, ("B", 8, 8, 3), "f")


def test_one_image_for_each_task_id():
  with pytest.raises(UserError, match=r"uint8 images \[3, 8, 8, 3\], given uint8 \[2, 8, 8, 3\]"):
    inputs.require_images(IMAGE, (3, 8, 8, 3), "f")


@pytest.mark.parametrize(
  ("ids", "given"),
  [
    ([0.5, 1], r"float64 \[2\]"),
    (3, r"int64 \[\]"),
    ([[1], [2, 3]], "a list"),
    (["1"], r"<U1 \[1\]"),
    ([True], r"bool \[1\]"),
  ],
)
def test_other_task_ids_are_refused(ids, given):
  with pytest.raises(UserError, match=rf"^f: expected task ids, .* given {given}$"):
    inputs.require_ids(ids, "f")


def test_task_ids_that_are_right_become_an_array():
  for ids in ([3, 1], np.int32([3, 1]), (3, 1)):
    np.testing.assert_array_equal(inputs.require_ids(ids, "f"), [3, 1])


@pytest.mark.parametrize(
  ("i", "size", "says"),
  [
    (2, 2, "from 0 to 1, given 2"),
    (-1, 2, "from 0 to 1, given -1"),
    ("1", 2, "from 0 to 1, given '1'"),
    (1.0, None, "from 0 on, given 1.0"),
    (None, None, "from 0 on, given None"),
  ],
)
def test_an_index_that_is_none_is_refused(i, size, says):
  with pytest.raises(UserError, match=f"^task: expected a whole number {says}$"):
    inputs.require_index(i, size, "task")
  inputs.require_index(np.int64(1), 2, "task")
