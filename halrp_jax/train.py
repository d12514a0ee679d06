"""fit(): the only optimisation loop. evaluate(): the only accuracy.

A method hands over two pure functions:

  apply_fn(params, frozen, stats, image, train, key) -> logits, stats
  penalty_fn(params, frozen)                         -> scalar

and gets back `fit`, jitted once when the method is made. Where cross-entropy on the logits is not
what it minimises it hands over an objective, where its updates are restricted an `edit_fn`, where
its own recipe belongs to it a `Recipe`.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax import lax

from halrp_jax import contract, epoch, layers, parallel, perturb, processes
from halrp_jax.types import Array, Diverged, Inputs, Params, Size, Split, Store, Task


class Batch(NamedTuple):
  image: jax.Array  # float32 [B, H, W, C] network input
  label: jax.Array  # int32 [B]
  num_classes: jax.Array  # int32 [], or [B, 1] where several tasks are learned at once
  owner: jax.Array | None  # int32 [B] which of them; None: one task


class Joint(NamedTuple):
  """Several tasks to be learned at once. Made by `join_tasks`; `fit` takes it like a `Task`."""

  train: Split
  valid: Split
  inputs: Inputs  # with a leading axis [T]
  num_classes: Array  # int32 [T]
  blocks: tuple[int, ...]  # numbers of consecutive training rows that share no batch with others


class Recipe(NamedTuple):
  """How `fit` optimises: the protocol's (`recipe`), unless a method brings its own."""

  # protocol.optimizer, and so on; or what makes updates of the scaled gradients, which may differ
  # between parts of the parameters (the momentum then counts for nothing)
  optimizer: str | optax.GradientTransformation
  momentum: float
  learning_rate: float
  gradient_scale: float
  schedule: str
  keep: str


class Plateau(NamedTuple):
  """Where schedule="plateau" is."""

  best: np.float64  # least validation loss so far
  left: np.int32  # epochs without a lower one until the rate is cut
  rate: np.float64  # learning rate now


class TrainState(NamedTuple):
  params: Params
  stats: Params  # running statistics of BatchNorm
  opt_state: Params
  step: jax.Array  # int32, optimizer steps done


def prepare_images(image: Array, inputs: Inputs, owner: Array | None = None) -> jax.Array:
  """uint8 [B, H, W, C] -> float32 network input [B, H, W, C] (`Inputs` says how).

  `owner` [B]: which row of `inputs` is each image's, if they have a leading axis.
  """
  x = image.astype(jnp.float32) / 255
  if owner is None:
    if inputs.permutation is not None:
      x = x.reshape(x.shape[0], -1)[:, inputs.permutation].reshape(*x.shape[:3], -1)
    return (x - inputs.mean[None, None, None]) / inputs.std[None, None, None]
  if inputs.permutation is not None:
    permuted = jnp.take_along_axis(x.reshape(x.shape[0], -1), inputs.permutation[owner], 1)
    x = permuted.reshape(*x.shape[:3], -1)
  return (x - inputs.mean[owner][:, None, None]) / inputs.std[owner][:, None, None]


def stack_inputs(tasks: Sequence[Task]) -> Inputs:
  """The inputs of all the tasks, with a leading axis: `prepare_images`' `owner` says whose."""
  mean, std = (jnp.stack([task.inputs[i] for task in tasks]) for i in (0, 1))
  permutation = None
  if any(task.inputs.permutation is not None for task in tasks):
    same = jnp.arange(math.prod(tasks[0].train.image.shape[1:3]) * mean.shape[-1])
    own = [task.inputs.permutation for task in tasks]
    permutation = jnp.stack([same if p is None else p for p in own])
  return Inputs(mean, std, permutation)


