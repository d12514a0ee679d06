"""WSN: one network, and in it a binary mask per task that picks a winning subnetwork.

Update rule: the weights of task t are theta * m_t, m_t being the c largest |s| of each layer. Adam
trains theta and the scores s together on the cross-entropy, straight through the mask: the gradient
of |s| is that of (theta * m) times theta. Weights that an earlier mask holds never change.

| paper | here                    | meaning |
|-------|-------------------------|---------|
| theta | shared["kernels"]       | kernels of the features |
| s     | shared["scores"]        | as the last task left them; for training alone |
| M     | shared["used"]          | weights that some mask holds; for training alone |
| m_t   | tasks[t]["mask"]        | eight to a byte |
| -     | tasks[t]["rest"], ["stats"] | head, biases, BatchNorm |
| c     | method.share            | share of each layer that a mask holds |

Nothing is forgotten, since head, biases and BatchNorm are the task's own (the paper's networks have
neither biases nor affine BatchNorm: method.bn = "noaffine"). The scores are not drawn again between
tasks. There is no weight decay: it would move weights that are held.

Reference: H. Kang et al., "Forget-free continual learning with winning subnetworks", 2022, Alg. 1;
spec/baselines.md 3.11. Its program's `sparsity` is 1 - c.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from halrp_jax import keys
from halrp_jax.nn.init import uniform_fan_in
from halrp_jax.training import networks, sizes
from halrp_jax.training.fit import learning_rate_decay, make_fit
from halrp_jax.types import Method, Size, State, nothing_learned, one_at_a_time
from halrp_jax.weights import trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.MethodConfig):
  """The keys `method.*` of this method."""

  share: float = keys.number(0.5, 0, 1, "c: share of each layer's weights that a mask holds", True)
  bn: str = keys.one_of(
    "task", ("task", "noaffine"), "BatchNorm's scale and bias: the task's own, or 1 and 0"
  )


def make(config, model, benchmark) -> Method:
  m, decay = config.method, learning_rate_decay(config, benchmark)

  def masked(params):
    scores = params["scores"]
    kernels = {n: masked_kernel(w, scores[n], m.share) for n, w in params["kernels"].items()}
    return trees.join(kernels, params["rest"])

  def apply_fn(params, frozen, stats, image, train_mode, key):
    params = params | {"rest": params["rest"] | frozen["rest"]}
    return networks.apply_model(model, masked(params), stats, image, train_mode, key)

  def edit(updates, frozen):
    kernels = {n: jnp.where(frozen["used"][n], 0, u) for n, u in updates["kernels"].items()}
    return updates | {"kernels": kernels}

  fit = make_fit(config, decay, apply_fn, lambda params, frozen: 0.0, edit_fn=edit)
  initialize = networks.make_initialize(model, benchmark)
  masks_of = jax.jit(lambda scores: {n: largest(jnp.abs(s), m.share) for n, s in scores.items()})

  def held(kernels, learned):
    kept = {n: w * _unpack(learned["mask"][n], w.shape) for n, w in kernels.items()}
    return trees.join(kept, learned["rest"])

  def logits(shared, learned, image):
    weights = held(shared["kernels"], learned)
    return networks.apply_model(model, weights, learned["stats"], image, False, None)[0]

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, score_key, fit_key = jax.random.split(key, 3)
    params, stats = initialize(init_key)
    kernels, rest = trees.split(params)
    if state.tasks:
      kernels, scores, used = (state.shared[k] for k in ("kernels", "scores", "used"))
      before = state.tasks[-1]
      rest, stats = before["rest"] | {trees.HEAD: rest[trees.HEAD]}, before["stats"]
    else:
      scores = _draw_scores(score_key, kernels)
      used = {n: jnp.zeros(w.shape, bool) for n, w in kernels.items()}
    trained, fixed = _split_norm(rest) if m.bn == "noaffine" else (rest, {})
    start = {"kernels": kernels, "scores": scores, "rest": trained}
    frozen = {"used": used, "rest": fixed}
    got, stats = fit(start, stats, frozen, task, fit_key, config.epochs, store.child("train"))
    masks = masks_of(got["scores"])
    learned = {
      "mask": {n: jnp.packbits(x) for n, x in masks.items()},
      "rest": got["rest"] | fixed,
      "stats": stats,
      "num_classes": jnp.int32(task.num_classes),
    }
    used = {n: used[n] | x for n, x in masks.items()}
    shared = {"kernels": got["kernels"], "scores": got["scores"], "used": used}
    return State(shared, (*state.tasks, learned)), {}

  def merge(state, t):
    p = state.tasks[t]
    return held(state.shared["kernels"], p), p["stats"]

  return Method(nothing_learned, one_at_a_time, learn, logits, size, merge, ("kernels",))


def masked_kernel(kernel: jax.Array, score: jax.Array, share: float) -> jax.Array:
  """theta * m, whose gradient passes the mask on its way to the score."""
  size = jnp.abs(score)
  # 0 is added; its gradient makes that of the score
  return kernel * (largest(size, share) + (size - lax.stop_gradient(size)))


def largest(size: jax.Array, share: float) -> jax.Array:
  """Mask of the share of the values that are largest; all >= 0, equal ones together.

  The threshold is the k-th smallest value, k = 1 + round((1 - share) (n - 1)). It is searched
  between two floats, by the values' distribution and every third time in the middle, until they
  are neighbours: some ten passes, where a sort takes as long as hundreds.
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
  """Floats that are not negative are ordered as these whole numbers are."""
  return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits):
  return lax.bitcast_convert_type(bits, jnp.float32)


def _draw_scores(key, kernels):
  keys = jax.random.split(key, len(kernels))
  draw = uniform_fan_in()
  return {n: draw(k, w.shape) for k, (n, w) in zip(keys, kernels.items(), strict=True)}


def _split_norm(rest):
  """Head and biases are trained; BatchNorm, whose scale is 1 and whose bias 0, is not."""
  trained = {n: x for n, x in rest.items() if n == trees.HEAD or not _has(x, "scale")}
  return trained, {n: x for n, x in rest.items() if n not in trained}


def _has(tree, name):
  return name in tree or any(_has(x, name) for x in tree.values() if isinstance(x, dict))


def _unpack(mask, shape):
  return jnp.unpackbits(mask)[: math.prod(shape)].reshape(shape).astype(jnp.float32)


def size(state: State) -> Size:
  """Masks, and per later task head and BatchNorm; the paper's count takes 32 mask bits for one."""
  shared, (first, *later) = state.shared, state.tasks
  kernels = shared["kernels"]
  counts = [sizes.count_rest(p["rest"], kernels, int(p["num_classes"])) for p in later]
  base = sizes.network_count(kernels, first["rest"], int(first["num_classes"]))
  counted = sum(c.counted for c in counts)
  uncounted = sum(c.biases for c in counts) + sizes.count_leaves([p["stats"] for p in state.tasks])
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
