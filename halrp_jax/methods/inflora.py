"""InfLoRA: low-rank branches in directions of their inputs that earlier tasks did not use.

Update rule: W <- W + U_t V_t' for every layer whose inputs V_t' multiplies (kinds.low_rank_inputs).
V_t is fixed before task t is learned; U_t starts at 0 and is trained with a head for the task.

| paper      | here                      | meaning |
|------------|---------------------------|---------|
| W_t        | shared["kernels"]         | kernels with the branches of all tasks so far |
| B_t        | V_t (`choose_directions`) | [I, r] fixed directions of the inputs, over sqrt(3) |
| A_t        | U_t                       | [J, r] trained |
| M_t        | shared["basis"]           | [I, k], zero columns: earlier inputs; for training |
| epsilon_th | threshold, last_threshold | share of the inputs' energy in M_t, rising with t |

Phases of task t: (1) the second moments C of all layers' inputs on the training images; V_t are the
leading directions of C - M M' C. (2) U_t and the head are trained. (3) U_t V_t' is added to the
kernels, and M grows with the inputs of the new network. As in the authors' code, energies are
squares of the eigenvalues of C. The code stores either M or its complement, whichever is smaller
(DualGPM), which changes no result; here it is M.

Without a pretrained base the first task trains the whole network. With `base_training` = "perturb"
it learns a branch as the other tasks do, as in the paper.

Biases and normalisation stay those of the base. The paper's setting is class-incremental: it adapts
the keys and values of a ViT's attention, and one classifier covers the classes of all tasks. Here
the task of an image is known and every task has a head, as for all methods of this package, and all
layers that can be factored get a branch.

Reference: Y.-S. Liang and W.-J. Li, "InfLoRA: Interference-Free Low-Rank Adaptation for Continual
Learning", CVPR 2024 (arXiv 2404.00228), Algorithm 1; code: github.com/liangyanshuo/InfLoRA.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax import keys
from halrp_jax.methods import branches
from halrp_jax.training import networks, sizes
from halrp_jax.training.fit import Fit, make_fit
from halrp_jax.training.setup import Setup
from halrp_jax.types import Method, Network, Params, Size, State, Store, Task
from halrp_jax.weights import bases, kinds, trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(branches.Config):
  """Config keys `method.*` of InfLoRA."""

  threshold: float = keys.number(
    0.95, 0, 1, "share of the inputs' energy that the basis carries after the first task"
  )
  last_threshold: float = keys.number(
    1.0, 0, 1, "the share after the last task; those between are interpolated"
  )


TaskState = branches.TaskState


def make(config: Config, setup: Setup) -> Method:
  """Builds InfLoRA.

  Raises:
    UserError: if the pretrained base does not fit `base_training`.
  """
  f = _build(config, setup)
  learn_one = branches.make_learn(
    config, setup, f.plan, functools.partial(learn_branch, f, setup.epochs)
  )

  def learn(state, tasks, key, store):
    (task,) = tasks
    state, head, stats = learn_one(state, task, key, store)

    def grow():
      return remember(f, config, setup, state, head, stats, task)

    grown = store.once("basis", grow)
    return state.append(TaskState(head, stats, jnp.int32(task.num_classes)), **grown), {}

  def network(shared, task):
    return Network(branches.whole(shared, task.head), task.stats)

  return Method(learn, size, network, serves=("kernels", "rest"))


# --- one task -----------------------------------------------------------------------------
# `f` are the compiled functions.


def learn_branch(
  f: "_Functions",
  epochs: int,
  state: State,
  task: Task,
  key: jax.Array,
  store: Store,
) -> branches.Learned:
  """Learns U_t and the head of a task, and adds U_t V_t' to the kernels.

  Args:
    f: the compiled functions.
    epochs: number of epochs.
    state: method state before the task.
    task: the task.
    key: random key for the head, the order of images and dropout.
    store: store of the task.

  Returns:
    The state with the new kernels, the head, and the BatchNorm statistics.
  """
  init_key, fit_key = jax.random.split(key)
  head = f.initialize(init_key)[0][trees.HEAD]
  shared, stats = state.shared, branches.latest_stats(state)

  def choose():
    return choose_directions(f, shared, head, stats, task)

  V = jax.tree.map(jnp.asarray, store.once("directions", choose))
  start = {
    "U": {n: jnp.zeros((f.plan.shapes[n][1], v.shape[1])) for n, v in V.items()},
    "head": head,
  }
  frozen = {"shared": {k: shared[k] for k in ("kernels", "rest")}, "V": V}
  args = (task, fit_key, epochs, store.child("train"))
  trained, stats = f.fit_branch(start, stats, frozen, *args)
  kernels = f.add(shared["kernels"], trained["U"], V)
  state = state._replace(shared=shared | {"kernels": kernels})
  return branches.Learned(state, trained["head"], stats)


def choose_directions(
  f: "_Functions",
  shared: dict,
  head: Params,
  stats: Params,
  task: Task,
) -> dict[str, np.ndarray]:
  """Returns V_t [I, r] by layer: leading directions of the inputs outside M, over sqrt(3).

  Where fewer than r are left, the other columns are zero, and so stay those of U.

  Args:
    f: the compiled functions.
    shared: what all tasks share, before the task.
    head: any head.
    stats: BatchNorm statistics.
    task: whose training images are used.
  """
  moments = f.input_moments(branches.whole(shared, head), stats, task)

  def choose(name):
    num_in, rank = f.plan.shapes[name][0], f.plan.ranks[name]
    known = _basis(shared, name, num_in)
    squares, found, total = bases.spectrum(known, _squared(moments[name]))
    count = min(rank, bases.count_directions(squares, total), num_in - known.shape[1])
    chosen = np.zeros((num_in, rank))
    chosen[:, :count] = found[:, :count] - known @ (known.T @ found[:, :count])
    return (chosen / math.sqrt(3)).astype(np.float32)

  return {name: choose(name) for name in f.plan.shapes}


def remember(
  f: "_Functions",
  config: Config,
  setup: Setup,
  state: State,
  head: Params,
  stats: Params,
  task: Task,
) -> dict:
  """Returns the bases M and their numbers of directions, grown with the inputs of a task.

  Args:
    f: the compiled functions.
    config: config of the method.
    setup: settings of the run.
    state: method state without the task, its kernels those after it.
    head: of the task.
    stats: BatchNorm statistics of the task.
    task: whose training images are used.
  """
  shared, t = state.shared, len(state.tasks)
  rise = (config.last_threshold - config.threshold) * t / setup.num_tasks
  energy = min(1.0, config.threshold + rise)
  moments = f.input_moments(branches.whole(shared, head), stats, task)
  grown = {"basis": {}, "num_directions": {}}
  for name in f.plan.shapes:
    known, seen = _basis(shared, name, f.plan.shapes[name][0]), _squared(moments[name])
    basis = bases.grow(known, seen, energy, first=not t)
    if not basis.shape[1]:  # the code keeps at least one direction
      basis = bases.grow(known, seen, energy, first=False)
    grown["basis"][name] = jnp.asarray(bases.pad(basis))
    grown["num_directions"][name] = jnp.int32(basis.shape[1])
  return grown


def _basis(shared: dict, name: str, num_in: int) -> np.ndarray:
  """Returns M [I, k] of a layer with `num_in` = I inputs, without its zero columns."""
  if "basis" not in shared:
    return np.zeros((num_in, 0), np.float32)
  return np.asarray(shared["basis"][name])[:, : int(shared["num_directions"][name])]


def _squared(moment: np.ndarray) -> np.ndarray:
  """Returns C C, whose eigenvalues are the energies that the authors' code compares."""
  scaled = moment / max(np.trace(moment), 1e-20)
  return scaled @ scaled


