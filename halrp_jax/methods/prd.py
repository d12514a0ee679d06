"""PRD: prototype-sample relation distillation, with features learned by contrasting images.

Update rule: SGD on L_s + beta L_p + alpha L_d, on two random views of every image (2N samples):

  L_s  supervised contrastive loss of z = g(f(x)), normalised: -(tau / 0.07) times the mean of the
       log softmax of z_i z_p / tau, which is over all samples except i; the mean is over samples i
       and the other samples p of the same class
  L_p  mean of 1 - cos(f, P_t[y]), with no gradient through f: it trains the prototypes of the task
  L_d  sum over earlier tasks k of KL(softmax(s'_k / tau_d), softmax(s_k / tau_d)), where s_k is
       f P_k / |P_k| and s'_k that of the teacher: it trains f and the prototypes of earlier tasks

| paper | here                       | meaning |
|-------|----------------------------|---------|
| f     | shared["encoder"]          | the network without its head, trained by every task |
| -     | shared["stats"]            | BatchNorm's running statistics |
| g     | shared["projection"]       | three dense layers; for training alone |
| P_t   | tasks[t].prototypes        | a vector for each class |
| s'    | `target`                   | of the teacher: encoder and prototypes before the task |
| tau   | method.temperature         | temperature of the contrastive loss |
| tau_d | method.distill_temperature | temperature of the distillation |

There is one phase of method.epochs epochs; `epochs` has no effect. Classes are predicted by the
cosines between f(x) and the rows of P_t. Later tasks change f and old prototypes, hence PRD
forgets. The teacher is the method state at the start of the task. Teacher and g are counted as
`Size.training_only`. The authors' code counts g as part of the model, and so does `Size.paper`.

Reference: N. Asadi et al., "Prototype-sample relation distillation: towards replay-free continual
learning", 2023, Eq. 4 and 6. The optimizer settings are those of the HALRP authors' port.
Deviations from it: colours change in a fixed order (brightness, contrast, saturation) instead of
one drawn per batch; the teacher has no dropout; weight decay is added after the gradients are
scaled; a batch has `batch_size` images, where the port takes 128 for all benchmarks. Both
implementations clip jittered colours to [0, 1] although their images are normalised
(method.clip_colours).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from halrp_jax import keys
from halrp_jax.nn import layers
from halrp_jax.training import batches, networks, sizes
from halrp_jax.training.fit import Recipe, make_fit, protocol_recipe
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Method, Params, Size, State
from halrp_jax.weights import taps, trees

_BASE_TEMPERATURE = 0.07  # of the contrastive loss
_GREY = (0.299, 0.587, 0.114)  # luminance of red, green, blue
_NO_CLASS = -1e9  # the score of a class that a task does not have


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.MethodConfig):
  """Config keys `method.*` of PRD."""

  epochs: int = keys.whole(100, 1, None, "epochs per task, instead of `epochs`")
  learning_rate: float = keys.number(1e-3, 0, None, "constant learning rate of SGD", True)
  momentum: float = keys.number(
    0.9, 0, 1, "momentum for encoder and projection; prototypes have none"
  )
  weight_decay: float = keys.number(
    1e-4, 0, None, "weight decay of encoder and projection; prototypes have none"
  )
  temperature: float = keys.number(0.1, 0, None, "tau: temperature of the contrastive loss", True)
  beta: float = keys.number(2.0, 0, None, "coefficient of the prototypes' loss")
  alpha: float = keys.number(4.0, 0, None, "coefficient of the distillation")
  distill_temperature: float = keys.number(
    1.0, 0, None, "tau_d: temperature of the distillation", True
  )
  softmax_axis: str = keys.one_of(
    "classes",
    ("classes", "samples"),
    "classes: distilled distributions are over the classes of a task, as in both implementations; "
    "samples: over the samples of the batch, for each old prototype",
  )
  augment: str = keys.one_of(
    "image",
    ("image", "none"),
    "image: two views of an image, cropped, mirrored and with changed colours; none: the image "
    "itself twice",
  )
  clip_colours: bool = keys.flag(
    True, "normalised images are clipped to [0, 1] after colour jitter, as in both implementations"
  )


class Projection(nn.Module):
  """The network g, which maps features [B, F] to z [B, 128]: twice dense-ReLU, dense."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns z [B, 128] of features [B, F]."""
    for i in (1, 2):
      x = nn.relu(layers.dense(512, x.shape[-1], name=f"fc{i}")(x))
    return layers.dense(128, x.shape[-1], name="fc3")(x)


