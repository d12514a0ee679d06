"""APD: additive parameter decomposition into weights that all tasks train and sparse additions.

Update rule: theta_i = sigma * m_i + tau_i + L_c(i) with m_i = sigmoid(v_i). Task t trains sigma,
v_t and all tau_i, i <= t, with Adam on its cross-entropy plus
  l1 sum_i |tau_i| + a/2 sum_{i<t} |theta_i - theta_i*|^2 + l2 (|tau_t|^2 + |v_t|^2),
where theta_i* is theta_i at the start of task t. In task 0, l2 |sigma|^2 is added. Here l2 stands
for method.l2, halved if method.l2_half.

| paper   | here                   | meaning |
|---------|------------------------|---------|
| sigma   | shared["kernels"]      | kernels that all tasks share and train |
| L       | shared["local"][layer] | values that a cluster's tasks share [1 + K, ..]; row 0: zeros |
| -       | shared["centroid"]     | clusters' centroids by layer [K, ..]; for training alone |
| a       | method.retroactive     | coefficient of the retroactive term |
| s, k, beta | method.{every,clusters,close} | settings of the consolidation |

Phases: training, and hierarchical consolidation. After every s tasks, consolidation clusters the
tau_i of each layer by k-means. Where the members of a cluster differ by at most beta, their
midrange moves to L and these entries of tau_i become 0. The retroactive term keeps forgetting
small, but not zero.

method.old_tau = "closed_form" is an addition of this package. For given sigma, the terms of an old
task are minimal at tau_i = soft(theta_i* - sigma * m_i, l1/a). With this tau_i they are a function
of sigma alone, a Huber loss, and an old tau needs no gradient and no moments.

Deviations from the authors' code: it also trains the v_i of old tasks, although it has a flag
that should freeze them, and draws the biases anew for every task. Here old v_i stay as they are,
and biases start from those of the previous task.

Reference: J. Yoon et al., "Scalable and order-robust continual learning with additive parameter
decomposition", 2020 (arXiv 1902.09432), Alg. 1, Eq. 3 to 6, and its code.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax import keys
from halrp_jax.methods import additive
from halrp_jax.training import losses, networks, sizes
from halrp_jax.training.fit import Fit, make_fit
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Method, Network, Params, Size, State, Task
from halrp_jax.weights import trees

_ITERATIONS = 100  # of k-means, as in APD's code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(additive.Config):
  """Config keys `method.*` of APD."""

  retroactive: float = keys.number(
    100.0, 0, None, "a: coefficient on the change of earlier tasks", True
  )
  old_tau: str = keys.one_of(
    "trained",
    ("trained", "closed_form"),
    "how the tau of earlier tasks follow sigma: trained, or the minimum for given sigma",
  )
  every: int = keys.whole(5, 0, None, "s: tasks between two consolidations; 0: never")
  clusters: int = keys.whole(2, 1, None, "k: clusters for every s tasks")
  close: float = keys.number(1e-2, 0, None, "beta: difference up to which values become one")


class TaskState(NamedTuple):
  """State of a task."""

  mask: dict[str, Array]  # m_i by layer, [J]: a factor for every output
  tau: dict[str, Array]  # tau_i by layer, in the kernel's shape; pruned for predictions alone
  cluster: dict[str, Array]  # c(i), int32 [] by layer: row of L
  rest: Params  # biases, BatchNorm and head
  stats: Params  # BatchNorm's statistics
  num_classes: Array  # int32 []


def check(config: keys.Config) -> list[str]:
  """Returns the errors of a run's config that concern several keys of APD."""
  m = config.method
  assert isinstance(m, Config)
  if m.every and m.clusters > m.every:
    return [
      f"method.clusters = {m.clusters} must be at most method.every = {m.every}: lower it, or set "
      "method.every=0"
    ]
  return []


def make(config: Config, setup: Setup) -> Method:
  """Builds APD."""
  fit, initialize = _make_fit(config, setup), networks.make_initialize(setup)

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, v_key, fit_key, cluster_key = jax.random.split(key, 4)
    start, frozen, stats = _start(config, state, *initialize(init_key), v_key)
    args = (start, stats, frozen, task, fit_key, setup.epochs, store.child("train"))
    trained, stats = fit(*args)  # Alg. 1: minimise Eq. 3
    state = _update(config, state, trained, frozen, stats, task)
    if config.every and len(state.tasks) % config.every == 0:
      seed = int(jax.random.randint(cluster_key, (), 0, 2**31 - 1))
      state = store.once(
        "consolidated", lambda: consolidate(state, config.clusters, config.close, seed)
      )
    return state, {}

  def network(shared, task):
    kernels = _kernels_of(config, shared, task)
    return Network(trees.join(kernels, task.rest), task.stats)

  serves = ("kernels", "local")
  return Method(learn, functools.partial(size, config), network, serves=serves)


# --- Algorithm 1: the objective and its start -------------------------------------------


