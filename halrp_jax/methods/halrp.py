"""HALRP: Hessian-aware low-rank perturbation of a frozen base (Li et al., TKDE 2024).

Update rule: W_t = R_t W_base S_t + U_t Sigma_t V_t' for every dense and convolutional layer but
the head, with ranks chosen for the whole network at once.

| paper          | here                          | meaning |
|----------------|-------------------------------|---------|
| W_base         | shared["kernels"][layer]      | kernels after the first task, frozen for ever |
| W_free         | `free`                        | kernels after the warm-up on task t |
| g_l            | `importance`                  | gradient of the loss at W_free |
| alpha          | method.alpha                  | share of the total score that is kept |
| n, n_r         | epochs, method.warmup_epochs  | all epochs of a task, those of the warm-up |
| lambda_0       | method.l1                     | on |U| and |V| |
| lambda_1       | method.l2                     | on R^2, S^2, U^2, V^2; on W^2 in the first task |
| gamma, p       | method.prune_bound            | model growth that is allowed |

Phases (Algorithm 1): task 0 trains freely. Task t > 0: warm-up of the whole network from the base
with a fresh head, cross-entropy alone (line 3); importance, least squares, SVD, ranks (4 to 6);
fresh optimizer, fine-tuning of <R, S, U, Sigma, V>, biases, BatchNorm and head (7, 8); pruning of
all tasks so far (9).

The perturbation of task 0 is the identity, so that all tasks' pytrees have the same shape.

Deviations from the paper are the switches in `VARIANTS`: "paper" is the text to the letter, "code"
the authors' program as released, "published" what reproduces the published accuracies and sizes
(docs/reproduction.md).

Reference: https://arxiv.org/abs/2311.15161.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from halrp_jax import keys
from halrp_jax.training import batches, contract, losses, networks, sizes
from halrp_jax.training.fit import make_fit
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Method, Params, State
from halrp_jax.weights import kinds, lowrank, trees

_CODE = {
  "upper_rank": 100,
  "min_rank": 1,
  "importance": "mean",
  "importance_split": "valid",
  "window_factor": True,
  "crossing": True,
  "sigma": "folded",
  "base_l2": True,
  "l2_half": True,
  "decay_target": 0.0,
  "prune": "mixed_all_layers",
  "prune_scope": "all",
  "prune_rate": "excess",
}
VARIANTS = {
  "code": _CODE,
  "published": _CODE | {"importance": "sum", "prune_scope": "new"},
  "paper": _CODE
  | {
    "upper_rank": 0,
    "min_rank": 0,
    "importance": "sum",
    "importance_split": "train",
    "window_factor": False,
    "sigma": "kept",
    "base_l2": False,
    "l2_half": False,
    "prune": "mixed_all_layers_all_tasks",
    "prune_rate": "fixed_above_bound",
  },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.MethodConfig):
  """The keys `method.*` of this method."""

  variant: str = keys.one_of("published", tuple(VARIANTS), "what the switches left None mean")
  alpha: float = keys.number(0.9, 0, 1, "share of the total importance that the ranks keep; 1: all")
  warmup_epochs: int = keys.whole(1, 0, None, "n_r: epochs of the free warm-up, out of `epochs`")
  l1: float = keys.number(0.0, 0, None, "lambda_0: L1 coefficient on U and V")
  l2: float = keys.number(
    0.0, 0, None, "lambda_1: L2 coefficient on R, S, U, V; on the kernels in task 0"
  )
  prune_threshold: float = keys.number(
    1e-5, 0, None, "absolute threshold of the rules that have one"
  )
  prune_bound: float | str = keys.number_or_none(
    0.6, 0, "model growth that is allowed, a fraction of the base; none: any"
  )
  rank_rule: str = keys.one_of(
    "importance",
    ("importance", "flat", "lrp", "random"),
    "importance: the method; flat: upper_rank everywhere; lrp: singular values alone; random: "
    "upper_rank everywhere with random U and V",
  )
  svd: str = keys.one_of(
    "exact",
    ("exact", "randomized"),
    "how the residual is decomposed; randomized: the largest svd_rank singular values of a layer",
  )
  svd_rank: int = keys.whole(256, 1, None, "singular values per layer that svd=randomized finds")
  upper_rank: int = keys.whole(None, 0, None, "largest rank of a layer; 0: no cap")
  min_rank: int = keys.whole(None, 0, None, "smallest rank of a layer")
  importance: str = keys.one_of(
    None, ("mean", "sum"), "of the squared gradient over a kernel's entries; sum: |g|^2"
  )
  importance_split: str = keys.one_of(
    None, ("valid", "train"), "images that the importance is taken on"
  )
  window_factor: bool = keys.flag(
    None, "a convolution's scores are multiplied by its window's area"
  )
  crossing: bool = keys.flag(None, "the score that carries the sum past alpha is kept too")
  sigma: str = keys.one_of(
    None,
    ("folded", "kept"),
    "folded: sqrt(Sigma) in U and in V, no Sigma trained or counted; kept: trained and counted",
  )
  base_l2: bool = keys.flag(None, "the first task has the L2 term on its kernels")
  l2_half: bool = keys.flag(None, "the L2 terms carry a factor 1/2")
  decay_target: float = keys.number(None, 0, 1, "value that the L2 term draws R and S to")
  prune: str = keys.one_of(None, tuple(lowrank.PRUNE_RULES), "what shares one pruning threshold")
  prune_scope: str = keys.one_of(
    None,
    ("new", "all"),
    "new: a task is pruned when it is learned, to its share of the bound, and never again; all: "
    "every task is, again and again, whenever the bound is passed",
  )
  prune_rate: str = keys.one_of(
    None,
    ("excess", "fixed", "fixed_above_bound"),
    "share pruned by percentile: 1 - bound/growth above the bound; always 1 - bound; 1 - bound "
    "above the bound",
  )


class TaskState(NamedTuple):
  perturbation: dict[str, lowrank.Perturbation]  # R, S, U, Sigma, V by layer
  rank: dict[str, Array]  # k_l, int32 [] by layer: columns of U and V beyond it are zero
  rest: Params  # biases, BatchNorm and head
  stats: Params  # BatchNorm's statistics
  num_classes: Array  # int32 []


def check(config: keys.Config) -> list[str]:
  """Returns errors that concern several keys."""
  m, errors = config.method, []
  if m.warmup_epochs >= config.epochs:
    errors.append(
      f"method.warmup_epochs = {m.warmup_epochs} must be less than epochs = {config.epochs}: "
      "the rest is for fine-tuning"
    )
  if m.importance_split == "valid" and config.protocol.validation_fraction == 0:
    errors.append(
      "method.importance_split = 'valid' needs protocol.validation_fraction > 0; "
      "or set method.importance_split=train"
    )
  if m.rank_rule in ("flat", "random") and not m.upper_rank:
    errors.append(f"method.rank_rule = {m.rank_rule!r} needs method.upper_rank > 0")
  if m.rank_rule == "random" and m.sigma == "kept":
    errors.append("method.rank_rule = 'random' has no Sigma: set method.sigma=folded")
  return errors


def make(config: Config, setup: Setup) -> Method:
  """Builds HALRP. Everything jitted is built here, once."""
  f = _build(config, setup)

  def learn(state, tasks, key, store):
    (task,) = tasks
    if not state.tasks:
      return learn_base(f, config, setup, task, key, store), {}
    contract.check_state(state, f.shapes)
    warm_key, select_key, fine_key = jax.random.split(key, 3)
    params, stats = warm_up(f, config, state, task, warm_key, store)

    def timed_select():
      start = time.perf_counter()
      perturbation, ranks, exact = select(f, config, setup, state, params, stats, task, select_key)
      seconds = time.perf_counter() - start
      chosen = {"ranks": ranks, "ranks_exact": exact}
      store.log({"event": "ranks", "phase": store.name} | chosen | {"seconds": seconds})
      return perturbation, chosen, seconds

    perturbation, chosen, seconds = store.once("select", timed_select)
    ranks, epochs = chosen["ranks"], setup.epochs - config.warmup_epochs
    learned = fine_tune(f, epochs, state, perturbation, ranks, params, stats, task, fine_key, store)
    state = prune(f, state.append(learned), config, max(1, setup.num_tasks - 1))
    return state, chosen | {"select_seconds": seconds}

  logits = networks.perturbed_logits(setup.model)
  return Method(learn, sizes.perturbed, networks.merged, logits, ("kernels",))


# --- Algorithm 1; f: the jitted functions ------------------------------------------------


def learn_base(f, config: Config, setup: Setup, task, key, store) -> State:
  """Line 1: the first task trains freely and gives the base."""
  init_key, fit_key = jax.random.split(key)
  params, stats = f.initialize(init_key)
  frozen = {"l2": networks.l2_coefficient(config) if config.base_l2 else 0.0}
  epochs, store = setup.epochs, store.child("base")
  params, stats = f.fit_free(params, stats, frozen, task, fit_key, epochs, store)
  return first_state(config, task, params, stats, f.shapes(params))


def first_state(config: Config, task, params, stats, shapes) -> State:
  """Returns the state after the first task; `shapes`: (I, J) of each layer's kernel."""
  kernels, rest = trees.split(params)

  def identity(kernel, shape):
    matrix = kinds.as_matrix(kernel, shape)
    return lowrank.identity(matrix, _columns(shape, config), config.sigma == "folded")

  unchanged = {name: identity(kernel, shapes[name]) for name, kernel in kernels.items()}
  return State({"kernels": kernels}, (_task_state(task, unchanged, {}, rest, stats),))


