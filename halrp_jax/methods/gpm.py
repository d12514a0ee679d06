"""GPM: one network; later tasks change each kernel only in directions unused by earlier inputs.

Update rule: dW <- dW - M (M' dW), where the columns of M are an orthonormal basis of the layer's
inputs in earlier tasks (of the patches for a convolution). Biases and BatchNorm's scale and bias
are frozen after the first task. Every task has its own head.

| paper | here                     | meaning |
|-------|--------------------------|---------|
| W     | shared["kernels"]        | kernel of a layer as a matrix [d, J]; trained by every task |
| M     | shared["basis"]          | [d, k] and zero columns; for training alone |
| k     | shared["num_directions"] | number of directions in M |
| eps   | method.threshold         | share of the inputs' energy that M must carry |
| -     | shared["others"]         | biases, BatchNorm's scale and bias, frozen after task 0 |

Phases: training; then M grows with the inputs of method.samples training images (weights/bases.py).

method.optimizer = "sgd" is the paper's recipe: SGD with method.learning_rate, which is cut when the
validation loss has stopped falling, and the weights with the lowest validation loss. "adam" is the
recipe of the protocol. There the updates that Adam returns are projected: with projected gradients
Adam would leave the subspace, because it scales every weight by itself.

Reference: G. Saha et al., "Gradient projection memory for continual learning", 2021 (arXiv
2103.09762), Alg. 1 and 2. Its networks have neither biases nor running statistics.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax import keys
from halrp_jax.training import batches, losses, networks, sizes
from halrp_jax.training.fit import Fit, Recipe, make_fit, protocol_recipe
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Method, Network, Params, Size, State, Task
from halrp_jax.weights import bases, taps, trees

_CHUNK = 25  # images whose patches are in memory at the same time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.NetworkConfig):
  """Config keys `method.*` of GPM."""

  optimizer: str = keys.one_of(
    "adam",
    ("sgd", "adam"),
    "sgd: the recipe of GPM's paper; adam: the protocol's recipe, with projected updates",
  )
  learning_rate: float = keys.number(0.01, 0, None, "optimizer=sgd: learning rate", True)
  threshold: float = keys.number(
    0.97, 0, 1, "eps: share of the inputs' energy that the basis carries"
  )
  threshold_step: float = keys.number(0.003, 0, 1, "added to eps for every earlier task, up to 1")
  samples: int = keys.whole(125, 1, None, "training images of a task that its basis is made from")


class TaskState(NamedTuple):
  """State of a task."""

  head: Params  # all other parameters are shared
  stats: Params  # BatchNorm's statistics
  num_classes: Array  # int32 []


def make(config: Config, setup: Setup) -> Method:
  """Builds GPM."""
  f = _build(config, setup)
  frozen = {"l2": networks.l2_coefficient(config)}

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, fit_key, sample_key = jax.random.split(key, 3)
    params, stats = f.initialize(init_key)
    args = (task, fit_key, setup.epochs, store.child("train"))
    if not state.tasks:
      params, stats = f.fit_first(params, stats, frozen, *args)
      head, shared = params[trees.HEAD], _first_shared(params)
    else:
      shared, stats = state.shared, state.tasks[-1].stats
      start = {"kernels": shared["kernels"], "head": params[trees.HEAD]}
      frozen_later = frozen | {"others": shared["others"], "basis": shared["basis"]}
      trained, stats = f.fit_later(start, stats, frozen_later, *args)
      head, shared = trained["head"], shared | {"kernels": trained["kernels"]}
    task_state = TaskState(head, stats, jnp.int32(task.num_classes))
    energy = min(1.0, config.threshold + config.threshold_step * len(state.tasks))

    def grow():  # Alg. 1: update the memory
      params = _whole(shared["kernels"], shared["others"], head)
      return _grow(f, config.samples, params, stats, task, sample_key, shared, energy)

    return state.append(task_state, **(shared | store.once("basis", grow))), {}

  def network(shared, task):
    return Network(_whole(shared["kernels"], shared["others"], task.head), task.stats)

  return Method(learn, size, network, serves=("kernels", "others"))


# --- jitted functions -------------------------------------------------------------------


class _Functions(NamedTuple):
  """Functions that are compiled once for all tasks."""

  initialize: Callable  # (key) -> params, stats
  fit_first: Fit  # of the plain network
  fit_later: Fit  # of kernels and head, with projected updates of the kernels
  inputs: Callable  # `_inputs_of`


def _build(config: Config, setup: Setup) -> _Functions:
  """Builds the functions that are compiled once for all tasks."""
  recipe = protocol_recipe(setup)
  if config.optimizer == "sgd":
    recipe = Recipe("sgd", 0.0, config.learning_rate, 1.0, "plateau", "best_loss")

  def apply_fn(params, frozen, *args):
    weights = _whole(params["kernels"], frozen["others"], params["head"])
    return networks.apply_model(setup.model, weights, *args)

  def penalty(params, frozen):
    return frozen["l2"] * losses.sum_squares(params["kernels"])

  def project(updates, frozen):
    kernels = {n: _project(u, frozen["basis"][n]) for n, u in updates["kernels"].items()}
    return updates | {"kernels": kernels}

  return _Functions(
    initialize=networks.make_initialize(setup),
    fit_first=make_fit(setup, *networks.plain_network(setup.model), recipe=recipe),
    fit_later=make_fit(setup, apply_fn, penalty, edit_fn=project, recipe=recipe),
    inputs=jax.jit(_inputs_of(setup.measuring, config.samples)),
  )


def _whole(kernels: dict[str, jax.Array], others: Params, head: Params) -> Params:
  """Returns the parameters of a whole network."""
  return trees.join(kernels, others | {trees.HEAD: head})


def _project(update: jax.Array, basis: jax.Array) -> jax.Array:
  """Removes the part of an update [.., J] in the span of the basis M [d, k]: dW - M (M' dW)."""
  u = update.reshape(-1, update.shape[-1])
  return (u - basis @ (basis.T @ u)).reshape(update.shape)


# --- the memory ---------------------------------------------------------------------------


def _first_shared(params: Params) -> dict:
  """Returns what all tasks share after the first task, with empty bases."""
  kernels, rest = trees.split(params)
  dims = {n: w.size // w.shape[-1] for n, w in kernels.items()}
  return {
    "kernels": kernels,
    "others": {name: x for name, x in rest.items() if name != trees.HEAD},
    "basis": {n: jnp.zeros((d, 0)) for n, d in dims.items()},
    "num_directions": {n: jnp.int32(0) for n in dims},
  }


def _inputs_of(model: nn.Module, num_samples: int) -> Callable:
  """Builds (params, stats, image [B, H, W, C]) -> the inputs of each layer as rows x [n, d].

  For a layer of which all samples give more than d rows, the result is a tuple with x' x [d, d].

  Args:
    model: the network.
    num_samples: number of images in all chunks together.
  """

  def inputs(params, stats, image):
    variables = {"params": params, "batch_stats": stats}
    seen = taps.layer_inputs(model, trees.layer_names(params), variables, image)

    def summary(x):
      rows = x.reshape(-1, x.shape[-1])
      few = num_samples * (len(rows) // len(image)) <= rows.shape[1]
      return rows if few else (rows.T @ rows,)

    return {name: summary(x) for name, x in seen.items()}

  return inputs


def _grow(
  f: _Functions,
  num_samples: int,
  params: Params,
  stats: Params,
  task: Task,
  key: jax.Array,
  shared: dict,
  energy: float,
) -> dict:
  """Returns the bases and their numbers of directions after a task (`bases.grow`).

  Args:
    f: the compiled functions.
    num_samples: method.samples.
    params: parameters of the whole network after the task.
    stats: its BatchNorm statistics.
    task: whose training images are used.
    key: random key for choosing the images.
    shared: shared state with the bases of earlier tasks.
    energy: eps of the task.
  """
  seen_fn = functools.partial(f.inputs, params, stats)
  parts = batches.over_samples(seen_fn, task, key, num_samples, _CHUNK)
  grown = {"basis": {}, "num_directions": {}}
  for name in shared["kernels"]:
    seen = [part[name] for part in parts]
    if isinstance(seen[0], tuple):
      moment = functools.reduce(np.add, [x.astype(np.float64) for (x,) in seen])
    else:
      moment = bases.moment_or_rows(np.concatenate(seen))
    count = int(shared["num_directions"][name])
    basis, num = bases.grow_padded(shared["basis"][name], count, moment, energy, first=not count)
    grown["basis"][name] = jnp.asarray(basis)
    grown["num_directions"][name] = jnp.int32(num)
  return grown


# --- size ---------------------------------------------------------------------------------


def size(state: State) -> Size:
  """Returns the size: later tasks add their heads. The bases are for training alone."""
  shared, (first, *later) = state.shared, state.tasks
  rest = shared["others"] | {trees.HEAD: first.head}
  base = sizes.network_count(shared["kernels"], rest, int(first.num_classes))
  heads = [sizes.count_rest({trees.HEAD: p.head}, {}, int(p.num_classes)) for p in later]
  stats = sizes.count_task_statistics(state)
  basis = sum(len(x) * int(shared["num_directions"][n]) for n, x in shared["basis"].items())
  return sizes.dense_size(base, sum(count.counted for count in heads), stats, basis)
