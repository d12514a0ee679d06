"""Perturbations of the kernels of flax.nnx models: nnx.Linear, nnx.Conv and nnx.LinearGeneral.

The functions are what `perturb.init`, `apply` and `merge` do with an nnx model. A model is split
into its graph and its state; the kernels of perturbed layers are taken out of the state, and the
composed kernels W_t are put in their place. So every layer computes exactly what it does with the
merged kernel. A path is the names of attributes and the indices of lists, joined by slashes.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from halrp_jax.types import Params, UserError
from halrp_jax.weights import fresh, kinds, lowrank, trees

_OF_NNX = ("_pytree__", "_object__")  # attributes that nnx itself adds to a module
_Path = tuple[Any, ...]  # attributes, indices and keys from the model to a module


def init(
  key: jax.Array, model: nnx.Module, *, rank: int, pattern: str = "*"
) -> tuple[dict[str, jax.Array], dict[str, lowrank.Perturbation], nnx.State[Any, Any]]:
  """Creates perturbations of some layers of an nnx model, which change nothing yet.

  Args:
    key: random key for V.
    model: the model, which stays as it is.
    rank: columns of U and V.
    pattern: which layers to perturb. The layer called "head" never is.

  Returns:
    Kernels by layer path, perturbations by layer path, and the state without the kernels.

  Raises:
    UserError: if no layer matches, or one that matches is shared or stacked.
  """
  fresh.check_rank_and_pattern(rank, pattern)
  layers = _layers(model)
  names = fresh.matching(layers, pattern)
  shapes = {name: _matrix_shape(name, *layers[name]) for name in names}
  flat = dict(nnx.to_flat_state(_copy(nnx.split(model)[1])))
  for name in names:
    if _kernel_path(name) not in flat:
      raise UserError(
        f"{name}: its kernel is also that of another layer, or a key in its path is a text of "
        "digits; such layers are not perturbed: choose others by pattern"
      )
  kernels = {name: flat.pop(_kernel_path(name))[...] for name in names}
  perturbation = fresh.perturbations(key, kernels, shapes, rank)
  return kernels, perturbation, nnx.from_flat_state(list(flat.items()))


def apply(
  model: nnx.Module,
  kernels: Mapping[str, jax.Array],
  perturbation: Mapping[str, lowrank.Perturbation],
  rest: nnx.State[Any, Any],
  *args: Params,
  mutable: bool = False,
  **kwargs: object,
) -> Params:
  """Calls an nnx model with perturbed kernels.

  Args:
    model: the model; only its graph is used.
    kernels: frozen kernels by layer path.
    perturbation: <R, S, U, Sigma, V> by layer path.
    rest: the state without the kernels; of a model with dropout it has random counters, too, which
      an optimizer can't train: take the parameters out with nnx.split_state(rest, nnx.Param, ...).
    *args: arguments of the call.
    mutable: whether to return the state after the call too: running statistics, random counters.
    **kwargs: further arguments of the call.

  Returns:
    What the model returns; with `mutable` also `rest` after the call.
  """
  whole: Any = nnx.merge(nnx.split(model)[0], merge(kernels, perturbation, rest))
  y = whole(*args, **kwargs)
  if not mutable:
    return y
  perturbed = set(map(_kernel_path, kernels))
  flat = [(p, x) for p, x in nnx.to_flat_state(nnx.split(whole)[1]) if p not in perturbed]
  return y, nnx.from_flat_state(flat)


def merge(
  kernels: Mapping[str, jax.Array],
  perturbation: Mapping[str, lowrank.Perturbation],
  rest: nnx.State[Any, Any],
) -> nnx.State[Any, Any]:
  """Returns the ordinary state of one task, for `nnx.update`: kernels W_t and the rest."""
  flat = list(nnx.to_flat_state(_copy(rest)))
  for name, kernel in kernels.items():
    composed = kinds.compose(kernel, perturbation[name])
    flat.append((_kernel_path(name), nnx.Param(composed)))
  return nnx.from_flat_state(flat)


def _copy(state: nnx.State[Any, Any]) -> nnx.State[Any, Any]:
  """Returns a state with variables of its own: a call of the model can't change the given ones."""
  return jax.tree.map(lambda x: x, state)


def _kernel_path(name: str) -> _Path:
  """Returns the path of a layer's kernel; numbers are indices of lists."""
  parts = name.split(trees.SEPARATOR)
  return (*(int(p) if p.isdigit() else p for p in parts), "kernel")


def _layers(model: nnx.Module) -> dict[str, tuple[list[_Path], nnx.Module]]:
  """Returns the layers that can be perturbed, by path: all their paths, and the module.

  A model that is one layer has none, as in Linen.
  """
  found: dict[int, tuple[list[_Path], nnx.Module]] = {}
  for path, module in _walk((), model, ()):
    if path and type(module) in (nnx.Linear, nnx.Conv, nnx.LinearGeneral):
      found.setdefault(id(module), ([], module))[0].append(path)
  named = {trees.SEPARATOR.join(map(str, paths[0])): (paths, m) for paths, m in found.values()}
  return {n: x for n, x in sorted(named.items()) if n.split(trees.SEPARATOR)[0] != trees.HEAD}


def _walk(path: _Path, node: object, above: tuple[int, ...]) -> Iterator[tuple[_Path, nnx.Module]]:
  """Yields every module below a node with its path; a shared one once for each of its paths."""
  if id(node) in above:
    return
  if isinstance(node, nnx.Module):
    yield path, node
  if isinstance(node, Mapping):
    parts = list(node.items())
  elif isinstance(node, list | tuple):
    parts = list(enumerate(node))
  elif isinstance(node, nnx.Module):
    parts = [(k, v) for k, v in vars(node).items() if not k.startswith(_OF_NNX)]
  else:
    return
  for name, part in parts:
    yield from _walk((*path, name), part, (*above, id(node)))


def _matrix_shape(name: str, paths: list[_Path], module: Any) -> tuple[int, int]:  # noqa: ANN401 (nnx modules have no common type for layers)
  """Returns (I, J) of a layer's kernel as a matrix; raises UserError if it can't be perturbed."""
  kernel = module.kernel[...]
  if len(paths) > 1:
    others = ", ".join(trees.SEPARATOR.join(map(str, p)) for p in paths[1:])
    raise UserError(
      f"{name}: the same layer is also {others}; shared layers are not perturbed: give each use a "
      "layer of its own, or choose others by pattern"
    )
  if isinstance(module, nnx.LinearGeneral):
    num_in, num_out = (_as_tuple(x) for x in (module.in_features, module.out_features))
    if module.batch_axis:
      raise UserError(f"{name}: LinearGeneral with batch_axis is not perturbed")
    expected, shape = len(num_in) + len(num_out), (math.prod(num_in), math.prod(num_out))
  else:
    window = len(_as_tuple(module.kernel_size)) if isinstance(module, nnx.Conv) else 0
    expected, shape = window + 2, (kernel.shape[-2], kernel.shape[-1])
  if kernel.ndim != expected:
    raise UserError(
      f"{name}: its kernel has {kernel.ndim} axes, expected {expected}: layers that are stacked by "
      "nnx.scan or nnx.vmap are not perturbed"
    )
  return shape


def _as_tuple(x: Any) -> tuple[int, ...]:  # noqa: ANN401
  """Returns a number or several as a tuple."""
  return tuple(x) if isinstance(x, tuple | list) else (x,)
