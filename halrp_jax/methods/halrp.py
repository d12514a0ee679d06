"""HALRP: Hessian-aware low-rank perturbation of a frozen base (Li et al., TKDE 2024).

Update rule: W_t = R_t W_base S_t + U_t Sigma_t V_t' for every dense and convolutional layer except
the head, with ranks chosen for the whole network together.

| paper          | here                          | meaning |
|----------------|-------------------------------|---------|
| W_base         | shared["kernels"][layer]      | kernels after the first task, then frozen |
| W_free         | `free`                        | kernels after the warm-up on task t |
| g_l            | `layer_importance`            | gradient of the loss at W_free |
| alpha          | method.alpha                  | share of the total score that is kept |
| n, n_r         | epochs, method.warmup_epochs  | epochs of a task, and of its warm-up |
| lambda_0       | method.l1                     | of the L1 norms of U and V |
| lambda_1       | method.l2                     | of R^2, S^2, U^2, V^2; of W^2 in the first task |
| gamma, p       | method.prune_bound            | model growth that is allowed |

Phases (Algorithm 1): task 0 trains freely. Later tasks train the whole network from the base and a
fresh head on the cross-entropy alone (warm-up, line 3). Importance, least squares, SVD and ranks
follow (lines 4 to 6). Then <R, S, U, Sigma, V>, biases, BatchNorm and head are fine-tuned with a
fresh optimizer (lines 7 and 8), and all tasks so far are pruned (line 9).

The perturbation of task 0 is the identity, so that the states of all tasks have the same shapes.

Deviations from the paper are switches, whose values `VARIANTS` has: "paper" follows the text to the
letter, "code" is the authors' code as released, "published" reproduces the published accuracies and
sizes (docs/reproduction.md), and "best" goes beyond the paper (docs/best.md).

Reference: https://arxiv.org/abs/2311.15161.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from halrp_jax import keys
from halrp_jax.methods import rank_rules
from halrp_jax.training import contract, first_task, losses, networks, sizes
from halrp_jax.training.fit import Fit, make_fit
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Method, Params, State, Store, Task, UserError
from halrp_jax.weights import kinds, lowrank, trees

_CODE = {
  "warmup_share": 0.0,
  "budget": 0.0,
  "conv_form": "window_mean",
  "factors": "float32",
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
_PUBLISHED = _CODE | {"importance": "sum", "prune_scope": "new"}
# docs/best.md has the reasons
_BEST = _PUBLISHED | {
  "warmup_share": 0.8,
  "budget": "bound",
  "conv_form": "unfolded",
  "factors": "int8",
  "prune": "none",
}
VARIANTS = {
  "code": _CODE,
  "published": _PUBLISHED,
  "best": _BEST,
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
class Config(rank_rules.Config):
  """Config keys `method.*` of HALRP."""

  variant: str = keys.one_of(
    "published", tuple(VARIANTS), "values of the switches below that are not set"
  )
  warmup_epochs: int = keys.whole(1, 0, None, "n_r: epochs of the free warm-up, out of `epochs`")
  warmup_share: float = keys.number(
    None, 0, 1, "share of `epochs` that the warm-up has in place of warmup_epochs; 0: warmup_epochs"
  )
  warmup_rate: float = keys.number(
    1.0, 0, None, "the learning rate of the warm-up is learning_rate times this", open_low=True
  )
  l1: float = keys.number(0.0, 0, None, "lambda_0: L1 coefficient on U and V")
  l2: float = keys.number(
    0.0, 0, None, "lambda_1: L2 coefficient on R, S, U, V; on the kernels in task 0"
  )
  prune_threshold: float = keys.number(
    1e-5, 0, None, "absolute threshold of the rules that have one"
  )
  prune_bound: float | str = keys.number_or(
    "none", 0.6, 0, "model growth that is allowed, a fraction of the base; none: any"
  )
  task_bound: float = keys.number(
    0.0,
    0,
    None,
    "prune_scope=new or budget=bound: model growth that each task is allowed, a fraction of the "
    "base, in place of prune_bound; 0: an equal share of prune_bound",
  )
  prune_epochs: int = keys.whole(
    0,
    0,
    None,
    "prune_scope=new: epochs of fine-tuning after pruning, out of `epochs`; what is pruned stays 0",
  )
  private: str = keys.one_of(
    "all",
    ("all", "norm", "head"),
    "parameters beside the kernels that each task has for itself; norm: those of normalisation and "
    "the head; head: the head alone, and the network is in evaluation mode while it is trained, "
    "with the first task's BatchNorm statistics",
  )
  base_l2: bool = keys.flag(None, "the first task has the L2 term on its kernels")
  l2_half: bool = keys.flag(None, "the L2 terms have a factor 1/2")
  decay_target: float = keys.number(None, 0, 1, "value that the L2 term draws R and S to")
  prune: str = keys.one_of(
    None, tuple(lowrank.PRUNE_RULES), "which values are pruned with one common threshold"
  )
  prune_scope: str = keys.one_of(
    None,
    ("new", "all"),
    "new: a task is pruned once, when it is learned, to its share of the bound; all: all tasks are "
    "pruned whenever the bound is exceeded (retrospective pruning)",
  )
  prune_rate: str = keys.one_of(
    None,
    ("excess", "fixed", "fixed_above_bound"),
    "share of the values that is pruned: excess: 1 - bound/growth above the bound; fixed: always "
    "1 - bound; fixed_above_bound: 1 - bound above the bound",
  )


class TaskState(NamedTuple):
  """State of a task."""

  perturbation: dict[str, lowrank.Perturbation]  # R, S, U, Sigma, V by layer
  rank: dict[str, Array]  # k_l, int32 [] by layer: columns of U and V beyond it are zero
  rest: Params  # biases, BatchNorm and head
  stats: Params  # BatchNorm's statistics
  num_classes: Array  # int32 []


def check(config: keys.Config) -> list[str]:
  """Returns the errors of a run's config that concern several keys of HALRP."""
  m, errors = config.method, []
  assert isinstance(m, Config)
  warmup_epochs = _warmup_epochs(m, config.epochs)
  if warmup_epochs + m.prune_epochs >= config.epochs:
    name = "method.warmup_epochs" + (" + method.prune_epochs" if m.prune_epochs else "")
    if m.warmup_share:
      name = f"the epochs of method.warmup_share{name.removeprefix('method.warmup_epochs')}"
    errors.append(
      f"{name} = {warmup_epochs + m.prune_epochs} must be less than epochs = {config.epochs}: "
      "the rest is for fine-tuning"
    )
  if m.prune_epochs and (m.prune_scope == "all" or m.prune == "none"):
    errors.append(
      f"method.prune_epochs = {m.prune_epochs} are after a task was pruned for good: set "
      "method.prune_scope=new and a method.prune other than none (as method.variant=published), or "
      "method.prune_epochs=0"
    )
  if m.factors == "int8" and (m.prune_scope == "all" or m.prune != "none"):
    errors.append(
      "method.factors = 'int8' stores zeros as other values, so that pruning makes no task "
      "smaller: set method.prune=none, or method.factors=float32"
    )
  if m.rank_rule in rank_rules.WITHOUT_SVD and m.warmup_share:
    errors.append(
      f"method.rank_rule = {m.rank_rule!r} keeps nothing of the kernels that a long warm-up "
      "learns: set method.warmup_share=0"
    )
  if m.importance_split == "valid" and config.protocol.validation_fraction == 0:
    errors.append(
      "method.importance_split = 'valid' needs protocol.validation_fraction > 0; "
      "or set method.importance_split=train"
    )
  if m.task_bound and m.budget != "bound" and (m.prune_scope == "all" or m.prune == "none"):
    errors.append(
      f"method.task_bound = {m.task_bound} bounds each task when it is pruned: set "
      "method.prune_scope=new and a method.prune other than none, or method.budget=bound, or "
      "method.task_bound=0"
    )
  if m.budget == "bound" and m.prune_bound == "none" and not m.task_bound:
    errors.append(
      "method.budget = 'bound' fills method.task_bound or method.prune_bound: set one of them, or "
      "method.budget=0"
    )
  return errors + rank_rules.check(m)


