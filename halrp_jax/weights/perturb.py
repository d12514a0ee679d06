"""Any Flax Linen model + frozen base kernels + <R, S, U, Sigma, V> per layer -> apply, merge.

  kernels, perturbation, rest = perturb.init(key, model, variables, x, rank=8, pattern="*/attn/*")
  y = perturb.apply(model, kernels, perturbation, variables | {"params": rest}, x)
  params = perturb.merge(kernels, perturbation, rest)    # model.apply({"params": params}, x) == y

The model stays an ordinary Flax module: while it is applied, `nn.intercept_methods` replaces the
call of each perturbed Dense, Conv and DenseGeneral (the projections of attention). `kinds` says how
a kernel is seen as a matrix [I, J]. Two exact ways to compute such a layer:

* composed: W_t is formed and the ordinary layer applied;
* factored: y = R * layer(S * x, W) + U (Sigma (V' x)) + b. The gradient of the frozen W is never
  needed, which makes the backward pass a third cheaper.
"""

import fnmatch
import functools
import math
from collections.abc import Iterable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax.nn.conv import times
from halrp_jax.types import Params, UserError, brief
from halrp_jax.weights import kinds, lowrank, proof, trees


def init(
  key: jax.Array,
  model: nn.Module,
  variables: Mapping[str, Params],
  *args,
  rank: int,
  pattern: str = "*",
  **kwargs,
) -> tuple[dict[str, jax.Array], dict[str, lowrank.Perturbation], Params]:
  """Returns perturbations of some layers of any Linen model, that change nothing yet.

  R and S are 1, U is 0 and V random, within +-1/sqrt(I): the first gradient moves R, S and U.

  Args:
    key: of V.
    model: any Linen model.
    variables: its {"params", other collections}: the base.
    *args: an example of what `model.apply` takes. The network is computed on it, unchanged and
      changed, and each form compared with the ordinary network; under jax.jit it is only traced.
    rank: columns of U and V; at most min(I, J) of a layer.
    pattern: which layers, as in file names: "*" is any text, with slashes in it ("*/attn/*"). The
      head (`trees.HEAD`) is never one of them.
    **kwargs: as *args.

  Returns:
    Kernels by layer path, perturbations by layer path, the other parameters.

  Raises:
    UserError: if no layer matches, one that does is not perturbed exactly, or an argument is of
      the wrong kind.
  """
  if not isinstance(rank, int | np.integer) or rank < 0:
    raise UserError(f"rank = {rank!r} must be a whole number, at least 0")
  if not isinstance(pattern, str):
    raise UserError(f"pattern = {pattern!r} must be a text such as '*/attn/*'")
  variables = proof.check_network(model, variables)
  params = variables["params"]
  names = [n for n in trees.layer_names(params) if fnmatch.fnmatchcase(n, pattern)]
  if not names:
    known = ", ".join(trees.layer_names(params)) or "none"
    raise UserError(f"no layer's path matches {pattern!r}; those with a kernel: {known}")

  found = proof.find_layers(lambda v: model.apply(v, *args, **kwargs), names, variables)
  is_traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((variables, args)))
  for name, layer in found.items():
    if is_traced and not layer.is_sure:
      raise UserError(f"{name}: that it is exact can't be proved under jax.jit: call init outside")
  kernels, rest = trees.take_out(names, params)
  perturbation = {}
  for layer_key, (name, kernel) in zip(_split(key, len(names)), kernels.items(), strict=True):
    num_in, num_out = found[name].shape
    columns, bound = min(rank, num_in, num_out), 1 / math.sqrt(num_in)
    p = lowrank.identity(kernel.reshape(-1, num_in, num_out), columns, fold=True)
    v = jax.random.uniform(layer_key, p.V.shape, kernel.dtype, -bound, bound)
    perturbation[name] = p._replace(V=v)
  if not is_traced:
    _prove(model, kernels, perturbation, variables | {"params": rest}, args, kwargs)
  return kernels, perturbation, rest


def _split(key, num: int):
  try:
    return jax.random.split(key, num)
  except (TypeError, ValueError) as e:
    raise UserError(f"key: expected one such as jax.random.key(0), got {key!r}") from e


