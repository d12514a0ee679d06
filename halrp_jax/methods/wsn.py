"""WSN: one network, and for each task a binary mask that selects a winning subnetwork.

Update rule: the weights of task t are theta * m_t, where the mask m_t is 1 for the share c of each
layer with the largest |s|. Adam trains theta and the scores s together on the cross-entropy. The
gradient goes straight through the mask: that of |s| is the gradient of theta * m times theta.
Weights that an earlier mask selects never change.

| paper | here                    | meaning |
|-------|-------------------------|---------|
| theta | shared["kernels"]       | kernels of all layers except the head |
| s     | shared["scores"]        | scores after the latest task; for training alone |
| M     | shared["used"]          | weights that any mask selects; for training alone |
| m_t   | tasks[t].mask           | mask of the task |
| c     | method.share            | share of each layer that a mask selects |

Nothing is forgotten, since head, biases and BatchNorm belong to the task. The paper's networks have
neither biases nor affine BatchNorm (method.bn = "noaffine"). The scores continue from task to task.
There is no weight decay, which would change the selected weights of earlier tasks.

The paper starts from random weights and scores. What random scores select of a pretrained network
classifies at chance; method.scores = "kernels" starts with its largest weights instead.

Reference: H. Kang et al., "Forget-free continual learning with winning subnetworks", ICML 2022,
Alg. 1. In its code `sparsity` is 1 - c.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from halrp_jax import keys
from halrp_jax.nn.init import uniform_fan_in
from halrp_jax.training import networks, sizes
from halrp_jax.training.fit import Fit, make_fit
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Method, Network, Params, Size, State
from halrp_jax.weights import trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.MethodConfig):
  """Config keys `method.*` of WSN."""

  share: float = keys.number(
    0.5, 0, 1, "c: share of each layer's weights that a mask selects", True
  )
  bn: str = keys.one_of(
    "task",
    ("task", "noaffine"),
    "task: each task has its own BatchNorm scale and bias; noaffine: they are 1 and 0",
  )
  scores: str = keys.one_of(
    "random",
    ("random", "kernels"),
    "start of s: random: drawn like kernels; kernels: equal to them, for a pretrained base",
  )


class TaskState(NamedTuple):
  """State of a task."""

  mask: dict[str, Array]  # m_t by layer, uint8: eight weights to a byte
  rest: Params  # biases, BatchNorm and head
  stats: Params  # BatchNorm's statistics
  num_classes: Array  # int32 []


def make(config: Config, setup: Setup) -> Method:
  """Builds WSN."""
  fit, initialize = _make_fit(config, setup), networks.make_initialize(setup)

  @jax.jit
  def masks_of(scores):
    return {n: largest(jnp.abs(s), config.share) for n, s in scores.items()}

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, score_key, fit_key = jax.random.split(key, 3)
    shared, rest, stats = _start(config, state, *initialize(init_key), score_key)
    rest, fixed = _split_norm(rest) if config.bn == "noaffine" else (rest, {})
    start = {"kernels": shared["kernels"], "scores": shared["scores"], "rest": rest}
    frozen, store = {"used": shared["used"], "rest": fixed}, store.child("train")
    trained, stats = fit(start, stats, frozen, task, fit_key, setup.epochs, store)
    masks = masks_of(trained["scores"])
    packed: dict[str, Array] = {n: jnp.packbits(x) for n, x in masks.items()}
    task_state = TaskState(packed, trained["rest"] | fixed, stats, jnp.int32(task.num_classes))
    used = {n: shared["used"][n] | x for n, x in masks.items()}  # Alg. 1: accumulate the mask
    kernels, scores = trained["kernels"], trained["scores"]
    return state.append(task_state, kernels=kernels, scores=scores, used=used), {}

  def network(shared, task):
    kernels = {n: w * _unpack(task.mask[n], w.shape) for n, w in shared["kernels"].items()}
    return Network(trees.join(kernels, task.rest), task.stats)

  return Method(learn, size, network, serves=("kernels",))


def _start(
  config: Config, state: State, params: Params, stats: Params, score_key: jax.Array
) -> tuple[dict[str, Params], Params, Params]:
  """Returns the start of a task: all values after the previous task, but a fresh head.

  Args:
    config: config of the method.
    state: method state before the task.
    params: freshly initialized parameters.
    stats: freshly initialized statistics.
    score_key: random key for the initial scores.

  Returns:
    theta, s and M as in `State.shared`; biases, BatchNorm and head; BatchNorm statistics.
  """
  kernels, rest = trees.split(params)
  if state.tasks:
    previous = state.tasks[-1]
    return state.shared, networks.fresh_head(previous.rest, rest), previous.stats
  scores = kernels if config.scores == "kernels" else _draw_scores(score_key, kernels)
  used = {n: jnp.zeros(w.shape, bool) for n, w in kernels.items()}
  return {"kernels": kernels, "scores": scores, "used": used}, rest, stats


# --- Algorithm 1: one step ----------------------------------------------------------------


def _make_fit(config: Config, setup: Setup) -> Fit:
  """Builds `fit` of the masked network, which trains theta and s together.

  `params` has "kernels", "scores" and "rest" with biases, BatchNorm and head. `frozen` has the mask
  "used" and the parameters "rest" that are not trained.
  """

  def apply_fn(params, frozen, *args):
    """Applies the network with the weights theta * m_t, where m_t is from the current scores."""
    scores = params["scores"]
    kernels = {n: masked_kernel(w, scores[n], config.share) for n, w in params["kernels"].items()}
    weights = trees.join(kernels, params["rest"] | frozen["rest"])
    return networks.apply_model(setup.model, weights, *args)

  def edit(updates, frozen):
    """Multiplies the update of theta by 1 - M."""
    kernels = {n: jnp.where(frozen["used"][n], 0, u) for n, u in updates["kernels"].items()}
    return updates | {"kernels": kernels}

  return make_fit(setup, apply_fn, lambda params, frozen: 0.0, edit_fn=edit)


def masked_kernel(kernel: jax.Array, score: jax.Array, share: float) -> jax.Array:
  """Returns theta * m; the gradient of |s| is that of theta * m times theta.

  Args:
    kernel: theta.
    score: s, in the kernel's shape.
    share: c.
  """
  size = jnp.abs(score)
  # the term added is 0, and gives the score its gradient
  return kernel * (largest(size, share) + (size - lax.stop_gradient(size)))


def largest(size: jax.Array, share: float) -> jax.Array:
  """Returns the mask of the given share of values that are largest.

  The mask is 1 from the k-th smallest value on, k = 1 + round((1 - share) (n - 1)). This threshold
  is found by a search between two floats, which ends when they are neighbours. The next float to
  try is interpolated from the numbers of values below, and every third time is the middle. The
  search takes about ten passes over the values; a sort takes as long as hundreds of passes.

  Args:
    size: values of at least 0; the mask has all or none of equal values.
    share: fraction in (0, 1].

  Returns:
    bool, in the shape of `size`.
  """
  size, k = lax.stop_gradient(size), 1 + round((1 - share) * (size.size - 1))
  rows = size.reshape(-1, size.shape[-1])

  def search(at):
    low, high, num_low, num_high, turn = at
    part = (k - num_low - 0.5) / (num_high - num_low)
    likely = _bits(_float(low) + part * (_float(high) - _float(low)))
    middle = low + (high - low) // 2
    pivot = jnp.where(turn % 3 == 2, middle, jnp.clip(likely, low + 1, high - 1))
    num = jnp.sum(jnp.sum(rows < _float(pivot), 0))
    below = num < k  # the threshold is at the pivot or above it
    low, num_low = jnp.where(below, pivot, low), jnp.where(below, num, num_low)
    high, num_high = jnp.where(below, high, pivot), jnp.where(below, num_high, num)
    return low, high, num_low, num_high, turn + 1

  zero = jnp.int32(0)
  start = zero, _bits(size.max()) + 1, zero, jnp.int32(size.size), zero
  low, *_ = lax.while_loop(lambda at: at[1] - at[0] > 1, search, start)
  return size >= _float(low)


def _bits(x: jax.Array) -> jax.Array:
  """Returns the bits of floats of at least 0 as int32, which are ordered like the floats."""
  return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
  """Inverts `_bits`."""
  return lax.bitcast_convert_type(bits, jnp.float32)


def _draw_scores(key: jax.Array, kernels: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Draws s by layer as PyTorch draws kernels."""
  keys = jax.random.split(key, len(kernels))
  draw = uniform_fan_in()
  return {n: draw(k, w.shape) for k, (n, w) in zip(keys, kernels.items(), strict=True)}


