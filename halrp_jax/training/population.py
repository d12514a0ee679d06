"""BatchNorm statistics over all training images of a task, for a model that answers for one image.

The statistics of a layer are mean and unbiased variance of what reaches it when every layer before
it uses its own population statistics. They are the one fixed point of "measure all layers with the
statistics of the round before": after k rounds the first k layers are exact, so a network with L
BatchNorm layers needs at most L passes over the images, whatever it starts from.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from halrp_jax.devices import processes
from halrp_jax.nn.norm import BatchNorm
from halrp_jax.training import batches
from halrp_jax.types import Method, Params, State, Task, UserError


def keep(method: Method, logits_fn: Callable, batch_size: int) -> Callable:
  """Wraps `Method.learn`: each new task keeps the statistics of its own training images.

  They are taken after the last change of the task's weights in `learn`, and never again: where
  later tasks change shared weights, their images say nothing about what an earlier task's layers
  see.

  Args:
    method: with `learn` and `serves`.
    logits_fn: (shared, tasks[t], image) -> logits, evaluating with stored statistics.
    batch_size: images per pass of the network; of no effect but for rounding.
  """
  measure = make_measure(logits_fn, batch_size)

  def learn(state, tasks, key, store):
    state, history = method.learn(state, tasks, key, store)
    shared = method.served(state)
    known, new = state.tasks[: -len(tasks)], state.tasks[-len(tasks) :]

    check = store.keep.check if processes.count() == 1 else lambda: None
    measured = []
    for i, (learned, task) in enumerate(zip(new, tasks, strict=True)):

      def taken(learned=learned, task=task):
        return processes.run_on_leader(lambda: measure(shared, learned, task, check))

      stats = jax.tree.map(jnp.asarray, store.once(f"population{i}", taken))
      measured.append(learned._replace(stats=stats))
      store.keep.check()
    return State(state.shared, (*known, *measured)), history

  return learn


def require_measurable(model: nn.Module, image_shape: tuple[int, ...]) -> None:
  """Refuses a network whose BatchNorm layers can't be watched from outside, before it is trained.

  Raises:
    UserError: if a layer is inside `nn.remat`, `nn.scan` or another transformation of Flax's.
  """

  def run(key):
    image, found = jnp.zeros((1, *image_shape)), {}
    variables = model.init(key, image, train=False)
    with nn.intercept_methods(_tap(found, jnp.ones(1))):
      model.apply(variables, image, train=False)
    return found

  try:
    jax.jit(run)(jax.random.key(0))  # tracing alone does not find what leaks out of a layer
  except jax.errors.UnexpectedTracerError as e:
    raise UserError(
      f"{type(model).__name__}: a BatchNorm inside nn.remat, nn.scan or nn.vmap can't be measured "
      "over all images; set method.batch_norm=running, or take it out of the transformation"
    ) from e


def complete(state: State, stats: Params) -> State:
  """Fills in the statistics that older versions did not keep, as NaN: they were not measured.

  Args:
    state: of a run whose network evaluated with the statistics of the batch.
    stats: statistics of any value, for their shapes.
  """
  if not jax.tree.leaves(stats) or any(_has_statistics(state, p) for p in state.tasks):
    return state
  unknown = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), stats)

  def fill(tree):
    if not isinstance(tree, dict):
      return tree
    return {k: unknown if k == "stats" and not v else fill(v) for k, v in tree.items()}

  tasks = tuple(p._replace(stats=unknown) for p in state.tasks)
  return State(fill(state.shared), tasks)


def unmeasured(state: State) -> tuple[int, ...]:
  """Returns the positions of the tasks whose statistics were not measured (`complete`)."""

  def unknown(learned):
    return any(np.isnan(x).any() for x in jax.tree.leaves(learned.stats))

  return tuple(t for t, p in enumerate(state.tasks) if unknown(p))


def _has_statistics(state: State, learned: Params) -> bool:
  return bool(learned.stats or state.shared.get("stats"))


def make_measure(logits_fn: Callable, batch_size: int) -> Callable:
  """Builds `measure(shared, learned, task, check)`: statistics as {layer: {"mean", "var"}}.

  `check` is called between two passes over the images and may raise (`Keep.check`).
  Runs whole on one device, so that one device, several, and several processes give the same bits.
  A network without BatchNorm gives an empty tree.
  """

  @jax.jit
  def moments(shared, learned, image, inputs, index, weight):
    """Returns {path: (count, mean [C], sum of squared deviations [C])} of some images [B]."""
    found = {}
    with nn.intercept_methods(_tap(found, weight)):
      logits_fn(shared, learned, batches.prepare_images(image[index], inputs))
    return {path: _merge(parts) for path, parts in found.items()}

  def measure(shared: Params, learned: Params, task: Task, check=lambda: None) -> Params:
    stats = learned.stats or shared.get("stats", {})
    if not jax.tree.leaves(stats):
      return stats
    shared, learned, stats, image, inputs = _on_one_device(
      (shared, learned, stats, task.train.image, task.inputs)
    )
    batches = list(_padded(np.asarray(task.train.index), batch_size))
    flat = _flatten(stats)
    for _ in flat:
      held = learned._replace(stats=_unflatten(flat))
      parts = [moments(shared, held, image, inputs, *batch) for batch in batches]
      measured = flat | _statistics(parts)
      if jax.tree.all(jax.tree.map(np.array_equal, measured, flat)):
        break
      flat = measured
      check()
    return _unflatten(flat)

  return measure


def _padded(index: np.ndarray, batch_size: int):
  """Yields (index [B], weight [B]) with B = `batch_size`; what fills up the last has weight 0."""
  for start in range(0, len(index), batch_size):
    part = index[start : start + batch_size]
    weight = (np.arange(batch_size) < len(part)).astype(np.float32)
    yield np.resize(part, batch_size), weight


def _on_one_device(tree: Params) -> Params:
  """Returns the arrays as they are on this process's first device."""
  device = jax.local_devices()[0]

  def place(x):
    if isinstance(x, jax.Array) and x.is_fully_replicated:
      x = x.addressable_data(0)
    return jax.device_put(x, device)

  return jax.tree.map(place, tree)