def join_tasks(tasks: Sequence[Task], mixed: bool) -> Joint:
  """All the tasks as one thing to learn; `mixed`: a batch holds images of several of them."""

  def join(kind):
    splits = [getattr(task, kind) for task in tasks]
    owner = np.concatenate([np.full(len(s.index), t, np.int32) for t, s in enumerate(splits)])
    index, label = (jnp.concatenate([s[i] for s in splits]) for i in (1, 2))
    return Split(splits[0].image, index, label, jnp.asarray(owner))

  sizes = tuple(len(task.train.index) for task in tasks)
  return Joint(
    join("train"),
    join("valid"),
    stack_inputs(tasks),
    jnp.array([task.num_classes for task in tasks], jnp.int32),
    (sum(sizes),) if mixed else sizes,
  )


def crop_and_flip(key: jax.Array, image: jax.Array, padding: int = 4, fill: float = 0) -> jax.Array:
  """A random crop of every image [B, H, W, C] padded with `fill`, half of them mirrored."""
  crop_key, flip_key = jax.random.split(key)
  num_images, height, width, _ = image.shape
  pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
  padded = jnp.pad(image, pads, constant_values=fill)
  top, left = jax.random.randint(crop_key, (2, num_images), 0, 2 * padding + 1)
  cropped = jax.vmap(lambda x, i, j: lax.dynamic_slice(x, (i, j, 0), (height, width, x.shape[-1])))(
    padded, top, left
  )
  mirrored = jax.random.bernoulli(flip_key, shape=(num_images, 1, 1, 1))
  return jnp.where(mirrored, cropped[:, :, ::-1], cropped)


def mask_classes(logits: jax.Array, num_classes: jax.Array) -> jax.Array:
  """Outputs beyond a task's own classes can't be predicted and get no gradient."""
  return jnp.where(jnp.arange(logits.shape[-1])[None] < num_classes, logits, -jnp.inf)


def cross_entropy_objective(apply_fn: Callable) -> Callable:
  """What `fit` minimises by default, beside the penalty.

  -> objective_fn(params, frozen, stats, batch, train, key) -> loss, logits [B, K], stats
  """

  def objective_fn(params, frozen, stats, batch, train, key):
    logits, stats = apply_fn(params, frozen, stats, batch.image, train, key)
    return cross_entropy(logits, batch.label, batch.num_classes), logits, stats

  return objective_fn


def cross_entropy(logits: jax.Array, label: jax.Array, num_classes: jax.Array) -> jax.Array:
  """Mean cross-entropy over the batch. logits [B, K_max], label [B]"""
  log_p = jax.nn.log_softmax(mask_classes(logits, num_classes))
  return -jnp.mean(jnp.take_along_axis(log_p, label[:, None], axis=1))


def sum_absolute(tree: Params) -> jax.Array:
  """L1 norm over all leaves, with gradient 0 at 0.

  jax.grad of jnp.abs is 1 at 0, which would wake up the zero columns of U and V.
  """
  return sum(jnp.sum(x * jnp.sign(x)) for x in jax.tree.leaves(tree))


def sum_squares(tree: Params) -> jax.Array:
  """Squared L2 norm over all leaves."""
  return sum(jnp.sum(x * x) for x in jax.tree.leaves(tree))


# --- the plain network: first tasks, single-task learning, warm-up --------------------


def initialize(model, key: jax.Array, image_shape: tuple[int, ...]) -> tuple[Params, Params]:
  """Fresh (params, stats) of a model. `image_shape` is [H, W, C]."""
  contract.check_call(model)
  variables = model.init({"params": key}, jnp.zeros((1, *image_shape)), train=False)
  variables = nn.meta.unbox(variables)
  return variables["params"], variables.get("batch_stats", {})


def statistics_of(model, image_shape: tuple[int, ...]) -> Params:
  """Returns shapes and types of a model's BatchNorm statistics; empty without BatchNorm."""
  return jax.eval_shape(lambda key: initialize(model, key, image_shape), jax.random.key(0))[1]


def make_initialize(model, benchmark) -> Callable:
  """Builds the jitted `initialize(key) -> params, stats`."""
  return jax.jit(lambda key: initialize(model, key, benchmark.image_shape))


