"""BMKP: bilevel memory with knowledge projection; kernels in a basis of outputs that tasks share.

Update rule: W_t = B[:, :k_t] A_t. A working memory, which is an ordinary network, learns the task.
The outputs of its layers extend the basis B. Its kernels W are projected to A_t = B' W, which are
trained once more while B is frozen.

| paper | here                        | meaning |
|-------|-----------------------------|---------|
| W     | shared["working"]["params"] | [J, d], here a kernel [.., J]; for training alone |
| B     | shared["basis"][layer]      | [J, J]: orthonormal columns, then zeros |
| -     | shared["num_directions"]    | orthonormal columns of B, by layer |
| E     | `outside`                   | W - B B' W |
| lambda | method.strength            | coefficient of the regularizer r |
| gamma | method.threshold            | share of the outputs' energy that B carries |

Phases: (1) learn: the working memory is trained from its state after the previous task, with a
fresh head, on the cross-entropy + lambda sum_l r(E_l); task 0 has no r. (2) project: B grows by the
rule of GPM (weights/bases.py) until it carries the share gamma of the energy of the layer's outputs
for method.samples training images, before BatchNorm and ReLU. (3) retrain: A_t, biases, BatchNorm
and head are trained from those of phase 1. Nothing is forgotten.

r(E) = tr(E'E) / |E'E|_1 is the paper's regularizer. It is small if E has rank 1, that is if few
directions are new. It takes two products of matrices [d, d] and [d, J] per layer and step. With
method.form = "code", r is that of the released code, which takes none. A layer whose B has all J
columns has no r.

Deviations: a layer whose first direction alone carries gamma keeps it, where GPM's rule for the
first task keeps none. method.l2 applies to W in phase 1 and to A_t in phase 3, which have equal
norms. The released code by oversight trains neither heads nor BatchNorm after task 0; here they
are trained, as in the paper. The HALRP paper does not say how it divides its epochs between the
phases: method.{learn,retrain}_share.

Reference: W. Sun et al., "Decoupling learning and remembering: a bilevel memory framework with
knowledge projection for task-incremental learning", CVPR 2023, Eq. 4.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from halrp_jax import keys
from halrp_jax.nn.conv import times
from halrp_jax.training import batches, networks, sizes
from halrp_jax.training.fit import Fit, make_fit
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Method, Network, Params, Size, State, Store, Task
from halrp_jax.weights import bases, perturb, taps, trees


# lambda and gamma are those of the paper on CIFAR-100. With half of the epochs for phase 1 and half
# for phase 3, validation accuracy on CIFAR100-Split (10 % of the images, form=code) is 51.5 %; with
# all epochs for both it is 49.0 %.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.NetworkConfig):
  """Config keys `method.*` of BMKP."""

  learn_share: float = keys.number(0.5, 0, 1, "share of a task's epochs that phase 1 has", True)
  retrain_share: float = keys.number(0.5, 0, 1, "share of a task's epochs that phase 3 has")
  strength: float = keys.number(1.0, 0, None, "lambda: coefficient of the regularizer r")
  form: str = keys.one_of(
    "paper", ("paper", "code"), "r as in the paper, or as in the authors' code"
  )
  threshold: float = keys.number(
    0.96, 0, 1, "gamma: share of the outputs' energy that the basis carries"
  )
  first_threshold: float = keys.number(0.95, 0, 1, "gamma of the first task")
  samples: int = keys.whole(500, 1, None, "training images of a task that its basis is made from")


class TaskState(NamedTuple):
  """State of a task."""

  params: Params  # biases, BatchNorm and head; as kernels A_t [.., J]: k_t columns, then zeros
  stats: Params  # BatchNorm's statistics
  num_directions: dict[str, Array]  # k_t, int32 [] by layer: columns of B that the task uses
  num_classes: Array  # int32 []


def make(config: Config, setup: Setup) -> Method:
  """Builds BMKP."""
  f = _build(config, setup)

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, learn_key, sample_key, retrain_key = jax.random.split(key, 4)
    fresh = f.initialize(init_key)
    params, stats = _learn(f, config, setup, state, *fresh, task, learn_key, store.child("learn"))
    memory = state.shared if state.tasks else _empty_bases(trees.split(params)[0])
    gamma = config.threshold if state.tasks else config.first_threshold

    def project():
      moments_fn, chunk = functools.partial(f.moments, params, stats), setup.evaluation_batch_size
      parts = batches.over_samples(moments_fn, task, sample_key, config.samples, chunk)
      return _grow(memory, parts, gamma)

    memory = store.once("project", project)
    store = store.child("retrain")
    task_state = _retrain(f, config, setup, memory, params, stats, task, retrain_key, store)
    features = {name: x for name, x in params.items() if name != trees.HEAD}
    state = state.append(task_state, **memory, working={"params": features, "stats": stats})
    return state, {"ranks": {name: int(k) for name, k in memory["num_directions"].items()}}

  def network(shared, task):
    kernels, rest = trees.split(task.params)
    kernels = {n: times(a, shared["basis"][n].T) for n, a in kernels.items()}
    return Network(trees.join(kernels, rest), task.stats)

  def logits(shared, task, image):
    return f.apply_projected(task.params, shared, task.stats, image, False, None)[0]

  return Method(learn, size, network, logits, serves=("basis",))


# --- phases 1 and 3 -----------------------------------------------------------------------
# `f` are the jitted functions.


def _learn(
  f: "_Functions",
  config: Config,
  setup: Setup,
  state: State,
  params: Params,
  stats: Params,
  task: Task,
  key: jax.Array,
  store: Store,
) -> tuple[Params, Params]:
  """Trains the working memory (phase 1); returns its params and stats.

  `params` and `stats` are freshly drawn. The first task starts from them; later tasks start from
  the working memory and use their head.
  """
  epochs = math.ceil(config.learn_share * setup.epochs)
  frozen = {"l2": networks.l2_coefficient(config)}
  if not state.tasks:
    return f.fit_first(params, stats, frozen, task, key, epochs, store)
  working, weight = state.shared["working"], _weights(state.shared, config.strength)
  frozen |= {"basis": state.shared["basis"], "weight": weight}
  start = networks.fresh_head(working["params"], params)
  return f.fit_working(start, working["stats"], frozen, task, key, epochs, store)


def _retrain(
  f: "_Functions",
  config: Config,
  setup: Setup,
  memory: dict,
  params: Params,
  stats: Params,
  task: Task,
  key: jax.Array,
  store: Store,
) -> TaskState:
  """Trains A_t from B' W, and biases, BatchNorm and head from those of phase 1 (phase 3)."""
  epochs = math.floor(config.retrain_share * setup.epochs)
  frozen = {"l2": networks.l2_coefficient(config), "basis": memory["basis"]}
  start = f.to_coefficients(params, memory["basis"])
  params, stats = f.fit_projected(start, stats, frozen, task, key, epochs, store)
  return TaskState(params, stats, memory["num_directions"], jnp.int32(task.num_classes))


