"""PRD: features by contrast between images; prototypes, whose relations to samples are distilled.

Update rule: SGD on L_s + beta L_p + alpha L_d, on two random views of every image (2N samples):

  L_s  supervised contrast of z = g(f(x)), normalised: -(tau / 0.07) times the mean, over samples i
       and the others p of i's class, of the log softmax of z_i z_p / tau over all others
  L_p  mean of 1 - cos(f, P_t[y]), f held fixed: it trains the prototypes of the task alone
  L_d  sum over earlier tasks k of KL(softmax(s'_k / tau_d), softmax(s_k / tau_d)), where s_k is
       f P_k / |P_k| and s'_k the teacher's: it trains f and the prototypes of earlier tasks

| paper | here                       | meaning |
|-------|----------------------------|---------|
| f     | shared["encoder"]          | the network without its head, trained by every task |
| -     | shared["stats"]            | BatchNorm's running statistics |
| g     | shared["projection"]       | three dense layers; for training alone |
| s'    | `target`                   | of encoder and prototypes as they were before the task |
| tau   | method.temperature         | of the contrast |
| tau_d | method.distill_temperature | of the distillation |

Phases: one of method.epochs, whatever config.epochs is. A class is predicted by the cosines between
f(x) and P_t. Features and old prototypes move on, hence it forgets. The teacher is what `State`
holds when a task begins; it is counted as training_only, as is g. The paper's program counts g into
the model, and so does `Size.paper`.

Reference: N. Asadi et al., "Prototype-sample relation distillation: towards replay-free continual
learning", 2023, Eq. 4 and 6. The recipe is that of the HALRP authors' port. Deviations: colours
change in a fixed order (brightness, contrast, saturation), not one drawn per batch; the teacher has
no dropout. Both programs cut jittered colours to 0..1 although their images are normalised
(method.clip_colours). Weight decay is SGD's own, so the scale of gradients does not touch it.
Batches are config.batch_size; the port's are 128 on TinyImageNet too.
"""

import dataclasses
from collections.abc import Callable
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
from halrp_jax.training.fit import Recipe, make_fit, recipe
from halrp_jax.training.setup import Setup
from halrp_jax.types import Array, Method, Params, Size, State
from halrp_jax.weights import taps, trees

_BASE_TEMPERATURE = 0.07
_GREY = (0.299, 0.587, 0.114)  # luminance of red, green, blue
_NEVER = -1e9  # the score of a class that a task does not have


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.MethodConfig):
  """The keys `method.*` of this method."""

  epochs: int = keys.whole(100, 1, None, "epochs per task, instead of `epochs`")
  learning_rate: float = keys.number(1e-3, 0, None, "of SGD, constant", True)
  momentum: float = keys.number(0.9, 0, 1, "of encoder and projection; prototypes have none")
  weight_decay: float = keys.number(1e-4, 0, None, "of encoder and projection; prototypes: none")
  temperature: float = keys.number(0.1, 0, None, "tau: of the contrast between samples", True)
  beta: float = keys.number(2.0, 0, None, "coefficient of the prototypes' loss")
  alpha: float = keys.number(4.0, 0, None, "coefficient of the distillation")
  distill_temperature: float = keys.number(1.0, 0, None, "tau_d: of the distillation", True)
  softmax_axis: str = keys.one_of(
    "classes",
    ("classes", "samples"),
    "what the distilled distributions are over: a task's classes (both programs), or the samples "
    "of the batch for each old prototype",
  )
  augment: str = keys.one_of(
    "image",
    ("image", "none"),
    "views of an image: cropped, mirrored, colours changed; or the image itself twice",
  )
  clip_colours: bool = keys.flag(
    True, "what colour jitter makes of the normalised images is cut to 0..1, as in both programs"
  )


