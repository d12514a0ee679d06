"""Pytrees as bytes and back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halrp_jax import methods, packing
from halrp_jax.types import State
from halrp_jax.weights.lowrank import Perturbation


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
  with pytest.raises(ValueError, match="is not in halrp_jax.packing.TYPES"):
    packing.unpack({"named": name, "items": []}, [])


@pytest.mark.parametrize("name", packing.TYPES)
def test_the_types_are_where_the_table_says(name):
  kind = packing._named(name)
  value = kind(*(np.float32(i) for i in range(len(kind._fields))))
  structure, arrays = packing.pack(value)
  assert structure["named"] == name  # no import path: the type may move
  assert packing.unpack(structure, arrays) == value


def test_the_task_states_of_all_methods_can_be_written():
  paths = packing.TYPES.values()
  for module in methods.METHODS.values():
    state = module.TaskState
    assert f"{state.__module__}:{state.__qualname__}" in paths


def test_a_type_without_a_name_is_not_written():
  class Stray(NamedTuple):
    x: int

  with pytest.raises(TypeError, match=r"Stray has no name in halrp_jax\.packing\.TYPES"):
    packing.pack(Stray(1))


@pytest.mark.parametrize(
  ("written", "kind"),
  [("halrp_jax.types:State", State), ("halrp_jax.lowrank:Perturbation", Perturbation)],
)
def test_names_of_older_files_are_read(written, kind):
  items = [{"value": None}] * len(kind._fields)
  assert isinstance(packing.unpack({"named": written, "items": items}, []), kind)