def _warmup_epochs(config: Config, epochs: int) -> int:
  """Returns the number of epochs of the warm-up, out of `epochs`; a share is at least one."""
  if not config.warmup_share:
    return config.warmup_epochs
  return max(1, min(round(config.warmup_share * epochs), epochs - config.prune_epochs - 1))


def make(config: Config, setup: Setup) -> Method:
  """Builds HALRP, and compiles its functions once for all tasks.

  Raises:
    UserError: if the pretrained base does not fit `base_training`, or statistics `private`.
  """
  _check_private(config, setup)
  config = dataclasses.replace(config, warmup_epochs=_warmup_epochs(config, setup.epochs))
  f = _build(config, setup)
  l2 = networks.l2_coefficient(config) if config.base_l2 else 0.0
  learn_first = first_task.make(setup, l2, f.fit_free)

  def learn(state, tasks, key, store):
    (task,) = tasks
    if not state.tasks and setup.base_training != "perturb":  # line 1
      params, stats = learn_first(task, key, store)
      return first_state(config, task, params, stats, f.ranks.shapes(params)), {}
    state = state if state.tasks else open_base(setup)
    contract.check_state(state, f.ranks.shapes)
    warm_key, select_key, fine_key = jax.random.split(key, 3)
    params, stats = warm_up(f, config, state, task, warm_key, store)

    def timed_select():
      start = time.perf_counter()
      shapes = f.ranks.shapes(params)
      max_numbers = room(config, setup.num_tasks, state, task, params, shapes, store)
      perturbation, ranks, exact = rank_rules.select(
        f.ranks, config, setup, state, params, stats, task, select_key, max_numbers
      )
      seconds = time.perf_counter() - start
      chosen = {"ranks": ranks, "ranks_exact": exact}
      store.log({"event": "ranks", "phase": store.name} | chosen | {"seconds": seconds})
      return perturbation, chosen, seconds

    perturbation, chosen, seconds = store.once("select", timed_select)
    ranks, epochs = chosen["ranks"], setup.epochs - config.warmup_epochs - config.prune_epochs
    task_state = fine_tune(
      f, config, epochs, state, perturbation, ranks, params, stats, task, fine_key, store
    )
    state = prune(f, state.append(task_state), config, setup.num_tasks)
    if config.prune_epochs:
      state = recover(f, config, state, task, jax.random.fold_in(fine_key, 1), store)
    if config.factors == "int8":
      *earlier, last = state.tasks
      found = {n: f.quantize(p) for n, p in last.perturbation.items()}
      state = state._replace(tasks=(*earlier, last._replace(perturbation=found)))
    return state, chosen | {"select_seconds": seconds}

  logits = networks.perturbed_logits(setup.model)
  size, size_of = (
    functools.partial(fn, owned=_owned(config)) for fn in (sizes.perturbed, sizes.perturbed_task)
  )
  return Method(learn, size, networks.merged, logits, ("kernels",), size_of=size_of)


