"""Pytrees as JSON and arrays, for the disk (`checkpoint`) and for other processes. No pickle."""

import importlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from halrp_jax.types import Params

# Types whose values are written to the disk: the name in the file, and where the type is. A name
# never changes; its type may move.
TYPES = {
  "State": "halrp_jax.types:State",
  "Perturbation": "halrp_jax.weights.lowrank:Perturbation",
  # `TaskState` of each method's file
  "anchored": "halrp_jax.methods.anchored:TaskState",
  "apd": "halrp_jax.methods.apd:TaskState",
  "apdfix": "halrp_jax.methods.apdfix:TaskState",
  "be": "halrp_jax.methods.be:TaskState",
  "bmkp": "halrp_jax.methods.bmkp:TaskState",
  "bn": "halrp_jax.methods.bn:TaskState",
  "clr": "halrp_jax.methods.clr:TaskState",
  "dictionary": "halrp_jax.methods.dictionary:TaskState",
  "gpm": "halrp_jax.methods.gpm:TaskState",
  "halrp": "halrp_jax.methods.halrp:TaskState",
  "mtl": "halrp_jax.methods.mtl:TaskState",
  "prd": "halrp_jax.methods.prd:TaskState",
  "stl": "halrp_jax.methods.stl:TaskState",
  "wsn": "halrp_jax.methods.wsn:TaskState",
}
# names in files of versions that wrote where the type was then
_ALIASES = {
  "halrp_jax.types:State": "State",
  "halrp_jax.lowrank:Perturbation": "Perturbation",
}


class Packed(NamedTuple):
  """A pytree on the host, ready to be written."""

  structure: dict
  arrays: list[np.ndarray]


def pack(tree: Params) -> Packed:
  """Copies a pytree to the host: the device may then use its buffers for something else.

  Args:
    tree: dicts, lists, tuples and the NamedTuples in `TYPES`, with arrays, numbers, texts and None.

  Raises:
    TypeError: for a NamedTuple that has no name in `TYPES`.
  """
  arrays = []
  return Packed(_encode(tree, arrays), arrays)


def unpack(structure: dict, arrays: Sequence[np.ndarray]) -> Params:
  """The pytree again, with numpy arrays.

  Raises:
    ValueError, KeyError, ...: whatever a structure that was not made by `pack` leads to.
  """
  return _decode(structure, dict(enumerate(arrays)))


def to_bytes(tree: Params) -> bytes:
  """What `from_bytes` makes the pytree of: length of the JSON, the JSON, the arrays."""
  structure, arrays = pack(tree)
  leaves = [[list(x.shape), str(x.dtype)] for x in arrays]
  head = json.dumps({"structure": structure, "leaves": leaves}).encode()
  return b"".join([len(head).to_bytes(8, "little"), head, *(x.tobytes() for x in arrays)])


def from_bytes(data: bytes) -> Params:
  """The pytree, with numpy arrays; what follows its end is ignored."""
  begin = 8 + int.from_bytes(data[:8], "little")
  head, arrays = json.loads(data[8:begin]), []
  for shape, dtype in head["leaves"]:
    count = int(np.prod(shape, dtype=np.int64))
    x = np.frombuffer(data, np.dtype(dtype), count, begin) if count else np.empty(0, dtype)
    begin += x.nbytes
    arrays.append(x.reshape(shape).copy())
  return unpack(head["structure"], arrays)


def _encode(tree: Params, arrays: list) -> dict:
  """The structure of a pytree as JSON; its arrays are appended to `arrays` as host copies."""
  if tree is None or type(tree) in (bool, int, float, str):  # numpy's float64 is a float, too
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


def _decode(node: dict, arrays: dict[int, np.ndarray]) -> Params:
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
  path = f"{kind.__module__}:{kind.__qualname__}"
  for name, known in TYPES.items():
    if known == path:
      return name
  raise TypeError(f"{path} has no name in halrp_jax.packing.TYPES")


def _named(name: str) -> type:
  name = _ALIASES.get(name, name)
  if name not in TYPES:
    raise ValueError(f"{name} is no type of ours")
  module, _, kind_name = TYPES[name].partition(":")
  return getattr(importlib.import_module(module), kind_name)