class Projection(nn.Module):
  """Computes z [B, 128] of f [B, F]: Dense-ReLU twice, dense."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in (1, 2):
      x = nn.relu(layers.dense(512, x.shape[-1], name=f"fc{i}")(x))
    return layers.dense(128, x.shape[-1], name="fc3")(x)


class TaskState(NamedTuple):
  prototypes: Array  # P_t [C, F], a row for each class, no bias; later tasks move them
  stats: Params  # BatchNorm's population statistics, {} until they are measured
  num_classes: Array  # int32 []


def check(config: keys.Config) -> list[str]:
  """Returns errors that concern several keys."""
  if config.parallel == "pmap":
    return [
      "parallel = 'pmap' shows each device a part of the batch, and prd contrasts all its images "
      "with one another: set parallel=sharded"
    ]
  return []


def make(config: Config, setup: Setup) -> Method:
  initialize, objective = _make_initialize(setup), _make_objective(config, setup)
  fit = make_fit(
    setup, None, lambda params, frozen: 0.0, objective_fn=objective, how=_recipe(config, setup)
  )

  def learn(state, tasks, key, store):
    (task,) = tasks
    init_key, fit_key = jax.random.split(key)
    shared, fresh = initialize(init_key)
    shared, position = state.shared or shared, jnp.int32(len(state.tasks))
    learned = (*state.tasks, TaskState(fresh, {}, jnp.int32(task.num_classes)))
    # the teacher: encoder and prototypes as they were before the task
    before, seen = _stack(state.tasks, setup.num_tasks, fresh.shape)
    teacher = {"encoder": shared["encoder"], "stats": shared["stats"], "prototypes": before}
    frozen = {"teacher": teacher, "seen": seen, "t": position}
    # Eq. 4 and 6: train encoder, projection and the prototypes of all tasks so far
    start = {k: shared[k] for k in ("encoder", "projection")}
    start["prototypes"], _ = _stack(learned, setup.num_tasks, fresh.shape)
    args = (start, shared["stats"], frozen, task, fit_key, config.epochs, store.child("train"))
    trained, stats = fit(*args)
    moved = np.asarray(trained["prototypes"])  # numpy's rows: none of them is traced
    moved = tuple(p._replace(prototypes=jnp.asarray(moved[k])) for k, p in enumerate(learned))
    shared = {k: trained[k] for k in ("encoder", "projection")} | {"stats": stats}
    return State(shared, moved), {}

  def logits(shared, task, image):
    stats = task.stats or shared["stats"]
    f, _ = _features(setup.model, shared["encoder"], stats, image, False, None)
    return cosines(f, task.prototypes)

  return Method(learn, size, logits=logits, serves=("encoder", "stats"))


def _features(model, encoder, stats, image, train, key):
  """Returns f(image) [B, F] and new statistics."""
  with taps.without_head():
    return networks.apply_model(model, encoder, stats, image, train, key)


def _make_initialize(setup: Setup) -> Callable:
  """Builds the jitted `initialize(key) -> State.shared, prototypes [C, F]`."""

  @jax.jit
  def initialize(key):
    params, stats = networks.initialize(setup.model, key, setup.image_shape)
    encoder, head = trees.split_private(params, norm=False)
    prototypes = head[trees.HEAD]["kernel"].T  # drawn as a head is
    g = Projection().init(jax.random.fold_in(key, 1), prototypes)["params"]
    return {"encoder": encoder, "stats": stats, "projection": g}, prototypes

  return initialize


def _make_objective(config: Config, setup: Setup) -> Callable:
  """Builds objective_fn: L_s + beta L_p + alpha L_d on two views of every image.

  `params` has "encoder", "projection" and "prototypes" [T, C, F]; `frozen` the "teacher", which of
  all classes were "seen" [T, C] and the position "t" of the task.
  """
  model, taught, projection = setup.model, setup.measuring, Projection()

  def objective(params, frozen, stats, batch, train, key):
    views, dropout_key = jnp.concatenate([batch.image] * 2), None
    if key is not None:
      view_key, dropout_key = jax.random.split(key)
      views = augment(view_key, views, config.clip_colours) if config.augment == "image" else views
    label, teacher = jnp.tile(batch.label, 2), frozen["teacher"]
    f, stats = _features(model, params["encoder"], stats, views, train, dropout_key)  # [2N, F]
    then, _ = _features(taught, teacher["encoder"], teacher["stats"], views, False, None)
    z = projection.apply({"params": params["projection"]}, f)
    own = lax.dynamic_index_in_dim(params["prototypes"], frozen["t"], keepdims=False)
    similarity = cosines(lax.stop_gradient(f), own)  # [2N, C]
    scores, target = (
      jnp.einsum("bf,tcf->btc", x, _unit(p)) / config.distill_temperature
      for x, p in ((f, params["prototypes"]), (then, teacher["prototypes"]))
    )
    loss = (
      contrast(z, label, config.temperature)
      + config.beta * jnp.mean(1 - jnp.take_along_axis(similarity, label[:, None], 1))
      + config.alpha * divergence(scores, target, frozen["seen"], config.softmax_axis)
    )
    return loss, similarity[: len(batch.label)], stats

  return objective


def _recipe(config: Config, setup: Setup) -> Recipe:
  """Returns SGD at a constant rate; momentum and weight decay are not for the prototypes."""
  decay, momentum = optax.add_decayed_weights(config.weight_decay), optax.trace(config.momentum)
  where = {"encoder": True, "projection": True, "prototypes": False}
  return recipe(setup)._replace(
    optimizer=optax.masked(optax.chain(decay, momentum), where),
    learning_rate=config.learning_rate,
    schedule="constant",
  )


def _stack(tasks, num_tasks: int, shape) -> tuple[Array, Array]:
  """Returns the tasks' prototypes [T, C, F], 0 for those to come; which rows are classes [T, C]."""
  rows, seen = np.zeros((num_tasks, *shape), np.float32), np.zeros((num_tasks, shape[0]), bool)
  for k, learned in enumerate(tasks):
    rows[k] = learned.prototypes
    seen[k, : int(learned.num_classes)] = True
  return jnp.asarray(rows), jnp.asarray(seen)