# --- Algorithm 1 -------------------------------------------------------------------------
# `f` are the compiled functions.


def open_base(setup: Setup) -> State:
  """Returns the method state before the first task if `base_training` is "perturb".

  Its base is the pretrained one, and its `shared` has also the pretrained other parameters and
  statistics, which the first task starts from as the later ones do.
  """
  base = setup.base
  assert base is not None
  kernels, rest = trees.split(base.params)
  return State({"kernels": kernels, "rest": rest, "stats": base.stats}, ())


def first_state(
  config: Config, task: Task, params: Params, stats: Params, shapes: contract.Shapes
) -> State:
  """Returns the method state after the first task.

  Args:
    config: config of the method.
    task: the first task.
    params: trained on it.
    stats: BatchNorm statistics.
    shapes: (I, J) of every layer's kernel as a matrix.
  """
  kernels, rest = trees.split(params)

  def identity(kernel, shape):
    matrix, unfold = kinds.as_matrix(kernel, shape), config.conv_form == "unfolded"
    columns = rank_rules.columns(lowrank.low_rank_shape(matrix, unfold), config)
    p = lowrank.identity(matrix, columns, config.sigma == "folded", unfold)
    return lowrank.quantized(p) if config.factors == "int8" else p

  unchanged = {name: identity(kernel, shapes[name]) for name, kernel in kernels.items()}
  return State({"kernels": kernels}, (_task_state(task, unchanged, {}, rest, stats),))