def warm_up(f, config: Config, state, task, key, store):
  """Line 3: a free network from the base with a fresh head. -> params, stats"""
  init_key, fit_key = jax.random.split(key)
  fresh, _ = f.initialize(init_key)
  base = state.tasks[0]
  params = trees.join(state.shared["kernels"], networks.fresh_head(base.rest, fresh))
  epochs, store = config.warmup_epochs, store.child("warmup")
  return f.fit_free(params, base.stats, {"l2": 0.0}, task, fit_key, epochs, store)


def select(f, config: Config, setup: Setup, state, params, stats, task, key):
  """Lines 4 to 7: from the warmed-up network to perturbations and ranks per layer.

  The last value tells if the ranks are those of the exact SVD: not if a randomised one should have
  found more singular values than `svd_rank`.
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
  ranks, exact = choose_ranks(config, decomposition, kernels, importance)
  perturbation = {}
  for i, (name, d) in enumerate(decomposition.items()):
    width = _columns(shapes[name], config)
    if config.rank_rule == "random":
      layer_key = jax.random.fold_in(key, i)
      perturbation[name] = lowrank.random_factors(layer_key, d, ranks[name], width)
    else:
      perturbation[name] = f.truncate(d, ranks[name], width, config.sigma == "folded")
  return jax.block_until_ready(perturbation), ranks, exact


def layer_importance(f, config: Config, batch_size: int, params, stats, task) -> dict[str, float]:
  """G_l at W_free: |g_l|^2 of every batch, averaged with the batches' sizes."""
  kernels, _ = trees.split(params)
  split = getattr(task, config.importance_split)
  parts = batches.consecutive(len(split.index), batch_size)
  total = dict.fromkeys(kernels, 0.0)
  for rows in parts:
    image, label = batches.load_batch(split, task.inputs, rows)
    squares = f.square_gradients(params, stats, image, label, jnp.int32(task.num_classes))
    for name, value in squares.items():
      share = len(rows) / len(parts)
      count = kernels[name].size if config.importance == "mean" else 1
      total[name] += share * float(value) / count
  return total