# --- the losses -------------------------------------------------------------------------


def _unit(x):
  """Returns x / |x| along the last axis, with a finite gradient at 0."""
  return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


def cosines(f: jax.Array, prototypes: jax.Array) -> jax.Array:
  """Returns the cosines [B, C] between features [B, F] and prototypes [C, F]."""
  return _unit(f) @ _unit(prototypes).T


def contrast(z: jax.Array, label: jax.Array, temperature: float) -> jax.Array:
  """Returns L_s of z [2N, D] and label [2N], which has every class at least twice."""
  z, itself = _unit(z), jnp.eye(len(z), dtype=bool)
  log_p = jax.nn.log_softmax(jnp.where(itself, -jnp.inf, z @ z.T / temperature))
  positive = (label[:, None] == label[None]) & ~itself
  means = jnp.sum(jnp.where(positive, log_p, 0), 1) / jnp.sum(positive, 1)
  return -temperature / _BASE_TEMPERATURE * jnp.mean(means)


def divergence(scores: jax.Array, target: jax.Array, seen: jax.Array, over: str) -> jax.Array:
  """Returns L_d: per earlier task the mean of KL(target, scores) over its distributions, summed.

  Args:
    scores: s / tau_d [2N, T, C].
    target: the teacher's.
    seen: [T, C] classes of earlier tasks.
    over: "classes": a distribution for each sample; "samples": one for each class.
  """
  axis = {"classes": 2, "samples": 0}[over]
  log_q, log_p = (
    jax.nn.log_softmax(jnp.where(seen[None], s, _NEVER), axis) for s in (scores, target)
  )
  terms = jnp.where(seen[None], jnp.exp(log_p) * (log_p - log_q), 0)
  if over == "classes":
    return jnp.sum(terms) / len(scores)
  return jnp.sum(terms.sum((0, 2)) / jnp.maximum(seen.sum(1), 1))


# --- views --------------------------------------------------------------------------------


def augment(key: jax.Array, image: jax.Array, clip: bool) -> jax.Array:
  """Crops, mirrors and recolours normalised images [B, H, W, C] at random."""
  crop_key, colour_key = jax.random.split(key)
  image = batches.crop_and_flip(crop_key, image, fill=-1.0)
  return change_colours(colour_key, image, clip) if image.shape[-1] == 3 else image


def change_colours(key: jax.Array, image: jax.Array, clip: bool) -> jax.Array:
  """Scales brightness, contrast and saturation of 4 images in 5 by 0.6 to 1.4, greys 1 in 5."""
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


def _grey(image):
  """Returns the luminance [B, H, W, 1] of [B, H, W, 3]."""
  return jnp.sum(image * jnp.array(_GREY)[None, None, None], -1, keepdims=True)


def size(state: State) -> Size:
  """Counts the base; a later task adds its prototypes; projection and teacher are for training."""
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
