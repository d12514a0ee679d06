"""CLR: a frozen base and a depthwise 3x3 convolution per task after each of its convolutions.

Update rule: y = K_t * (W * x), where * is convolution and K_t has one 3x3 kernel for each channel,
at first the identity. Task 0 trains W. Then every task, the first included, trains K_t, BatchNorm
and a fresh head with Adam on the cross-entropy + l2 |K_t|^2.

| paper | here                          | meaning |
|-------|-------------------------------|---------|
| W     | shared["kernels"], ["biases"] | those after the first task, then frozen |
| K_t   | tasks[t].adapters             | depthwise kernels |
| -     | shared["norm"], ["stats"]     | BatchNorm with method.bn_scope = "shared" |

Phases: base (task 0 alone) and reprogram (every task), each of `epochs` epochs.

As in the HALRP authors' port, all tasks share BatchNorm by default and every task trains it. This
changes earlier tasks, and is the only cause of forgetting. With BatchNorm per task, as in the
original, nothing is forgotten. A bias before BatchNorm is added after the depthwise convolution
instead of before it. BatchNorm removes it in both cases, except at the border of the image. Dense
layers are frozen and have no adapter.

Reference: Y. Ge et al., "CLR: channel-wise lightweight reprogramming for continual learning", 2023,
Sect. 3. The original starts from an ImageNet network.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from halrp_jax import keys
from halrp_jax.nn.conv import depthwise_conv
from halrp_jax.training import losses, networks, sizes
from halrp_jax.training.fit import make_fit, plain_fit
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Method, Params, Size, State
from halrp_jax.weights import trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.NetworkConfig):
  """Config keys `method.*` of CLR."""

  bn_scope: str = keys.one_of(
    "shared", ("shared", "task"), "whether all tasks share BatchNorm, or each task has its own"
  )


class TaskState(NamedTuple):
  """State of a task."""

  adapters: dict[str, Array]  # K_t, [3, 3, C] by layer; none after 1x1 convolutions
  norm: Params  # BatchNorm with method.bn_scope = "task", else {}
  head: Params
  stats: Params  # BatchNorm's statistics with bn_scope = "task" or population statistics, else {}
  num_classes: Array  # int32 []


def make(config: Config, setup: Setup) -> Method:
  """Builds CLR."""
  l2, own_norm = networks.l2_coefficient(config), config.bn_scope == "task"
  apply_fn = _reprogrammed_network(setup.model)

  def penalty(params, frozen):
    return l2 * losses.sum_squares(params["adapters"])

  fit_base, fit_adapters = plain_fit(setup, l2), make_fit(setup, apply_fn, penalty)
  initialize = networks.make_initialize(setup)

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, fit_key, base_key = jax.random.split(key, 3)
    params, stats = initialize(init_key)
    base, head = state.shared, params[trees.HEAD]
    if not state.tasks:  # Sect. 3 takes a network trained on ImageNet as the base
      base = _freeze(*fit_base(params, stats, task, base_key, store.child("base")))
    # Sect. 3: reprogram the base for the task
    start = {"adapters": _identities(base["kernels"]), "norm": base["norm"], "head": head}
    frozen = {k: base[k] for k in ("kernels", "biases")}
    args = (start, base["stats"], frozen, task, fit_key, setup.epochs, store.child("reprogram"))
    trained, stats = fit_adapters(*args)
    norm, none = {"norm": trained["norm"], "stats": stats}, {"norm": {}, "stats": {}}
    own, common = (norm, {}) if own_norm else (none, norm)
    parts = {k: trained[k] for k in ("adapters", "head")} | own
    task_state = TaskState(**parts, num_classes=jnp.int32(task.num_classes))
    return state.append(task_state, **(base | common)), {}

  def logits(shared, task, image):
    norm = task.norm if own_norm else shared["norm"]
    params = {"adapters": task.adapters, "norm": norm, "head": task.head}
    return apply_fn(params, shared, task.stats or shared["stats"], image, False, None)[0]

  return Method(learn, size, logits=logits, serves=("kernels", "biases", "norm", "stats"))


def _reprogrammed_network(model: nn.Module) -> Callable:
  """Builds apply_fn of the network with a depthwise convolution after each of its convolutions.

  `params` has "adapters", "norm" and "head"; `frozen` has "kernels" and "biases".
  """

  def apply_fn(params, frozen, stats, image, train, key):
    rest = trees.join_biases(frozen["biases"], params["norm"] | {trees.HEAD: params["head"]})
    weights = trees.join(frozen["kernels"], rest)
    with nn.intercept_methods(_adapter_interceptor(params["adapters"])):
      return networks.apply_model(model, weights, stats, image, train, key)

  return apply_fn


def _freeze(params: Params, stats: Params) -> dict:
  """Returns the base: frozen kernels and biases, and BatchNorm after the first task."""
  kernels, rest = trees.split(params)
  biases, others = trees.split_biases(rest, kernels)
  norm = {name: x for name, x in others.items() if name != trees.HEAD}
  return {"kernels": kernels, "biases": biases, "norm": norm, "stats": stats}


def _identities(kernels: Params) -> dict[str, Array]:
  """Returns for every convolution larger than 1x1 a depthwise kernel that changes nothing."""
  identity = jnp.zeros((3, 3)).at[1, 1].set(1.0)
  return {
    name: jnp.tile(identity[:, :, None], w.shape[-1])
    for name, w in kernels.items()
    if w.ndim == 4 and w.shape[:2] != (1, 1)
  }


def _adapter_interceptor(adapters: dict[str, jax.Array]) -> Callable:
  """Builds an interceptor that convolves the output of every layer that has an adapter."""

  def intercept(next_fun, args, kwargs, context):
    y = next_fun(*args, **kwargs)
    name = "/".join(context.module.path)
    if context.method_name != "__call__" or name not in adapters:
      return y
    return depthwise_conv(y, adapters[name])

  return intercept


def size(state: State) -> Size:
  """Returns the size: every task adds its adapters, later ones also heads and own BatchNorm."""
  shared, (first, *later) = state.shared, state.tasks
  norm = first.norm or shared["norm"]
  rest = trees.join_biases(shared["biases"], norm | {trees.HEAD: first.head})
  base = sizes.network_count(shared["kernels"], rest, int(first.num_classes))
  adapters = sizes.count_leaves([p.adapters for p in state.tasks])
  private = [p.norm | {trees.HEAD: p.head} for p in later]
  counts = [
    sizes.count_rest(rest, {}, int(p.num_classes)).counted
    for rest, p in zip(private, later, strict=True)
  ]
  return sizes.dense_size(base, adapters + sum(counts), *sizes.count_statistics(state))