def choose_ranks(config: Config, decomposition, kernels, importance) -> tuple[dict[str, int], bool]:
  """Line 6, for the whole network at once (paper Eq. 11). -> ranks, whether they are exact"""
  found = [d.sigma.size for d in decomposition.values()]
  if config.rank_rule in ("flat", "random"):
    wanted = ranks = [min(config.upper_rank, d.S.size, d.R.size) for d in decomposition.values()]
  else:
    scores = []
    for name, d in decomposition.items():
      window = kernels[name].size // (d.S.size * d.R.size) if config.window_factor else 1
      scores.append(window * importance[name] * lowrank.squared_singular_values(d))
    allocate = functools.partial(lowrank.allocate_ranks, scores, config.alpha)
    limits = {"min_rank": config.min_rank, "upper_rank": config.upper_rank}
    wanted = allocate(crossing=config.crossing)
    ranks = allocate(crossing=config.crossing, **limits)
  exact = all(k <= n for k, n in zip(wanted, found, strict=True))
  ranks = [min(k, n) for k, n in zip(ranks, found, strict=True)]
  return dict(zip(decomposition, ranks, strict=True)), exact


def fine_tune(f, epochs, state, perturbation, ranks, params, stats, task, key, store) -> TaskState:
  """Line 8: <R, S, U, Sigma, V>, biases, BatchNorm and head with a fresh optimizer."""
  _, rest = trees.split(params)
  start = {"perturbation": perturbation, "rest": rest}
  store = store.child("finetune")
  trained, stats = f.fit_perturbed(start, stats, state.shared, task, key, epochs, store)
  return _task_state(task, trained["perturbation"], ranks, trained["rest"], stats)


