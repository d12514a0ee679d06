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
| -     | tasks[t]["head"], ["stats"] | BatchNorm's statistics are the task's own |

Phases: training; then method.samples training images pass through and M grows (bases.py).

method.optimizer = "sgd" is the paper's: plain gradients, rate method.learning_rate, cut where the
validation loss stops falling, weights of its lowest. "adam" is the protocol's recipe, and what Adam
makes of the gradients is projected: Adam on projected gradients would leave the subspace, since it
scales every weight by itself.

Reference: G. Saha et al., "Gradient projection memory for continual learning", 2021, Alg. 1 and 2;
spec/baselines.md 3.10. Its networks have neither biases nor running statistics.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax import keys, models
from halrp_jax.training import batches, losses, networks, sizes
from halrp_jax.training.fit import Recipe, learning_rate_decay, make_fit, recipe
from halrp_jax.types import Method, State, nothing_learned, one_at_a_time
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


def make(config, model, benchmark) -> Method:
  m, decay = config.method, learning_rate_decay(config, benchmark)
  how = recipe(config)
  if m.optimizer == "sgd":
    how = Recipe("sgd", 0.0, m.learning_rate, 1.0, "plateau", "best_loss")
    decay = _no_decay
  plain, penalty = networks.plain_network(model)

  def whole(params, others):
    return trees.join(params["kernels"], others | {trees.HEAD: params["head"]})

  def apply_fn(params, frozen, stats, image, train_mode, key):
    return plain(whole(params, frozen["others"]), {}, stats, image, train_mode, key)

  def projected(updates, frozen):
    kernels = {n: _project(u, frozen["basis"][n]) for n, u in updates["kernels"].items()}
    return updates | {"kernels": kernels}

  fit_first = make_fit(config, decay, plain, penalty, how=how)
  fit = make_fit(
    config,
    decay,
    apply_fn,
    lambda params, frozen: frozen["l2"] * losses.sum_squares(params["kernels"]),
    edit_fn=projected,
    how=how,
  )
  initialize = networks.make_initialize(model, benchmark)
  inputs_fn = jax.jit(_inputs_of(models.in_training(config, model), m.samples))

  def learn(state, tasks, key, store):
    (task,) = tasks
    t, frozen = len(state.tasks), {"l2": networks.l2_coefficient(m)}
    init_key, fit_key, sample_key = jax.random.split(key, 3)
    params, stats = initialize(init_key)
    phase = store.child("train")
    if not t:
      params, stats = fit_first(params, stats, frozen, task, fit_key, config.epochs, phase)
      kernels, rest = trees.split(params)
      shared = {"kernels": kernels, "others": _without_head(rest)} | _empty_bases(kernels)
      head = params[trees.HEAD]
    else:
      shared, stats = state.shared, state.tasks[-1]["stats"]
      start = {"kernels": shared["kernels"], "head": params[trees.HEAD]}
      frozen |= {"others": shared["others"], "basis": shared["basis"]}
      got, stats = fit(start, stats, frozen, task, fit_key, config.epochs, phase)
      shared, head = shared | {"kernels": got["kernels"]}, got["head"]
    learned = {"head": head, "stats": stats, "num_classes": jnp.int32(task.num_classes)}

    def grow():
      params = whole(shared | learned, shared["others"])
      energy = min(1.0, m.threshold + m.threshold_step * t)
      return _grow(inputs_fn, params, stats, task, sample_key, m.samples, shared, energy)

    shared = shared | store.once("basis", grow)
    return State(shared, (*state.tasks, learned)), {}

  def logits(shared, learned, image):
    params = whole(shared | learned, shared["others"])
    return plain(params, {}, learned["stats"], image, False, None)[0]

  def merge(state, t):
    p = state.tasks[t]
    return whole(state.shared | p, state.shared["others"]), p["stats"]

  serves = ("kernels", "others")
  return Method(nothing_learned, one_at_a_time, learn, logits, size, merge, serves)


def _no_decay(task):
  return 1.0


def _project(update, basis):
  """[.., J] -> the same without what lies in the span of basis [d, k]."""
  u = update.reshape(-1, update.shape[-1])
  return (u - basis @ (basis.T @ u)).reshape(update.shape)


def _without_head(rest):
  return {name: x for name, x in rest.items() if name != trees.HEAD}


def _empty_bases(kernels):
  dims = {n: w.size // w.shape[-1] for n, w in kernels.items()}
  return {
    "basis": {n: jnp.zeros((d, 0)) for n, d in dims.items()},
    "num_directions": {n: jnp.int32(0) for n in dims},
  }


def _inputs_of(model, num_samples: int):
  """Builds (params, stats, image [B, H, W, C]) -> rows x that each layer sees [n, d], or, where all
  samples give more than d, x' x [d, d] in a tuple of one."""

  def inputs(params, stats, image):
    variables = {"params": params, "batch_stats": stats}
    seen = taps.layer_inputs(model, trees.layer_names(params), variables, image)

    def summary(x):
      rows = x.reshape(-1, x.shape[-1])
      few = num_samples * (len(rows) // len(image)) <= rows.shape[1]
      return rows if few else (rows.T @ rows,)

    return {name: summary(x) for name, x in seen.items()}

  return inputs


def _grow(inputs_fn, params, stats, task, key, num_samples, shared, energy):
  """The bases after a task, and how many directions they have."""
  seen_fn = functools.partial(inputs_fn, params, stats)
  parts = batches.over_samples(seen_fn, task, key, num_samples, _CHUNK)
  grown = {"basis": {}, "num_directions": {}}
  for name in shared["kernels"]:
    seen = [part[name] for part in parts]
    if isinstance(seen[0], tuple):
      moment = sum(x.astype(np.float64) for (x,) in seen)
    else:
      moment = bases.of_rows(np.concatenate(seen))
    count = int(shared["num_directions"][name])
    basis, num = bases.grow_padded(shared["basis"][name], count, moment, energy, first=not count)
    grown["basis"][name] = jnp.asarray(basis)
    grown["num_directions"][name] = jnp.int32(num)
  return grown


def size(state: State):
  """Later tasks add their heads; the bases are for training."""
  shared, (first, *later) = state.shared, state.tasks
  rest = shared["others"] | {trees.HEAD: first["head"]}
  base = sizes.network_count(shared["kernels"], rest, int(first["num_classes"]))
  heads = [sizes.count_rest({trees.HEAD: p["head"]}, {}, int(p["num_classes"])) for p in later]
  stats = sizes.count_leaves([p["stats"] for p in state.tasks])
  basis = sum(len(x) * int(shared["num_directions"][n]) for n, x in shared["basis"].items())
  return sizes.dense_size(base, sum(count.counted for count in heads), stats, basis)