def warm_up(
  f: "_Functions", config: Config, state: State, task: Task, key: jax.Array, store: Store
) -> tuple[Params, Params]:
  """Trains a free network from the base with a fresh head (line 3).

  Returns:
    Its parameters, whose kernels are W_free, and its BatchNorm statistics.
  """
  init_key, fit_key = jax.random.split(key)
  fresh, _ = f.initialize(init_key)
  rest, stats = _start_of(state)
  params = trees.join(state.shared["kernels"], networks.fresh_head(rest, fresh))
  epochs, store = config.warmup_epochs, store.child("warmup")
  args = (task, fit_key, epochs, store)
  return f.fit_free(params, stats, {"l2": 0.0}, *args, rate_factor=config.warmup_rate)


def room(
  config: Config,
  num_tasks: int,
  state: State,
  task: Task,
  params: Params,
  shapes: contract.Shapes,
  store: Store,
) -> float:
  """Returns how many numbers U, V and a kept Sigma of a task may have; infinity: any.

  With method.budget = "bound" they may have what `task_bound`, or an equal share of `prune_bound`,
  leaves beside R, S and the task's other numbers. An int8 is a fourth of a number. This is not in
  the paper.

  Args:
    config: config of the method.
    num_tasks: number of the benchmark's tasks.
    state: method state before the task.
    task: the task.
    params: parameters after the warm-up.
    shapes: (I, J) of every layer's kernel as a matrix.
    store: store of the task, for a note if nothing is left.
  """
  if not isinstance(config.budget, str):
    return config.budget * sizes.count_leaves(params) or math.inf
  kernels, rest = trees.split(params)
  without_columns = {
    n: lowrank.identity(kinds.as_matrix(w, shapes[n]), 0, fold=True) for n, w in kernels.items()
  }
  with_task = state.append(_task_state(task, without_columns, {}, rest, {}))
  size = sizes.perturbed_task(with_task, len(state.tasks), _owned(config))
  fixed, base = size.paper - size.base, sizes.base_count(with_task)
  bound = _bound_of_a_task(config, state, num_tasks)
  assert bound is not None  # `check` requires it
  left = math.floor(bound * base) - fixed
  if left <= 0 and config.rank_rule != "none":
    note = (
      f"task {task.name!r} may add {bound:.3g} of the base, and R, S and its other numbers are "
      f"{fixed / base:.3g} of it, so that all ranks are 0: set a larger method.task_bound"
    )
    store.log({"event": "note", "note": note})
  return max(0, left)


def fine_tune(
  f: "_Functions",
  config: Config,
  epochs: int,
  state: State,
  perturbation: dict[str, lowrank.Perturbation],
  ranks: dict[str, int],
  params: Params,
  stats: Params,
  task: Task,
  key: jax.Array,
  store: Store,
) -> TaskState:
  """Trains <R, S, U, Sigma, V>, biases, BatchNorm and head with a fresh optimizer (line 8).

  Args:
    f: the compiled functions.
    config: config of the method.
    epochs: number of epochs.
    state: method state before the task.
    perturbation: perturbation from `select`.
    ranks: ranks from `select`.
    params: parameters after the warm-up.
    stats: BatchNorm statistics after the warm-up.
    task: the task.
    key: random key for the order of images and for dropout.
    store: store of the task, for progress and events.

  Returns:
    The state of the task.
  """
  _, rest = trees.split(params)
  if config.private != "all":
    first, first_stats = _start_of(state)
    shared, _ = trees.split_private(first, config.private == "norm")
    rest = trees.join_private(shared, trees.split_private(rest, config.private == "norm")[1])
    stats = first_stats if config.private == "head" else stats
  start = {"perturbation": perturbation, "rest": rest}
  store = store.child("finetune")
  trained, stats = f.fit_perturbed(start, stats, state.shared, task, key, epochs, store)
  return _task_state(task, trained["perturbation"], ranks, trained["rest"], stats)


