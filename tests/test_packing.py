"""Pytrees as bytes and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halrp_jax import packing
from halrp_jax.types import State


def test_bytes_hold_the_whole_pytree():
  tree = {
    "state": State({"x": jnp.arange(6.0).reshape(2, 3)}, ({}, {"n": jnp.int32(3)})),
    "values": [None, True, 7, 0.1, "text", (np.float64(np.nan), np.zeros((0, 4), np.uint8))],
    "half": jnp.ones(3, jnp.bfloat16),
  }
  again = packing.from_bytes(packing.to_bytes(tree) + b"what follows")
  assert jax.tree.structure(again) == jax.tree.structure(tree)
  for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert np.asarray(a).dtype == np.asarray(b).dtype
  assert isinstance(again["state"], State)


@pytest.mark.parametrize("name", ["os:path", "halrp_jax.types:UserError", "halrp_jax.types"])
def test_only_types_of_ours_are_made(name):
  with pytest.raises((ValueError, AttributeError)):
    packing.unpack({"named": name, "items": []}, [])
