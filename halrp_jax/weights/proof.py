"""Proof on an example that a network can be perturbed: its layers are found, and each is exact.

Two things can go wrong unnoticed. A layer may compute with another kernel than the parameter at its
path (normalised weights, a network applied inside another). Or it may compute in a way that a
perturbed layer does not reproduce. Both are found by tracing and computing the network, because the
types of its layers (`kinds`) do not show them.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.linen.module import InterceptorContext

from halrp_jax.types import Params, UserError, brief
from halrp_jax.weights import kinds, lowrank, trees

# Two results count as equal if they differ by at most this fraction of the largest value, or by
# 32 times the epsilon of their dtype if that is more (`_agree`).
_TOLERANCE = 1e-3
ADVICE = (
  "it can't be perturbed; leave it out with the argument `pattern` of perturb.init, or, in a run, "
  "set method.name=stl"
)
_OTHER_KERNEL = (
  "the kernel it computes with is not the parameter at its path (a normalised or otherwise "
  f"transformed kernel, or a network applied inside another): {ADVICE}"
)


def check_network(model: object, variables: object) -> dict[str, Params]:
  """Returns `variables` with plain arrays in place of Flax's boxes (nn.with_partitioning).

  Raises:
    UserError: if `model` is no Linen module, or `variables` are not what its `init` returns.
  """
  check_module(model)
  if not isinstance(variables, Mapping):
    raise UserError(
      f"variables: expected a dict such as {type(model).__name__}.init returns, given "
      f"{type(variables).__name__}"
    )
  if not isinstance(variables.get("params"), Mapping) or not variables["params"]:
    keys = ", ".join(map(str, variables)) or "nothing"
    raise UserError(
      f'variables: expected {{"params": ..., other collections}}, given {keys}; '
      'if these are the parameters, pass {"params": params}'
    )
  return nn.meta.unbox(dict(variables))


def check_module(model: object) -> None:
  """Raises UserError if `model` is no instance of a Linen module."""
  if isinstance(model, type) and issubclass(model, nn.Module):
    raise UserError(f"{model.__name__} is a class: pass an instance, {model.__name__}(...)")
  if not isinstance(model, nn.Module):
    raise UserError(
      f"expected a Flax Linen module (flax.linen.Module), given {type(model).__name__}; "
      "convert a module of flax.nnx with flax.nnx.bridge.to_linen"
    )


def called_layer(names: Collection[str], context: InterceptorContext) -> str:
  """Returns the path of an intercepted layer if it is one of `names`, otherwise ""."""
  if context.method_name != "__call__" or not kinds.is_known(context.module):
    return ""
  name = trees.SEPARATOR.join(context.module.path)
  return name if name in names else ""


class Layer(NamedTuple):
  """Properties of a layer that `find_layers` has found."""

  shape: tuple[int, int]  # (I, J) of its kernel as a matrix
  is_plain: bool  # `kinds.is_plain`
  is_sure: bool  # its kernel is the parameter at its path; False: tracing alone does not tell


def find_layers(
  run_fn: Callable[[Params], Params], names: Collection[str], variables: Mapping[str, Params]
) -> dict[str, Layer]:
  """Finds the layers to be perturbed by tracing a network, without computing it.

  Args:
    run_fn: (variables) -> what the network returns.
    names: paths of the layers.
    variables: parameters and other collections, without Flax's boxes.

  Raises:
    UserError: if a layer can't be perturbed.
  """
  found: dict[str, Layer] = {}
  unknown: dict[str, nn.Module] = {}
  names = frozenset(names)

  def run(variables: Mapping[str, Params]) -> Params:
    flat: Params = traverse_util.flatten_dict(variables["params"], sep=trees.SEPARATOR)

    def intercept(
      next_fun: Callable[..., Params],
      args: tuple[Params, ...],
      kwargs: dict[str, Params],
      context: InterceptorContext,
    ) -> Params:
      module, path = context.module, trees.SEPARATOR.join(context.module.path)
      if name := called_layer(names, context):
        kernel, own = module.get_variable("params", "kernel"), flat[f"{name}/kernel"]
        if kernel is None or kernel.shape != own.shape:
          raise UserError(
            f"{name}: its kernel is one of a stack (nn.scan, nn.vmap), or belongs to a network "
            f"applied inside another: {ADVICE}"
          )
        is_sure = kernel is own and (name not in found or found[name].is_sure)
        shape = kinds.matrix_shape(name, module, kernel)
        found[name] = Layer(shape, kinds.is_plain(module), is_sure)
      elif path in names and not kinds.is_known(module):
        unknown.setdefault(path, module)
      return next_fun(*args, **kwargs)

    with nn.intercept_methods(intercept):
      return run_fn(variables)

  with as_user_errors():
    jax.eval_shape(run, variables)
  for name in sorted(names - found.keys()):
    if name in unknown:
      kinds.check_known(name, unknown[name])
    raise UserError(f"{name}: the network never calls it as a layer: {ADVICE}")
  return found


def prove_layers(
  run_fn: Callable[[Params, dict[str, jax.Array]], Params],
  variables: Params,
  kernels: Mapping[str, jax.Array],
  perturbations: Sequence[Mapping[str, lowrank.Perturbation]],
  key: jax.Array | None = None,
) -> list[Params]:
  """Computes a network with perturbed kernels, and compares each layer with its perturbed forms.

  The forms are "composed" and "factored" (`kinds.apply`). Each must return the same as the ordinary
  layer with the perturbed kernel.

  Args:
    run_fn: (variables, kernels by path) -> what the network returns with these kernels.
    variables: {"params": parameters without `kernels`, other collections}.
    kernels: unperturbed kernels by layer path.
    perturbations: dicts of perturbations by layer path; the network is computed once with each.
    key: if given, layers are compared on random inputs instead of those that they receive.

  Returns:
    What `run_fn` returns with the kernels of each perturbation.

  Raises:
    UserError: if a layer does not compute with its perturbed kernel, or a form is not exact.
  """
  faults: dict[str, str] = {}

  def note(name: str, fault: str, is_right: np.ndarray) -> None:
    if not np.all(is_right):
      faults.setdefault(name, fault)

  @jax.jit
  def run(
    variables: Params,
    kernels: Mapping[str, jax.Array],
    merged: dict[str, jax.Array],
    perturbation: Mapping[str, lowrank.Perturbation],
  ) -> Params:
    def intercept(
      next_fun: Callable[..., Params],
      args: tuple[Params, ...],
      kwargs: dict[str, Params],
      context: InterceptorContext,
    ) -> Params:
      y = next_fun(*args, **kwargs)
      if name := called_layer(kernels, context):
        (x,) = (*args, *kwargs.values())
        layer_args = (kernels[name], merged[name], perturbation[name])
        for fault, is_right in _compare(context.module, *layer_args, x, y, key).items():
          # unlike a returned value, a callback gets through nn.remat and nn.scan
          jax.debug.callback(functools.partial(note, name, fault), is_right)
      return y

    with nn.intercept_methods(intercept):
      return run_fn(variables, merged)

  outputs: list[Params] = []
  with as_user_errors(), full_precision():
    for p in perturbations:
      merged = {n: kinds.compose(w, p[n]) for n, w in kernels.items()}
      outputs.append(run(variables, kernels, merged, p))
    jax.effects_barrier()
  for name in sorted(faults):
    raise UserError(f"{name}: {faults[name]}")
  return outputs


def _compare(
  module: nn.Module,
  kernel: jax.Array,
  merged: jax.Array,
  p: lowrank.Perturbation,
  x: jax.typing.ArrayLike,
  y: jax.Array,
  key: jax.Array | None,
) -> dict[str, jax.Array]:
  """Compares a layer with its composed and its factored form.

  Args:
    module: the layer, bound to its parameters.
    kernel: unperturbed.
    merged: the perturbed kernel, which the layer should compute with.
    p: the perturbation.
    x: the layer's input.
    y: the layer's output.
    key: see `prove_layers`.

  Returns:
    {message of a fault: boolean [], True if the layer does not have that fault}.
  """
  own = module.get_variable("params", "kernel")
  bias = module.get_variable("params", "bias") if module.use_bias else None
  absent = {_OTHER_KERNEL: jnp.array_equal(own, merged, equal_nan=True)}
  x, expected = jnp.asarray(x), y
  if key is not None:
    x = _random_like(key, x)
    params = {"kernel": own} | ({} if bias is None else {"bias": bias})
    expected = kinds.run_detached(module, params, x)
  for form in ("composed", "factored"):
    actual = kinds.apply(module, kernel, p, bias, x, form=form)
    fault = f"its {form} form is not exact for inputs {x.dtype}{list(x.shape)}: {ADVICE}"
    absent[fault] = _agree(actual, expected, own.dtype)
  return absent


def full_precision() -> contextlib.AbstractContextManager[object]:
  """Returns a context in which accelerators multiply float32 without rounding it to fewer bits."""
  return jax.default_matmul_precision("float32")


def is_same(a: Params, b: Params) -> bool:
  """Returns whether the leaves of two pytrees agree up to the rounding of a network in bfloat16.

  The tolerance is coarse, at least a quarter of the largest value of a leaf. `prove_layers` has
  compared the single layers more strictly.
  """
  a, b = jax.tree.leaves(a), jax.tree.leaves(b)
  return len(a) == len(b) and all(
    bool(_agree(x, y, jnp.bfloat16)) for x, y in zip(a, b, strict=True)
  )


def _agree(
  a: jax.typing.ArrayLike, b: jax.typing.ArrayLike, *dtypes: jax.typing.DTypeLike
) -> jax.Array:
  """Returns whether two arrays agree up to the rounding of their dtype and of `dtypes`."""
  if jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
    a, b = jax.random.key_data(a), jax.random.key_data(b)
  a, b = jnp.asarray(a), jnp.asarray(b)
  if a.shape != b.shape or a.dtype != b.dtype:
    return jnp.array(False)
  if not jnp.issubdtype(a.dtype, jnp.inexact):
    return jnp.all(a == b)
  tolerance = max(_TOLERANCE, *(32 * float(jnp.finfo(d).eps) for d in (a.dtype, *dtypes)))
  # Values of b from `limit` on, and NaN, are not compared: one form may overflow, the other not.
  limit = float(jnp.finfo(a.dtype).max) / 16
  a, b = (x if jnp.iscomplexobj(x) else x.astype(jnp.float32) for x in (a, b))
  is_compared = jnp.abs(b) < limit
  largest = jnp.max(jnp.abs(b), initial=0.0, where=is_compared)
  return jnp.max(jnp.abs(a - b), initial=0.0, where=is_compared) <= tolerance * largest


def _random_like(key: jax.Array, x: jax.Array) -> jax.Array:
  """Draws an array of the shape and dtype of `x`; whole numbers are at least 0."""
  if jnp.issubdtype(x.dtype, jnp.floating):
    return jax.random.normal(key, x.shape, x.dtype)
  if x.dtype == bool:
    return jax.random.bernoulli(key, shape=x.shape)
  return jax.random.randint(key, x.shape, 0, min(jnp.iinfo(x.dtype).max, 255)).astype(x.dtype)


def stand_ins(key: jax.Array, tree: Params) -> Params:
  """Returns `tree` with its floating-point arrays drawn anew, uniformly from [0.5, 1).

  The proof must hold for any parameters and statistics. Freshly initialised ones can hide a fault:
  a layer that normalises its kernel, for example, may leave a freshly drawn kernel unchanged.
  """
  leaves, treedef = jax.tree.flatten(tree)

  def draw(key: jax.Array, x: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    if not jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating):
      return x
    return jax.random.uniform(key, jnp.shape(x), jnp.asarray(x).dtype, 0.5, 1)

  keys = jax.random.split(key, len(leaves))
  return treedef.unflatten([draw(k, x) for k, x in zip(keys, leaves, strict=True)])


@contextlib.contextmanager
def as_user_errors(what: str = "the network") -> Generator[None]:
  """Turns every exception of the block into a UserError: `what` can't be applied."""
  try:
    yield
  except UserError:
    raise
  except Exception as e:
    raise UserError(f"{what} can't be applied to this example: {brief(e)}") from e
