"""SD-LoRA: frozen directions of earlier tasks whose magnitudes are learned again with each task.

Update rule: W = W_0 + sum_{k<t} alpha_k U_k V_k' / (|U_k| |V_k|) + alpha_t U_t V_t' for every layer
whose inputs V_k' multiplies (kinds.low_rank_inputs), with Frobenius norms. Task t trains alpha_1 to
alpha_t, U_t, V_t and its head.

| paper     | here                 | meaning |
|-----------|----------------------|---------|
| W_0       | shared["kernels"]    | kernels of the base, frozen |
| A_k       | shared["U"]          | [J, T r], columns k r to (k + 1) r of task k, norm 1 |
| B_k       | shared["V"]          | [I, T r], the same |
| alpha     | shared["magnitudes"] | [T] by layer; all tasks are predicted with the latest ones |

When a task is learned, the norms of U_t and V_t go into alpha_t, so the network is the same before
and after. There is one alpha per layer and task, as in the paper's formula; the released code has
one for all layers, starts all of them again at 0.8 with every task, and so changes the network
between two tasks. A new alpha_t starts at 0.8, V_t uniformly within +-1/sqrt(I), U_t at 0, as
there.

Without a pretrained base the first task trains the whole network. With `base_training` = "perturb"
it learns a branch as the other tasks do, as in the paper.

Biases and normalisation stay those of the base. The paper's setting is class-incremental: it adapts
the queries and values of a ViT's attention, and one classifier covers the classes of all tasks.
Here the task of an image is known and every task has a head, as for all methods of this package,
and all layers that can be factored get a branch. The paper's variants with fewer ranks (RR) and
with distillation (KD) are not built.

Reference: Y. Wu et al., "SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental
Learning", ICLR 2025 (openreview 5U1rlpX68A, arXiv 2501.13198).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from halrp_jax.methods import branches
from halrp_jax.training import networks, sizes
from halrp_jax.training.fit import Fit, make_fit
from halrp_jax.training.setup import Setup
from halrp_jax.types import Method, Network, Params, Size, State, Store, Task
from halrp_jax.weights import kinds, lowrank, trees

_START = 0.8  # a new magnitude
_TINY = 1e-20  # lower bound of norms that are divided by


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(branches.Config):
  """Config keys `method.*` of SD-LoRA."""


TaskState = branches.TaskState


def make(config: Config, setup: Setup) -> Method:
  """Builds SD-LoRA.

  Raises:
    UserError: if the pretrained base does not fit `base_training`.
  """
  f = _build(config, setup)
  learn_one = branches.make_learn(config, setup, f.plan, functools.partial(learn_branch, f, setup))

  def learn(state, tasks, key, store):
    (task,) = tasks
    state, head, stats = learn_one(state, task, key, store)
    state = with_slots(state, f.plan, setup.num_tasks)
    return state.append(TaskState(head, stats, jnp.int32(task.num_classes))), {}

  def network(shared, task):
    changes = branches_of(shared)
    kernels = {n: kinds.compose(w, changes[n]) for n, w in shared["kernels"].items()}
    return Network(branches.whole(shared | {"kernels": kernels}, task.head), task.stats)

  def logits(shared, task, image):
    changes = branches_of(shared)
    args = (task.head, task.stats, image, False, None)
    return branches.apply(setup.model, shared, changes, *args)[0]

  serves = ("kernels", "rest", "U", "V", "magnitudes")
  return Method(learn, size, network, logits, serves)


# --- one task -----------------------------------------------------------------------------
# `f` are the compiled functions.


def learn_branch(
  f: "_Functions",
  setup: Setup,
  state: State,
  task: Task,
  key: jax.Array,
  store: Store,
) -> branches.Learned:
  """Learns the branch and the head of a task, and all magnitudes.

  Args:
    f: the compiled functions.
    setup: settings of the run.
    state: method state before the task.
    task: the task.
    key: random key for V, the head, the order of images and dropout.
    store: store of the task.

  Returns:
    The state with one more direction, the head, and the BatchNorm statistics.
  """
  init_key, branch_key, fit_key = jax.random.split(key, 3)
  t = len(state.tasks)
  state = with_slots(state, f.plan, max(setup.num_tasks, t + 1))
  shared, stats = state.shared, branches.latest_stats(state)
  start = fresh_branch(branch_key, f.plan) | {
    "magnitudes": {n: x.at[t].set(_START) for n, x in shared["magnitudes"].items()},
    "head": f.initialize(init_key)[0][trees.HEAD],
  }
  frozen = {"shared": shared, "slot": jnp.int32(t)}
  args = (task, fit_key, setup.epochs, store.child("train"))
  trained, stats = f.fit_branch(start, stats, frozen, *args)
  shared = shared | f.freeze(shared, trained, frozen["slot"])
  return branches.Learned(state._replace(shared=shared), trained["head"], stats)


def fresh_branch(key: jax.Array, plan: branches.Plan) -> dict[str, Params]:
  """Returns U = 0 [J, r] and V [I, r], uniform within +-1/sqrt(I), by layer.

  Args:
    key: random key for V.
    plan: shapes and ranks.
  """

  def draw(i: int, name: str) -> jax.Array:
    rows = plan.shapes[name][0]
    bound, layer_key = 1 / math.sqrt(rows), jax.random.fold_in(key, i)
    shape = (rows, plan.ranks[name])
    return jax.random.uniform(layer_key, shape, minval=-bound, maxval=bound)

  return {
    "U": {n: jnp.zeros((num_out, plan.ranks[n])) for n, (_, num_out) in plan.shapes.items()},
    "V": {n: draw(i, n) for i, n in enumerate(plan.shapes)},
  }


def with_slots(state: State, plan: branches.Plan, num_tasks: int) -> State:
  """Returns the state with room for the branches of `num_tasks` tasks; free columns are zero."""

  def widen(tree: Params, like: dict[str, tuple[int, ...]]) -> Params:
    old = {n: tree.get(n, jnp.zeros(s[:-1] + (0,))) for n, s in like.items()}
    more = {n: max(0, s[-1] - old[n].shape[-1]) for n, s in like.items()}
    return {
      n: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more[n])]) if more[n] else x
      for n, x in old.items()
    }

  width = {n: num_tasks * rank for n, rank in plan.ranks.items()}
  wanted = {
    "U": {n: (num_out, width[n]) for n, (_, num_out) in plan.shapes.items()},
    "V": {n: (num_in, width[n]) for n, (num_in, _) in plan.shapes.items()},
    "magnitudes": dict.fromkeys(plan.shapes, (num_tasks,)),
  }
  found = {name: widen(state.shared.get(name, {}), like) for name, like in wanted.items()}
  return state._replace(shared=state.shared | found)


def branches_of(shared: dict) -> dict[str, lowrank.Perturbation]:
  """Returns the sum of all branches, weighted with their magnitudes, by layer."""
  U, magnitudes = shared["U"], shared["magnitudes"]
  sigma = {n: jnp.repeat(x, U[n].shape[1] // len(x)) for n, x in magnitudes.items()}
  return branches.as_perturbation(shared["U"], shared["V"], sigma)


# --- jitted functions -------------------------------------------------------------------


class _Functions(NamedTuple):
  """Functions that are compiled once for all tasks."""

  plan: branches.Plan  # layers that have a branch
  initialize: Callable  # (key) -> params, stats
  fit_branch: Fit  # of U, V, magnitudes and the head
  freeze: Callable  # (shared, trained, slot) -> shared U, V and magnitudes after a task


def _build(config: Config, setup: Setup) -> _Functions:
  """Builds the functions that are compiled once for all tasks."""
  model, plan = setup.model, branches.make_plan(config, setup)

  def put(whole, own, slot):
    """Returns the factors of all tasks with those of one task in its columns."""
    return {
      n: lax.dynamic_update_slice(whole[n], x, (0, slot * plan.ranks[n])) for n, x in own.items()
    }

  def apply_fn(params, frozen, *args):
    shared, slot = frozen["shared"], frozen["slot"]
    factors = {k: put(shared[k], params[k], slot) for k in ("U", "V")}
    changes = branches_of(factors | {"magnitudes": params["magnitudes"]})
    return branches.apply(model, shared, changes, params["head"], *args)

  def freeze(shared, trained, slot):
    norms = {
      k: {n: jnp.maximum(jnp.linalg.norm(x), _TINY) for n, x in trained[k].items()}
      for k in ("U", "V")
    }
    units = {k: {n: x / norms[k][n] for n, x in trained[k].items()} for k in ("U", "V")}
    magnitudes = {
      n: x.at[slot].multiply(norms["U"][n] * norms["V"][n])
      for n, x in trained["magnitudes"].items()
    }
    found = {k: put(shared[k], units[k], slot) for k in ("U", "V")}
    return found | {"magnitudes": magnitudes}

  return _Functions(
    plan=plan,
    initialize=networks.make_initialize(setup),
    fit_branch=make_fit(setup, apply_fn, lambda params, frozen: 0.0),
    freeze=jax.jit(freeze),
  )


# --- size ---------------------------------------------------------------------------------


def size(state: State) -> Size:
  """Returns the size: every task adds its head, and the directions and magnitudes of its branch."""
  shared, (first, *later) = state.shared, state.tasks
  rest = shared["rest"] | {trees.HEAD: first.head}
  base = sizes.network_count(shared["kernels"], rest, int(first.num_classes))
  heads = sum(sizes.count_rest({trees.HEAD: p.head}, {}, int(p.num_classes)).counted for p in later)
  used = sum(_is_used(shared, t) for t in range(len(state.tasks)))
  slots = {n: len(x) for n, x in shared["magnitudes"].items()}
  sizes_of = {n: (u.size + shared["V"][n].size) // slots[n] for n, u in shared["U"].items()}
  branch = sum(size + 1 for size in sizes_of.values() if size)  # with the magnitude
  stats = sizes.count_task_statistics(state)
  return sizes.dense_size(base, heads + used * branch, stats)


def _is_used(shared: dict, slot: int) -> bool:
  """Returns whether a task has a branch: the first has none if it trained the whole network."""
  return any(bool(jnp.any(x[slot])) for x in shared["magnitudes"].values())
