"""APD: additive parameter decomposition, shared weights that go on learning + sparse additions.

Update rule: theta_i = sigma * m_i + tau_i + L_c(i), m_i = sigmoid(v_i). Task t trains sigma, v_t
and all tau_i, i <= t, by Adam on its cross-entropy and
  l1 sum_i |tau_i| + a/2 sum_{i<t} |theta_i - theta_i*|^2 + l2 (|tau_t|^2 + |v_t|^2),
theta_i* being theta_i when task t began; sigma has l2 |sigma|^2 in task 0 alone.

| paper   | here                      | meaning |
|---------|---------------------------|---------|
| sigma   | shared["kernels"]         | kernels that all tasks share and train |
| m_i     | tasks[i]["mask"]          | a factor for every output of a layer |
| tau_i   | tasks[i]["tau"]           | of the kernel's shape; in prediction 0 where at most l1 |
| L       | shared["local"][layer]    | what the tasks of a cluster share, [1 + K, ..]; first 0 |
| c(i)    | tasks[i]["cluster"]       | row of it, by layer |
| a       | method.retroactive        | |
| s, k, beta | method.{every,clusters,close} | consolidation |

Phases: training; after every s tasks hierarchical consolidation: the tau_i of a layer are clustered
by k-means; where the members of a cluster differ by at most beta, the middle becomes L and leaves
their tau_i. The retroactive term makes old tasks forget little, not nothing.

method.old_tau = "closed_form" is ours: given sigma, what minimises the terms of an old task is
tau_i = soft(theta_i* - sigma * m_i, l1/a), so that these terms are a function of sigma alone (a
Huber loss) and an old tau needs no gradient and no moments.

Reference: J. Yoon et al., "Scalable and order-robust continual learning with additive parameter
decomposition", 2020, Eq. 3 to 6 and its program; spec/baselines.md 3.7.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.cluster import KMeans

from halrp_jax import keys
from halrp_jax.methods import additive
from halrp_jax.training import losses, networks, sizes
from halrp_jax.training.fit import learning_rate_decay, make_fit
from halrp_jax.types import Method, State, nothing_learned, one_at_a_time
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


def check(config) -> list[str]:
  m = config.method
  if m.every and m.clusters > m.every:
    return [f"method.clusters must be <= method.every, got {m.clusters} and {m.every}"]
  return []


def make(config, model, benchmark) -> Method:
  m, decay = config.method, learning_rate_decay(config, benchmark)
  l2, closed = networks.l2_coefficient(m), m.old_tau == "closed_form"

  def network(kernels, rest, stats, image, train_mode, key):
    return networks.apply_model(model, trees.join(kernels, rest), stats, image, train_mode, key)

  def apply_fn(params, frozen, *args):
    mask = additive.masks_of(params["v"])
    return network(additive.compose(params["sigma"], mask, params["tau"]), params["rest"], *args)

  def of_task_before(sigma, old, mask, anchor):
    """What penalises the change of the tasks before in one layer; all with leading axes [P]."""
    shift = anchor - additive.times(sigma, mask)  # what tau would have to be; L drops out
    if closed:
      return jnp.sum(huber(shift, m.l1, m.retroactive))
    return m.l1 * losses.sum_absolute(old) + 0.5 * m.retroactive * jnp.sum((old - shift) ** 2)

  def penalty(params, frozen):
    own = m.l1 * losses.sum_absolute(params["tau"])
    own += l2 * losses.sum_squares((params["tau"], params["v"]))
    own += frozen["l2_sigma"] * losses.sum_squares(params["sigma"])
    return own + sum(
      of_task_before(w, params["old"].get(n), frozen["mask"][n], frozen["anchor"][n])
      for n, w in params["sigma"].items()
    )

  fit = make_fit(config, decay, apply_fn, penalty)
  initialize = networks.make_initialize(model, benchmark)

  def kernels_of(shared, p):
    local = {n: x[p["cluster"][n]] for n, x in shared["local"].items()}
    tau = jax.tree.map(jnp.add, additive.prune(p["tau"], m.l1), local)
    return additive.compose(shared["kernels"], p["mask"], tau)

  def logits(shared, p, image):
    return network(kernels_of(shared, p), p["rest"], p["stats"], image, False, None)[0]

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, v_key, fit_key, cluster_key = jax.random.split(key, 4)
    sigma, rest, stats = _start(state, *initialize(init_key))
    mask, old = (_stack(state.tasks, what, sigma) for what in ("mask", "tau"))
    anchor = {n: additive.times(w, mask[n]) + old[n] for n, w in sigma.items()}
    l2_sigma = jnp.float32(0 if state.tasks else l2)
    frozen = {"mask": mask, "anchor": anchor, "l2_sigma": l2_sigma}
    start = {
      "sigma": sigma,
      "tau": sigma,
      "old": {} if closed else old,
      "v": additive.draw_v(v_key, sigma),
      "rest": rest,
    }
    got, stats = fit(start, stats, frozen, task, fit_key, config.epochs, store.child("train"))
    if closed:
      shift = {n: anchor[n] - additive.times(w, mask[n]) for n, w in got["sigma"].items()}
      got["old"] = jax.tree.map(lambda x: soft(x, m.l1 / m.retroactive), shift)
    learned = {
      "mask": additive.masks_of(got["v"]),
      "tau": got["tau"],
      "cluster": {n: jnp.int32(0) for n in sigma},
      "rest": got["rest"],
      "stats": stats,
      "num_classes": jnp.int32(task.num_classes),
    }
    before = [
      p | {"tau": {n: x[i] for n, x in got["old"].items()}} for i, p in enumerate(state.tasks)
    ]
    local = state.shared.get("local") or {n: jnp.zeros((1, *w.shape)) for n, w in sigma.items()}
    shared = state.shared | {"kernels": got["sigma"], "local": local}
    state = State(shared, (*before, learned))
    if m.every and len(state.tasks) % m.every == 0:
      seed = int(jax.random.randint(cluster_key, (), 0, 2**31 - 1))
      state = store.once("consolidate", lambda: consolidate(state, m.clusters, m.close, seed))
    return state, {}

  def size(state):
    """`training_only`: what the next task holds for those before (theta*, where tau is trained its
    gradient and moments too) and the centroids."""
    pruned = tuple(p | {"tau": additive.prune(p["tau"], m.l1)} for p in state.tasks)
    local = [x[1:] for x in state.shared["local"].values()]
    nonzero = sum(int(jnp.count_nonzero(x)) for x in local)
    held = len(pruned) * sizes.count_leaves(state.shared["kernels"]) * (1 if closed else 4)
    held += sizes.count_leaves(state.shared.get("centroid", {}))
    return additive.size(State(state.shared, pruned), sizes.count_leaves(local), nonzero, held)

  def merge(state, t):
    p = state.tasks[t]
    return trees.join(kernels_of(state.shared, p), p["rest"]), p["stats"]

  serves = ("kernels", "local")
  return Method(nothing_learned, one_at_a_time, learn, logits, size, merge, serves)


def soft(x: jax.Array, threshold: float) -> jax.Array:
  """What minimises threshold |tau| + (tau - x)^2 / 2 over tau."""
  return jnp.sign(x) * jnp.maximum(jnp.abs(x) - threshold, 0)


def huber(x: jax.Array, l1: float, a: float) -> jax.Array:
  """min over tau of l1 |tau| + a/2 (tau - x)^2."""
  size, bend = jnp.abs(x), l1 / a
  return jnp.where(size <= bend, 0.5 * a * x * x, l1 * (size - 0.5 * bend))


def _start(state, params, stats):
  """sigma, biases and BatchNorm as the task before left them, a fresh head."""
  kernels, rest = trees.split(params)
  if not state.tasks:
    return kernels, rest, stats
  before = state.tasks[-1]
  rest = before["rest"] | {trees.HEAD: rest[trees.HEAD]}
  return state.shared["kernels"], rest, before["stats"]


def _stack(tasks, what: str, sigma):
  """One array [P, ..] per layer; zeros up to a power of two, so that few shapes are compiled."""
  num, width = len(tasks), 1 << (len(tasks) - 1).bit_length() if tasks else 0
  shape = {n: w.shape[-1:] if what == "mask" else w.shape for n, w in sigma.items()}
  empty = {n: jnp.zeros((width - num, *s)) for n, s in shape.items()}
  return {n: jnp.concatenate([*(p[what][n][None] for p in tasks), empty[n]]) for n in sigma}


def consolidate(state: State, clusters: int, close: float, seed: int) -> State:
  """Hierarchical consolidation (Alg. 1, lines 9 to 14) of every layer by itself.

  Args:
    state: after a multiple of s tasks.
    clusters: k, how many clusters the latest s tasks bring.
    close: beta.
    seed: of the choice of tasks whose tau new clusters start from.

  Returns:
    The state with tau, L and clusters of all tasks renewed.
  """
  tasks = [dict(p, tau={}, cluster={}) for p in state.tasks]
  local, centroid = {}, {}
  for name, shared in state.shared["local"].items():
    full = np.stack([np.asarray(p["tau"][name] + shared[p["cluster"][name]]) for p in state.tasks])
    known = np.asarray(state.shared.get("centroid", {}).get(name, full[:0]))
    label, centroid[name] = _k_means(full, known, clusters, np.random.default_rng(seed))
    commons = [_common(full[label == c], close) for c in range(len(centroid[name]))]
    local[name] = jnp.stack([jnp.zeros(full.shape[1:]), *(value for value, _ in commons)])
    for p, tau, c in zip(tasks, full, label, strict=True):
      p["tau"][name] = jnp.asarray(np.where(commons[c][1], 0, tau))
      p["cluster"][name] = jnp.int32(c + 1)
  return State(state.shared | {"local": local, "centroid": centroid}, tuple(tasks))


def _k_means(rows, known, num_new: int, rng):
  """-> cluster of every row, centroids; it starts from those known and from some of the rows."""
  start = np.concatenate([known, rows[np.sort(rng.choice(len(rows), num_new, replace=False))]])
  flat = rows.reshape(len(rows), -1)
  found = KMeans(len(start), init=start.reshape(len(start), -1), n_init=1, max_iter=_ITERATIONS)
  label = found.fit_predict(flat)
  return label, jnp.asarray(found.cluster_centers_, jnp.float32).reshape(start.shape)


def _common(members: np.ndarray, close: float):
  """The middle of what all members hold almost equally, else 0; where that is. One alone: 0."""
  if len(members) < 2:
    shape = members.shape[1:]
    return np.zeros(shape, np.float32), np.zeros(shape, bool)
  high, low = members.max(0), members.min(0)
  near = high - low <= close
  return np.where(near, (high + low) / 2, 0).astype(np.float32), near