class TaskState(NamedTuple):
  """State of a task."""

  prototypes: Array  # P_t [C, F], a row for each class, no bias; later tasks change them
  stats: Params  # BatchNorm's population statistics, {} until they are measured
  num_classes: Array  # int32 []


def check(config: keys.Config) -> list[str]:
  """Returns the errors of a run's config that concern several keys of PRD."""
  if config.parallel == "pmap":
    return [
      "parallel = 'pmap' gives each device a part of the batch, but method.name = 'prd' compares "
      "all its images with one another: set parallel=sharded"
    ]
  return []


def make(config: Config, setup: Setup) -> Method:
  """Builds PRD."""
  initialize, objective = _make_initialize(setup), _make_objective(config, setup)
  fit = make_fit(
    setup, None, lambda params, frozen: 0.0, objective_fn=objective, recipe=_recipe(config, setup)
  )

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, fit_key = jax.random.split(key)
    shared, fresh = initialize(init_key)
    shared, position = state.shared or shared, jnp.int32(len(state.tasks))
    task_states = (*state.tasks, TaskState(fresh, {}, jnp.int32(task.num_classes)))
    # the teacher has the encoder and the prototypes from before the task
    old_prototypes, seen = _stack(state.tasks, setup.num_tasks, fresh.shape)
    teacher = {"encoder": shared["encoder"], "stats": shared["stats"], "prototypes": old_prototypes}
    frozen = {"teacher": teacher, "seen": seen, "t": position}
    # Eq. 4 and 6: train encoder, projection and the prototypes of all tasks so far
    start = {k: shared[k] for k in ("encoder", "projection")}
    start["prototypes"], _ = _stack(task_states, setup.num_tasks, fresh.shape)
    args = (start, shared["stats"], frozen, task, fit_key, config.epochs, store.child("train"))
    trained, stats = fit(*args)
    prototypes = np.asarray(trained["prototypes"])  # numpy, so that indexing compiles nothing
    task_states = tuple(
      p._replace(prototypes=jnp.asarray(prototypes[k])) for k, p in enumerate(task_states)
    )
    shared = {k: trained[k] for k in ("encoder", "projection")} | {"stats": stats}
    return State(shared, task_states), {}

  def logits(shared, task, image):
    stats = task.stats or shared["stats"]
    f, _ = _features(setup.model, shared["encoder"], stats, image, False, None)
    return cosines(f, task.prototypes)

  return Method(learn, size, logits=logits, serves=("encoder", "stats"))


def _features(
  model: nn.Module,
  encoder: Params,
  stats: Params,
  image: jax.Array,
  train: bool,
  key: jax.Array | None,
) -> tuple[jax.Array, Params]:
  """Returns the features f(image) [B, F] and new BatchNorm statistics."""
  with taps.without_head():
    return networks.apply_model(model, encoder, stats, image, train, key)


def _make_initialize(setup: Setup) -> Callable:
  """Builds `initialize(key) -> State.shared, prototypes [C, F]`."""
  draw = networks.make_initialize(setup)

  def initialize(key):
    params, stats = draw(key)
    encoder, head = trees.split_private(params, norm=False)
    prototypes = head[trees.HEAD]["kernel"].T  # drawn like the kernel of a head
    g = Projection().init(jax.random.fold_in(key, 1), prototypes)["params"]
    return {"encoder": encoder, "stats": stats, "projection": g}, prototypes

  return initialize