def _prove(model, kernels, perturbation, variables, args, kwargs) -> None:
  """Computes the network with unchanged kernels and with changed ones, in both forms.

  What a layer computes is proved on random parameters too: normalised weights are normalised
  already while they are fresh, and give nothing away.

  Raises:
    UserError: if `apply` is not `model.apply` on the merged parameters; it names the layer.
  """
  key = jax.random.key(0)

  def moved(name, i):
    """Far enough from the identity that whatever is left out is seen."""
    p = perturbation[name]
    window = kernels[name].size // (p.R.size * p.S.size)
    return p._replace(
      R=p.R + 0.5 * jnp.sin(i + jnp.arange(p.R.size)).astype(p.R.dtype),
      S=p.S + 0.5 * jnp.cos(i + jnp.arange(p.S.size)).astype(p.S.dtype),
      U=jax.random.normal(jax.random.fold_in(key, i), p.U.shape, p.U.dtype) / window,
    )

  def centred(w, p):
    """A kernel's stand-in as large as fresh ones are."""
    return (4 * (w - 0.75) / math.sqrt(w.size / p.R.size)).astype(w.dtype)

  others = {n: moved(n, i) for i, n in enumerate(kernels)}

  def run(variables, kernels):
    params = trees.join(kernels, variables["params"])
    return model.apply(variables | {"params": params}, *args, **kwargs)

  is_pair = kwargs.get("mutable", False) is not False  # of the output and changed collections
  drawn, changed = proof.stand_ins(key, (kernels, variables))
  drawn = {n: centred(w, others[n]) for n, w in drawn.items()}
  proof.prove_layers(run, changed, drawn, [others], key)

  @functools.partial(jax.jit, static_argnames="names")
  def perturbed(p, variables, kernels, names):
    """The layers `names` by `apply`, the others merged."""
    chosen = {n: kernels[n] for n in names}
    merged = {n: kinds.compose(w, p[n]) for n, w in kernels.items() if n not in chosen}
    variables = variables | {"params": trees.join(merged, variables["params"])}
    return apply(model, chosen, p, variables, *args, form="composed", **kwargs)

  def fault(p, want, names):
    """What is wrong if these layers alone are perturbed by `apply`; "" if nothing."""
    try:
      with proof.exactly():
        got = perturbed(p, variables, kernels, names)
    except Exception as e:
      return f"its kernel is used outside of the layer ({brief(e)})"
    same = proof.is_same(*((got[0], want[0]) if is_pair else (got, want)))
    return "" if same else "perturbed, the network gives something else than merged"

  both = (perturbation, others)  # unchanged, and changed
  for p, want in zip(both, proof.prove_layers(run, variables, kernels, both), strict=True):
    if what := fault(p, want, tuple(kernels)):
      alone = [(n, found) for n in kernels if (found := fault(p, want, (n,)))]
      name, what = alone[0] if alone else (", ".join(kernels), what)
      raise UserError(f"{name}: {what}: {proof.REFUSED}")


compose = kinds.compose  # of one layer


def merge(
  kernels: Mapping[str, jax.Array],
  perturbation: Mapping[str, lowrank.Perturbation],
  rest: Params,
) -> Params:
  """Ordinary parameters of one task: the perturbed kernels W_t and everything else."""
  return trees.join({n: kinds.compose(w, perturbation[n]) for n, w in kernels.items()}, rest)


def apply(
  model: nn.Module,
  kernels: Mapping[str, jax.Array],
  perturbation: Mapping[str, lowrank.Perturbation],
  variables: Mapping[str, Params],
  *args,
  form: str = "auto",
  **kwargs,
):
  """`model.apply` with perturbed kernels.

  Args:
    model: any Linen model whose perturbed layers are nn.Dense, nn.Conv or nn.DenseGeneral.
    kernels: frozen kernels by layer path (`trees.split`, `init`).
    perturbation: <R, S, U, Sigma, V> by layer path.
    variables: {"params": everything but the perturbed kernels, other collections}.
    *args: passed to `model.apply`.
    form: "factored", "composed", or "auto": the cheaper one for each layer.
    **kwargs: passed to `model.apply`.

  Returns:
    What `model.apply` returns.
  """

  def intercept(next_fun, call_args, call_kwargs, context):
    if not (name := proof.is_call_of(kernels, context)):
      return next_fun(*call_args, **call_kwargs)
    module = context.module
    (x,) = (*call_args, *call_kwargs.values())
    bias = module.get_variable("params", "bias") if module.use_bias else None
    return kinds.apply(module, kernels[name], perturbation[name], bias, x, form=form)

  with nn.intercept_methods(intercept):
    return model.apply(variables, *args, **kwargs)


