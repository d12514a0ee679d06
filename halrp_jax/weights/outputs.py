"""Chooses the logits among the outputs of a network that returns a tuple or a dict."""

import copy
import dataclasses
import functools
from typing import TypeVar

import flax.linen as nn
import jax

from halrp_jax.types import Params, UserError
from halrp_jax.weights import trees

_Model = TypeVar("_Model")


def select(model: _Model, path: str | int) -> _Model:
  """Returns a network that computes what `model` does, and returns one of its outputs alone.

  It has the fields, parameters and paths of `model`: variables, perturbations and files of one are
  those of the other. An nnx model shares its variables with the result.

  Args:
    model: a Linen or nnx model whose call returns a pytree, such as a tuple or a dict.
    path: path of the output in what the call returns: an index, a key, or several of them joined by
      slashes, as in "heads/0".

  Raises:
    UserError: if `model` is no instance of a Linen or nnx module. The call of the result raises it
      if there is no such output; it names those there are.
  """
  bases = {
    (c.__module__.split(".")[:2] == ["flax", "nnx"], c.__name__) for c in type(model).__mro__
  }
  if not isinstance(model, nn.Module) and (True, "Module") not in bases:  # importing nnx takes time
    raise UserError(
      f"select_output: expected an instance of a Flax module, given {_name_of(model)}"
    )
  chosen = _with_output(type(model), str(path))
  if isinstance(model, nn.Module):
    fields = [f.name for f in dataclasses.fields(model) if f.init and f.name != "parent"]
    return chosen(**{name: getattr(model, name) for name in fields})
  shallow = copy.copy(model)
  shallow.__class__ = chosen
  return shallow


def describe(outputs: Params) -> str:
  """Returns the path, dtype and shape of every output of a network, for an error message."""
  found = [f"{path!r} ({x.dtype} {list(x.shape)})" for path, x in _by_path(outputs).items()]
  return ", ".join(found) or "none"


def example(outputs: Params, shape: tuple[int, ...]) -> str:
  """Returns the path of an output as Python text: that of the first with a shape, or else any."""
  found = _by_path(outputs)
  fitting = [path for path, x in found.items() if x.shape == shape]
  path = next(iter([*fitting, *found]), "logits")
  return path if path.isdigit() else repr(path)


def _with_output(cls: type, path: str) -> type:
  """Returns a subclass whose call returns the output at `path`."""

  # `wraps` takes over the signature, and the marks that Flax has put on the call
  @functools.wraps(cls.__call__)
  def call(self: object, *args: Params, **kwargs: Params) -> Params:
    return _take(cls.__call__(self, *args, **kwargs), path, cls.__name__)

  same = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
  return type(cls)(cls.__name__, (cls,), {"__call__": call} | same)


def _take(outputs: Params, path: str, name: str) -> Params:
  """Returns the output at a path; raises UserError if the network `name` has none there."""
  found = _by_path(outputs)
  if path not in found:
    raise UserError(
      f"select_output: {name} has no output {path!r}; it has {describe(outputs)}"
      if "" not in found
      else f"select_output: {name} returns one array, there is nothing to select: leave it out"
    )
  return found[path]


def _by_path(outputs: Params) -> dict[str, Params]:
  """Returns the arrays of a pytree by their paths."""
  return {
    jax.tree_util.keystr(path, simple=True, separator=trees.SEPARATOR): x
    for path, x in jax.tree_util.tree_leaves_with_path(outputs)
  }


def _name_of(model: object) -> str:
  """Returns what was given in place of a model, for an error message."""
  return f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