def _make_fit(config: Config, setup: Setup) -> Fit:
  """Builds `fit` for Eq. 3.

  `params` has "sigma", "v" and "tau" of the task, "old" with the tau of earlier tasks, and "rest"
  with biases, BatchNorm and head. `frozen` is from `_start`.
  """
  l2 = networks.l2_coefficient(config)

  def apply_fn(params, frozen, *args):
    mask = additive.masks_of(params["v"])
    kernels = additive.compose(params["sigma"], mask, params["tau"])
    return networks.apply_model(setup.model, trees.join(kernels, params["rest"]), *args)

  def of_earlier_tasks(sigma, old, mask, anchor):
    """Returns the penalty of one layer; old, mask and anchor have a leading axis of tasks [P]."""
    shift = anchor - additive.times(
      sigma, mask
    )  # tau_i that keeps theta_i at its anchor; both leave out L, which cancels
    if config.old_tau == "closed_form":
      return jnp.sum(huber(shift, config.l1, config.retroactive))
    change = 0.5 * config.retroactive * jnp.sum((old - shift) ** 2)
    return config.l1 * losses.sum_absolute(old) + change

  def penalty(params, frozen):
    own = config.l1 * losses.sum_absolute(params["tau"])
    own += l2 * losses.sum_squares((params["tau"], params["v"]))
    own += frozen["l2_sigma"] * losses.sum_squares(params["sigma"])
    return own + sum(
      of_earlier_tasks(w, params["old"].get(n), frozen["mask"][n], frozen["anchor"][n])
      for n, w in params["sigma"].items()
    )

  return make_fit(setup, apply_fn, penalty)


def _start(
  config: Config, state: State, params: Params, stats: Params, v_key: jax.Array
) -> tuple[dict, dict, Params]:
  """Returns `params`, `frozen` and `stats` at the start of a task.

  sigma, biases and BatchNorm are those of the previous task. The head is fresh, tau starts at
  sigma, and v near 0.

  Args:
    config: config of the method.
    state: method state before the task.
    params: freshly initialized parameters.
    stats: freshly initialized statistics.
    v_key: random key for v.
  """
  sigma, rest = trees.split(params)
  if state.tasks:
    previous = state.tasks[-1]
    sigma, stats = state.shared["kernels"], previous.stats
    rest = networks.fresh_head(previous.rest, rest)
  mask, old = (_stack(state.tasks, field, sigma) for field in ("mask", "tau"))
  # Alg. 1: restore theta_i*; anchor and theta_i both leave out L, which cancels
  anchor = {n: additive.times(w, mask[n]) + old[n] for n, w in sigma.items()}
  l2_sigma = jnp.float32(0 if state.tasks else networks.l2_coefficient(config))
  start = {
    "sigma": sigma,
    "tau": sigma,
    "old": {} if config.old_tau == "closed_form" else old,
    "v": additive.draw_v(v_key, sigma),
    "rest": rest,
  }
  return start, {"mask": mask, "anchor": anchor, "l2_sigma": l2_sigma}, stats


def _update(
  config: Config, state: State, trained: dict, frozen: dict, stats: Params, task: Task
) -> State:
  """Returns the method state with the new task, and with sigma and all tau as trained."""
  sigma, old = trained["sigma"], trained["old"]
  if config.old_tau == "closed_form":
    anchor, mask = frozen["anchor"], frozen["mask"]
    shift = {n: anchor[n] - additive.times(w, mask[n]) for n, w in sigma.items()}
    old = jax.tree.map(lambda x: soft(x, config.l1 / config.retroactive), shift)
  earlier = tuple(
    p._replace(tau={n: x[i] for n, x in old.items()}) for i, p in enumerate(state.tasks)
  )
  task_state = TaskState(
    mask=additive.masks_of(trained["v"]),
    tau=trained["tau"],
    cluster={n: jnp.int32(0) for n in sigma},
    rest=trained["rest"],
    stats=stats,
    num_classes=jnp.int32(task.num_classes),
  )
  local = state.shared.get("local") or {n: jnp.zeros((1, *w.shape)) for n, w in sigma.items()}
  return state._replace(tasks=earlier).append(task_state, kernels=sigma, local=local)


def _kernels_of(config: Config, shared: dict, task: TaskState) -> dict[str, Array]:
  """Returns the kernels theta_i = sigma * m_i + tau_i + L_c(i), with tau_i pruned."""
  local = {n: x[task.cluster[n]] for n, x in shared["local"].items()}
  tau = jax.tree.map(jnp.add, additive.prune(task.tau, config.l1), local)
  return additive.compose(shared["kernels"], task.mask, tau)


def soft(x: jax.Array, threshold: float) -> jax.Array:
  """Returns the tau that minimises threshold |tau| + (tau - x)^2 / 2, by element."""
  return jnp.sign(x) * jnp.maximum(jnp.abs(x) - threshold, 0)


def huber(x: jax.Array, l1: float, a: float) -> jax.Array:
  """Returns the minimum over tau of l1 |tau| + a/2 (tau - x)^2, by element."""
  magnitude, bend = jnp.abs(x), l1 / a
  return jnp.where(magnitude <= bend, 0.5 * a * x * x, l1 * (magnitude - 0.5 * bend))


