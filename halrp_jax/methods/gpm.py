"""GPM: one network; later tasks move each kernel only where earlier tasks' inputs don't reach.

Update rule: dW <- dW - M (M' dW), the columns of M being an orthonormal basis of what the layer saw
in earlier tasks (a convolution: its patches). Biases and BatchNorm's scale and bias are frozen
after the first task; every task has its own head.

| paper | here                     | meaning |
|-------|--------------------------|---------|
| W     | shared["kernels"]        | features, as a matrix [d, J] per layer; trained by every task |
| M     | shared["basis"]          | [d, k] and zero columns; for training alone |
| k     | shared["num_directions"] | |
| eps   | method.threshold         | share of a layer's energy that M must carry; + step * t |
| -     | shared["others"]         | biases, BatchNorm's scale and bias, frozen after task 0 |

Phases: training; then method.samples training images pass through and M grows (weights/bases.py).

method.optimizer = "sgd" is the paper's: plain gradients, rate method.learning_rate, cut where the
validation loss stops falling, weights of its lowest. "adam" is the protocol's recipe, and what Adam
makes of the gradients is projected: Adam on projected gradients would leave the subspace, since it
scales every weight by itself.

Reference: G. Saha et al., "Gradient projection memory for continual learning", 2021 (arXiv
2103.09762), Alg. 1 and 2. Its networks have neither biases nor running statistics.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax import keys
from halrp_jax.training import batches, losses, networks, sizes
from halrp_jax.training.fit import Recipe, make_fit, recipe
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Method, Network, Params, Size, State, Task
from halrp_jax.weights import bases, taps, trees

_CHUNK = 25  # images whose patches are in memory at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.NetworkConfig):
  """The keys `method.*` of this method."""

  optimizer: str = keys.one_of(
    "adam", ("sgd", "adam"), "sgd: the paper's recipe; adam: the protocol's, its updates projected"
  )
  learning_rate: float = keys.number(0.01, 0, None, "of optimizer=sgd", True)
  threshold: float = keys.number(0.97, 0, 1, "eps: share of the energy that the basis carries")
  threshold_step: float = keys.number(0.003, 0, 1, "added to eps for every task, up to 1")
  samples: int = keys.whole(125, 1, None, "training images of a task that its basis is made from")


class TaskState(NamedTuple):
  head: Params  # of the task alone; all other parameters are shared
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
      held = frozen | {"others": shared["others"], "basis": shared["basis"]}
      trained, stats = f.fit_later(start, stats, held, *args)
      head, shared = trained["head"], shared | {"kernels": trained["kernels"]}
    learned = TaskState(head, stats, jnp.int32(task.num_classes))
    energy = min(1.0, config.threshold + config.threshold_step * len(state.tasks))

    def grow():  # Alg. 1: update the memory
      params = _whole(shared["kernels"], shared["others"], head)
      return _grow(f, config.samples, params, stats, task, sample_key, shared, energy)

    return state.append(learned, **(shared | store.once("basis", grow))), {}

  def network(shared, task):
    return Network(_whole(shared["kernels"], shared["others"], task.head), task.stats)

  return Method(learn, size, network, serves=("kernels", "others"))


# --- jitted functions -------------------------------------------------------------------


class _Functions(NamedTuple):
  initialize: Callable  # (key) -> params, stats
  fit_first: Callable  # `make_fit` of the plain network
  fit_later: Callable  # `make_fit` of kernels and head, whose updates are projected
  inputs: Callable  # `_inputs_of`


def _build(config: Config, setup: Setup) -> _Functions:
  how = recipe(setup)
  if config.optimizer == "sgd":
    how = Recipe("sgd", 0.0, config.learning_rate, 1.0, "plateau", "best_loss")

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
    fit_first=make_fit(setup, *networks.plain_network(setup.model), how=how),
    fit_later=make_fit(setup, apply_fn, penalty, edit_fn=project, how=how),
    inputs=jax.jit(_inputs_of(setup.measuring, config.samples)),
  )


def _whole(kernels, others, head) -> Params:
  """Returns the parameters of a whole network."""
  return trees.join(kernels, others | {trees.HEAD: head})


def _project(update, basis):
  """Removes from an update [.., J] what lies in the span of the basis M [d, k]: dW - M (M' dW)."""
  u = update.reshape(-1, update.shape[-1])
  return (u - basis @ (basis.T @ u)).reshape(update.shape)


# --- the memory ---------------------------------------------------------------------------


def _first_shared(params: Params) -> dict:
  """Returns what tasks share after the first one, with bases that are still empty."""
  kernels, rest = trees.split(params)
  dims = {n: w.size // w.shape[-1] for n, w in kernels.items()}
  return {
    "kernels": kernels,
    "others": {name: x for name, x in rest.items() if name != trees.HEAD},
    "basis": {n: jnp.zeros((d, 0)) for n, d in dims.items()},
    "num_directions": {n: jnp.int32(0) for n in dims},
  }


def _inputs_of(model, num_samples: int):
  """Builds (params, stats, image [B, H, W, C]) -> rows x [n, d] that each layer sees.

  Where all samples give more than d rows it is x' x [d, d], in a tuple of one.
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


def _grow(f, num_samples: int, params, stats, task: Task, key, shared: dict, energy: float) -> dict:
  """Returns the bases after a task, and how many directions they have (`bases.grow`)."""
  seen_fn = functools.partial(f.inputs, params, stats)
  parts = batches.over_samples(seen_fn, task, key, num_samples, _CHUNK)
  grown = {"basis": {}, "num_directions": {}}
  for name in shared["kernels"]:
    seen = [part[name] for part in parts]
    if isinstance(seen[0], tuple):
      moment = sum(x.astype(np.float64) for (x,) in seen)
    else:
      moment = bases.moment_or_rows(np.concatenate(seen))
    count = int(shared["num_directions"][name])
    basis, num = bases.grow_padded(shared["basis"][name], count, moment, energy, first=not count)
    grown["basis"][name] = jnp.asarray(basis)
    grown["num_directions"][name] = jnp.int32(num)
  return grown


# --- size ---------------------------------------------------------------------------------


def size(state: State) -> Size:
  """Counts the first task's network and the heads of later tasks; the bases are for training."""
  shared, (first, *later) = state.shared, state.tasks
  rest = shared["others"] | {trees.HEAD: first.head}
  base = sizes.network_count(shared["kernels"], rest, int(first.num_classes))
  heads = [sizes.count_rest({trees.HEAD: p.head}, {}, int(p.num_classes)) for p in later]
  stats = sizes.count_leaves([p.stats for p in state.tasks])
  basis = sum(len(x) * int(shared["num_directions"][n]) for n, x in shared["basis"].items())
  return sizes.dense_size(base, sum(count.counted for count in heads), stats, basis)