def l2_coefficient(method_config) -> float:
  """What |W|^2 is multiplied by, of a method with `validate.NETWORK_KEYS`."""
  return method_config.l2 * (0.5 if method_config.l2_half else 1.0)


def apply_model(model, params, stats, image, train, key):
  """`model.apply` with running statistics. -> logits [B, K], new stats"""
  variables = {"params": params, "batch_stats": stats}
  if not train:
    return model.apply(variables, image, train=False), stats
  logits, updates = model.apply(
    variables, image, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
  )
  return logits, updates.get("batch_stats", {})


def fix_batch_statistics(model, params, image):
  """Returns a model that evaluates with stored statistics, and those of a batch to be stored.

  Of no effect on a network without BatchNorm.
  """
  if not hasattr(model, "running"):
    return model, {}
  running = model.clone(running=True)
  start = running.init(jax.random.key(0), image[:1], train=False)["batch_stats"]
  # after one step s1 = (1 - momentum) s0 + momentum b: solve for the batch's b
  variables = {"params": params, "batch_stats": start}
  _, updates = running.apply(
    variables, image, train=True, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"]
  )
  momentum = layers.MOMENTUM
  stats = jax.tree.map(
    lambda new, old: (new - (1 - momentum) * old) / momentum, updates["batch_stats"], start
  )
  return running, jax.lax.stop_gradient(stats)


def plain_network(model) -> tuple[Callable, Callable]:
  """(apply_fn, penalty_fn) of the unperturbed network; `frozen` is {"l2": coefficient}.

  The penalty is l2 |W|^2 over the kernels of the features: no head, no bias, no BatchNorm.
  """

  def apply_fn(params, frozen, stats, image, train, key):
    return apply_model(model, params, stats, image, train, key)

  def penalty_fn(params, frozen):
    kernels, _ = perturb.split(params)
    return frozen["l2"] * sum_squares(kernels)

  return apply_fn, penalty_fn


def head_network(model) -> tuple[Callable, Callable]:
  """(apply_fn, penalty_fn) where the head alone is trained, on a network that is in evaluation.

  `params` is {"head": its parameters}; `frozen` {"params": the others}.
  """
  contract.check_call(model)

  def apply_fn(params, frozen, stats, image, train, key):
    return apply_model(model, frozen["params"] | params, stats, image, False, key)

  return apply_fn, lambda params, frozen: 0.0