# --- jitted functions -------------------------------------------------------------------


class _Functions(NamedTuple):
  """Functions that are compiled once for all tasks."""

  initialize: Callable[[jax.Array], tuple[Params, Params]]  # (key) -> params, stats
  fit_first: Fit  # of the plain network
  fit_working: Fit  # of the plain network with the regularizer r
  fit_projected: Fit  # of the network with kernels A_t B'
  apply_projected: Callable  # apply_fn of that network, not jitted
  to_coefficients: Callable  # `_to_coefficients`
  moments: Callable  # `_moments_of`


def _build(config: Config, setup: Setup) -> _Functions:
  """Builds the functions that are compiled once for all tasks."""
  model = setup.model
  plain, penalty = networks.plain_network(model)

  def penalty_of_learning(params, frozen):
    kernels, _ = trees.split(params)
    total = penalty(params, frozen)
    for name, weight in frozen["weight"].items():
      basis = frozen["basis"][name]
      e = outside(kernels[name], basis)
      total += weight * (paper_form(e) if config.form == "paper" else code_form(e, basis))
    return total

  def apply_projected(params, frozen, stats, image, train, key):
    variables = {"params": params, "batch_stats": stats}
    args = (model, frozen["basis"], variables, image)
    if not train:
      return perturb.apply_in_bases(*args, train=False), stats
    rngs, mutable = {"dropout": key}, ["batch_stats"]
    logits, new = perturb.apply_in_bases(*args, train=True, rngs=rngs, mutable=mutable)
    return logits, new.get("batch_stats", {})

  return _Functions(
    initialize=networks.make_initialize(setup),
    fit_first=make_fit(setup, plain, penalty),
    fit_working=make_fit(setup, plain, penalty_of_learning),
    fit_projected=make_fit(setup, apply_projected, penalty),
    apply_projected=apply_projected,
    to_coefficients=jax.jit(_to_coefficients),
    moments=jax.jit(_moments_of(setup.measuring)),
  )


# --- phase 1: the regularizer r -------------------------------------------------------


def outside(kernel: jax.Array, basis: jax.Array) -> jax.Array:
  """Returns the part E' [d, J] of a kernel [.., J] that lies outside its basis [J, J]."""
  w = kernel.reshape(-1, kernel.shape[-1])
  return w - w @ (basis @ basis.T)  # the product of the bases needs no gradient


