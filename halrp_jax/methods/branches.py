"""What InfLoRA and SD-LoRA share: one network for all tasks that low-rank branches change.

| here               | meaning |
|--------------------|---------|
| shared["kernels"]  | kernels of the layers that have a branch, by path |
| shared["rest"]     | all other parameters of the base except the head, frozen |
| shared["stats"]    | BatchNorm statistics of the base, for the first task |

A branch U V' [J, I] is added to the kernel of every layer whose inputs V' can multiply
(`kinds.low_rank_inputs`): dense layers and ordinary convolutions, where it is the same at every
position of the window. All tasks are predicted with the current kernels, each with its own head and
statistics.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from halrp_jax import keys
from halrp_jax.training import contract, first_task, networks, sizes
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Params, State, Store, Task
from halrp_jax.weights import lowrank, trees


class TaskState(NamedTuple):
  """State of a task."""

  head: Params  # all other parameters are shared
  stats: Params  # BatchNorm's statistics
  num_classes: Array  # int32 []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.NetworkConfig):
  """Config keys `method.*` that InfLoRA and SD-LoRA share."""

  l2: float = keys.number(
    0.0, 0, None, "L2 coefficient on the kernels of a first task that trains all parameters"
  )
  rank: int = keys.whole(10, 1, None, "r: most columns of U and V of a task in a layer")
  budget: float = keys.number(
    0.0,
    0,
    None,
    "size of all U and V of a task as a share of the base, divided into ranks that are as equal as "
    "possible; 0: r columns in every layer",
  )


class Learned(NamedTuple):
  """What is known after a task was learned."""

  state: State  # method state, without the state of the task
  head: Params  # of the task
  stats: Params  # BatchNorm's statistics after the task


class Plan(NamedTuple):
  """Which layers get a branch, by path."""

  shapes: contract.Shapes  # (I, J) of the kernels as matrices
  ranks: dict[str, int]  # columns of U and V


def make_plan(config: Config, setup: Setup) -> Plan:
  """Returns the layers that get a branch: those whose inputs V' multiplies.

  Raises:
    UserError: if the network does not meet the requirements (`contract.make_matrix_shapes`), or
      the budget is too small.
  """
  model = setup.model
  shapes_of = contract.make_matrix_shapes(model, setup.image_shape, setup.max_classes)
  params, _ = jax.eval_shape(
    lambda key: networks.initialize(model, key, setup.image_shape), jax.random.key(0)
  )
  shapes = shapes_of(params)
  shapes = {n: shapes[n] for n in networks.with_low_rank_inputs(setup, shapes)}
  widths = [min(config.rank, *shape) for shape in shapes.values()]
  if config.budget:
    priorities, costs = lowrank.equal_priorities(widths), [sum(x) for x in shapes.values()]
    max_numbers = config.budget * sizes.count_leaves(params)
    widths = sizes.allocate_budget(priorities, costs, max_numbers, config.budget)
  return Plan(shapes, dict(zip(shapes, widths, strict=True)))


def make_learn(
  config: Config,
  setup: Setup,
  plan: Plan,
  learn_branch: Callable[[State, Task, jax.Array, Store], Learned],
) -> Callable[[State, Task, jax.Array, Store], Learned]:
  """Builds `learn(state, task, key, store)`, which learns the branch and the head of a task.

  The first task has no branch, unless `base_training` is "perturb": it trains what that key says.

  Args:
    config: config of the method.
    setup: settings of the run.
    plan: the layers that get a branch.
    learn_branch: learns a task on the base of `state`.

  Raises:
    UserError: if the pretrained base does not fit `base_training`.
  """
  learn_first = first_task.make(setup, networks.l2_coefficient(config))

  def learn(state, task, key, store):
    if state.tasks:
      return learn_branch(state, task, key, store)
    if setup.base_training == "perturb":
      assert setup.base is not None
      state = open_base(setup.base.params, setup.base.stats, plan)
      return learn_branch(state, task, key, store)
    params, stats = learn_first(task, key, store)
    return Learned(open_base(params, stats, plan), params[trees.HEAD], stats)

  return learn


def open_base(params: Params, stats: Params, plan: Plan) -> State:
  """Returns a method state without tasks.

  Args:
    params: all parameters of the base.
    stats: its BatchNorm statistics.
    plan: the layers that get a branch.
  """
  kernels, rest = trees.take_out(plan.shapes, params)
  rest = {name: x for name, x in rest.items() if name != trees.HEAD}
  return State({"kernels": kernels, "rest": rest, "stats": stats}, ())


def latest_stats(state: State) -> Params:
  """Returns the BatchNorm statistics that the next task starts from: the previous task's."""
  return state.tasks[-1].stats if state.tasks else state.shared["stats"]


def whole(shared: dict, head: Params) -> Params:
  """Returns the parameters of a whole network."""
  return trees.join(shared["kernels"], shared["rest"] | {trees.HEAD: head})


def as_perturbation(
  U: Mapping[str, jax.Array],
  V: Mapping[str, jax.Array],
  sigma: Mapping[str, jax.Array] | None = None,
) -> dict[str, lowrank.Perturbation]:
  """Returns branches U diag(sigma) V' as perturbations with R = S = 1.

  Args:
    U: [J, K] by layer.
    V: [I, K] by layer.
    sigma: [K] by layer; None: ones.
  """

  def perturbation(u: jax.Array, s: jax.Array | None, v: jax.Array) -> lowrank.Perturbation:
    return lowrank.Perturbation(jnp.ones(len(u)), jnp.ones(len(v)), u, s, v)

  return {n: perturbation(U[n], None if sigma is None else sigma[n], V[n]) for n in U}


def apply(
  model: nn.Module,
  shared: dict,
  branches: Mapping[str, lowrank.Perturbation],
  head: Params,
  stats: Params,
  image: jax.Array,
  train: bool,
  key: jax.Array | None,
) -> tuple[jax.Array, Params]:
  """Applies the network with branches; returns logits [B, K] and BatchNorm statistics.

  Args:
    model: the network.
    shared: what all tasks share.
    branches: by layer.
    head: of the task.
    stats: BatchNorm statistics.
    image: float32 [B, H, W, C]
    train: whether it is trained. If not, the statistics stay as they are.
    key: random key for dropout; None in evaluation.
  """
  params = {"perturbation": branches, "rest": shared["rest"] | {trees.HEAD: head}}
  apply_fn = networks.perturbed_network(model)
  return apply_fn(params, shared, stats, image, train, key)
