"""HALRP's choice of the ranks of all layers, and where U and V of a task start.

Lines 4 to 7 of Algorithm 1: the importance of every layer, R and S by least squares, the singular
values of what remains, and the ranks that a rule (`method.rank_rule`) gives the layers together.
`methods/halrp.py` is the method. Reference: https://arxiv.org/abs/2311.15161, Sect. 4.1 to 4.3.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax import keys
from halrp_jax.training import batches, contract, losses, networks, sizes
from halrp_jax.training.setup import Setup
from halrp_jax.types import Params, State, Task
from halrp_jax.weights import kinds, lowrank, trees

_EQUAL = ("flat", "random", "lora")  # rules that give every layer upper_rank
WITHOUT_SVD = ("random", "lora", "eva", "none")  # rules that use no singular values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.MethodConfig):
  """Config keys `method.*` that concern the ranks."""

  alpha: float = keys.number(0.9, 0, 1, "share of the total importance that the ranks keep; 1: all")
  budget: float | str = keys.number_or(
    "bound",
    None,
    0,
    "size of all U, V and kept Sigma of a task as a share of the base, which rank_rule divides "
    "among the layers; alpha and min_rank then have no effect; 0: any size; bound: what "
    "task_bound, or an equal share of prune_bound, leaves beside the task's other numbers",
  )
  rank_rule: str = keys.one_of(
    "importance",
    ("importance", "flat", "lrp", "pearl", "random", "lora", "eva", "none"),
    "importance: the method; none: no low-rank part; flat: upper_rank everywhere; lrp: singular "
    "values alone; pearl: in every layer the share alpha of its own squared singular values (arXiv "
    "2505.11998); random: upper_rank everywhere with random U and V; lora: the same with U = 0 "
    "(arXiv 2106.09685); eva: V are the directions of most variance of the layers' inputs and U is "
    "0, upper_rank on average and at most twice that (arXiv 2410.07170)",
  )
  conv_form: str = keys.one_of(
    None,
    ("window_mean", "unfolded"),
    "low-rank part of a convolution; window_mean: the same at every position of the window; "
    "unfolded: V has a row for every input at every position",
  )
  factors: str = keys.one_of(
    None,
    ("float32", "int8"),
    "numbers of U and V of a learned task; int8: rounded after training, with a float32 of Sigma "
    "for each column; four of them count as one number",
  )
  scales: bool = keys.flag(True, "R and S are trained; false: they stay 1, as in LoRA")
  svd: str = keys.one_of(
    "exact",
    ("exact", "randomized"),
    "exact: all singular values of a layer's residual; randomized: the largest svd_rank",
  )
  svd_rank: int = keys.whole(256, 1, None, "singular values per layer that svd=randomized finds")
  upper_rank: int = keys.whole(None, 0, None, "largest rank of a layer; 0: no cap")
  min_rank: int = keys.whole(None, 0, None, "smallest rank of a layer")
  importance: str = keys.one_of(
    None,
    ("mean", "sum"),
    "importance of a layer: mean of the squared gradient over the kernel's entries, or sum (|g|^2)",
  )
  importance_split: str = keys.one_of(
    None, ("valid", "train"), "images that the importance is computed on"
  )
  window_factor: bool = keys.flag(
    None, "a convolution's scores are multiplied by its window's area"
  )
  crossing: bool = keys.flag(None, "the score that carries the sum past alpha is kept too")
  sigma: str = keys.one_of(
    None,
    ("folded", "kept"),
    "folded: sqrt(Sigma) goes into U and V, and Sigma is neither trained nor counted; kept: Sigma "
    "is trained and counted",
  )


def check(m: Config) -> list[str]:
  """Returns the errors of a method's config that concern several of these keys."""
  errors = []
  if m.rank_rule in (*_EQUAL, "eva") and not m.upper_rank:
    errors.append(f"method.rank_rule = {m.rank_rule!r} needs method.upper_rank > 0")
  if m.rank_rule == "eva" and m.conv_form == "unfolded":
    errors.append(
      "method.rank_rule = 'eva' has directions of sums over a window: set "
      "method.conv_form=window_mean"
    )
  if m.rank_rule == "none" and m.budget not in (0, "bound"):
    errors.append("method.rank_rule = 'none' has no U and V: set method.budget=0")
  if m.rank_rule in ("random", "lora", "eva") and m.sigma == "kept":
    errors.append(f"method.rank_rule = {m.rank_rule!r} has no Sigma: set method.sigma=folded")
  return errors