def perturbed_network(model) -> Callable:
  """apply_fn of the network with perturbed kernels.

  `params` is {"perturbation": by layer, "rest": all but the kernels}; `frozen` has "kernels".
  """

  def apply_fn(params, frozen, stats, image, train, key):
    variables = {"params": params["rest"], "batch_stats": stats}
    args = (model, frozen["kernels"], params["perturbation"], variables, image)
    if not train:
      return perturb.apply(*args, train=False), stats
    logits, new = perturb.apply(*args, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
    return logits, new.get("batch_stats", {})

  return apply_fn


class RestCount(NamedTuple):
  counted: int  # BatchNorm's scale and bias, and the head
  biases: int  # of the layers with a kernel (BatchNorm may keep them): the paper leaves them out


def count_rest(rest: Params, kernels: Params, num_classes: int) -> RestCount:
  """Counts everything but the kernels of the features; the head at a task's own width."""
  flat = traverse_util.flatten_dict(rest, sep="/")
  biases = sum(x.size for path, x in flat.items() if perturb.is_bias(path, kernels))
  head = sum(x.size // x.shape[-1] * num_classes for x in rest[perturb.HEAD].values())
  others = sum(x.size for path, x in flat.items() if not path.startswith(f"{perturb.HEAD}/"))
  return RestCount(others - biases + head, biases)


def network_count(kernels: Params, rest: Params, num_classes: int) -> int:
  """Parameters of a whole network, the head at a task's own width."""
  count = count_rest(rest, kernels, num_classes)
  return sum(w.size for w in kernels.values()) + count.counted + count.biases


def count_leaves(tree: Params) -> int:
  """How many numbers a pytree has."""
  return sum(x.size for x in jax.tree.leaves(tree))


def count_statistics(state) -> tuple[int, int]:
  """Counts BatchNorm's statistics: those that predictions use, those kept for training alone.

  Where all tasks have their own, the running ones they share serve training.
  """
  own = [p.get("stats", {}) for p in state.tasks]
  of_tasks, of_training = count_leaves(own), count_leaves(state.shared.get("stats", {}))
  return (of_tasks, of_training) if of_tasks else (of_training, 0)


def dense_size(base: int, counted: int, uncounted: int, training_only: int = 0) -> Size:
  """Size of a model without zeros and masks.

  Args:
    base: parameters of the network of the first task.
    counted: numbers that later tasks add and the paper counts (spec a.9).
    uncounted: those it leaves out: biases of later tasks, BatchNorm's statistics of all.
    training_only: numbers kept for training alone.
  """
  dense = base + counted + uncounted
  return Size(base, dense, dense, 0, training_only, base + counted)


# --- fit ------------------------------------------------------------------------------


def recipe(config) -> Recipe:
  """The protocol's."""
  p = config.protocol
  return Recipe(p.optimizer, p.momentum, config.learning_rate, p.gradient_scale, p.schedule, p.keep)


def _moments(how: Recipe) -> optax.GradientTransformation:
  if how.optimizer == "adam":
    return optax.scale_by_adam()
  return optax.trace(how.momentum) if how.optimizer == "sgd" else how.optimizer


def learning_rate_decay(config, benchmark) -> Callable[[Task | Joint], float]:
  """Task -> factor on the learning rate per optimizer step (`protocol.schedule`, spec a.10).

  "code" is the authors' formula, which hard-codes the 50,000 images of CIFAR-100 for every
  benchmark; "epoch" multiplies by 0.95 per true epoch; "constant" does not decay, "plateau" not
  here.
  """
  p, num_tasks = config.protocol, len(benchmark.tasks)

  def decay(task: Task | Joint) -> float:
    if p.schedule in ("constant", "plateau"):
      return 1.0
    images = len(task.train.index)
    if p.schedule == "code":
      share = len(task.num_classes) / num_tasks if isinstance(task, Joint) else 1 / num_tasks
      images = 50000 * share * config.train_fraction * (1 - p.validation_fraction)
    return 0.95 ** (config.batch_size / images)

  return decay


def steps_per_epoch(config, num_images: int) -> int:
  """Optimizer steps in one epoch over `num_images` training images."""
  full, rest = divmod(num_images, config.batch_size)
  return full + (rest > 0 and config.protocol.last_batch == "train")


def _make_batch(split: Split, inputs: Inputs, num_classes, rows, image_fn=lambda image: image):
  """The rows [B] of a split as the network gets them."""
  image, label = image_fn(split.image[split.index[rows]]), split.label[rows]
  if split.owner is None:
    return Batch(prepare_images(image, inputs), label, num_classes, None)
  owner = split.owner[rows]
  return Batch(prepare_images(image, inputs, owner), label, num_classes[owner][:, None], owner)


def _count_right(logits, batch: Batch):
  return jnp.sum(jnp.argmax(mask_classes(logits, batch.num_classes), -1) == batch.label)


def _make_step(config, tx, objective_fn: Callable, penalty_fn: Callable, edit_fn: Callable):
  """Builds `step(state, rows [B], frozen, data, key) -> state, [B * loss, hits]`."""

  spread = parallel.make_spread(config)

  def loss_fn(params, frozen, stats, batch, key):
    loss, logits, stats = objective_fn(params, frozen, stats, batch, True, key)
    sums = jnp.stack([len(batch.label) * loss, _count_right(logits, batch)])
    return loss + penalty_fn(params, frozen), (stats, sums)

  def step(state, rows, frozen, data, key):
    split, inputs, num_classes, rate, gamma = data
    key = jax.random.fold_in(key, state.step)

    def augment(image):
      if config.protocol.augment == "crop_flip":
        return crop_and_flip(jax.random.fold_in(key, 1), image)
      return image

    batch = spread(_make_batch(split, inputs, num_classes, rows, augment))
    gradients = jax.grad(loss_fn, has_aux=True)(
      state.params, frozen, state.stats, batch, parallel.own_key(key)
    )
    grad, (stats, sums) = parallel.average(gradients)
    sums *= len(rows) / len(batch.label)
    updates, opt_state = tx.update(grad, state.opt_state, state.params)
    updates = edit_fn(updates, frozen)
    rate = -rate * gamma**state.step
    params = jax.tree.map(lambda x, u: x + rate * u, state.params, updates)
    return TrainState(params, stats, opt_state, state.step + 1), sums

  return step


def make_fit(
  config,
  decay: Callable[[Task | Joint], float],
  apply_fn: Callable,
  penalty_fn: Callable,
  *,
  objective_fn: Callable | None = None,
  edit_fn: Callable = lambda updates, frozen: updates,
  how: Recipe | None = None,
):
  """Builds `fit(params, stats, frozen, task, key, epochs, store) -> params, stats`.

  The optimizer sees gradient_scale * gradient and starts with empty moments and the full learning
  rate, which is multiplied by `decay(task)` after every step; with schedule="plateau" it is cut
  when the validation loss has stopped falling, and training ends when it is too low. Returned are
  the weights of the last epoch, or of the best one on the validation images (keep).

  Args:
    config: resolved.
    decay: from `learning_rate_decay`.
    apply_fn: see the top of this file.
    penalty_fn: see the top of this file.
    objective_fn: what is minimised beside the penalty, by default `cross_entropy_objective`.
    edit_fn: (updates, frozen) -> updates, applied to what the optimizer makes of the gradients.
    how: by default the protocol's recipe.
  """
  how = how or recipe(config)
  objective_fn = objective_fn or cross_entropy_objective(apply_fn)
  tx = optax.chain(optax.scale(how.gradient_scale), _moments(how))
  epochs_of_runs = epoch.make(config, _make_step(config, tx, objective_fn, penalty_fn, edit_fn))
  is_judged = how.schedule == "plateau" or how.keep != "last"
  validate = _make_validate(config, objective_fn)

  def fit(params, stats, frozen, task: Task | Joint, key, epochs: int, store: Store):
    result = f"{store.name}/result"
    if (kept := store.keep.read(result, (params, stats))) is not None:
      return jax.tree.map(jnp.asarray, kept)
    num_classes = jnp.asarray(task.num_classes, jnp.int32)
    blocks = task.blocks if isinstance(task, Joint) else (len(task.train.index),)
    num_images = sum(blocks)
    if config.protocol.last_batch == "drop":
      num_images -= sum(n % config.batch_size for n in blocks)
    data = (task.train, task.inputs, num_classes)
    gamma = jnp.float32(decay(task))
    done, state, best, plateau = start(params, stats, store)
    kept_at = time.perf_counter()
    for i in range(done, epochs):
      if plateau.rate < config.protocol.stop_rate and how.schedule == "plateau":
        break
      begin = time.perf_counter()
      event = {"event": "epoch", "phase": store.name, "epoch": i + 1, "epochs": epochs}
      arguments = (
        state,
        frozen,
        (*data, jnp.float32(plateau.rate), gamma),
        blocks,
        jax.random.fold_in(key, i),
        functools.partial(_watch, event, store),
      )
      state, total = store.together(epochs_of_runs, arguments)
      loss, accuracy = (float(x) / num_images for x in total)
      event |= {"loss": loss, "train_accuracy": 100 * accuracy}
      if is_judged:
        valid = processes.first_does(lambda s=state: validate(s, frozen, task, num_classes))
        event |= {"valid_loss": valid[0], "valid_accuracy": valid[1]}
        best = _keep_best(how.keep, best, state, *valid)
        plateau = _slow_down(config.protocol, plateau, valid[0])
      store.log(event | {"seconds": time.perf_counter() - begin})
      if i + 1 < epochs and _is_due(config.checkpoint, i + 1, kept_at):
        progress = (np.int32(i + 1), state, best, plateau)
        store.keep.write(f"{store.name}/fit", jax.tree.leaves(progress))
        kept_at = time.perf_counter()
      store.keep.check()
    params, stats = (state.params, state.stats) if how.keep == "last" or not epochs else best[1:]
    store.keep.write(result, jax.tree.leaves((params, stats)))
    return params, stats

  def start(params, stats, store):
    """-> epochs done, state, best epoch so far, plateau: as kept, or from the beginning."""
    # the state is donated to every epoch: the caller's arrays must not be
    params, stats = jax.tree.map(jnp.array, (params, stats))
    state = TrainState(params, stats, tx.init(params), jnp.zeros((), jnp.int32))
    state = parallel.replicate(config, state)  # where it will be after the first step
    best = () if how.keep == "last" else (np.float64(-np.inf), params, stats)
    patience = np.int32(config.protocol.patience)
    plateau = Plateau(np.float64(np.inf), patience, np.float64(how.learning_rate))
    kept = store.keep.read(f"{store.name}/fit", (np.int32(0), state, best, plateau))
    if kept is None:
      # `best` keeps arrays that the first epoch is given away with `state`
      return 0, jax.tree.map(jnp.array, state), best, plateau
    done, state, best, plateau = kept
    state, best = jax.tree.map(lambda x: jnp.array(x) if np.ndim(x) else x, (state, best))
    return int(done), state._replace(step=jnp.int32(state.step)), best, plateau

  return fit


def _make_validate(config, objective_fn: Callable) -> Callable:
  """Builds `validate(state, frozen, task, num_classes)`: loss and accuracy in percent."""

  @jax.jit
  def judge(state, frozen, split, inputs, num_classes, rows):
    """[sum of losses, hits] on some rows of a split."""
    batch = _make_batch(split, inputs, num_classes, rows)
    loss, logits, _ = objective_fn(state.params, frozen, state.stats, batch, False, None)
    return jnp.stack([len(rows) * loss, _count_right(logits, batch)])

  def validate(state, frozen, task, num_classes) -> tuple[float, float]:
    num_images = len(task.valid.index)
    if not num_images:
      return math.nan, math.nan
    args = (state, frozen, task.valid, task.inputs, num_classes)
    parts = [judge(*args, rows) for rows in batches(num_images, evaluation_batch_size(config))]
    loss, hits = sum(np.asarray(x, np.float64) for x in parts) / num_images
    return float(loss), 100 * float(hits)

  return validate


def _keep_best(keep: str, best, state: TrainState, loss: float, accuracy: float):
  """The score and weights of the best epoch; an earlier one wins a tie."""
  score = {"last": -np.inf, "best": accuracy, "best_loss": -loss}[keep]
  if keep == "last" or not score > best[0]:
    return best
  return np.float64(score), *jax.tree.map(jnp.array, (state.params, state.stats))


def _slow_down(protocol, plateau: Plateau, loss: float) -> Plateau:
  """GPM's and WSN's: after `patience` epochs that are no better, the rate is cut."""
  patience = np.int32(protocol.patience)
  if loss < plateau.best:
    return Plateau(np.float64(loss), patience, plateau.rate)
  if plateau.left > 1:
    return plateau._replace(left=np.int32(plateau.left - 1))
  return Plateau(plateau.best, patience, np.float64(plateau.rate * protocol.plateau_factor))


@processes.by_first
def _is_due(often, num_epochs: int, kept_at: float) -> bool:
  """Short epochs would write more than they compute: a checkpoint has all of Adam's moments."""
  elapsed = time.perf_counter() - kept_at
  return num_epochs % often.every_epochs == 0 and elapsed >= often.every_seconds


def _watch(event: dict, store: Store, state, sums, step: int, num_steps: int) -> None:
  """Between the chunks of an epoch."""
  if not np.isfinite(sums).all():
    place = store.keep.write(
      f"{store.name}/diverged", {"params": state.params, "stats": state.stats, "step": state.step}
    )
    raise Diverged(
      f"{event['phase']}, epoch {event['epoch']}, step {step} of {num_steps}: the loss is "
      f"{float(sums[0])}; try a smaller learning_rate or protocol.gradient_scale"
      + (f" (the weights then: {place}, read by halrp_jax.checkpoint.load)" if place else "")
    )
  store.log(event | {"event": "progress", "step": step, "steps": num_steps})
  store.keep.check()


# --- evaluation -----------------------------------------------------------------------


def make_predict(method) -> Callable:
  """Builds `Method.predict` from `Method.logits`: compiled once, a task's own classes alone."""
  logits_fn = jax.jit(method.logits)

  def predict(state, t, image):
    shared = {name: state.shared[name] for name in method.serves}
    logits = logits_fn(shared, state.tasks[t], image)
    return logits[:, : int(state.tasks[t]["num_classes"])]

  return predict


def evaluation_batch_size(config) -> int:
  """Images per evaluation batch."""
  return config.evaluation_batch_size or config.batch_size


def batches(num_images: int, batch_size: int) -> list[np.ndarray]:
  """Rows 0..num_images-1 in order, cut into batches; the last one may be smaller."""
  rows = np.arange(num_images)
  return [rows[i : i + batch_size] for i in range(0, num_images, batch_size)]


@jax.jit
def load_batch(split: Split, inputs: Inputs, rows: Array) -> tuple[jax.Array, jax.Array]:
  """Network inputs [B, H, W, C] and labels [B] of some rows of a split."""
  return prepare_images(split.image[split.index[rows]], inputs), split.label[rows]


def over_samples(fn: Callable, task: Task, key: jax.Array, num_samples: int, chunk: int) -> list:
  """fn(image [B, H, W, C]) of random training images, chunk by chunk, as arrays on the host."""
  chosen = np.asarray(jax.random.permutation(key, len(task.train.index)))[:num_samples]
  parts = []
  for rows in np.split(chosen, range(chunk, len(chosen), chunk)):
    image, _ = load_batch(task.train, task.inputs, rows)
    parts.append(jax.tree.map(np.asarray, fn(image)))
  return parts


@jax.jit
def _count_hits(logits, label):
  return jnp.sum(jnp.argmax(logits, -1) == label)


def evaluate(
  predict_fn: Callable, tasks: Sequence[Task], split: str, batch_size: int
) -> list[float]:
  """Accuracy in percent on one split of every task, NaN where it is empty.

  All batches of all tasks are handed to the device before the first result is read. Of several
  processes each has some of the batches.

  Args:
    predict_fn: (position in `tasks`, image [B, H, W, C]) -> logits [B, K]
    tasks: what to evaluate on.
    split: "train", "valid" or "test".
    batch_size: images per batch; with `method.batch_norm=batch` accuracies depend on it.
  """
  hits = []
  for i, task in enumerate(tasks):
    data = getattr(task, split)
    mine = batches(len(data.index), batch_size)[processes.index() :: processes.count()]
    parts = (load_batch(data, task.inputs, rows) for rows in mine)
    hits.append([_count_hits(predict_fn(i, image), label) for image, label in parts])
  hits = processes.total(np.array([sum(map(int, h)) for h in hits], np.int32))
  sizes = [len(getattr(task, split).index) for task in tasks]
  return [100 * int(h) / n if n else math.nan for h, n in zip(hits, sizes, strict=True)]