def _split_norm(rest: Params) -> tuple[Params, Params]:
  """Splits parameters into head and biases, which are trained, and BatchNorm, which is not."""
  trained = {n: x for n, x in rest.items() if n == trees.HEAD or not _has(x, "scale")}
  return trained, {n: x for n, x in rest.items() if n not in trained}


def _has(tree: dict, name: str) -> bool:
  """Returns whether a tree has a parameter of this name at any depth."""
  return name in tree or any(_has(x, name) for x in tree.values() if isinstance(x, dict))


def _unpack(mask: Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns a packed mask as floats 0 and 1 in the kernel's shape."""
  return jnp.unpackbits(mask)[: math.prod(shape)].reshape(shape).astype(jnp.float32)


def size(state: State) -> Size:
  """Returns the size with masks, heads and BatchNorm.

  `Size.paper` counts 32 bits of a mask as one number.
  """
  shared, (first, *later) = state.shared, state.tasks
  kernels = shared["kernels"]
  counts = [sizes.count_rest(p.rest, kernels, int(p.num_classes)) for p in later]
  base = sizes.network_count(kernels, first.rest, int(first.num_classes))
  counted = sum(c.counted for c in counts)
  uncounted = sum(c.biases for c in counts) + sizes.count_task_statistics(state)
  num_kernels = sizes.count_leaves(kernels)
  num_used = sum(int(x.sum()) for x in shared["used"].values())
  bits = num_kernels * len(state.tasks)
  dense = base + counted + uncounted
  return Size(
    base=base,
    dense=dense,
    nonzero=dense - num_kernels + num_used,
    mask_bits=bits,
    training_only=num_kernels + num_kernels // 32,
    paper=base + counted + bits // 32,
  )