class Functions(NamedTuple):
  """Functions that are compiled once for all tasks."""

  shapes: Callable[[Params], contract.Shapes]  # (params) -> {layer: (I, J)}
  input_moments: Callable  # (params, stats, task) -> {layer: sum of x x' over inputs x}
  square_gradients: Callable  # (params, stats, image, label, num_classes) -> {layer: |g_l|^2}
  decompose: Callable  # (kernels as matrices, free ones, key) -> {layer: Decomposition}
  truncate: Callable  # `lowrank.truncate`


def build(config: Config, setup: Setup, shapes: Callable[[Params], contract.Shapes]) -> Functions:
  """Builds the functions that are compiled once for all tasks.

  Args:
    config: config of the method.
    setup: settings of the run.
    shapes: (params) -> (I, J) of the kernels as matrices, by layer path.
  """
  measured = setup.measuring

  def square_gradients(params, stats, image, label, num_classes):
    """Returns by layer |g_l|^2 of the batch's mean cross-entropy, in evaluation mode."""
    kernels, rest = trees.split(params)

    def loss_fn(kernels):
      params = trees.join(kernels, rest)
      logits, _ = networks.apply_model(measured, params, stats, image, False, None)
      return losses.cross_entropy(logits, label, num_classes)

    return {name: jnp.vdot(g, g) for name, g in jax.grad(loss_fn)(kernels).items()}

  args = (config.scales, config.conv_form == "unfolded")

  def decompose(base, free, key):
    if config.rank_rule in WITHOUT_SVD:
      return {n: lowrank.scales_alone(base[n], free[n], *args) for n in base}
    if config.svd == "exact":
      return {n: lowrank.decompose(base[n], free[n], *args) for n in base}
    own, k = {n: jax.random.fold_in(key, i) for i, n in enumerate(base)}, config.svd_rank
    return {n: lowrank.decompose_randomized(base[n], free[n], own[n], k, *args) for n in base}

  return Functions(
    shapes=shapes,
    input_moments=networks.make_input_moments(setup, shapes),
    square_gradients=jax.jit(square_gradients, compiler_options=networks.COMPILE_QUICKLY),
    decompose=jax.jit(decompose),
    truncate=jax.jit(lowrank.truncate, static_argnums=(2, 3)),
  )


def select(
  f: Functions,
  config: Config,
  setup: Setup,
  state: State,
  params: Params,
  stats: Params,
  task: Task,
  key: jax.Array,
  max_numbers: float,
) -> tuple[dict[str, lowrank.Perturbation], dict[str, int], bool]:
  """Decomposes the warmed-up network and chooses the ranks (lines 4 to 7).

  Args:
    f: the compiled functions.
    config: config of the method.
    setup: settings of the run.
    state: method state before the task.
    params: parameters after the warm-up.
    stats: BatchNorm statistics after the warm-up.
    task: the task.
    key: random key for randomized SVD and random factors.
    max_numbers: what U, V and a kept Sigma of all layers together may have; infinity: any.

  Returns:
    Perturbations by layer, ranks by layer, and whether these are the ranks of the exact SVD. They
    are not if a layer needs more singular values than the `svd_rank` of a randomised SVD.
  """
  kernels = state.shared["kernels"]
  free, _ = trees.split(params)
  importance = dict.fromkeys(kernels, 1.0)
  if config.rank_rule == "importance":
    importance = layer_importance(f, config, setup.batch_size, params, stats, task)
  svd_key, key = jax.random.split(key)
  shapes = f.shapes(params)
  matrices, free = (
    {n: kinds.as_matrix(w, shapes[n]) for n, w in tree.items()} for tree in (kernels, free)
  )
  decomposition = f.decompose(matrices, free, svd_key)
  if config.rank_rule == "eva":
    return *along_inputs(f, config, params, stats, task, decomposition, max_numbers), True
  ranks, exact = choose_ranks(config, decomposition, kernels, importance, max_numbers)
  perturbation = {}
  for i, (name, d) in enumerate(decomposition.items()):
    width = columns((d.V.shape[0], d.U.shape[0]), config)
    if config.rank_rule in ("random", "lora"):
      layer_key = jax.random.fold_in(key, i)
      p = lowrank.random_factors(layer_key, d, ranks[name], width)
      perturbation[name] = p if config.rank_rule == "random" else p._replace(U=0 * p.U)
    else:
      perturbation[name] = f.truncate(d, ranks[name], width, config.sigma == "folded")
  return jax.block_until_ready(perturbation), ranks, exact


