"""CLR: a frozen base and a depthwise 3x3 convolution per task after each of its convolutions.

Update rule: y = K_t * (W * x), K_t one 3x3 kernel for each channel, the identity at first. Task 0
trains W; then every task, the first included, trains K_t, BatchNorm and a fresh head by Adam on the
cross-entropy + l2 |K_t|^2.

| paper | here                       | meaning |
|-------|----------------------------|---------|
| W     | shared["kernels"]          | kernels after the first task, frozen for ever; biases too |
| K_t   | tasks[t]["adapters"]       | [3, 3, C] by layer; none after 1x1 convolutions |
| -     | shared["norm"], ["stats"]  | BatchNorm with method.bn_scope = "shared" |
| -     | tasks[t]["norm"], ["stats"] | BatchNorm with bn_scope = "task"; population statistics |
| -     | tasks[t]["head"]           | |

Phases: base (task 0 alone), reprogram (every task), both of config.epochs.

Shared BatchNorm, which every task goes on training, is what the HALRP authors' port does: earlier
tasks then change, its only forgetting. With BatchNorm per task, as in the original, there is none.
A bias before BatchNorm stays behind the depthwise kernel: BatchNorm takes it out either way, but at
the border of the image. Dense layers are frozen and have no adapter.

Reference: Y. Ge et al., "CLR: channel-wise lightweight reprogramming for continual learning", 2023,
Sect. 3; spec/baselines.md 3.13. The original starts from an ImageNet network.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from halrp_jax import keys
from halrp_jax.nn.conv import depthwise_conv
from halrp_jax.training import losses, networks, sizes
from halrp_jax.training.fit import learning_rate_decay, make_fit
from halrp_jax.types import Method, State, nothing_learned, one_at_a_time
from halrp_jax.weights import trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.NetworkConfig):
  """The keys `method.*` of this method."""

  bn_scope: str = keys.one_of(
    "shared", ("shared", "task"), "one BatchNorm that all tasks train, or each its own"
  )


def make(config, model, benchmark) -> Method:
  m, decay = config.method, learning_rate_decay(config, benchmark)
  l2 = networks.l2_coefficient(m)
  own_norm = m.bn_scope == "task"

  def apply_fn(params, frozen, stats, image, train_mode, key):
    rest = trees.join_biases(frozen["biases"], params["norm"] | {trees.HEAD: params["head"]})
    weights = trees.join(frozen["kernels"], rest)
    with nn.intercept_methods(_reprogrammed(params["adapters"])):
      return networks.apply_model(model, weights, stats, image, train_mode, key)

  def penalty(params, frozen):
    return l2 * losses.sum_squares(params["adapters"])

  fit_base = make_fit(config, decay, *networks.plain_network(model))
  fit = make_fit(config, decay, apply_fn, penalty)
  initialize = networks.make_initialize(model, benchmark)

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, fit_key, base_key = jax.random.split(key, 3)
    params, stats = initialize(init_key)
    head = params[trees.HEAD]
    shared = state.shared
    if not state.tasks:
      base, stats = fit_base(
        params, stats, {"l2": l2}, task, base_key, config.epochs, store.child("base")
      )
      shared = _freeze(base, stats)
    start = {"adapters": _identities(shared["kernels"]), "norm": shared["norm"], "head": head}
    frozen = {k: shared[k] for k in ("kernels", "biases")}
    trained, stats = fit(
      start, shared["stats"], frozen, task, fit_key, config.epochs, store.child("reprogram")
    )
    norm = {"norm": trained["norm"], "stats": stats}
    learned = trained | (norm if own_norm else {"norm": {}, "stats": {}})
    shared = shared if own_norm else shared | norm
    learned |= {"num_classes": jnp.int32(task.num_classes)}
    return State(shared, (*state.tasks, learned)), {}

  def logits(shared, learned, image):
    params = learned | {"norm": (learned if own_norm else shared)["norm"]}
    stats = learned["stats"] or shared["stats"]
    return apply_fn(params, shared, stats, image, False, None)[0]

  serves = ("kernels", "biases", "norm", "stats")
  return Method(nothing_learned, one_at_a_time, learn, logits, size, serves=serves)


def _freeze(params, stats):
  """The base: kernels and biases; BatchNorm as the first task leaves it."""
  kernels, rest = trees.split(params)
  biases, others = trees.split_biases(rest, kernels)
  norm = {name: x for name, x in others.items() if name != trees.HEAD}
  return {"kernels": kernels, "biases": biases, "norm": norm, "stats": stats}


def _identities(kernels):
  """A depthwise kernel that changes nothing for every convolution wider than 1x1."""
  identity = jnp.zeros((3, 3)).at[1, 1].set(1.0)
  return {
    name: jnp.tile(identity[:, :, None], w.shape[-1])
    for name, w in kernels.items()
    if w.ndim == 4 and w.shape[:2] != (1, 1)
  }


def _reprogrammed(adapters):
  def intercept(next_fun, args, kwargs, context):
    y = next_fun(*args, **kwargs)
    name = "/".join(context.module.path)
    if context.method_name != "__call__" or name not in adapters:
      return y
    return depthwise_conv(y, adapters[name])

  return intercept


def size(state: State):
  """Every task adds its depthwise kernels, every later one its head and its own BatchNorm."""
  shared, (first, *later) = state.shared, state.tasks
  norm = first["norm"] or shared["norm"]
  rest = trees.join_biases(shared["biases"], norm | {trees.HEAD: first["head"]})
  base = sizes.network_count(shared["kernels"], rest, int(first["num_classes"]))
  adapters = sizes.count_leaves([p["adapters"] for p in state.tasks])
  private = [p["norm"] | {trees.HEAD: p["head"]} for p in later]
  counts = [
    sizes.count_rest(rest, {}, int(p["num_classes"])).counted
    for rest, p in zip(private, later, strict=True)
  ]
  return sizes.dense_size(base, adapters + sum(counts), *sizes.count_statistics(state))
