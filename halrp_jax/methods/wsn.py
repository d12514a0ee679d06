"""WSN: one network, and in it a binary mask per task that picks a winning subnetwork.

Update rule: the weights of task t are theta * m_t, m_t being the c largest |s| of each layer. Adam
trains theta and the scores s together on the cross-entropy, straight through the mask: the gradient
of |s| is that of (theta * m) times theta. Weights that an earlier mask holds never change.

| paper | here                    | meaning |
|-------|-------------------------|---------|
| theta | shared["kernels"]       | kernels of the features |
| s     | shared["scores"]        | as the last task left them; for training alone |
| M     | shared["used"]          | weights that some mask holds; for training alone |
| c     | method.share            | share of each layer that a mask holds |

Nothing is forgotten, since head, biases and BatchNorm are the task's own (the paper's networks have
neither biases nor affine BatchNorm: method.bn = "noaffine"). The scores are not drawn again between
tasks. There is no weight decay: it would move weights that are held.

Reference: H. Kang et al., "Forget-free continual learning with winning subnetworks", ICML 2022,
Alg. 1. Its program's `sparsity` is 1 - c.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from halrp_jax import keys
from halrp_jax.nn.init import uniform_fan_in
from halrp_jax.training import networks, sizes
from halrp_jax.training.fit import make_fit
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Method, Network, Params, Size, State
from halrp_jax.weights import trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.MethodConfig):
  """The keys `method.*` of this method."""

  share: float = keys.number(0.5, 0, 1, "c: share of each layer's weights that a mask holds", True)
  bn: str = keys.one_of(
    "task", ("task", "noaffine"), "BatchNorm's scale and bias: the task's own, or 1 and 0"
  )


class TaskState(NamedTuple):
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
    shared, rest, stats = _start(state, *initialize(init_key), score_key)
    rest, fixed = _split_norm(rest) if config.bn == "noaffine" else (rest, {})
    start = {"kernels": shared["kernels"], "scores": shared["scores"], "rest": rest}
    frozen, store = {"used": shared["used"], "rest": fixed}, store.child("train")
    trained, stats = fit(start, stats, frozen, task, fit_key, setup.epochs, store)
    masks = masks_of(trained["scores"])
    packed = {n: jnp.packbits(x) for n, x in masks.items()}
    learned = TaskState(packed, trained["rest"] | fixed, stats, jnp.int32(task.num_classes))
    used = {n: shared["used"][n] | x for n, x in masks.items()}  # Alg. 1: accumulate the mask
    kernels, scores = trained["kernels"], trained["scores"]
    return state.append(learned, kernels=kernels, scores=scores, used=used), {}

  def network(shared, task):
    kernels = {n: w * _unpack(task.mask[n], w.shape) for n, w in shared["kernels"].items()}
    return Network(trees.join(kernels, task.rest), task.stats)

  return Method(learn, size, network, serves=("kernels",))


def _start(state: State, params: Params, stats: Params, score_key):
  """Returns theta, s and M, biases with BatchNorm and head, and statistics.

  They are as the task before left them but for the head; `params` and `stats` are fresh ones.
  """
  kernels, rest = trees.split(params)
  if state.tasks:
    before = state.tasks[-1]
    return state.shared, networks.fresh_head(before.rest, rest), before.stats
  scores = _draw_scores(score_key, kernels)
  used = {n: jnp.zeros(w.shape, bool) for n, w in kernels.items()}
  return {"kernels": kernels, "scores": scores, "used": used}, rest, stats


# --- Algorithm 1: one step ----------------------------------------------------------------


def _make_fit(config: Config, setup: Setup) -> Callable:
  """Builds `make_fit` of the masked network: theta and s are trained together."""

  def apply_fn(params, frozen, *args):
    """Runs the network with the weights theta * m_t, m_t being what the scores say now."""
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
  """Returns theta * m, whose gradient passes the mask on its way to the score."""
  size = jnp.abs(score)
  # 0 is added; its gradient makes that of the score
  return kernel * (largest(size, share) + (size - lax.stop_gradient(size)))


def largest(size: jax.Array, share: float) -> jax.Array:
  """Returns the mask of the largest values, a share of them.

  The threshold is the k-th smallest value, k = 1 + round((1 - share) (n - 1)). It is searched
  between two floats, by the values' distribution and every third time in the middle, until they
  are neighbours: some ten passes, where a sort takes as long as hundreds.

  Args:
    size: values >= 0; equal ones are all in the mask or all outside.
    share: of the values, in (0, 1].
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
    below = num < k  # what is searched for lies at the pivot or above
    low, num_low = jnp.where(below, pivot, low), jnp.where(below, num, num_low)
    high, num_high = jnp.where(below, high, pivot), jnp.where(below, num_high, num)
    return low, high, num_low, num_high, turn + 1

  zero = jnp.int32(0)
  start = zero, _bits(size.max()) + 1, zero, jnp.int32(size.size), zero
  low, *_ = lax.while_loop(lambda at: at[1] - at[0] > 1, search, start)
  return size >= _float(low)


def _bits(x):
  """Returns the bits of floats >= 0 as whole numbers, whose order is that of the floats."""
  return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits):
  """Inverts `_bits`."""
  return lax.bitcast_convert_type(bits, jnp.float32)


def _draw_scores(key, kernels):
  """Draws s by layer as PyTorch draws kernels."""
  keys = jax.random.split(key, len(kernels))
  draw = uniform_fan_in()
  return {n: draw(k, w.shape) for k, (n, w) in zip(keys, kernels.items(), strict=True)}


def _split_norm(rest):
  """Returns what is trained, head and biases, and what is not: BatchNorm, of scale 1 and bias 0."""
  trained = {n: x for n, x in rest.items() if n == trees.HEAD or not _has(x, "scale")}
  return trained, {n: x for n, x in rest.items() if n not in trained}


def _has(tree, name):
  """Tells whether a parameter of some name is anywhere in a tree."""
  return name in tree or any(_has(x, name) for x in tree.values() if isinstance(x, dict))


def _unpack(mask, shape):
  """Returns a packed mask as floats 0 and 1 of the kernel's shape."""
  return jnp.unpackbits(mask)[: math.prod(shape)].reshape(shape).astype(jnp.float32)


def size(state: State) -> Size:
  """Counts masks, heads and BatchNorm; in `paper` 32 bits of a mask are one number."""
  shared, (first, *later) = state.shared, state.tasks
  kernels = shared["kernels"]
  counts = [sizes.count_rest(p.rest, kernels, int(p.num_classes)) for p in later]
  base = sizes.network_count(kernels, first.rest, int(first.num_classes))
  counted = sum(c.counted for c in counts)
  uncounted = sum(c.biases for c in counts) + sizes.count_leaves([p.stats for p in state.tasks])
  num_kernels = sizes.count_leaves(kernels)
  held = sum(int(x.sum()) for x in shared["used"].values())
  bits = num_kernels * len(state.tasks)
  dense = base + counted + uncounted
  return Size(
    base=base,
    dense=dense,
    nonzero=dense - num_kernels + held,
    mask_bits=bits,
    training_only=num_kernels + num_kernels // 32,
    paper=base + counted + bits // 32,
  )