def _make_objective(config: Config, setup: Setup) -> Callable:
  """Builds objective_fn: L_s + beta L_p + alpha L_d on two views of every image.

  `params` has "encoder", "projection" and "prototypes" [T, C, F]. `frozen` has the "teacher",
  booleans "seen" [T, C] for the classes of earlier tasks, and the index "t" of the task.
  """
  model, teacher_model = setup.model, setup.measuring
  project: Callable[..., Params] = Projection().apply

  def objective(params, frozen, stats, batch, train, key):
    views, dropout_key = jnp.concatenate([batch.image] * 2), None
    if key is not None:
      view_key, dropout_key = jax.random.split(key)
      views = augment(view_key, views, config.clip_colours) if config.augment == "image" else views
    label, teacher = jnp.tile(batch.label, 2), frozen["teacher"]
    f, stats = _features(model, params["encoder"], stats, views, train, dropout_key)  # [2N, F]
    old_f, _ = _features(teacher_model, teacher["encoder"], teacher["stats"], views, False, None)
    z = project({"params": params["projection"]}, f)
    own = lax.dynamic_index_in_dim(params["prototypes"], frozen["t"], keepdims=False)
    similarity = cosines(lax.stop_gradient(f), own)  # [2N, C]
    scores, target = (
      jnp.einsum("bf,tcf->btc", x, _unit(p)) / config.distill_temperature
      for x, p in ((f, params["prototypes"]), (old_f, teacher["prototypes"]))
    )
    loss = (
      contrast(z, label, config.temperature)
      + config.beta * jnp.mean(1 - jnp.take_along_axis(similarity, label[:, None], 1))
      + config.alpha * divergence(scores, target, frozen["seen"], config.softmax_axis)
    )
    return loss, similarity[: len(batch.label)], stats

  return objective


def _recipe(config: Config, setup: Setup) -> Recipe:
  """Returns SGD with a constant rate, and without momentum and decay for the prototypes."""
  decay, momentum = optax.add_decayed_weights(config.weight_decay), optax.trace(config.momentum)
  where = {"encoder": True, "projection": True, "prototypes": False}
  return protocol_recipe(setup)._replace(
    optimizer=optax.masked(optax.chain(decay, momentum), where),
    learning_rate=config.learning_rate,
    schedule="constant",
  )