def stack(
  perturbations: Iterable[Mapping[str, lowrank.Perturbation]],
) -> dict[str, lowrank.Perturbation]:
  """Perturbations of several tasks -> one, every leaf with a leading axis [T, ...].

  U, Sigma and V are cut to the columns that some task uses, since `apply_many` gathers them.
  """

  def used(p):
    scale = 1 if p.sigma is None else p.sigma
    columns = np.flatnonzero(np.any(p.U * scale, axis=0) & np.any(p.V, axis=0))
    return int(columns.max(initial=-1)) + 1

  def cut(p, columns):
    sigma = None if p.sigma is None else p.sigma[:columns]
    return p._replace(U=p.U[:, :columns], sigma=sigma, V=p.V[:, :columns])

  by_task = [jax.tree.map(np.asarray, dict(p)) for p in perturbations]
  width = {name: max(used(p[name]) for p in by_task) for name in by_task[0]}
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
  **kwargs,
) -> jax.Array:
  """`apply` where every sample of a batch has a task of its own.

  One product with the frozen kernels for the whole batch; the small parts are gathered. A layer
  that can't be factored is composed for every sample.

  Args:
    model: as for `apply`; what it says of a sample may not depend on the batch.
    kernels: as for `apply`.
    perturbation: from `stack`.
    variables: as for `apply`, every leaf with a leading axis [T, ...].
    t: int [B], which row of `perturbation` and `variables` is each sample's.
    x: [B, ...]
    **kwargs: passed to `model.apply`.

  Returns:
    [B, ...], what `apply` returns for each sample.
  """

  def one(own, sample):
    p, variables = own
    return apply(model, kernels, p, variables, sample[None], form="factored", **kwargs)[0]

  return jax.vmap(one)(jax.tree.map(lambda leaf: leaf[t], (dict(perturbation), dict(variables))), x)


def apply_in_bases(
  model: nn.Module,
  bases: Mapping[str, jax.Array],
  variables: Mapping[str, Params],
  *args,
  **kwargs,
):
  """`model.apply` with kernels A B' in place of A, B [J, J] spanning what a layer's outputs may be.

  Each layer takes the form with fewer multiply-adds: x (A B'), or (x A) B' where the batch has
  fewer places than A has rows. Zero columns of A leave no trace, whatever B has there: columns that
  B gets later change no bit.

  Args:
    model: any Linen model whose layers named in `bases` are nn.Dense or nn.Conv.
    bases: B by layer path.
    variables: {"params": with A [.., J] as those layers' kernels, other collections}.
    *args: passed to `model.apply`.
    **kwargs: passed to `model.apply`.

  Returns:
    What `model.apply` returns.
  """

  def intercept(next_fun, call_args, call_kwargs, context):
    module, name = context.module, trees.SEPARATOR.join(context.module.path)
    if name not in bases or context.method_name != "__call__":
      return next_fun(*call_args, **call_kwargs)
    (x,), kernel = call_args, module.get_variable("params", "kernel")
    few_places = x.size // x.shape[-1] < kernel.size // kernel.shape[-1]
    if not few_places:
      kernel = times(kernel, bases[name].T)
    detached = module.clone(parent=None, name=None, use_bias=False)
    y = detached.apply({"params": {"kernel": kernel}}, x)
    y = times(y, bases[name].T) if few_places else y
    return y + kinds.channels(module.get_variable("params", "bias"), y) if module.use_bias else y

  with nn.intercept_methods(intercept):
    return model.apply(variables, *args, **kwargs)
