"""Proof on an example that a network can be perturbed: its layers are found, and each is exact.

Two things can go wrong unnoticed: a layer may compute with another kernel than the parameter at its
path (normalised weights, a network applied inside another), or in a way that a perturbed layer
does not reproduce. Both are found by computing, not by a list of names.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from halrp_jax.types import Params, UserError, brief
from halrp_jax.weights import kinds, lowrank

_SEPARATOR = "/"
_LOOSEST = 1e-3  # relative to the largest value; or 32 times the dtype's epsilon, if that is more
REFUSED = "not perturbed (perturb.init leaves out what `pattern` does not match)"
_NOT_ITS_OWN = (
  "the kernel it computes with is not the parameter at its path (a normalised or otherwise "
  f"transformed kernel, or a network applied inside another): {REFUSED}"
)


def check_network(model, variables) -> dict[str, Params]:
  """Returns `variables` with plain arrays in place of Flax's boxes (nn.with_partitioning).

  Raises:
    UserError: if `model` is no Linen module, or `variables` are not what its `init` returns.
  """
  check_module(model)
  if not isinstance(variables, Mapping):
    raise UserError(
      f"variables: expected a dict such as {type(model).__name__}.init returns, got "
      f"{type(variables).__name__}"
    )
  if not isinstance(variables.get("params"), Mapping) or not variables["params"]:
    known = ", ".join(map(str, variables)) or "nothing"
    raise UserError(
      f'variables: expected {{"params": ..., other collections}}, found {known}; '
      'if these are the parameters, pass {"params": params}'
    )
  return nn.meta.unbox(dict(variables))


def check_module(model) -> None:
  """Raises UserError if `model` is no instance of a Linen module."""
  if isinstance(model, type) and issubclass(model, nn.Module):
    raise UserError(f"{model.__name__} is a class: pass an instance, {model.__name__}(...)")
  if not isinstance(model, nn.Module):
    raise UserError(
      f"expected a Flax Linen module (flax.linen.Module), got {type(model).__name__}; "
      "for flax.nnx: flax.nnx.bridge.to_linen"
    )


def is_call_of(names: Iterable[str], context) -> str:
  """Returns the path of an intercepted layer if it is one of `names`, otherwise ""."""
  if context.method_name != "__call__" or not kinds.is_known(context.module):
    return ""
  name = _SEPARATOR.join(context.module.path)
  return name if name in names else ""


class Layer(NamedTuple):
  shape: tuple[int, int]  # (I, J) of its kernel as a matrix
  is_plain: bool  # `kinds.is_plain`
  is_sure: bool  # its kernel is the parameter at its path; False: tracing alone does not tell


def find_layers(run_fn: Callable, names: Iterable[str], variables: dict) -> dict[str, Layer]:
  """Traces a network; nothing is computed.

  Args:
    run_fn: variables -> what the network returns.
    names: the layers to be perturbed, by path.
    variables: parameters and other collections, without boxes.

  Raises:
    UserError: if a layer can't be perturbed.
  """
  found, others, names = {}, {}, frozenset(names)

  def run(variables):
    flat = traverse_util.flatten_dict(variables["params"], sep=_SEPARATOR)

    def intercept(next_fun, args, kwargs, context):
      module, path = context.module, _SEPARATOR.join(context.module.path)
      if name := is_call_of(names, context):
        kernel, own = module.get_variable("params", "kernel"), flat[f"{name}/kernel"]
        if kernel is None or kernel.shape != own.shape:
          raise UserError(
            f"{name}: its kernel is one of a stack (nn.scan, nn.vmap), or of a network inside "
            f"another: {REFUSED}"
          )
        is_sure = kernel is own and (name not in found or found[name].is_sure)
        shape = kinds.matrix_shape(name, module, kernel)
        found[name] = Layer(shape, kinds.is_plain(module), is_sure)
      elif path in names and not kinds.is_known(module):
        others.setdefault(path, module)
      return next_fun(*args, **kwargs)

    with nn.intercept_methods(intercept):
      return run_fn(variables)

  with explained():
    jax.eval_shape(run, variables)
  for name in sorted(names - found.keys()):
    if name in others:
      kinds.matrix_shape(name, others[name], None)
    raise UserError(f"{name}: is never called as a layer here: {REFUSED}")
  return found


def prove_layers(
  run_fn: Callable,
  variables: Params,
  kernels: Mapping[str, jax.Array],
  perturbations: Sequence[Mapping[str, lowrank.Perturbation]],
  key: jax.Array | None = None,
) -> list:
  """Computes a network and, at every perturbed layer, both forms of its perturbation beside it.

  Args:
    run_fn: (variables, kernels by path) -> what the network returns with them.
    variables: parameters but `kernels`, and other collections.
    kernels: before the perturbation, by path.
    perturbations: each by path.
    key: if given, layers are compared on random inputs instead of those that reach them.

  Returns:
    What `run_fn` returns with the kernels of each perturbation.

  Raises:
    UserError: if a layer computes something else than its perturbed kernel says.
  """
  faults = {}

  def note(name, what, right):
    if not np.all(right):
      faults.setdefault(name, what)

  def watch(name, what, right):
    # a callback leaves nn.remat and nn.scan too
    jax.debug.callback(functools.partial(note, name, what), right)

  @jax.jit
  def run(variables, kernels, merged, perturbation):
    def intercept(next_fun, args, kwargs, context):
      if not (name := is_call_of(kernels, context)):
        return next_fun(*args, **kwargs)
      module, (x,) = context.module, (*args, *kwargs.values())
      own = module.get_variable("params", "kernel")
      bias = module.get_variable("params", "bias") if module.use_bias else None
      watch(name, _NOT_ITS_OWN, jnp.array_equal(own, merged[name], equal_nan=True))
      want = y = next_fun(*args, **kwargs)
      x = jnp.asarray(x)
      if key is not None:
        x = _random_like(key, x)
        params = {"kernel": own} | ({} if bias is None else {"bias": bias})
        want = module.clone(parent=None, name=None).apply({"params": params}, x)
      for form in ("composed", "factored"):
        got = kinds.apply(module, kernels[name], perturbation[name], bias, x, form=form)
        what = f"its {form} perturbation is not exact on inputs {x.dtype}{list(x.shape)}: {REFUSED}"
        watch(name, what, _agree(got, want, own.dtype))
      return y

    with nn.intercept_methods(intercept):
      return run_fn(variables, merged)

  out = []
  with explained(), exactly():
    for p in perturbations:
      merged = {n: kinds.compose(w, p[n]) for n, w in kernels.items()}
      out.append(run(variables, kernels, merged, p))
    jax.effects_barrier()
  for name in sorted(faults):
    raise UserError(f"{name}: {faults[name]}")
  return out


def exactly():
  """A context in which accelerators multiply float32 as such, not with less by default."""
  return jax.default_matmul_precision("float32")


def is_same(a, b) -> bool:
  """Whether two pytrees agree but for what rounding makes of a whole network, 16 bits in it or not.

  How exact the layers are is known already (`prove_layers`).
  """
  a, b = jax.tree.leaves(a), jax.tree.leaves(b)
  return len(a) == len(b) and all(
    bool(_agree(x, y, jnp.bfloat16)) for x, y in zip(a, b, strict=True)
  )


def _agree(a, b, *dtypes) -> jax.Array:
  """Whether two arrays are the same within the rounding of their dtype and of `dtypes`."""
  if jax.dtypes.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
    a, b = jax.random.key_data(a), jax.random.key_data(b)
  a, b = jnp.asarray(a), jnp.asarray(b)
  if a.shape != b.shape or a.dtype != b.dtype:
    return jnp.array(False)
  if not jnp.issubdtype(a.dtype, jnp.inexact):
    return jnp.all(a == b)
  tolerance = max(_LOOSEST, *(32 * float(jnp.finfo(d).eps) for d in (a.dtype, *dtypes)))
  limit = float(jnp.finfo(a.dtype).max) / 16  # near it one form may overflow and not the other
  a, b = (x if jnp.iscomplexobj(x) else x.astype(jnp.float32) for x in (a, b))
  counted = jnp.abs(b) < limit
  largest = jnp.max(jnp.abs(b), initial=0.0, where=counted)
  return jnp.max(jnp.abs(a - b), initial=0.0, where=counted) <= tolerance * largest


def _random_like(key, x):
  if jnp.issubdtype(x.dtype, jnp.floating):
    return jax.random.normal(key, x.shape, x.dtype)
  if x.dtype == bool:
    return jax.random.bernoulli(key, shape=x.shape)
  return jax.random.randint(key, x.shape, 0, min(jnp.iinfo(x.dtype).max, 255)).astype(x.dtype)


def stand_ins(key: jax.Array, tree: Params) -> Params:
  """Returns `tree` with random real numbers in [0.5, 1) in place of its own; the rest as it is.

  What a layer computes is to be proved whatever the parameters and statistics are: normalised
  weights change nothing while they are still as `init` made them.
  """
  leaves, treedef = jax.tree.flatten(tree)

  def draw(key, x):
    if not jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating):
      return x
    return jax.random.uniform(key, jnp.shape(x), jnp.asarray(x).dtype, 0.5, 1)

  keys = jax.random.split(key, len(leaves))
  return treedef.unflatten([draw(k, x) for k, x in zip(keys, leaves, strict=True)])


@contextlib.contextmanager
def explained(what: str = "the network"):
  """A context in which whatever a network raises becomes a UserError."""
  try:
    yield
  except UserError:
    raise
  except Exception as e:
    raise UserError(f"{what} can't be applied to this example: {brief(e)}") from e