def _stack(
  tasks: Sequence[TaskState], field: str, sigma: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
  """Stacks a field of all task states to one array [P, ..] per layer.

  P is a power of two, so that few shapes are compiled; the additional rows are zeros.
  """
  num, width = len(tasks), 1 << (len(tasks) - 1).bit_length() if tasks else 0
  shape = {n: w.shape[-1:] if field == "mask" else w.shape for n, w in sigma.items()}
  empty = {n: jnp.zeros((width - num, *s)) for n, s in shape.items()}
  rows = [getattr(p, field) for p in tasks]
  return {n: jnp.concatenate([*(x[n][None] for x in rows), empty[n]]) for n in sigma}


# --- Algorithm 1: hierarchical consolidation --------------------------------------------


def consolidate(state: State, clusters: int, close: float, seed: int) -> State:
  """Consolidates the tau of all tasks, layer by layer (Alg. 1, lines 9 to 14).

  Args:
    state: method state after a multiple of s tasks.
    clusters: k, the number of clusters that are added for the latest s tasks.
    close: beta.
    seed: seed for choosing the tasks whose tau are the first centroids of the new clusters.

  Returns:
    The state with new tau, L and clusters of all tasks.
  """
  taus, clusters_of = [{} for _ in state.tasks], [{} for _ in state.tasks]
  local, centroid = {}, {}
  for name, shared in state.shared["local"].items():
    full = np.stack([np.asarray(p.tau[name] + shared[p.cluster[name]]) for p in state.tasks])
    known = np.asarray(state.shared.get("centroid", {}).get(name, full[:0]))
    label, centroid[name] = _k_means(full, known, clusters, np.random.default_rng(seed))
    commons = [_common(full[label == c], close) for c in range(len(centroid[name]))]
    local[name] = jnp.stack([jnp.zeros(full.shape[1:]), *(value for value, _ in commons)])
    for i, (tau, c) in enumerate(zip(full, label, strict=True)):
      taus[i][name] = jnp.asarray(np.where(commons[c][1], 0, tau))
      clusters_of[i][name] = jnp.int32(c + 1)
  tasks = tuple(
    p._replace(tau=tau, cluster=cluster)
    for p, tau, cluster in zip(state.tasks, taus, clusters_of, strict=True)
  )
  return State(state.shared | {"local": local, "centroid": centroid}, tasks)


def _k_means(
  rows: np.ndarray, known: np.ndarray, num_new: int, rng: np.random.Generator
) -> tuple[np.ndarray, jax.Array]:
  """Clusters rows by k-means.

  Args:
    rows: array [T, ..] of the rows to cluster.
    known: first centroids of the old clusters [K, ..].
    num_new: number of new clusters, whose first centroids are rows chosen at random.
    rng: generator for choosing the rows.

  Returns:
    The cluster of every row [T], and the centroids [K + num_new, ..].
  """
  from sklearn.cluster import KMeans  # takes a second to import, and no other method needs it

  start = np.concatenate([known, rows[np.sort(rng.choice(len(rows), num_new, replace=False))]])
  flat = rows.reshape(len(rows), -1)
  settings: dict[str, Params] = {"init": start.reshape(len(start), -1), "n_init": 1}
  found = KMeans(len(start), max_iter=_ITERATIONS, **settings)
  label = found.fit_predict(flat)
  return label, jnp.asarray(found.cluster_centers_, jnp.float32).reshape(start.shape)


def _common(members: np.ndarray, close: float) -> tuple[np.ndarray, np.ndarray]:
  """Returns the values that all members of a cluster have in common, and where they are.

  Values are common if they differ by at most `close`; their middle stands for them, and 0 is
  returned elsewhere. A single member has none in common with others.
  """
  if len(members) < 2:
    shape = members.shape[1:]
    return np.zeros(shape, np.float32), np.zeros(shape, bool)
  high, low = members.max(0), members.min(0)
  near = high - low <= close
  return np.where(near, (high + low) / 2, 0).astype(np.float32), near


# --- size ---------------------------------------------------------------------------------


def size(config: Config, state: State) -> Size:
  """Returns the size with pruned tau, masks, L, BatchNorm and heads.

  Training alone needs the centroids and, for each task, theta*. If the tau of earlier tasks are
  trained, it needs their gradients and Adam's two moments too. The tau themselves count as stored.
  """
  pruned = tuple(p._replace(tau=additive.prune(p.tau, config.l1)) for p in state.tasks)
  local = [x[1:] for x in state.shared["local"].values()]
  nonzero = sum(int(jnp.count_nonzero(x)) for x in local)
  training_only = len(pruned) * sizes.count_leaves(state.shared["kernels"])
  training_only *= 1 if config.old_tau == "closed_form" else 4
  training_only += sizes.count_leaves(state.shared.get("centroid", {}))
  num_local = sizes.count_leaves(local)
  return additive.size(State(state.shared, pruned), num_local, nonzero, training_only)
