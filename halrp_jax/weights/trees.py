"""Parameter trees taken apart and put together again: kernels, biases, what tasks share."""

from collections.abc import Iterable, Mapping

import jax
from flax import traverse_util

from halrp_jax.types import Params

HEAD = "head"  # never perturbed
SEPARATOR = "/"


def layer_names(params: Params) -> tuple[str, ...]:
  """Paths of the layers that are perturbed: all that have a kernel but the head."""
  paths = traverse_util.flatten_dict(params)
  names = (SEPARATOR.join(path[:-1]) for path in paths if path[-1] == "kernel" and path[:-1])
  return tuple(sorted(n for n in names if n.split(SEPARATOR)[0] != HEAD))


def split(params: Params) -> tuple[dict[str, jax.Array], Params]:
  """Parameters -> (kernels of the perturbed layers by path, everything else)."""
  return take_out(layer_names(params), params)


def take_out(names: Iterable[str], params: Params) -> tuple[dict[str, jax.Array], Params]:
  flat = traverse_util.flatten_dict(params)  # names of parameters may have slashes in them
  kernels = {name: flat.pop(_kernel_path(name)) for name in names}
  return kernels, traverse_util.unflatten_dict(flat)


def _kernel_path(name: str) -> tuple[str, ...]:
  return (*name.split(SEPARATOR), "kernel")


def join(kernels: Mapping[str, jax.Array], rest: Params) -> Params:
  """The inverse of `split`."""
  flat = traverse_util.flatten_dict(rest)
  flat |= {_kernel_path(name): kernel for name, kernel in kernels.items()}
  return traverse_util.unflatten_dict(flat)


def split_biases(rest: Params, names: Iterable[str]) -> tuple[dict[str, jax.Array], Params]:
  """Everything but the kernels -> (biases of the layers `names` by path, everything else).

  A bias before BatchNorm is a parameter of the BatchNorm (`nn.norm.BatchNorm`).
  """
  flat = traverse_util.flatten_dict(rest, sep=SEPARATOR)
  biases = {path: flat.pop(path) for path in list(flat) if is_bias(path, names)}
  return biases, traverse_util.unflatten_dict(flat, sep=SEPARATOR)


def join_biases(biases: Mapping[str, jax.Array], others: Params) -> Params:
  """The inverse of `split_biases`."""
  flat = traverse_util.flatten_dict(others, sep=SEPARATOR)
  return traverse_util.unflatten_dict(flat | dict(biases), sep=SEPARATOR)


def is_bias(path: str, names: Iterable[str]) -> bool:
  """Whether a parameter is the bias of one of the layers `names`."""
  suffix = f"{SEPARATOR}bias"
  return path.removesuffix(suffix) in names or path.endswith(f"{SEPARATOR}input_bias")


def split_private(params: Params, norm: bool) -> tuple[Params, Params]:
  """Parameters -> (what tasks share, what each has alone: the head, and BatchNorm if `norm`)."""
  flat = traverse_util.flatten_dict(params, sep=SEPARATOR)
  norms = {p.rpartition(SEPARATOR)[0] for p in flat if p.endswith(f"{SEPARATOR}scale")}

  def is_private(path):
    return path.split(SEPARATOR)[0] == HEAD or (norm and path.rpartition(SEPARATOR)[0] in norms)

  parts = [{p: x for p, x in flat.items() if is_private(p) is own} for own in (False, True)]
  return tuple(traverse_util.unflatten_dict(part, sep=SEPARATOR) for part in parts)


def join_private(shared: Params, private: Params) -> Params:
  """The inverse of `split_private`."""
  flat = [traverse_util.flatten_dict(tree, sep=SEPARATOR) for tree in (shared, private)]
  return traverse_util.unflatten_dict(flat[0] | flat[1], sep=SEPARATOR)
