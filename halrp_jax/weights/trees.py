"""Functions that split parameter trees and join them again: kernels, biases, shared parts.

The path of a layer is its names in the tree joined by slashes, such as "block1/conv1".
"""

from collections.abc import Collection, Iterable, Mapping

import jax
from flax import traverse_util

from halrp_jax.types import Array, Params

HEAD = "head"  # name of the classifying layer, which is never perturbed
SEPARATOR = "/"
_ENTRIES = ("params", "rest", "others", "private")  # of what methods train, that may have the head


def is_in_head(path: tuple[object, ...]) -> bool:
  """Returns whether a leaf of what a method trains belongs to the head.

  Methods train a tree of parameters, or hold one as an entry of what they train.
  """
  names = [getattr(key, "key", None) for key in path[:2]]
  return names[:1] == [HEAD] or (names[1:] == [HEAD] and names[0] in _ENTRIES)


def layer_names(params: Params) -> tuple[str, ...]:
  """Returns the sorted paths of all layers with a kernel, except the head."""
  paths: Params = traverse_util.flatten_dict(params)
  names = (SEPARATOR.join(path[:-1]) for path in paths if path[-1] == "kernel" and path[:-1])
  return tuple(sorted(n for n in names if n.split(SEPARATOR)[0] != HEAD))


def split(params: Params) -> tuple[dict[str, jax.Array], Params]:
  """Splits parameters into the kernels of all layers except the head, by path, and the rest."""
  return take_out(layer_names(params), params)


def take_out(names: Iterable[str], params: Params) -> tuple[dict[str, jax.Array], Params]:
  """Splits parameters into the kernels of the layers `names`, by path, and the rest."""
  flat: Params = traverse_util.flatten_dict(
    params
  )  # no separator: names of parameters may have slashes
  kernels = {name: flat.pop(_kernel_path(name)) for name in names}
  return kernels, traverse_util.unflatten_dict(flat)


def _kernel_path(name: str) -> tuple[str, ...]:
  """Returns the keys that lead to the kernel of a layer."""
  return (*name.split(SEPARATOR), "kernel")


def join(kernels: Mapping[str, Array], rest: Params) -> Params:
  """Joins kernels by path and the other parameters. Inverts `split`."""
  flat: Params = traverse_util.flatten_dict(rest)
  flat |= {_kernel_path(name): kernel for name, kernel in kernels.items()}
  return traverse_util.unflatten_dict(flat)


def split_biases(rest: Params, names: Collection[str]) -> tuple[dict[str, jax.Array], Params]:
  """Splits parameters into the biases of the layers `names`, by path, and the rest.

  The bias of a layer before BatchNorm is a parameter of the BatchNorm (`nn.norm.BatchNorm`).

  Args:
    rest: parameters without the kernels of these layers.
    names: paths of layers.
  """
  flat: Params = traverse_util.flatten_dict(rest, sep=SEPARATOR)
  biases = {path: flat.pop(path) for path in list(flat) if is_bias(path, names)}
  return biases, traverse_util.unflatten_dict(flat, sep=SEPARATOR)


def join_biases(biases: Mapping[str, Array], others: Params) -> Params:
  """Joins biases by path and the other parameters. Inverts `split_biases`."""
  flat: Params = traverse_util.flatten_dict(others, sep=SEPARATOR)
  return traverse_util.unflatten_dict(flat | dict(biases), sep=SEPARATOR)


def is_bias(path: str, names: Collection[str]) -> bool:
  """Returns whether the parameter at `path` is the bias of one of the layers `names`."""
  suffix = f"{SEPARATOR}bias"
  return path.removesuffix(suffix) in names or path.endswith(f"{SEPARATOR}input_bias")


def split_private(params: Params, norm: bool) -> tuple[Params, Params]:
  """Splits parameters into those that tasks share and those that each task has for itself.

  Args:
    params: the parameters of a whole network.
    norm: whether BatchNorm belongs to the task, as the head always does.

  Returns:
    The shared parameters and the private ones.
  """
  flat: Params = traverse_util.flatten_dict(params, sep=SEPARATOR)
  norms = {p.rpartition(SEPARATOR)[0] for p in flat if p.endswith(f"{SEPARATOR}scale")}

  def is_private(path: str) -> bool:
    return path.split(SEPARATOR)[0] == HEAD or (norm and path.rpartition(SEPARATOR)[0] in norms)

  shared = {path: x for path, x in flat.items() if not is_private(path)}
  private = {path: x for path, x in flat.items() if is_private(path)}
  return (
    traverse_util.unflatten_dict(shared, sep=SEPARATOR),
    traverse_util.unflatten_dict(private, sep=SEPARATOR),
  )


def join_private(shared: Params, private: Params) -> Params:
  """Joins shared and private parameters. Inverts `split_private`."""
  flat_shared = traverse_util.flatten_dict(shared, sep=SEPARATOR)
  flat_private = traverse_util.flatten_dict(private, sep=SEPARATOR)
  return traverse_util.unflatten_dict(flat_shared | flat_private, sep=SEPARATOR)
