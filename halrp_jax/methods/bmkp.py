"""BMKP: bilevel memory with knowledge projection; kernels in a basis of outputs that tasks share.

Update rule: W_t = B[:, :k_t] A_t. A working memory, one ordinary network, learns the task; what its
layers put out extends B; its kernels are kept as A_t = B' W and trained once more, B being held.

| paper | here                          | meaning |
|-------|-------------------------------|---------|
| W     | shared["working"]["params"]   | [J, d], here a kernel [.., J]; for training alone |
| B     | shared["basis"][layer]        | [J, J]: orthonormal columns, then zeros |
| k_t   | tasks[t]["num_directions"]    | columns of B that task t uses |
| A_t   | tasks[t]["params"], kernels   | [k_t, d], here a kernel [.., J]: k_t columns, then zeros |
| -     | tasks[t]["params"], ["stats"] | biases, BatchNorm, head |
| E     | `outside`                     | W - B B' W |
| lambda, gamma | method.{strength,threshold} | |

Phases: (1) learn: from the working memory of the task before, with a fresh head, the cross-entropy
+ lambda sum_l r(E_l), no r in task 0. (2) project: B grows by GPM's rule (bases.py) until it
carries a share gamma of the outputs of method.samples training images, taken before BatchNorm and
ReLU. (3) retrain: A_t, biases, BatchNorm and head, from phase 1's. Nothing is forgotten.

r(E) = tr(E'E) / |E'E|_1 (paper) is small where E has rank 1: few directions are new. It takes two
products of a layer's d x d with d x J per step, method.form = "code" (that of the released program)
none. A layer whose B has all J columns has no r.

Deviations: a layer whose first direction alone carries gamma keeps it, where GPM's first-task rule
keeps none; method.l2 is on W in phase 1 and on A_t in 3 (equal in norm). The released program
trains neither heads nor BatchNorm after task 0, by oversight; here as in the paper. How the HALRP
paper shared its epochs out is not said: method.{learn,retrain}_share.

Reference: W. Sun et al., "Decoupling learning and remembering: a bilevel memory framework with
knowledge projection for task-incremental learning", 2023, Eq. 4; spec/baselines.md 3.12.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from halrp_jax import keys, models
from halrp_jax.nn.conv import times
from halrp_jax.training import batches, networks, sizes
from halrp_jax.training.fit import learning_rate_decay, make_fit
from halrp_jax.types import Method, Size, State, nothing_learned, one_at_a_time
from halrp_jax.weights import bases, perturb, taps, trees


# lambda and gamma: the paper's on CIFAR-100. Half the epochs for phase 1, half for 3: 51.5 % on the
# validation images of CIFAR100-Split (a tenth of the images, form=code); all for both: 49.0 %.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.NetworkConfig):
  """The keys `method.*` of this method."""

  learn_share: float = keys.number(0.5, 0, 1, "epochs of phase 1 in those of a task", True)
  retrain_share: float = keys.number(0.5, 0, 1, "epochs of phase 3 in those of a task")
  strength: float = keys.number(1.0, 0, None, "lambda: coefficient on r")
  form: str = keys.one_of("paper", ("paper", "code"), "whose r")
  threshold: float = keys.number(
    0.96, 0, 1, "gamma: share of the outputs' energy that the basis carries"
  )
  first_threshold: float = keys.number(0.95, 0, 1, "gamma of the first task")
  samples: int = keys.whole(500, 1, None, "training images of a task that its basis is made from")


def make(config, model, benchmark) -> Method:
  m, decay = config.method, learning_rate_decay(config, benchmark)
  learn_epochs = math.ceil(m.learn_share * config.epochs)
  retrain_epochs = math.floor(m.retrain_share * config.epochs)
  plain, penalty = networks.plain_network(model)

  def apply_projected(params, frozen, stats, image, train_mode, key):
    variables = {"params": params, "batch_stats": stats}
    args = (model, frozen["basis"], variables, image)
    if not train_mode:
      return perturb.apply_in_bases(*args, train=False), stats
    logits, new = perturb.apply_in_bases(
      *args, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
    )
    return logits, new.get("batch_stats", {})

  def penalty_of_learning(params, frozen):
    kernels, _ = trees.split(params)
    total = penalty(params, frozen)
    for name, weight in frozen["weight"].items():
      basis = frozen["basis"][name]
      e = outside(kernels[name], basis)
      total += weight * (paper_form(e) if m.form == "paper" else code_form(e, basis))
    return total

  fit_first = make_fit(config, decay, plain, penalty)
  fit_working = make_fit(config, decay, plain, penalty_of_learning)
  fit_projected = make_fit(config, decay, apply_projected, penalty)
  initialize = networks.make_initialize(model, benchmark)
  to_coefficients = jax.jit(_to_coefficients)
  moments_fn = jax.jit(_moments_of(models.in_training(config, model)))

  def learn(state, tasks, key, store):
    (task,) = tasks
    t, frozen = len(state.tasks), {"l2": networks.l2_coefficient(m)}
    init_key, learn_key, sample_key, retrain_key = jax.random.split(key, 4)
    params, stats = initialize(init_key)
    phase = store.child("learn")
    if not t:
      params, stats = fit_first(params, stats, frozen, task, learn_key, learn_epochs, phase)
      memory = _empty_bases(trees.split(params)[0])
    else:
      memory, working = state.shared, state.shared["working"]
      params = working["params"] | {trees.HEAD: params[trees.HEAD]}
      held = frozen | {"basis": memory["basis"], "weight": _weights(memory, m.strength)}
      params, stats = fit_working(
        params, working["stats"], held, task, learn_key, learn_epochs, phase
      )

    def project():
      parts = batches.over_samples(
        functools.partial(moments_fn, params, stats),
        task,
        sample_key,
        m.samples,
        batches.evaluation_batch_size(config),
      )
      return _grow(memory, parts, m.threshold if t else m.first_threshold)

    memory = store.once("project", project)
    frozen |= {"basis": memory["basis"]}
    start = to_coefficients(params, memory["basis"])
    phase = store.child("retrain")
    got, own = fit_projected(start, stats, frozen, task, retrain_key, retrain_epochs, phase)
    learned = {
      "params": got,
      "stats": own,
      "num_directions": memory["num_directions"],
      "num_classes": jnp.int32(task.num_classes),
    }
    features = {name: x for name, x in params.items() if name != trees.HEAD}
    shared = memory | {"working": {"params": features, "stats": stats}}
    ranks = {name: int(k) for name, k in memory["num_directions"].items()}
    return State(shared, (*state.tasks, learned)), {"ranks": ranks}

  def logits(shared, learned, image):
    return apply_projected(learned["params"], shared, learned["stats"], image, False, None)[0]

  def merge(state, t):
    p, basis = state.tasks[t], state.shared["basis"]
    kernels, rest = trees.split(p["params"])
    kernels = {n: times(a, basis[n].T) for n, a in kernels.items()}
    return trees.join(kernels, rest), p["stats"]

  return Method(nothing_learned, one_at_a_time, learn, logits, size, merge, ("basis",))


# --- phase 1: what r is ---------------------------------------------------------------


def outside(kernel: jax.Array, basis: jax.Array) -> jax.Array:
  """E', what of a kernel [.., J] lies outside its basis [J, J], as a matrix [d, J]."""
  w = kernel.reshape(-1, kernel.shape[-1])
  return w - w @ (basis @ basis.T)  # no gradient passes the product in brackets