def layer_importance(
  f: Functions, config: Config, batch_size: int, params: Params, stats: Params, task: Task
) -> dict[str, float]:
  """Returns by layer the importance |g_l|^2 at W_free, averaged over batches.

  As in the authors' code the mean is weighted with the sizes of the batches. With
  method.importance = "mean" it is divided by the number of entries of the kernel.

  Args:
    f: the compiled functions.
    config: config of the method.
    batch_size: images per batch.
    params: parameters after the warm-up.
    stats: BatchNorm statistics after the warm-up.
    task: whose images are used (method.importance_split).
  """
  kernels, _ = trees.split(params)
  split = getattr(task, config.importance_split)
  parts = batches.consecutive(len(split.index), batch_size)
  total = dict.fromkeys(kernels, 0.0)
  loaded = batches.load_batches(split, task.inputs, parts)
  for rows, (image, label) in zip(parts, loaded, strict=True):
    squares = f.square_gradients(params, stats, image, label, jnp.int32(task.num_classes))
    for name, value in squares.items():
      share = len(rows) / len(parts)
      count = kernels[name].size if config.importance == "mean" else 1
      total[name] += share * float(value) / count
  return total


def along_inputs(
  f: Functions,
  config: Config,
  params: Params,
  stats: Params,
  task: Task,
  decomposition: dict[str, lowrank.Decomposition],
  max_numbers: float,
) -> tuple[dict[str, lowrank.Perturbation], dict[str, int]]:
  """Returns perturbations whose V are the main directions of the layers' inputs, and their ranks.

  The ranks of all layers together are `upper_rank` for each layer whose V multiplies an input, or
  U and V fill the budget; the largest shares of variance are taken. Other layers get rank 0.

  Args:
    f: the compiled functions.
    config: config of the method.
    params: parameters of the network.
    stats: BatchNorm statistics.
    task: whose training images are used.
    decomposition: by layer, of which R and S are used.
    max_numbers: what U, V and a kept Sigma of all layers together may have; infinity: any.
  """
  moments = f.input_moments(params, stats, task)
  found = {n: lowrank.explained(x) for n, x in moments.items()}
  widest = 2 * config.upper_rank
  widths = {n: min(d.U.shape[0], d.V.shape[0]) for n, d in decomposition.items()}
  scores = [shares[: widths[n]] for n, (shares, _) in found.items()]
  if config.budget:
    counts = _fill_budget(config, scores, [decomposition[n] for n in found], max_numbers, widest)
  else:
    counts = lowrank.allocate_count(scores, config.upper_rank * len(found), widest)
  ranks = dict.fromkeys(decomposition, 0) | dict(zip(found, counts, strict=True))
  perturbation = {}
  for name, d in decomposition.items():
    _, vectors = found.get(name, (None, np.zeros((d.V.shape[0],) * 2, np.float32)))
    width = columns((d.V.shape[0], d.U.shape[0]), config)
    perturbation[name] = lowrank.directions(d, vectors, ranks[name], width)
  return perturbation, ranks


