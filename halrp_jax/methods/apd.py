"""APD: additive parameter decomposition, shared weights that go on learning + sparse additions.

Update rule: theta_i = sigma * m_i + tau_i + L_c(i), m_i = sigmoid(v_i). Task t trains sigma, v_t
and all tau_i, i <= t, by Adam on its cross-entropy and
  l1 sum_i |tau_i| + a/2 sum_{i<t} |theta_i - theta_i*|^2 + l2 (|tau_t|^2 + |v_t|^2),
theta_i* being theta_i when task t began; sigma has l2 |sigma|^2 in task 0 alone.

| paper   | here                   | meaning |
|---------|------------------------|---------|
| sigma   | shared["kernels"]      | kernels that all tasks share and train |
| L       | shared["local"][layer] | what the tasks of a cluster share, [1 + K, ..]; first 0 |
| -       | shared["centroid"]     | of the clusters, by layer [K, ..]; for training alone |
| a       | method.retroactive     | |
| s, k, beta | method.{every,clusters,close} | consolidation |

Phases: training; after every s tasks hierarchical consolidation: the tau_i of a layer are clustered
by k-means; where the members of a cluster differ by at most beta, the middle becomes L and leaves
their tau_i. The retroactive term makes old tasks forget little, not nothing.

method.old_tau = "closed_form" is ours: given sigma, what minimises the terms of an old task is
tau_i = soft(theta_i* - sigma * m_i, l1/a), so that these terms are a function of sigma alone (a
Huber loss) and an old tau needs no gradient and no moments.

Deviations from the authors' program: it trains the v_i of old tasks too, against a flag of its own,
and draws the biases anew for every task; here old v_i stay as they are, and biases start where the
task before left them.

Reference: J. Yoon et al., "Scalable and order-robust continual learning with additive parameter
decomposition", 2020 (arXiv 1902.09432), Alg. 1, Eq. 3 to 6, and its program.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.cluster import KMeans

from halrp_jax import keys
from halrp_jax.methods import additive
from halrp_jax.training import losses, networks, sizes
from halrp_jax.training.fit import make_fit
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Method, Network, Params, Size, State, Task
from halrp_jax.weights import trees

_ITERATIONS = 100  # of k-means, as in APD's program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(additive.Config):
  """The keys `method.*` of this method."""

  retroactive: float = keys.number(
    100.0, 0, None, "a: coefficient on the change of the tasks before", True
  )
  old_tau: str = keys.one_of(
    "trained", ("trained", "closed_form"), "how the tau of the tasks before follow sigma"
  )
  every: int = keys.whole(5, 0, None, "s: tasks between two consolidations; 0: never")
  clusters: int = keys.whole(2, 1, None, "k: clusters for every s tasks")
  close: float = keys.number(1e-2, 0, None, "beta: difference up to which values become one")


class TaskState(NamedTuple):
  mask: dict[str, Array]  # m_i by layer, [J]: a factor for every output
  tau: dict[str, Array]  # tau_i by layer, of the kernel's shape; in prediction 0 where at most l1
  cluster: dict[str, Array]  # c(i), int32 [] by layer: row of L
  rest: Params  # biases, BatchNorm and head
  stats: Params  # BatchNorm's statistics
  num_classes: Array  # int32 []


def check(config: keys.Config) -> list[str]:
  """Returns errors that concern several keys."""
  m = config.method
  if m.every and m.clusters > m.every:
    return [f"method.clusters must be <= method.every, got {m.clusters} and {m.every}"]
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
    state = _renew(config, state, trained, frozen, stats, task)
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


# --- Algorithm 1: the objective and what it starts from --------------------------------


def _make_fit(config: Config, setup: Setup) -> Callable:
  """Builds `make_fit` of Eq. 3: `params` has sigma, v_t, the tau of all tasks, biases and head."""
  l2 = networks.l2_coefficient(config)

  def apply_fn(params, frozen, *args):
    mask = additive.masks_of(params["v"])
    kernels = additive.compose(params["sigma"], mask, params["tau"])
    return networks.apply_model(setup.model, trees.join(kernels, params["rest"]), *args)

  def of_task_before(sigma, old, mask, anchor):
    """Returns the penalty of one layer for the tasks before; all with leading axes [P]."""
    shift = anchor - additive.times(sigma, mask)  # what tau would have to be; L drops out
    if config.old_tau == "closed_form":
      return jnp.sum(huber(shift, config.l1, config.retroactive))
    change = 0.5 * config.retroactive * jnp.sum((old - shift) ** 2)
    return config.l1 * losses.sum_absolute(old) + change

  def penalty(params, frozen):
    own = config.l1 * losses.sum_absolute(params["tau"])
    own += l2 * losses.sum_squares((params["tau"], params["v"]))
    own += frozen["l2_sigma"] * losses.sum_squares(params["sigma"])
    return own + sum(
      of_task_before(w, params["old"].get(n), frozen["mask"][n], frozen["anchor"][n])
      for n, w in params["sigma"].items()
    )

  return make_fit(setup, apply_fn, penalty)


def _start(config: Config, state: State, params: Params, stats: Params, v_key):
  """Returns what is trained, what is held (`frozen`), and statistics.

  sigma, biases and BatchNorm are as the task before left them, the head is fresh.

  Args:
    config: of the method.
    state: before the task.
    params: fresh ones.
    stats: fresh ones.
    v_key: for the masks.
  """
  sigma, rest = trees.split(params)
  if state.tasks:
    before = state.tasks[-1]
    sigma, stats = state.shared["kernels"], before.stats
    rest = networks.fresh_head(before.rest, rest)
  mask, old = (_stack(state.tasks, field, sigma) for field in ("mask", "tau"))
  # Alg. 1: restore theta_i*; without L, which drops out of its change
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


def _renew(config: Config, state: State, trained, frozen, stats: Params, task: Task) -> State:
  """Returns the state with the new task, with the tau of all tasks and sigma as trained."""
  sigma, old = trained["sigma"], trained["old"]
  if config.old_tau == "closed_form":
    anchor, mask = frozen["anchor"], frozen["mask"]
    shift = {n: anchor[n] - additive.times(w, mask[n]) for n, w in sigma.items()}
    old = jax.tree.map(lambda x: soft(x, config.l1 / config.retroactive), shift)
  before = tuple(
    p._replace(tau={n: x[i] for n, x in old.items()}) for i, p in enumerate(state.tasks)
  )
  learned = TaskState(
    mask=additive.masks_of(trained["v"]),
    tau=trained["tau"],
    cluster={n: jnp.int32(0) for n in sigma},
    rest=trained["rest"],
    stats=stats,
    num_classes=jnp.int32(task.num_classes),
  )
  local = state.shared.get("local") or {n: jnp.zeros((1, *w.shape)) for n, w in sigma.items()}
  return state._replace(tasks=before).append(learned, kernels=sigma, local=local)


def _kernels_of(config: Config, shared: dict, task: TaskState) -> dict[str, jax.Array]:
  """Returns theta_i = sigma * m_i + tau_i + L_c(i), tau_i pruned."""
  local = {n: x[task.cluster[n]] for n, x in shared["local"].items()}
  tau = jax.tree.map(jnp.add, additive.prune(task.tau, config.l1), local)
  return additive.compose(shared["kernels"], task.mask, tau)


def soft(x: jax.Array, threshold: float) -> jax.Array:
  """Returns what minimises threshold |tau| + (tau - x)^2 / 2 over tau."""
  return jnp.sign(x) * jnp.maximum(jnp.abs(x) - threshold, 0)


def huber(x: jax.Array, l1: float, a: float) -> jax.Array:
  """Returns the minimum over tau of l1 |tau| + a/2 (tau - x)^2."""
  size, bend = jnp.abs(x), l1 / a
  return jnp.where(size <= bend, 0.5 * a * x * x, l1 * (size - 0.5 * bend))


def _stack(tasks, field: str, sigma):
  """Stacks a field of the tasks, one array [P, ..] per layer.

  It has zeros up to a power of two, so that few shapes are compiled.
  """
  num, width = len(tasks), 1 << (len(tasks) - 1).bit_length() if tasks else 0
  shape = {n: w.shape[-1:] if field == "mask" else w.shape for n, w in sigma.items()}
  empty = {n: jnp.zeros((width - num, *s)) for n, s in shape.items()}
  rows = [getattr(p, field) for p in tasks]
  return {n: jnp.concatenate([*(x[n][None] for x in rows), empty[n]]) for n in sigma}


# --- Algorithm 1: hierarchical consolidation --------------------------------------------


def consolidate(state: State, clusters: int, close: float, seed: int) -> State:
  """Consolidates every layer by itself (hierarchical consolidation: Alg. 1, lines 9 to 14).

  Args:
    state: after a multiple of s tasks.
    clusters: k, how many clusters the latest s tasks bring.
    close: beta.
    seed: of the choice of tasks whose tau new clusters start from.

  Returns:
    The state with tau, L and clusters of all tasks renewed.
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