def paper_form(e: jax.Array) -> jax.Array:
  """tr(E'E) / |E'E|_1, Eq. 4, `e` being E' [d, J].

  |G|_1 is linear in G but where signs change: with S = sign(E'E) its gradient is 2 E S, a product
  that the value needs anyway.
  """
  product = lax.stop_gradient(jnp.sign(e @ e.T) @ e)
  norm = jnp.sum(e * product)
  norm = 2 * norm - lax.stop_gradient(norm)
  return jnp.sum(e * e) / jnp.where(norm > 0, norm, 1)


def code_form(e: jax.Array, basis: jax.Array) -> jax.Array:
  """tr(M) / sum(M), M = B B' + E E', without forming M."""
  trace = jnp.sum(basis * basis) + jnp.sum(e * e)
  return trace / (jnp.sum(jnp.sum(basis, 0) ** 2) + jnp.sum(jnp.sum(e, 1) ** 2))


def _weights(memory, strength):
  """lambda by layer; 0 where nothing lies outside but rounding, whose r has a boundless slope."""
  return {
    name: jnp.float32(strength if int(k) < len(memory["basis"][name]) else 0)
    for name, k in memory["num_directions"].items()
  }


# --- phase 2 --------------------------------------------------------------------------


def _empty_bases(kernels):
  return {
    "basis": {n: jnp.zeros((w.shape[-1],) * 2) for n, w in kernels.items()},
    "num_directions": {n: jnp.int32(0) for n in kernels},
  }


def _moments_of(model):
  """Builds (params, stats, image [B, H, W, C]) -> Z Z' [J, J] of every layer's outputs."""

  def moments(params, stats, image):
    variables = {"params": params, "batch_stats": stats}
    found = taps.layer_outputs(model, trees.layer_names(params), variables, image)
    rows = {name: z.reshape(-1, z.shape[-1]) for name, z in found.items()}
    return {name: z.T @ z for name, z in rows.items()}

  return moments


def _grow(memory, parts, energy):
  """The bases after a task, and how many directions they have."""
  grown = {"basis": {}, "num_directions": {}}
  for name, basis in memory["basis"].items():
    count = int(memory["num_directions"][name])
    moment = sum(part[name].astype(np.float64) for part in parts)
    args = (basis, count, moment, energy)
    basis, num = bases.grow_padded(*args, first=not count, least=len(basis))
    if not num:
      basis, num = bases.grow_padded(*args, first=False, least=len(basis))
    grown["basis"][name] = jnp.asarray(basis)
    grown["num_directions"][name] = jnp.int32(num)
  return grown


def _to_coefficients(params, basis):
  """Kernels W -> B' W, everything else as it is."""
  kernels, rest = trees.split(params)
  return trees.join({n: times(w, basis[n]) for n, w in kernels.items()}, rest)


# --- size -----------------------------------------------------------------------------


def size(state: State) -> Size:
  """The bases, and per task coefficients, BatchNorm and head; less than the base at first.

  The working memory is for training.
  """
  shared, (first, *later) = state.shared, state.tasks
  kernels, rest = trees.split(first["params"])
  base = sizes.network_count(kernels, rest, int(first["num_classes"]))
  products = sum(len(b) * int(shared["num_directions"][n]) for n, b in shared["basis"].items())
  for p in state.tasks:
    products += sum(w.size // w.shape[-1] * int(p["num_directions"][n]) for n, w in kernels.items())
  rests = [trees.split(p["params"])[1] for p in later]
  counts = [
    sizes.count_rest(x, kernels, int(p["num_classes"])) for x, p in zip(rests, later, strict=True)
  ]
  counted = products - sizes.count_leaves(kernels) + sum(c.counted for c in counts)
  uncounted = sum(c.biases for c in counts) + sizes.count_leaves([p["stats"] for p in state.tasks])
  return sizes.dense_size(base, counted, uncounted, sizes.count_leaves(shared["working"]))
