"""Population statistics: BatchNorm statistics over all training images of a task.

With them a prediction for one image does not depend on other images. The statistics of a layer are
mean and unbiased variance of its input when every earlier layer uses its own population statistics.
They are found in rounds: each measures all layers with the statistics of the previous round. After
k rounds the first k layers are exact, so a network with L BatchNorm layers needs at most L rounds,
whatever the statistics are at the start.
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
from halrp_jax.types import Array, Learn, Method, Params, State, Task, UserError


def wrap_learn(
  method: Method, logits_fn: Callable[[dict, Params, Array], Array], batch_size: int
) -> Learn:
  """Wraps `Method.learn`, so that each new task state gets the statistics of its own images.

  They are measured after the last change of the task's weights in `learn`, and never again: when
  later tasks change shared weights, their images say nothing about the inputs of an earlier task's
  layers.

  Args:
    method: its `learn` and `serves` are used.
    logits_fn: (shared, tasks[t], image) -> logits, evaluating with stored statistics.
    batch_size: images per pass through the network; it changes nothing but rounding.
  """
  measure = make_measure(logits_fn, batch_size)

  def learn(state, tasks, key, store):
    state, history = method.learn(state, tasks, key, store)
    shared = method.served(state)
    known, new = state.tasks[: -len(tasks)], state.tasks[-len(tasks) :]

    # `check` waits for all processes, but only process 0 measures
    check = store.progress.check if processes.count() == 1 else lambda: None
    measured = []
    for i, (task_state, task) in enumerate(zip(new, tasks, strict=True)):

      def measure_task(task_state=task_state, task=task):
        return processes.run_on_leader(lambda: measure(shared, task_state, task, check))

      stats = jax.tree.map(jnp.asarray, store.once(f"population{i}", measure_task))
      measured.append(task_state._replace(stats=stats))
      store.progress.check()
    return State(state.shared, (*known, *measured)), history

  return learn


def require_measurable(model: nn.Module, image_shape: tuple[int, ...]) -> None:
  """Checks that the inputs of all BatchNorm layers of a network can be recorded.

  Args:
    model: the network, before it is trained.
    image_shape: [H, W, C] of its input.

  Raises:
    UserError: if a layer is inside `nn.remat`, `nn.scan` or another transformation of Flax.
  """

  def run(key):
    image, found = jnp.zeros((1, *image_shape)), {}
    variables = model.init(key, image, train=False)
    with nn.intercept_methods(_recorder(found, jnp.ones(1))):
      model.apply(variables, image, train=False)
    return found

  try:
    # jax.jit, not jax.eval_shape: only it raises the error if a value leaks out of a layer
    jax.jit(run)(jax.random.key(0))
  except jax.errors.UnexpectedTracerError as e:
    raise UserError(
      f"{type(model).__name__}: a BatchNorm inside nn.remat, nn.scan or nn.vmap can't be measured "
      "over all images; set method.batch_norm=running, or take it out of the transformation"
    ) from e


def complete(state: State, stats: Params) -> State:
  """Adds missing statistics to a method state as NaN, which means "not measured".

  States that older versions stored have none if their network evaluated with the statistics of the
  batch.

  Args:
    state: the method state; one that has statistics is returned as it is.
    stats: statistics of any value, or their shapes and dtypes.
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
  """Returns the indices of the tasks whose statistics were not measured (`complete`)."""

  def is_unmeasured(task_state):
    return any(np.isnan(x).any() for x in jax.tree.leaves(task_state.stats))

  return tuple(t for t, p in enumerate(state.tasks) if is_unmeasured(p))


def _has_statistics(state: State, task_state: Params) -> bool:
  """Returns whether a task has BatchNorm statistics, of its own or shared."""
  return bool(task_state.stats or state.shared.get("stats"))


