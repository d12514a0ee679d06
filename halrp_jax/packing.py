"""Converts pytrees to JSON and arrays and back, for checkpoints and other processes. No pickle."""

import importlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from halrp_jax.types import Json, Params

# The named tuples that may be written to disk: {name in the file: import path}. The names must
# never change, because finished runs contain them; the types may move.
TYPES = {
  "State": "halrp_jax.types:State",
  "Perturbation": "halrp_jax.weights.lowrank:Perturbation",
  # the class `TaskState` of each method's module
  "anchored": "halrp_jax.methods.anchored:TaskState",
  "apd": "halrp_jax.methods.apd:TaskState",
  "apdfix": "halrp_jax.methods.apdfix:TaskState",
  "be": "halrp_jax.methods.be:TaskState",
  "bmkp": "halrp_jax.methods.bmkp:TaskState",
  "bn": "halrp_jax.methods.bn:TaskState",
  "branches": "halrp_jax.methods.branches:TaskState",
  "clr": "halrp_jax.methods.clr:TaskState",
  "dictionary": "halrp_jax.methods.dictionary:TaskState",
  "gpm": "halrp_jax.methods.gpm:TaskState",
  "halrp": "halrp_jax.methods.halrp:TaskState",
  "mtl": "halrp_jax.methods.mtl:TaskState",
  "prd": "halrp_jax.methods.prd:TaskState",
  "stl": "halrp_jax.methods.stl:TaskState",
  "wsn": "halrp_jax.methods.wsn:TaskState",
}
# Older versions of halrp_jax wrote import paths instead of names.
_ALIASES = {
  "halrp_jax.types:State": "State",
  "halrp_jax.lowrank:Perturbation": "Perturbation",
}


class Packed(NamedTuple):
  """A pytree on the host, ready to be written to disk."""

  structure: Json  # the pytree with the index into `arrays` in place of each array
  arrays: list[np.ndarray]


def pack(tree: Params) -> Packed:
  """Copies a pytree to the host, so that the device may reuse its buffers.

  Args:
    tree: a pytree of dicts, lists, tuples and the named tuples in `TYPES`, whose leaves are arrays,
      numbers, texts or None.

  Raises:
    TypeError: if a named tuple is not in `TYPES`.
  """
  arrays: list[np.ndarray] = []
  return Packed(_encode(tree, arrays), arrays)


def unpack(structure: Json, arrays: Sequence[np.ndarray]) -> Params:
  """Returns the pytree of a `Packed`, with numpy arrays as leaves.

  Raises:
    ValueError, KeyError, TypeError or AttributeError: if the structure was not made by `pack`.
  """
  return _decode(structure, dict(enumerate(arrays)))


def to_bytes(tree: Params) -> bytes:
  """Returns a pytree as bytes that `from_bytes` reads.

  They are the length of a JSON text (8 bytes, little endian), the JSON text, and the arrays.

  Raises:
    TypeError: as `pack`.
  """
  structure, arrays = pack(tree)
  leaves = [[list(x.shape), str(x.dtype)] for x in arrays]
  head = json.dumps({"structure": structure, "leaves": leaves}).encode()
  return b"".join([len(head).to_bytes(8, "little"), head, *(x.tobytes() for x in arrays)])


def from_bytes(data: bytes) -> Params:
  """Returns the pytree that `to_bytes` has written, with numpy arrays; ignores bytes after it."""
  begin = 8 + int.from_bytes(data[:8], "little")
  head, arrays = json.loads(data[8:begin]), []
  for shape, dtype in head["leaves"]:
    count = int(np.prod(shape, dtype=np.int64))
    x = np.frombuffer(data, np.dtype(dtype), count, begin) if count else np.empty(0, dtype)
    begin += x.nbytes
    arrays.append(x.reshape(shape).copy())
  return unpack(head["structure"], arrays)


def _encode(tree: Params, arrays: list[np.ndarray]) -> Json:
  """Returns the structure of a pytree as JSON; appends host copies of its arrays to `arrays`."""
  if tree is None or type(tree) in (bool, int, float, str):  # not isinstance: np.float64 is a float
    return {"value": tree}
  if isinstance(tree, dict):
    return {"dict": [[k, _encode(v, arrays)] for k, v in tree.items()]}
  if hasattr(tree, "_fields"):
    return {"named": _name_of(type(tree)), "items": [_encode(x, arrays) for x in tree]}
  if isinstance(tree, (tuple, list)):
    kind = "tuple" if isinstance(tree, tuple) else "list"
    return {kind: [_encode(x, arrays) for x in tree]}
  arrays.append(np.array(tree))  # a copy, never a view of the device's buffer
  return {"array": len(arrays) - 1}


def _decode(node: Json, arrays: dict[int, np.ndarray]) -> Params:
  """Returns the pytree of a structure that `_encode` has made."""
  if "value" in node:
    return node["value"]
  if "dict" in node:
    return {k: _decode(v, arrays) for k, v in node["dict"]}
  if "array" in node:
    return np.asarray(arrays[node["array"]])
  if "named" in node:
    kind = _named(node["named"])
    return kind(*(_decode(x, arrays) for x in node["items"]))
  kind = tuple if "tuple" in node else list
  return kind(_decode(x, arrays) for x in node["tuple" if kind is tuple else "list"])


def _name_of(kind: type) -> str:
  """Returns the name of a type in `TYPES`; raises TypeError if it has none."""
  path = f"{kind.__module__}:{kind.__qualname__}"
  for name, known in TYPES.items():
    if known == path:
      return name
  raise TypeError(f"{path} has no name in halrp_jax.packing.TYPES")


def _named(name: str) -> type:
  """Imports the type with a name in `TYPES`; raises ValueError if there is none."""
  name = _ALIASES.get(name, name)
  if name not in TYPES:
    raise ValueError(f"{name} is not in halrp_jax.packing.TYPES")
  module, _, kind_name = TYPES[name].partition(":")
  return getattr(importlib.import_module(module), kind_name)