def choose_ranks(
  config: Config,
  decomposition: dict[str, lowrank.Decomposition],
  kernels: dict[str, jax.Array],
  importance: dict[str, float],
  max_numbers: float,
) -> tuple[dict[str, int], bool]:
  """Chooses the ranks of the whole network together (line 6, paper Eq. 11).

  With `method.budget`, columns are taken by their score per number that they add.

  Args:
    config: config of the method.
    decomposition: by layer.
    kernels: kernels of the base, by layer.
    importance: by layer.
    max_numbers: what U, V and a kept Sigma of all layers together may have; infinity: any.

  Returns:
    Ranks by layer, and whether they are those of the exact SVD.
  """
  if config.rank_rule == "none":
    return dict.fromkeys(decomposition, 0), True
  if config.rank_rule in _EQUAL:
    needed = ranks = _equal_ranks(config, decomposition, max_numbers)
  else:
    needed, ranks = _ranks_by_score(config, decomposition, kernels, importance, max_numbers)
  exact = True
  if config.rank_rule not in WITHOUT_SVD:
    found = [d.sigma.size for d in decomposition.values()]
    exact = all(k <= n for k, n in zip(needed, found, strict=True))
    ranks = [min(k, n) for k, n in zip(ranks, found, strict=True)]
  return dict(zip(decomposition, ranks, strict=True)), exact


def _equal_ranks(
  config: Config, decomposition: dict[str, lowrank.Decomposition], max_numbers: float
) -> list[int]:
  """Returns `upper_rank` for every layer that has so many, or ranks that fill the budget."""
  widths = [min(d.V.shape[0], d.U.shape[0]) for d in decomposition.values()]
  if not config.budget:
    return [min(config.upper_rank, width) for width in widths]
  priorities = lowrank.equal_priorities(widths)
  return _fill_budget(config, priorities, decomposition.values(), max_numbers, config.upper_rank)


def _ranks_by_score(
  config: Config,
  decomposition: dict[str, lowrank.Decomposition],
  kernels: dict[str, jax.Array],
  importance: dict[str, float],
  max_numbers: float,
) -> tuple[list[int], list[int]]:
  """Returns ranks by the scores of all columns, without and with `min_rank` and `upper_rank`.

  The arguments are those of `choose_ranks`.
  """
  scores = []
  for name, d in decomposition.items():
    window = kernels[name].size // (d.V.shape[0] * d.R.size) if config.window_factor else 1
    scores.append(window * importance[name] * lowrank.squared_singular_values(d))
  if config.budget:
    priorities = [s / _cost(d, config) for s, d in zip(scores, decomposition.values(), strict=True)]
    if config.rank_rule == "pearl":
      # the share that is missing without the column: a common threshold takes the largest
      priorities = [1 - (np.cumsum(s) - s) / max(np.sum(s), 1e-20) for s in scores]
    found = decomposition.values()
    ranks = _fill_budget(config, priorities, found, max_numbers, config.upper_rank)
    return ranks, ranks
  # layers that are chosen together
  pools = [[s] for s in scores] if config.rank_rule == "pearl" else [scores]

  def allocate(**limits: int) -> list[int]:
    share = functools.partial(lowrank.allocate_ranks, alpha=config.alpha)
    return [k for pool in pools for k in share(pool, crossing=config.crossing, **limits)]

  return allocate(), allocate(min_rank=config.min_rank, upper_rank=config.upper_rank)


def _fill_budget(
  config: Config,
  priorities: list[np.ndarray],
  decompositions: Iterable[lowrank.Decomposition],
  max_numbers: float,
  upper_rank: int,
) -> list[int]:
  """Returns ranks whose columns have at most `max_numbers` (`lowrank.allocate_budget`).

  Raises:
    UserError: if `method.budget` is a number and not a single column fits.
  """
  costs = [_cost(d, config) for d in decompositions]
  if isinstance(config.budget, str):
    return lowrank.allocate_budget(priorities, costs, max_numbers, upper_rank)
  return sizes.allocate_budget(priorities, costs, max_numbers, config.budget, upper_rank)


def _cost(d: lowrank.Decomposition, config: Config) -> float:
  """Returns the numbers that one column adds, where an int8 is a fourth of a number.

  They are M + J of U and V, and one of Sigma if it is kept or holds the scales of int8.
  """
  entries = d.V.shape[0] + d.U.shape[0]
  if config.factors == "int8":
    return entries / 4 + 1
  return entries + (config.sigma == "kept")


def columns(shape: tuple[int, int], config: Config) -> int:
  """Returns the width of U and V, the largest rank of a layer with `shape` (M, J) of V U'."""
  if config.rank_rule == "none":
    return 0
  full = min(shape)
  most = 2 * config.upper_rank if config.rank_rule == "eva" else config.upper_rank
  return min(most or full, full)