def _k_means(rows, known, num_new: int, rng):
  """Clusters the rows, from the centroids known and from some of the rows.

  -> cluster of every row, centroids
  """
  start = np.concatenate([known, rows[np.sort(rng.choice(len(rows), num_new, replace=False))]])
  flat = rows.reshape(len(rows), -1)
  found = KMeans(len(start), init=start.reshape(len(start), -1), n_init=1, max_iter=_ITERATIONS)
  label = found.fit_predict(flat)
  return label, jnp.asarray(found.cluster_centers_, jnp.float32).reshape(start.shape)


def _common(members: np.ndarray, close: float):
  """Returns the middle of what all members hold almost equally, else 0, and where that is.

  A single member has nothing in common with others: 0 everywhere.
  """
  if len(members) < 2:
    shape = members.shape[1:]
    return np.zeros(shape, np.float32), np.zeros(shape, bool)
  high, low = members.max(0), members.min(0)
  near = high - low <= close
  return np.where(near, (high + low) / 2, 0).astype(np.float32), near


# --- size ---------------------------------------------------------------------------------


def size(config: Config, state: State) -> Size:
  """Counts the pruned tau, masks, L, BatchNorm and heads.

  For training alone are the centroids and what the next task holds for those before: theta*, and
  where their tau is trained its values, gradient and moments.
  """
  pruned = tuple(p._replace(tau=additive.prune(p.tau, config.l1)) for p in state.tasks)
  local = [x[1:] for x in state.shared["local"].values()]
  nonzero = sum(int(jnp.count_nonzero(x)) for x in local)
  held = len(pruned) * sizes.count_leaves(state.shared["kernels"])
  held *= 1 if config.old_tau == "closed_form" else 4
  held += sizes.count_leaves(state.shared.get("centroid", {}))
  return additive.size(State(state.shared, pruned), sizes.count_leaves(local), nonzero, held)