# --- jitted functions -------------------------------------------------------------------


class _Functions(NamedTuple):
  """Functions that are compiled once for all tasks."""

  plan: branches.Plan  # layers that have a branch
  initialize: Callable  # (key) -> params, stats
  fit_branch: Fit  # of U and the head
  input_moments: Callable  # (params, stats, task) -> {layer: C [I, I]}
  add: Callable  # (kernels, U, V) -> kernels with U V' added


def _build(config: Config, setup: Setup) -> _Functions:
  """Builds the functions that are compiled once for all tasks."""
  model, plan = setup.model, branches.make_plan(config, setup)

  def apply_fn(params, frozen, *args):
    changes = branches.as_perturbation(params["U"], frozen["V"])
    return branches.apply(model, frozen["shared"], changes, params["head"], *args)

  def add(kernels, U, V):
    changes = branches.as_perturbation(U, V)
    return {n: kinds.compose(w, changes[n]) for n, w in kernels.items()}

  return _Functions(
    plan=plan,
    initialize=networks.make_initialize(setup),
    fit_branch=make_fit(setup, apply_fn, lambda params, frozen: 0.0),
    input_moments=networks.make_input_moments(setup, lambda params: plan.shapes),
    add=jax.jit(add),
  )


# --- size ---------------------------------------------------------------------------------


def size(state: State) -> Size:
  """Returns the size: later tasks add their heads. The bases are for training alone."""
  shared, (first, *later) = state.shared, state.tasks
  rest = shared["rest"] | {trees.HEAD: first.head}
  base = sizes.network_count(shared["kernels"], rest, int(first.num_classes))
  heads = [sizes.count_rest({trees.HEAD: p.head}, {}, int(p.num_classes)) for p in later]
  stats = sizes.count_task_statistics(state)
  basis = sum(len(x) * int(shared["num_directions"][n]) for n, x in shared["basis"].items())
  return sizes.dense_size(base, sum(count.counted for count in heads), stats, basis)
