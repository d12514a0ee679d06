"""IRU: incremental rank updates, each task adds a few rank-1 factors to every layer.

Update rule: W_t = sum over k of s_t[k] u_k v_k', k over all factors so far. Task t trains its own
new u_k and v_k and the selector s_t of all; the factors of the tasks before are frozen.

| paper | here                    | meaning |
|-------|-------------------------|---------|
| u, v  | shared["A"], ["B"]      | columns and rows, zeros where later tasks will put theirs |
| s_t   | tasks[t]["z"]           | selector, real numbers |
| -     | tasks[t]["rest"], ["stats"] | biases, BatchNorm, head |
| r1, r2 | method.{first_factors,factors} | of the first and of each later task, per layer |

At first u, v and the head's kernel are orthogonal, the selector is 1 for new factors; for those of
earlier tasks it is 0 and biases are too (method.start = "fresh", the notebook's), or both are what
they were in the task before ("task_before"): with few steps per task the selector hardly leaves 0,
and what earlier tasks learned stays unused. Nothing is forgotten.

configs/iru_pmnist20.py is the published notebook: method.loss = "mse" on the softmax, raw pixels,
first_rate. Convolutions, weight decay and BatchNorm are ours: its network has none of them. A
convolution's kernel is the matrix [kh * kw * I, J]. No layer gets more factors at once than its
full rank.

References: R. Hyder et al., "Incremental task learning with incremental rank updates", 2022;
spec/baselines.md 3.15.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from halrp_jax import keys
from halrp_jax.methods import dictionary
from halrp_jax.training import losses, networks
from halrp_jax.training.fit import learning_rate_decay, make_fit, recipe
from halrp_jax.types import Method, State, nothing_learned, one_at_a_time
from halrp_jax.weights import trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(dictionary.Config):
  """The keys `method.*` of this method."""

  # 64 and 4 found by `tune` at .25: docs/measurements.md; published for another network: 11 and 1
  first_factors: int = keys.whole(64, 1, None, "r1: factors of every layer in the first task")
  factors: int = keys.whole(4, 1, None, "r2: factors that each later task adds to every layer")
  loss: str = keys.one_of(
    "cross_entropy", ("cross_entropy", "mse"), "mse: between softmax and one-hot labels"
  )
  first_rate: float = keys.number(
    1.0, 0, None, "factor on the learning rate in the first task", True
  )


_orthogonal = jax.nn.initializers.orthogonal()


def make(config, model, benchmark) -> Method:
  m, decay = config.method, learning_rate_decay(config, benchmark)
  initialize = networks.make_initialize(model, benchmark)
  shapes = dictionary.kernel_shapes(initialize)
  ranks = [
    {n: min(r, *dictionary.matrix_shape(s)) for n, s in shapes.items()}
    for r in (m.first_factors, m.factors)
  ]
  l2 = networks.l2_coefficient(m)

  def num_factors(tasks: int) -> dict[str, int]:
    """By layer, after so many tasks."""
    later = max(tasks - 1, 0)
    return {n: (tasks > 0) * ranks[0][n] + later * ranks[1][n] for n in shapes}

  width = num_factors(len(benchmark.tasks))

  def dictionary_of(params, frozen):
    """A and B with the new factors in their places."""
    at = frozen["at"]
    a = {n: lax.dynamic_update_slice(x, params["u"][n], (0, at[n])) for n, x in frozen["A"].items()}
    b = {n: lax.dynamic_update_slice(x, params["v"][n], (at[n], 0)) for n, x in frozen["B"].items()}
    return a, b

  def kernels_of(params, frozen):
    return dictionary.compose(*dictionary_of(params, frozen), params["z"], shapes)

  def apply_fn(params, frozen, stats, image, train_mode, key):
    weights = trees.join(kernels_of(params, frozen), params["rest"])
    return networks.apply_model(model, weights, stats, image, train_mode, key)

  def squared_error(params, frozen, stats, batch, train_mode, key):
    logits, stats = apply_fn(params, frozen, stats, batch.image, train_mode, key)
    return mean_squared_error(logits, batch.label, batch.num_classes), logits, stats

  def fit_with(rate):
    how = recipe(config)
    return make_fit(
      config,
      decay,
      apply_fn,
      lambda params, frozen: l2 * losses.sum_squares(kernels_of(params, frozen)),
      objective_fn=squared_error if m.loss == "mse" else None,
      how=how._replace(learning_rate=rate * how.learning_rate),
    )

  fits = fit_with(m.first_rate), fit_with(1.0)
  extend = jax.jit(dictionary_of)

  def learn(state, tasks, key, store):
    (task,) = tasks
    t = len(state.tasks)
    init_key, factor_key, fit_key = jax.random.split(key, 3)
    params, stats = initialize(init_key)
    shared = state.shared or _no_factors(shapes, width)
    new, at = ranks[min(t, 1)], num_factors(t)
    frozen = shared | {"at": {n: jnp.int32(i) for n, i in at.items()}}
    head_key, *keys = jax.random.split(factor_key, 1 + len(shapes))
    z = {n: jnp.zeros(width[n]) for n in shapes}
    rest = _without_biases(trees.split(params)[1], shapes)
    head = {
      k: _orthogonal(head_key, x.shape) if k == "kernel" else x for k, x in rest[trees.HEAD].items()
    }
    if t and m.start == "task_before":
      z, rest, stats = (state.tasks[-1][k] for k in ("z", "rest", "stats"))
    start = _draw_factors(keys, shapes, new) | {
      "z": {n: jnp.where(_places(width[n], at[n], new[n]), 1.0, x) for n, x in z.items()},
      "rest": rest | {trees.HEAD: head},
    }
    phase = store.child("train")
    got, stats = fits[min(t, 1)](start, stats, frozen, task, fit_key, config.epochs, phase)
    a, b = extend({k: got[k] for k in ("u", "v")}, frozen)
    num_classes = jnp.int32(task.num_classes)
    learned = {"z": got["z"], "rest": got["rest"], "stats": stats, "num_classes": num_classes}
    return State({"A": a, "B": b}, (*state.tasks, learned)), {"ranks": num_factors(t + 1)}

  def size(state):
    counts = [num_factors(t) for t in range(1, len(state.tasks) + 1)]
    coefficients = sum(sum(count.values()) for count in counts)
    return dictionary.size(state, shapes, counts[-1], coefficients, 0, 0)

  logits, merge = dictionary.make_network(model, shapes)
  serves = dictionary.SERVES
  return Method(nothing_learned, one_at_a_time, learn, logits, size, merge, serves)


def mean_squared_error(logits: jax.Array, label: jax.Array, num_classes: jax.Array) -> jax.Array:
  """Between softmax and one-hot labels, over batch and classes. logits [B, K_max], label [B]"""
  p = jax.nn.softmax(losses.mask_classes(logits, num_classes))
  squares = (p - jax.nn.one_hot(label, p.shape[-1])) ** 2
  return jnp.mean(jnp.sum(squares, -1)) / num_classes


def _no_factors(shapes, width):
  sizes = {n: dictionary.matrix_shape(s) for n, s in shapes.items()}
  return {
    "A": {n: jnp.zeros((d, width[n])) for n, (d, _) in sizes.items()},
    "B": {n: jnp.zeros((width[n], j)) for n, (_, j) in sizes.items()},
  }


def _draw_factors(keys, shapes, num):
  """Orthonormal columns u and rows v."""
  u, v = {}, {}
  for key, (n, s) in zip(keys, shapes.items(), strict=True):
    (d, j), (u_key, v_key) = dictionary.matrix_shape(s), jax.random.split(key)
    u[n], v[n] = _orthogonal(u_key, (d, num[n])), _orthogonal(v_key, (num[n], j))
  return {"u": u, "v": v}


def _places(width: int, at: int, num: int) -> np.ndarray:
  """Which of a dictionary's factors are the `num` ones from `at` on."""
  return (np.arange(width) >= at) & (np.arange(width) < at + num)


def _without_biases(rest, shapes):
  """Everything but the kernels, all biases 0."""
  biases, others = trees.split_biases(rest, (*shapes, trees.HEAD))
  return trees.join_biases(jax.tree.map(jnp.zeros_like, biases), others)