def make_measure(
  logits_fn: Callable[[dict, Params, Array], Array], batch_size: int
) -> Callable[..., Params]:
  """Builds `measure(shared, task_state, task, check) -> stats`, which measures the statistics.

  They are a tree like `task_state.stats`: {"mean", "var"} for every BatchNorm layer, {} without
  BatchNorm. `check` is called between two passes over the images and may raise `Stopped`.
  Everything is computed on one device, so that one device, several devices and several processes
  give the same bits.

  Args:
    logits_fn: (shared, tasks[t], image) -> logits, evaluating with stored statistics.
    batch_size: images per pass through the network.
  """

  @jax.jit
  def moments(shared, task_state, image, inputs, index, weight):
    """Returns {path: (count, mean [C], sum of squared deviations [C])} of some images [B]."""
    found = {}
    with nn.intercept_methods(_recorder(found, weight)):
      logits_fn(shared, task_state, batches.prepare_images(image[index], inputs))
    return {path: _merge(parts) for path, parts in found.items()}

  def measure(shared: Params, task_state: Params, task: Task, check=lambda: None) -> Params:
    stats = task_state.stats or shared.get("stats", {})
    if not jax.tree.leaves(stats):
      return stats
    shared, task_state, stats, inputs = _on_one_device((shared, task_state, stats, task.inputs))
    split = task.train if batches.is_on_host(task.train) else _on_one_device(task.train)
    rows, weights = _padded_batches(len(split.index), batch_size)
    flat = _flatten(stats)
    for _ in flat:
      current = task_state._replace(stats=_unflatten(flat))
      parts = []
      for (part, own), weight in zip(
        batches.windows(split, rows, _on_one_device), weights, strict=True
      ):
        index = np.asarray(part.index)[own]
        parts.append(moments(shared, current, part.image, inputs, index, weight))
        if batches.is_on_host(split):
          jax.block_until_ready(parts[-1])
      measured = flat | _statistics(parts)
      if jax.tree.all(jax.tree.map(np.array_equal, measured, flat)):
        break
      flat = measured
      check()
    return _unflatten(flat)

  return measure


def _padded_batches(num_images: int, batch_size: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Returns rows [B] and weights [B] of batches of B images; those that fill it up weigh 0."""
  parts = batches.consecutive(num_images, batch_size)
  weights = [(np.arange(batch_size) < len(part)).astype(np.float32) for part in parts]
  return [np.resize(part, batch_size) for part in parts], weights


def _on_one_device(tree: Params) -> Params:
  """Returns a tree with its arrays on the first device of this process."""
  device = jax.local_devices()[0]

  def place(x):
    if isinstance(x, jax.Array) and x.is_fully_replicated:
      x = x.addressable_data(0)
    return jax.device_put(x, device)

  return jax.tree.map(place, tree)


def _recorder(found: dict[str, list], weight: jax.Array) -> Callable:
  """Builds an interceptor that appends the moments of every BatchNorm's input to `found`.

  Args:
    found: by layer path the moments of every call.
    weight: [B], 1 for images that count and 0 for others.
  """

  def intercept(next_fun, args, kwargs, context):
    module = context.module
    if isinstance(module, BatchNorm | nn.BatchNorm) and context.method_name == "__call__":
      count, mean, squares = _moments(args[0], getattr(module, "axis", -1), weight)
      if getattr(module, "num_in", 0):
        # this BatchNorm holds the bias of the layer before it, which its input does not include
        mean += module.get_variable("params", "input_bias")
      found.setdefault("/".join(module.path), []).append((count, mean, squares))
    return next_fun(*args, **kwargs)

  return intercept


def _moments(
  x: jax.Array, axis: int | Sequence[int], weight: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns count, mean and sum of squared deviations over all axes except the features' `axis`."""
  features = {a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis)}
  axes = tuple(a for a in range(x.ndim) if a not in features)
  x, weight = x.astype(jnp.float32), weight.reshape(-1, *(1,) * (x.ndim - 1))
  count = jnp.sum(weight) * np.prod([x.shape[a] for a in axes[1:]], dtype=np.float32)
  mean = jnp.sum(weight * x, axes, keepdims=True) / count
  squares = jnp.sum(weight * (x - mean) ** 2, axes)
  return count, mean.reshape(squares.shape), squares


def _merge(parts: Sequence) -> tuple:
  """Combines the moments of several sets of values into those of one set (Chan et al., 1979)."""
  if len(parts) == 1:
    return parts[0]
  counts, means, squares = (sum(p[i] * (p[0] if i == 1 else 1) for p in parts) for i in range(3))
  mean = means / counts
  return counts, mean, squares + sum(n * (m - mean) ** 2 for n, m, _ in parts)


def _statistics(parts: Sequence) -> dict[str, dict[str, np.ndarray]]:
  """Combines the moments of all batches in float64; returns {path: {"mean", "var"}} in float32."""
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
  """Returns statistics as {path of a layer: {"mean", "var"}}."""
  flat: dict[str, dict[str, np.ndarray]] = {}
  for path, x in traverse_util.flatten_dict(stats).items():
    flat.setdefault("/".join(path[:-1]), {})[path[-1]] = np.asarray(x)
  return flat


def _unflatten(flat: dict[str, dict]) -> Params:
  """Inverts `_flatten`."""
  return traverse_util.unflatten_dict({tuple(p.split("/")): x for p, x in flat.items()})