def _stack(
  tasks: Sequence[TaskState], num_tasks: int, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
  """Stacks the prototypes of task states, with zeros for the tasks to come.

  Args:
    tasks: the states of the tasks so far.
    num_tasks: T, of the benchmark.
    shape: (C, F) of the prototypes of a task.

  Returns:
    The prototypes [T, C, F], and whether they belong to a class [T, C].
  """
  rows, seen = np.zeros((num_tasks, *shape), np.float32), np.zeros((num_tasks, shape[0]), bool)
  for k, task_state in enumerate(tasks):
    rows[k] = task_state.prototypes
    seen[k, : int(task_state.num_classes)] = True
  return jnp.asarray(rows), jnp.asarray(seen)


# --- the losses -------------------------------------------------------------------------


def _unit(x: jax.Array) -> jax.Array:
  """Returns x / |x| along the last axis, with a finite gradient at 0."""
  return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


def cosines(f: jax.Array, prototypes: jax.Array) -> jax.Array:
  """Returns the cosines [B, C] between features [B, F] and prototypes [C, F]."""
  return _unit(f) @ _unit(prototypes).T


def contrast(z: jax.Array, label: jax.Array, temperature: float) -> jax.Array:
  """Returns L_s, a scalar.

  Args:
    z: [2N, D]
    label: int [2N], in which every class occurs at least twice.
    temperature: tau.
  """
  z, itself = _unit(z), jnp.eye(len(z), dtype=bool)
  log_p = jax.nn.log_softmax(jnp.where(itself, -jnp.inf, z @ z.T / temperature))
  positive = (label[:, None] == label[None]) & ~itself
  means = jnp.sum(jnp.where(positive, log_p, 0), 1) / jnp.sum(positive, 1)
  return -temperature / _BASE_TEMPERATURE * jnp.mean(means)


def divergence(scores: jax.Array, target: jax.Array, seen: jax.Array, over: str) -> jax.Array:
  """Returns L_d, a scalar: the sum over earlier tasks of the mean KL(target, scores).

  Args:
    scores: s / tau_d [2N, T, C].
    target: the scores of the teacher.
    seen: bool [T, C], the classes of earlier tasks.
    over: "classes" for a distribution over classes for each sample, "samples" for one over samples
      for each class. The mean is over these distributions.
  """
  axis = {"classes": 2, "samples": 0}[over]
  log_q, log_p = (
    jax.nn.log_softmax(jnp.where(seen[None], s, _NO_CLASS), axis) for s in (scores, target)
  )
  terms = jnp.where(seen[None], jnp.exp(log_p) * (log_p - log_q), 0)
  if over == "classes":
    return jnp.sum(terms) / len(scores)
  return jnp.sum(terms.sum((0, 2)) / jnp.maximum(seen.sum(1), 1))


# --- views --------------------------------------------------------------------------------


def augment(key: jax.Array, image: jax.Array, clip: bool) -> jax.Array:
  """Crops and mirrors normalised images [B, H, W, C] at random, and changes their colours.

  Args:
    key: random key for the changes.
    image: the images; those without 3 channels keep their colours.
    clip: whether colours are clipped to [0, 1].
  """
  crop_key, colour_key = jax.random.split(key)
  image = batches.crop_and_flip(crop_key, image, fill=-1.0)
  return change_colours(colour_key, image, clip) if image.shape[-1] == 3 else image


def change_colours(key: jax.Array, image: jax.Array, clip: bool) -> jax.Array:
  """Changes the colours of images at random.

  Of 80 % of the images, brightness, contrast and saturation are scaled by factors from 0.6 to 1.4.
  Then 20 % of all images become grey.

  Args:
    key: random key for the changes.
    image: [B, H, W, 3]
    clip: whether the scaled colours are clipped to [0, 1].
  """
  factor_key, jitter_key, grey_key = jax.random.split(key, 3)
  one = (len(image), 1, 1, 1)
  brightness, contrast, saturation = jax.random.uniform(
    factor_key, (3, *one), minval=0.6, maxval=1.4
  )

  def cut(x):
    return jnp.clip(x, 0, 1) if clip else x

  x = cut(brightness * image)
  x = cut(contrast * x + (1 - contrast) * _grey(x).mean((1, 2), keepdims=True))
  x = cut(saturation * x + (1 - saturation) * _grey(x))
  image = jnp.where(jax.random.bernoulli(jitter_key, 0.8, one), x, image)
  return jnp.where(jax.random.bernoulli(grey_key, 0.2, one), _grey(image), image)


def _grey(image: jax.Array) -> jax.Array:
  """Returns the luminance [B, H, W, 1] of images [B, H, W, 3]."""
  return jnp.sum(image * jnp.array(_GREY)[None, None, None], -1, keepdims=True)


def size(state: State) -> Size:
  """Returns the size: later tasks add their prototypes.

  Projection and teacher are for training alone.
  """
  shared, tasks = state.shared, state.tasks
  kernels, rest = trees.split(shared["encoder"])
  prototypes = [p.prototypes.shape[1] * int(p.num_classes) for p in tasks]
  head = {trees.HEAD: {"kernel": tasks[0].prototypes.T}}
  base = sizes.network_count(kernels, rest | head, int(tasks[0].num_classes))
  stats, projection = sizes.count_statistics(state)[0], sizes.count_leaves(shared["projection"])
  dense = base + sum(prototypes[1:]) + stats
  teacher = sizes.count_leaves((shared["encoder"], shared["stats"])) + sum(prototypes)
  return Size(
    base=base,
    dense=dense,
    nonzero=dense,
    mask_bits=0,
    training_only=projection + teacher,
    paper=base + projection + sum(prototypes[1:]),
  )