def prune(f: "_Functions", state: State, config: Config, num_tasks: int) -> State:
  """Prunes U and V of the new task, or of all perturbed tasks (line 9, paper Sect. 4.4).

  With method.prune_scope = "new", a task is pruned when it is learned, to `method.task_bound` or
  its equal share of the bound, and never changes again. With "all", it ends with as many values,
  but also changes after its BatchNorm statistics have been measured.

  Args:
    f: the compiled functions.
    state: method state with the new task.
    config: config of the method.
    num_tasks: number of the benchmark's tasks.

  Returns:
    The state with pruned perturbations.
  """
  if config.prune_scope == "new":
    unchanged, candidates = state.tasks[:-1], state.tasks[-1:]
    bound = _bound_of_a_task(config, state, num_tasks)
  else:
    first = 0 if "rest" in state.shared else 1
    unchanged, candidates = state.tasks[:first], state.tasks[first:]
    bound = None if isinstance(config.prune_bound, str) else config.prune_bound
  rate = lowrank.prune_rate(
    config.prune_rate, bound, sizes.dense_growth(state, candidates, _owned(config))
  )
  if config.prune == "none" or rate is None:
    return state
  values = [sizes.low_rank_values(p) for p in candidates]
  taus = lowrank.prune_thresholds(values, config.prune, config.prune_threshold, rate)
  pruned = [
    p._replace(perturbation={n: f.prune(q, tau[n]) for n, q in p.perturbation.items()})
    for p, tau in zip(candidates, taus, strict=True)
  ]
  return state._replace(tasks=(*unchanged, *pruned))


def _bound_of_a_task(config: Config, state: State, num_tasks: int) -> float | None:
  """Returns the growth that a task is allowed, as a fraction of the base; None: any."""
  if config.task_bound or isinstance(config.prune_bound, str):
    return config.task_bound or None
  first = 0 if "rest" in state.shared else 1
  return config.prune_bound / max(1, num_tasks - first)


def recover(
  f: "_Functions", config: Config, state: State, task: Task, key: jax.Array, store: Store
) -> State:
  """Fine-tunes the new task after pruning with a fresh optimizer; what is pruned stays 0.

  This is not in the paper.

  Args:
    f: the compiled functions.
    config: config of the method.
    state: method state whose last task was pruned.
    task: the task.
    key: random key for the order of images and for dropout.
    store: store of the task, for progress and events.
  """
  last = state.tasks[-1]
  mask = jax.tree.map(lambda x: x != 0, last.perturbation)
  start = {"perturbation": last.perturbation, "rest": last.rest}
  frozen = state.shared | {"mask": mask}
  args = (task, key, config.prune_epochs, store.child("recover"))
  trained, stats = f.fit_pruned(start, last.stats, frozen, *args)
  return state._replace(tasks=(*state.tasks[:-1], last._replace(**trained, stats=stats)))


# --- jitted functions -------------------------------------------------------------------


class _Functions(NamedTuple):
  """Functions that are compiled once for all tasks."""

  ranks: rank_rules.Functions
  initialize: Callable  # (key) -> params, stats
  fit_free: Fit  # of the plain network
  fit_perturbed: Fit  # of the perturbed network
  fit_pruned: Fit  # of the perturbed network; zeros of the perturbation stay zeros
  prune: Callable  # `lowrank.prune`
  quantize: Callable  # `lowrank.quantized`