def prune(f, state: State, config: Config, num_later: int) -> State:
  """Line 9: prunes U and V (paper Sect. 4.4) of the new task, or of every task since the second.

  A task pruned when it is learned has a share 1/`num_later` of the bound and never changes again.
  Pruned with all others whenever the bound is passed, it ends with as many values, but changes
  after its BatchNorm statistics were taken.
  """
  bound = None if config.prune_bound == "none" else config.prune_bound
  known, later = state.tasks[:1], state.tasks[1:]
  if config.prune_scope == "new":
    known, later = state.tasks[:-1], state.tasks[-1:]
    bound = bound and bound / num_later
  rate = lowrank.prune_rate(config.prune_rate, bound, sizes.dense_growth(state, later))
  if config.prune == "none" or rate is None:
    return state
  values = [sizes.low_rank_values(p) for p in later]
  taus = lowrank.prune_thresholds(values, config.prune, config.prune_threshold, rate)
  pruned = [
    p._replace(perturbation={n: f.prune(q, tau[n]) for n, q in p.perturbation.items()})
    for p, tau in zip(later, taus, strict=True)
  ]
  return state._replace(tasks=(*known, *pruned))


# --- jitted functions -------------------------------------------------------------------


class _Functions(NamedTuple):
  shapes: Callable  # (params) -> {layer: (I, J)}
  initialize: Callable  # (key) -> params, stats
  fit_free: Callable  # `make_fit` of the plain network
  fit_perturbed: Callable  # `make_fit` of the perturbed one
  square_gradients: Callable  # (params, stats, image, label, num_classes) -> {layer: |g_l|^2}
  decompose: Callable  # (kernels as matrices, free ones, key) -> {layer: Decomposition}
  truncate: Callable  # `lowrank.truncate`
  prune: Callable  # `lowrank.prune`


def _build(config: Config, setup: Setup) -> _Functions:
  model, measured = setup.model, setup.measuring

  def penalty(params, frozen):
    """Paper Eq. 12. Sigma has no term there, and none here."""
    total = 0.0
    for p in params["perturbation"].values():
      scales = losses.sum_squares((p.R - config.decay_target, p.S - config.decay_target))
      total += config.l1 * losses.sum_absolute((p.U, p.V))
      total += networks.l2_coefficient(config) * (scales + losses.sum_squares((p.U, p.V)))
    return total

  def square_gradients(params, stats, image, label, num_classes):
    """Of the batch's mean cross-entropy, in evaluation mode."""
    kernels, rest = trees.split(params)

    def loss_fn(kernels):
      params = trees.join(kernels, rest)
      logits, _ = networks.apply_model(measured, params, stats, image, False, None)
      return losses.cross_entropy(logits, label, num_classes)

    return {name: jnp.vdot(g, g) for name, g in jax.grad(loss_fn)(kernels).items()}

  def decompose(base, free, key):
    if config.svd == "exact":
      return {n: lowrank.decompose(base[n], free[n]) for n in base}
    own, k = {n: jax.random.fold_in(key, i) for i, n in enumerate(base)}, config.svd_rank
    return {n: lowrank.decompose_randomized(base[n], free[n], own[n], k) for n in base}

  return _Functions(
    shapes=contract.make_matrix_shapes(model, setup.image_shape, setup.max_classes),
    initialize=networks.make_initialize(setup),
    fit_free=make_fit(setup, *networks.plain_network(model)),
    fit_perturbed=make_fit(setup, networks.perturbed_network(model), penalty),
    square_gradients=jax.jit(square_gradients),
    decompose=jax.jit(decompose),
    truncate=jax.jit(lowrank.truncate, static_argnums=(2, 3)),
    prune=jax.jit(lowrank.prune),
  )


def _columns(shape, config: Config) -> int:
  """Width of U and V: the largest rank the layer can get. `shape`: (I, J)"""
  full = min(shape)
  return min(config.upper_rank or full, full)


def _task_state(task, perturbation, ranks, rest, stats) -> TaskState:
  rank = {name: jnp.int32(ranks.get(name, 0)) for name in perturbation}
  return TaskState(perturbation, rank, rest, stats, jnp.int32(task.num_classes))