def paper_form(e: jax.Array) -> jax.Array:
  """Returns r(E) = tr(E'E) / |E'E|_1 (Eq. 4), a scalar.

  |G|_1 is linear in G except where signs change. So its gradient by E is 2 E S with S = sign(E'E),
  a product that is computed for the value anyway.

  Args:
    e: E' [d, J].
  """
  product = lax.stop_gradient(jnp.sign(e @ e.T) @ e)
  norm = jnp.sum(e * product)
  norm = 2 * norm - lax.stop_gradient(norm)
  return jnp.sum(e * e) / jnp.where(norm > 0, norm, 1)


def code_form(e: jax.Array, basis: jax.Array) -> jax.Array:
  """Returns r as in the released code: tr(M) / sum(M) with M = B B' + E E', a scalar.

  M is not formed.

  Args:
    e: E' [d, J].
    basis: B [J, J].
  """
  trace = jnp.sum(basis * basis) + jnp.sum(e * e)
  return trace / (jnp.sum(jnp.sum(basis, 0) ** 2) + jnp.sum(jnp.sum(e, 1) ** 2))


def _weights(memory: dict, strength: float) -> dict[str, jax.Array]:
  """Returns the coefficient of r by layer: lambda, or 0 where B has all J columns.

  There E is nothing but rounding errors, and the gradient of r would have no bound.
  """
  return {
    name: jnp.float32(strength if int(k) < len(memory["basis"][name]) else 0)
    for name, k in memory["num_directions"].items()
  }


# --- phase 2 --------------------------------------------------------------------------


def _empty_bases(kernels: dict[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
  """Returns bases without directions, for kernels by layer."""
  return {
    "basis": {n: jnp.zeros((w.shape[-1],) * 2) for n, w in kernels.items()},
    "num_directions": {n: jnp.int32(0) for n in kernels},
  }


def _moments_of(model: nn.Module) -> Callable:
  """Builds (params, stats, image [B, H, W, C]) -> Z Z' [J, J] of every layer's outputs Z [J, n]."""

  def moments(params, stats, image):
    variables = {"params": params, "batch_stats": stats}
    found = taps.layer_outputs(model, trees.layer_names(params), variables, image)
    rows = {name: z.reshape(-1, z.shape[-1]) for name, z in found.items()}
    return {name: z.T @ z for name, z in rows.items()}

  return moments


def _grow(memory: dict, parts: list[dict[str, np.ndarray]], energy: float) -> dict:
  """Returns the bases and their numbers of directions after a task.

  Args:
    memory: bases of earlier tasks, with their numbers of directions.
    parts: Z Z' of every layer's outputs, for each chunk of images.
    energy: gamma.
  """
  grown = {"basis": {}, "num_directions": {}}
  for name, basis in memory["basis"].items():
    count = int(memory["num_directions"][name])
    moment = functools.reduce(np.add, [part[name].astype(np.float64) for part in parts])
    args = (basis, count, moment, energy)
    basis, num = bases.grow_padded(*args, first=not count, min_width=len(basis))
    if not num:
      basis, num = bases.grow_padded(*args, first=False, min_width=len(basis))
    grown["basis"][name] = jnp.asarray(basis)
    grown["num_directions"][name] = jnp.int32(num)
  return grown


def _to_coefficients(params: Params, basis: dict[str, jax.Array]) -> Params:
  """Replaces the kernels W by B' W, and leaves all other parameters as they are."""
  kernels, rest = trees.split(params)
  return trees.join({n: times(w, basis[n]) for n, w in kernels.items()}, rest)


# --- size -----------------------------------------------------------------------------


def size(state: State) -> Size:
  """Returns the size with the bases and, for every task, coefficients, BatchNorm and head.

  After the first tasks it may be smaller than the base. The working memory is for training alone.
  """
  shared, (first, *later) = state.shared, state.tasks
  kernels, rest = trees.split(first.params)
  base = sizes.network_count(kernels, rest, int(first.num_classes))
  products = sum(len(b) * int(shared["num_directions"][n]) for n, b in shared["basis"].items())
  for p in state.tasks:
    products += sum(w.size // w.shape[-1] * int(p.num_directions[n]) for n, w in kernels.items())
  rests = [trees.split(p.params)[1] for p in later]
  counts = [
    sizes.count_rest(x, kernels, int(p.num_classes)) for x, p in zip(rests, later, strict=True)
  ]
  counted = products - sizes.count_leaves(kernels) + sum(c.counted for c in counts)
  uncounted = sum(c.biases for c in counts) + sizes.count_task_statistics(state)
  return sizes.dense_size(base, counted, uncounted, sizes.count_leaves(shared["working"]))