def _build(config: Config, setup: Setup) -> _Functions:
  """Builds the functions that are compiled once for all tasks."""
  model = setup.model
  shapes = contract.make_matrix_shapes(model, setup.image_shape, setup.max_classes)
  tuning = fine_tuning(config, model)

  def edit_pruned(updates, frozen):
    updates = tuning.edit_fn(updates, frozen)
    held = jax.tree.map(jnp.multiply, updates["perturbation"], frozen["mask"])
    return updates | {"perturbation": held}

  return _Functions(
    ranks=rank_rules.build(config, setup, shapes),
    initialize=networks.make_initialize(setup),
    fit_free=make_fit(setup, *networks.plain_network(model)),
    fit_perturbed=make_fit(setup, *tuning[:2], edit_fn=tuning.edit_fn),
    fit_pruned=make_fit(setup, *tuning[:2], edit_fn=edit_pruned),
    prune=jax.jit(lowrank.prune),
    quantize=jax.jit(lowrank.quantized),
  )


class FineTuning(NamedTuple):
  """What `fit` needs to train the perturbation of a task."""

  apply_fn: Callable  # (params, frozen, stats, image, train, key) -> logits, stats
  penalty_fn: Callable  # (params, frozen) -> scalar
  edit_fn: Callable  # (updates, frozen) -> updates


def fine_tuning(config: Config, model: nn.Module) -> FineTuning:
  """Builds the functions that train <R, S, U, Sigma, V> and a task's own other parameters.

  What a task does not have for itself gets no gradient, so that its products are not computed.
  """

  def with_shared(fn, params):
    """Applies a function to the parameters that a task does not have for itself."""
    found, rest = params["perturbation"], params["rest"]
    if not config.scales:
      found = {n: p._replace(R=fn(p.R), S=fn(p.S)) for n, p in found.items()}
    if config.private != "all":
      shared, own = trees.split_private(rest, config.private == "norm")
      rest = trees.join_private(jax.tree.map(fn, shared), own)
    return {"perturbation": found, "rest": rest}

  def apply_fn(params, frozen, stats, image, train, key):
    train = train and config.private != "head"
    params = with_shared(jax.lax.stop_gradient, params)
    return networks.perturbed_network(model)(params, frozen, stats, image, train, key)

  def penalty_fn(params, frozen):
    """Returns the regularisation of the paper's Eq. 12, which has no term for Sigma."""
    total = 0.0
    for p in params["perturbation"].values():
      scales = losses.sum_squares((p.R - config.decay_target, p.S - config.decay_target))
      total += config.l1 * losses.sum_absolute((p.U, p.V))
      total += networks.l2_coefficient(config) * (scales + losses.sum_squares((p.U, p.V)))
    return total

  def edit_fn(updates, frozen):
    return with_shared(jnp.zeros_like, updates)

  return FineTuning(apply_fn, penalty_fn, edit_fn)


def _check_private(config: Config, setup: Setup) -> None:
  """Raises UserError if the BatchNorm statistics do not fit `private`."""
  is_stored = setup.batch_norm in ("running", "frozen") or not hasattr(setup.model, "running")
  if config.private == "head" and not is_stored:
    raise UserError(
      "method.private = 'head' keeps the first task's BatchNorm statistics: set "
      "method.batch_norm=frozen or running, which do too"
    )


def _start_of(state: State) -> tuple[Params, Params]:
  """Returns the parameters beside the kernels, and the statistics, that a later task starts from.

  They are those of the first task, or the pretrained ones if it is learned as the others are.
  """
  if "rest" in state.shared:
    return state.shared["rest"], state.shared["stats"]
  return state.tasks[0].rest, state.tasks[0].stats


def _owned(config: Config) -> sizes.Owned:
  """Returns what a later task has for itself beside U and V."""
  return sizes.Owned(config.private, config.scales)


def _task_state(
  task: Task,
  perturbation: dict[str, lowrank.Perturbation],
  ranks: dict[str, int],
  rest: Params,
  stats: Params,
) -> TaskState:
  """Returns the state of a task; layers without an entry in `ranks` have rank 0."""
  rank = {name: jnp.int32(ranks.get(name, 0)) for name in perturbation}
  return TaskState(perturbation, rank, rest, stats, jnp.int32(task.num_classes))
