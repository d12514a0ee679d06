"""Low-rank perturbations of any Flax model: create them, apply them, merge them.

  kernels, perturbation, rest = perturb.init(key, model, variables, x, rank=8, pattern="*/attn/*")
  y = perturb.apply(model, kernels, perturbation, variables | {"params": rest}, x)
  params = perturb.merge(kernels, perturbation, rest)    # model.apply({"params": params}, x) == y

`kernels` are the frozen kernels of the base, `perturbation` has <R, S, U, Sigma, V> of every layer,
and `rest` are the other parameters. The model stays an ordinary Flax module: while it is applied,
`nn.intercept_methods` replaces the call of each perturbed Dense, Conv and DenseGeneral (the
projections of attention). With an nnx model (`nnx_models`) the calls are

  kernels, perturbation, rest = perturb.init(key, model, rank=8)
  y = perturb.apply(model, kernels, perturbation, rest, x)
  nnx.update(model, perturb.merge(kernels, perturbation, rest))    # model(x) == y

A model that returns a tuple or a dict does so under `apply`, too; `select_output(model, "logits")`
is the model that returns one output alone.

`kinds` says how a kernel is seen as a matrix [I, J].

There are two exact ways to compute such a layer:

* composed: W_t is formed and the ordinary layer applied;
* factored: y = R * layer(S * x, W) + U (Sigma (V' x)) + b. The gradient of the frozen W is never
  needed, which makes the backward pass a third cheaper.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.module import InterceptorContext
from jax.core import Tracer

from halrp_jax.nn.conv import times
from halrp_jax.types import Params, UserError, brief
from halrp_jax.weights import fresh, kinds, lowrank, outputs, proof, trees


def init(
  key: jax.Array,
  model: Params,
  variables: Mapping[str, Params] | None = None,
  *args: Params,
  rank: int,
  pattern: str = "*",
  **kwargs: object,
) -> tuple[dict[str, jax.Array], dict[str, lowrank.Perturbation], Params]:
  """Creates perturbations of some layers of a Linen or nnx model, which change nothing yet.

  R and S are 1, U is 0, and V is random within +-1/sqrt(I), so that the first gradient moves R, S
  and U. Sigma is None, folded into U and V.

  Args:
    key: random key for V, such as jax.random.key(0).
    model: any Linen model; or an nnx model, without the following positional arguments.
    variables: variables of the base, {"params": ..., other collections}.
    *args: an example of what `model.apply` takes. The network is computed on it with unchanged and
      with changed kernels, and both forms are compared with the ordinary network. Under jax.jit it
      is only traced.
    rank: columns of U and V; a layer has at most min(I, J).
    pattern: which layers to perturb, as in file names: "*" stands for any text, slashes included
      ("*/attn/*"). The head (`trees.HEAD`) is never perturbed.
    **kwargs: further arguments of `model.apply`.

  Returns:
    Kernels by layer path, perturbations by layer path, the other parameters; of an nnx model the
    nnx.State without the kernels.

  Raises:
    UserError: if no layer matches, if a layer that matches can't be perturbed exactly, or if an
      argument is of the wrong kind.
  """
  if _is_nnx(model):
    from halrp_jax.weights import nnx_models  # importing nnx takes time

    if variables is not None:
      raise UserError(
        f"{type(model).__name__} is an nnx model, which holds its variables and needs no example: "
        "call perturb.init(key, model, rank=...)"
      )
    return nnx_models.init(key, model, rank=rank, pattern=pattern)
  variables = {} if variables is None else variables
  fresh.check_rank_and_pattern(rank, pattern)
  variables = proof.check_network(model, variables)
  params = variables["params"]
  names = fresh.matching(trees.layer_names(params), pattern)

  apply_fn: Callable[..., Params] = model.apply
  found = proof.find_layers(lambda v: apply_fn(v, *args, **kwargs), names, variables)
  is_traced = any(isinstance(x, Tracer) for x in jax.tree.leaves((variables, args)))
  for name, layer in found.items():
    if is_traced and not layer.is_sure:
      raise UserError(
        f"{name}: under jax.jit it can't be proved that its perturbation is exact: call init "
        "outside of jax.jit"
      )
  kernels, rest = trees.take_out(names, params)
  shapes = {name: layer.shape for name, layer in found.items()}
  perturbation = fresh.perturbations(key, kernels, shapes, rank)
  if not is_traced:
    _prove(model, kernels, perturbation, variables | {"params": rest}, args, kwargs)
  return kernels, perturbation, rest


def _is_nnx(x: object) -> bool:
  """Returns whether an object is an nnx model or state; does not import nnx."""
  return any(c.__module__.startswith("flax.nnx") for c in type(x).__mro__)


def _prove(
  model: nn.Module,
  kernels: dict[str, jax.Array],
  perturbation: dict[str, lowrank.Perturbation],
  variables: dict[str, Params],
  args: tuple[Params, ...],
  kwargs: Mapping[str, object],
) -> None:
  """Proves on an example that `apply` equals `model.apply` on the merged parameters.

  Every layer is compared on its own with random parameters and inputs, then the whole network with
  the perturbation given and with one that changes every kernel. The parameters are random because
  fresh ones can hide a fault: normalised weights are already normalised.

  Args:
    model: the model.
    kernels: by layer path.
    perturbation: by layer path.
    variables: {"params": parameters without the kernels, other collections}.
    args: further arguments of `model.apply`.
    kwargs: further arguments of `model.apply`.

  Raises:
    UserError: if they differ; it names the layer.
  """
  key = jax.random.key(0)
  apply_fn: Callable[..., Params] = model.apply

  def run(variables: Mapping[str, Params], kernels: Mapping[str, jax.Array]) -> Params:
    params = trees.join(kernels, variables["params"])
    return apply_fn({**variables, "params": params}, *args, **kwargs)

  changed = {n: _change(key, i, w, perturbation[n]) for i, (n, w) in enumerate(kernels.items())}
  random_kernels, random_variables = proof.stand_ins(key, (kernels, variables))
  random_kernels = {n: _centre(w, changed[n].R.size) for n, w in random_kernels.items()}
  proof.prove_layers(run, random_variables, random_kernels, [changed], key)

  @functools.partial(jax.jit, static_argnames="names")
  def run_perturbed(
    p: Mapping[str, lowrank.Perturbation],
    variables: Mapping[str, Params],
    kernels: dict[str, jax.Array],
    names: tuple[str, ...],
  ) -> Params:
    """Applies the network with the layers `names` perturbed by `apply` and the others merged."""
    chosen = {n: kernels[n] for n in names}
    merged = {n: kinds.compose(w, p[n]) for n, w in kernels.items() if n not in chosen}
    variables = {**variables, "params": trees.join(merged, variables["params"])}
    return apply(model, chosen, p, variables, *args, form="composed", **kwargs)

  def find_fault(
    p: Mapping[str, lowrank.Perturbation], expected: Params, names: tuple[str, ...]
  ) -> str:
    """Returns what is wrong if `apply` perturbs these layers alone; "" if nothing is."""
    try:
      with proof.full_precision():
        actual = run_perturbed(p, variables, kernels, names)
    except Exception as e:
      return f"its kernel is used outside of the layer ({brief(e)})"
    if kwargs.get("mutable", False) is not False:  # then the network returns collections too
      actual, expected = actual[0], expected[0]
    if proof.is_same(actual, expected):
      return ""
    return "the network differs between the perturbed and the merged layer"

  both = (perturbation, changed)
  results = proof.prove_layers(run, variables, kernels, both)
  for p, expected in zip(both, results, strict=True):
    if fault := find_fault(p, expected, tuple(kernels)):
      alone = [(n, found) for n in kernels if (found := find_fault(p, expected, (n,)))]
      name, fault = alone[0] if alone else (", ".join(kernels), fault)
      raise UserError(f"{name}: {fault}: {proof.ADVICE}")


def _change(
  key: jax.Array, i: int, kernel: jax.Array, p: lowrank.Perturbation
) -> lowrank.Perturbation:
  """Returns a perturbation so far from the identity that every part of it shows in the output.

  Args:
    key: random key for all layers.
    i: index of the layer.
    kernel: kernel of the layer.
    p: the perturbation to start from.
  """
  window_size = kernel.size // (p.R.size * p.S.size)
  return p._replace(
    R=p.R + 0.5 * jnp.sin(i + jnp.arange(p.R.size)).astype(p.R.dtype),
    S=p.S + 0.5 * jnp.cos(i + jnp.arange(p.S.size)).astype(p.S.dtype),
    U=jax.random.normal(jax.random.fold_in(key, i), p.U.shape, p.U.dtype) / window_size,
  )


def _centre(kernel: jax.Array, num_out: int) -> jax.Array:
  """Shifts and scales a kernel with values in [0.5, 1) to the size of a freshly drawn one."""
  return (4 * (kernel - 0.75) / math.sqrt(kernel.size / num_out)).astype(kernel.dtype)


compose = kinds.compose  # the perturbed kernel of one layer; `kinds.compose` says more
select_output = outputs.select  # the model that returns one of its outputs alone


def merge(
  kernels: Mapping[str, jax.Array],
  perturbation: Mapping[str, lowrank.Perturbation],
  rest: Params,
) -> Params:
  """Returns the ordinary parameters of one task: the perturbed kernels W_t and the rest.

  Args:
    kernels: frozen kernels by layer path.
    perturbation: <R, S, U, Sigma, V> by layer path.
    rest: the other parameters; of an nnx model its nnx.State, and so is the result.
  """
  if _is_nnx(rest):
    from halrp_jax.weights import nnx_models

    return nnx_models.merge(kernels, perturbation, rest)
  return trees.join({n: kinds.compose(w, perturbation[n]) for n, w in kernels.items()}, rest)


def apply(
  model: Params,
  kernels: Mapping[str, jax.Array],
  perturbation: Mapping[str, lowrank.Perturbation],
  variables: Params,
  *args: Params,
  form: str = "auto",
  **kwargs: Params,
) -> Params:
  """Applies a model with perturbed kernels.

  Args:
    model: a Linen model whose perturbed layers are nn.Dense, nn.Conv or nn.DenseGeneral; or an nnx
      model, of which only the graph is used.
    kernels: frozen kernels by layer path (`trees.split`, `init`).
    perturbation: <R, S, U, Sigma, V> by layer path.
    variables: {"params": all parameters except the perturbed kernels, other collections}; of an nnx
      model the nnx.State without the kernels.
    *args: passed to `model.apply`, or to the nnx model.
    form: how a layer is computed: "factored", "composed", or "auto" for the cheaper one. The
      layers of an nnx model are composed.
    **kwargs: passed to `model.apply`, or to the nnx model; with `mutable=True` an nnx model's state
      after the call is returned too.

  Returns:
    What `model.apply` or the nnx model returns.
  """
  if _is_nnx(model):
    from halrp_jax.weights import nnx_models

    return nnx_models.apply(model, kernels, perturbation, variables, *args, **kwargs)

  def intercept(
    next_fun: Callable[..., Params],
    call_args: tuple[Params, ...],
    call_kwargs: dict[str, Params],
    context: InterceptorContext,
  ) -> Params:
    if not (name := proof.called_layer(kernels, context)):
      return next_fun(*call_args, **call_kwargs)
    module = context.module
    (x,) = (*call_args, *call_kwargs.values())
    bias = module.get_variable("params", "bias") if module.use_bias else None
    return kinds.apply(module, kernels[name], perturbation[name], bias, x, form=form)

  apply_fn: Callable[..., Params] = model.apply
  with nn.intercept_methods(intercept):
    return apply_fn(variables, *args, **kwargs)


def stack(
  perturbations: Iterable[Mapping[str, lowrank.Perturbation]],
) -> dict[str, lowrank.Perturbation]:
  """Stacks the perturbations of several tasks along a new leading axis, for `apply_many`.

  U, Sigma and V are cut to the columns that some task uses, since `apply_many` copies them for
  every sample.

  Args:
    perturbations: perturbations of each task, by layer path.

  Returns:
    By layer path a perturbation whose arrays are [T, ...].
  """

  def used_columns(p: lowrank.Perturbation) -> int:
    scale = 1 if p.sigma is None else p.sigma
    columns = np.flatnonzero(np.any(p.U * scale, axis=0) & np.any(p.V, axis=0))
    return int(columns.max(initial=-1)) + 1

  def cut(p: lowrank.Perturbation, columns: int) -> lowrank.Perturbation:
    sigma = None if p.sigma is None else p.sigma[:columns]
    return p._replace(U=p.U[:, :columns], sigma=sigma, V=p.V[:, :columns])

  by_task = [jax.tree.map(np.asarray, dict(p)) for p in perturbations]
  width = {name: max(used_columns(p[name]) for p in by_task) for name in by_task[0]}
  return {
    name: jax.tree.map(lambda *x: jnp.stack(x), *[cut(p[name], k) for p in by_task])
    for name, k in width.items()
  }


def apply_many(
  model: nn.Module,
  kernels: Mapping[str, jax.Array],
  perturbation: Mapping[str, lowrank.Perturbation],
  variables: Mapping[str, Params],
  t: jax.Array,
  x: jax.Array,
  **kwargs: object,
) -> jax.Array:
  """Applies a model to a batch in which every sample has its own task.

  The frozen kernels take one product for the whole batch; the small arrays are copied for every
  sample. A layer that can't be factored is composed for every sample.

  Args:
    model: see `apply`; its output for a sample may not depend on the rest of the batch.
    kernels: see `apply`.
    perturbation: perturbations from `stack`.
    variables: see `apply`, every array with a leading axis [T, ...].
    t: int [B], for each sample the row of `perturbation` and `variables` that is used.
    x: [B, ...], the samples.
    **kwargs: passed to `model.apply`.

  Returns:
    [B, ...], what `apply` returns for each sample.
  """

  def apply_one(own: tuple[Params, Params], sample: jax.Array) -> jax.Array:
    p, variables = own
    y = apply(model, kernels, p, variables, sample[None], form="factored", **kwargs)
    return jax.tree.map(lambda rows: rows[0], y)

  own = jax.tree.map(lambda leaf: leaf[t], (dict(perturbation), dict(variables)))
  return jax.vmap(apply_one)(own, x)


def apply_in_bases(
  model: nn.Module,
  bases: Mapping[str, jax.Array],
  variables: Mapping[str, Params],
  *args: Params,
  **kwargs: object,
) -> Params:
  """Applies a model whose kernels are products A B', where B [J, J] spans a layer's outputs.

  Each layer takes the form with fewer multiply-adds: x (A B'), or (x A) B' where x has fewer rows
  than A. Where a column of A is zero, that of B has no effect: columns that B gets later do not
  change a bit of the result.

  Args:
    model: a Linen model whose layers named in `bases` are nn.Dense or nn.Conv.
    bases: B by layer path.
    variables: {"params": with A [.., J] as the kernels of those layers, other collections}.
    *args: passed to `model.apply`.
    **kwargs: passed to `model.apply`.

  Returns:
    What `model.apply` returns.
  """

  def intercept(
    next_fun: Callable[..., Params],
    call_args: tuple[Params, ...],
    call_kwargs: dict[str, Params],
    context: InterceptorContext,
  ) -> Params:
    module, name = context.module, trees.SEPARATOR.join(context.module.path)
    if name not in bases or context.method_name != "__call__":
      return next_fun(*call_args, **call_kwargs)
    (x,), kernel = call_args, module.get_variable("params", "kernel")
    few_rows = x.size // x.shape[-1] < kernel.size // kernel.shape[-1]
    if not few_rows:
      kernel = times(kernel, bases[name].T)
    y = kinds.run_detached(module.clone(use_bias=False), {"kernel": kernel}, x)
    y = times(y, bases[name].T) if few_rows else y
    return y + kinds.channels(module.get_variable("params", "bias"), y) if module.use_bias else y

  apply_fn: Callable[..., Params] = model.apply
  with nn.intercept_methods(intercept):
    return apply_fn(variables, *args, **kwargs)