def _tap(found: dict[str, list], weight: jax.Array) -> Callable:
  """Builds an interceptor that adds the moments of every BatchNorm's input to `found`."""

  def intercept(next_fun, args, kwargs, context):
    module = context.module
    if isinstance(module, BatchNorm | nn.BatchNorm) and context.method_name == "__call__":
      count, mean, squares = _moments(args[0], getattr(module, "axis", -1), weight)
      if getattr(module, "num_in", 0):  # stored as if the bias of the layer before had been added
        mean += module.get_variable("params", "input_bias")
      found.setdefault("/".join(module.path), []).append((count, mean, squares))
    return next_fun(*args, **kwargs)

  return intercept


def _moments(x: jax.Array, axis, weight: jax.Array):
  """Returns count, mean and sum of squared deviations over all axes but the features' `axis`."""
  features = {a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis)}
  axes = tuple(a for a in range(x.ndim) if a not in features)
  x, weight = x.astype(jnp.float32), weight.reshape(-1, *(1,) * (x.ndim - 1))
  count = jnp.sum(weight) * np.prod([x.shape[a] for a in axes[1:]], dtype=np.float32)
  mean = jnp.sum(weight * x, axes, keepdims=True) / count
  squares = jnp.sum(weight * (x - mean) ** 2, axes)
  return count, mean.reshape(squares.shape), squares


def _merge(parts: Sequence):
  """Returns the moments of several sets of values as those of one (Chan et al., 1979)."""
  if len(parts) == 1:
    return parts[0]
  counts, means, squares = (sum(p[i] * (p[0] if i == 1 else 1) for p in parts) for i in range(3))
  mean = means / counts
  return counts, mean, squares + sum(n * (m - mean) ** 2 for n, m, _ in parts)


def _statistics(parts: Sequence) -> dict[str, dict[str, np.ndarray]]:
  """Pools the moments of all batches in float64. Returns {path: {"mean", "var"}} in float32."""
  pooled = {}
  parts = jax.tree.map(lambda x: np.asarray(x, np.float64), parts)
  for path in parts[0]:
    count, mean, squares = _merge([part[path] for part in parts])
    pooled[path] = {
      "mean": np.float32(mean),
      "var": np.float32(squares / max(count - 1, 1)),
    }
  return pooled


def _flatten(stats: Params) -> dict[str, dict[str, np.ndarray]]:
  """Returns {path of a layer: {"mean", "var"}}."""
  layers_ = {}
  for path, x in traverse_util.flatten_dict(stats).items():
    layers_.setdefault("/".join(path[:-1]), {})[path[-1]] = np.asarray(x)
  return layers_


def _unflatten(flat: dict[str, dict]) -> Params:
  """Inverts `_flatten`."""
  return traverse_util.unflatten_dict({tuple(p.split("/")): x for p, x in flat.items()})
