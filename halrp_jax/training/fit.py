"""The optimisation loop of all methods, `fit`.

A method supplies two pure functions:

  apply_fn(params, frozen, stats, image, train, key) -> logits, stats
  penalty_fn(params, frozen)                         -> scalar

and `make_fit` builds `fit` from them, which is compiled once when the method is made. `params` is
what is trained, `frozen` is not, and `stats` are BatchNorm's running statistics. A method that
minimises something else than the cross-entropy of the logits supplies an objective, one that
restricts its updates an `edit_fn`, and one with its own optimizer settings a `Recipe`.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from halrp_jax import keys
from halrp_jax.devices import processes
from halrp_jax.training import batches, epoch, losses, networks
from halrp_jax.training.setup import Setup
from halrp_jax.types import Diverged, Json, Params, Store, Task
from halrp_jax.weights import trees

Fit = Callable[..., tuple[Params, Params]]  # returns params and stats


class Recipe(NamedTuple):
  """Optimizer settings of `fit`: those of the protocol, unless a method has its own.

  Fields that are names have the values and meaning of the key `protocol.*` of the same name.
  """

  # a name, or a transformation of the scaled gradients into updates, in which case `momentum` is
  # not used
  optimizer: str | optax.GradientTransformation
  momentum: float
  learning_rate: float
  gradient_scale: float
  schedule: str
  keep: str


class Plateau(NamedTuple):
  """State of the learning rate with schedule="plateau"."""

  best: np.float64  # least validation loss so far
  left: np.int32  # epochs without a lower loss until the rate is cut
  rate: np.float64  # current learning rate


class TrainState(NamedTuple):
  """State of training between two optimizer steps."""

  params: Params
  stats: Params  # BatchNorm's running statistics
  opt_state: Params
  step: jax.Array  # int32, optimizer steps done


class Progress(NamedTuple):
  """State of training between two epochs, whose leaves are what a checkpoint holds."""

  num_epochs: np.int32  # epochs done
  state: TrainState
  best: Params  # score, params and stats of the best epoch; () if the last one is returned
  plateau: Plateau


# --- one step -------------------------------------------------------------------------


def protocol_recipe(setup: Setup) -> Recipe:
  """Returns the optimizer settings of the protocol."""
  p = setup.protocol
  return Recipe(p.optimizer, p.momentum, setup.learning_rate, p.gradient_scale, p.schedule, p.keep)


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
  """Returns the optimizer: gradients become updates, without the learning rate."""
  return optax.chain(optax.scale(recipe.gradient_scale), _transformation(recipe))


def _transformation(recipe: Recipe) -> optax.GradientTransformation:
  """Returns the optimizer as a transformation of scaled gradients, without the learning rate."""
  if isinstance(recipe.optimizer, optax.GradientTransformation):
    return recipe.optimizer
  return optax.scale_by_adam() if recipe.optimizer == "adam" else optax.trace(recipe.momentum)


def learning_rate_decay(setup: Setup, schedule: str, task: Task | batches.Joint) -> float:
  """Returns the factor that the learning rate is multiplied by after every optimizer step.

  Args:
    setup: settings of the run.
    schedule: `Recipe.schedule`. "epoch" multiplies by 0.95 per epoch. "code" is the formula of the
      authors' code, which takes the 50,000 images of CIFAR-100 for every benchmark. "constant"
      and "plateau" have no decay per step.
    task: what is learned.
  """
  if schedule in ("constant", "plateau"):
    return 1.0
  images = len(task.train.index)
  if schedule == "code":
    num_joint = len(task.num_classes) if isinstance(task, batches.Joint) else 1
    share = num_joint / setup.num_tasks
    images = 50000 * share * setup.train_fraction * (1 - setup.protocol.validation_fraction)
  return 0.95 ** (setup.batch_size / images)


def make_step(
  setup: Setup,
  tx: optax.GradientTransformation,
  objective_fn: Callable,
  penalty_fn: Callable,
  edit_fn: Callable,
) -> Callable:
  """Builds `step(state, rows [B], frozen, data, key) -> state, [B * loss, hits]`."""
  layout = setup.layout

  def loss_fn(params, frozen, stats, batch, key):
    loss, logits, stats = objective_fn(params, frozen, stats, batch, True, key)
    sums = jnp.stack([len(batch.label) * loss, losses.count_right(logits, batch)])
    return loss + penalty_fn(params, frozen), (stats, sums)

  def step(state, rows, frozen, data, key):
    split, inputs, num_classes, rate, gamma = data
    key = jax.random.fold_in(key, state.step)

    def augment(image):
      if setup.protocol.augment == "crop_flip":
        return batches.crop_and_flip(jax.random.fold_in(key, 1), image)
      return image

    batch = layout.shard(batches.make_batch(split, inputs, num_classes, rows, augment))
    gradients = jax.grad(loss_fn, has_aux=True)(
      state.params, frozen, state.stats, batch, layout.own_key(key)
    )
    grad, (stats, sums) = layout.average(gradients)
    sums *= len(rows) / len(batch.label)
    updates, opt_state = tx.update(grad, state.opt_state, state.params)
    updates = edit_fn(updates, frozen)
    rate = -rate * gamma**state.step

    def change(path, x, update):
      if setup.protocol.head_rate != 1 and trees.is_in_head(path):
        update *= setup.protocol.head_rate
      return x + rate * update

    params = jax.tree_util.tree_map_with_path(change, state.params, updates)
    return TrainState(params, stats, opt_state, state.step + 1), sums

  return step


# --- all epochs -----------------------------------------------------------------------


def make_fit(
  setup: Setup,
  apply_fn: Callable | None,
  penalty_fn: Callable,
  *,
  objective_fn: Callable | None = None,
  edit_fn: Callable = lambda updates, frozen: updates,
  recipe: Recipe | None = None,
) -> Fit:
  """Builds `fit(params, stats, frozen, task, key, epochs, store) -> params, stats`.

  The optimizer gets gradient_scale * gradient. It starts with empty moments and the full learning
  rate, which is multiplied by `learning_rate_decay` after every step. With schedule="plateau" the
  rate is cut when the validation loss has stopped falling, and training ends when it is too low.
  `fit` returns the weights of the last epoch, or those of the best epoch on the validation images
  (`Recipe.keep`).

  Every finished call is stored, and a checkpoint is written after an epoch when one is due. When
  the run is resumed, `fit` returns what is stored, or continues from the last checkpoint.

  Args:
    setup: its protocol, batch sizes, loop, checkpoint settings and layout are used.
    apply_fn: see the top of this file; None with an `objective_fn`.
    penalty_fn: see the top of this file.
    objective_fn: what is minimised together with the penalty, by default
      `losses.cross_entropy_objective`.
    edit_fn: (updates, frozen) -> updates, applied to the updates that the optimizer returns.
    recipe: the optimizer settings, by default those of the protocol.
  """
  recipe = recipe or protocol_recipe(setup)
  if objective_fn is None:
    assert apply_fn is not None, "make_fit needs apply_fn or objective_fn"
    objective_fn = losses.cross_entropy_objective(apply_fn)
  tx = optimizer(recipe)
  run_epoch = epoch.make(setup, make_step(setup, tx, objective_fn, penalty_fn, edit_fn))
  start = _make_start(setup, recipe, tx)
  after_epoch = _make_after_epoch(setup, recipe, objective_fn)

  def fit(
    params: Params,
    stats: Params,
    frozen: Params,
    task: Task | batches.Joint,
    key: jax.Array,
    epochs: int,
    store: Store,
  ) -> tuple[Params, Params]:
    _check(params, task)
    result = f"{store.name}/result"
    if (stored := store.progress.read(result, (params, stats))) is not None:
      return jax.tree.map(jnp.asarray, stored)
    data = (task.train, task.inputs, jnp.asarray(task.num_classes, jnp.int32))
    gamma = jnp.float32(learning_rate_decay(setup, recipe.schedule, task))
    blocks = task.blocks if isinstance(task, batches.Joint) else (len(task.train.index),)
    progress, saved_at = start(params, stats, store), time.perf_counter()
    for i in range(int(progress.num_epochs), epochs):
      rate = progress.plateau.rate
      if recipe.schedule == "plateau" and rate < setup.protocol.stop_rate:
        break
      begin = time.perf_counter()
      event = {"event": "epoch", "phase": store.name, "epoch": i + 1, "epochs": epochs}
      state, sums = run_epoch(
        store.gang,
        progress.state,
        frozen,
        (*data, jnp.float32(rate), gamma),
        blocks,
        jax.random.fold_in(key, i),
        functools.partial(_watch, event, store),
      )
      progress = progress._replace(num_epochs=np.int32(i + 1), state=state)
      progress, found = after_epoch(progress, sums, frozen, task, blocks)
      store.log(event | found | {"seconds": time.perf_counter() - begin})
      if i + 1 < epochs and _is_due(setup.checkpoint, i + 1, saved_at):
        store.progress.write(f"{store.name}/fit", jax.tree.leaves(progress))
        saved_at = time.perf_counter()
      store.progress.check()
    if recipe.keep == "last" or not epochs:
      params, stats = progress.state.params, progress.state.stats
    else:
      _, params, stats = progress.best
    store.progress.write(result, jax.tree.leaves((params, stats)))
    return params, stats

  return fit


def _make_start(
  setup: Setup, recipe: Recipe, tx: optax.GradientTransformation
) -> Callable[[Params, Params, Store], Progress]:
  """Builds `start(params, stats, store)`: the progress at the last checkpoint or the start."""

  def start(params: Params, stats: Params, store: Store) -> Progress:
    # every epoch donates the state, which must not hold arrays of the caller
    params, stats = jax.tree.map(jnp.array, (params, stats))
    state = TrainState(params, stats, tx.init(params), jnp.zeros((), jnp.int32))
    state = setup.layout.replicate(state)  # onto the devices where the first step leaves it
    best = () if recipe.keep == "last" else (np.float64(-np.inf), params, stats)
    patience = np.int32(setup.protocol.patience)
    plateau = Plateau(np.float64(np.inf), patience, np.float64(recipe.learning_rate))
    fresh = Progress(np.int32(0), state, best, plateau)
    saved = store.progress.read(f"{store.name}/fit", fresh)
    if saved is None:
      # `best` may share arrays with `state`, which the first epoch donates
      return fresh._replace(state=jax.tree.map(jnp.array, state))
    state, best = jax.tree.map(
      lambda x: jnp.array(x) if np.ndim(x) else x, (saved.state, saved.best)
    )
    return saved._replace(state=state._replace(step=jnp.int32(state.step)), best=best)

  return start


def _make_after_epoch(setup: Setup, recipe: Recipe, objective_fn: Callable) -> Callable:
  """Builds `after_epoch(progress, sums, frozen, task, blocks)`.

  It validates the network if the recipe asks for it, and returns the progress with the best epoch
  and the learning rate renewed, and what is logged of the epoch.
  """
  validate = processes.on_leader(_make_validate(setup, objective_fn))
  is_validated = recipe.schedule == "plateau" or recipe.keep != "last"

  def after_epoch(progress, sums, frozen, task, blocks):
    num_images = sum(blocks)
    if setup.protocol.last_batch == "drop":
      num_images -= sum(n % setup.batch_size for n in blocks)
    loss, accuracy = (float(x) / num_images for x in sums)
    found = {"loss": loss, "train_accuracy": 100 * accuracy}
    if not is_validated:
      return progress, found
    loss, accuracy = validate(progress.state, frozen, task)
    best = _keep_best(recipe.keep, progress.best, progress.state, loss, accuracy)
    plateau = _cut_rate(setup.protocol, progress.plateau, loss)
    found |= {"valid_loss": loss, "valid_accuracy": accuracy}
    return progress._replace(best=best, plateau=plateau), found

  return after_epoch


def _check(params: Params, task: Task | batches.Joint) -> None:
  """Raises AssertionError if the arguments of `fit` have the wrong ranks or types.

  Parameters are floating point, images uint8 [N, H, W, C], and rows, labels and owners integers
  [n].
  """
  for path, x in jax.tree.leaves_with_path({"params": params}):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    chex.assert_type(x, float, custom_message=f"{name} must be floating point")
  for name, split in (("train", task.train), ("valid", task.valid)):
    message = f"{name}: images must be uint8 [N, H, W, C]"
    chex.assert_rank(split.image, 4, custom_message=message)
    chex.assert_type(split.image, np.uint8, custom_message=message)
    rows = [x for x in (split.index, split.label, split.owner) if x is not None]
    message = f"{name}: index, label and owner must be integers [n], one of each per image"
    chex.assert_rank(rows, 1, custom_message=message)
    chex.assert_type(rows, int, custom_message=message)
    chex.assert_equal_shape(rows, custom_message=message)
  message = "num_classes must be a scalar for one task, [T] for several that are learned together"
  chex.assert_rank(task.num_classes, int(isinstance(task, batches.Joint)), custom_message=message)


def plain_fit(setup: Setup, l2: float) -> Fit:
  """Builds `fit(params, stats, task, key, store) -> params, stats` of the plain network.

  It minimises the cross-entropy + l2 |W|^2 for `setup.epochs`, where W are the kernels of all
  layers except the head.
  """
  fit, frozen = make_fit(setup, *networks.plain_network(setup.model)), {"l2": l2}

  def fit_plain(params, stats, task, key, store):
    return fit(params, stats, frozen, task, key, setup.epochs, store)

  return fit_plain


# --- validation, checkpoints, progress ------------------------------------------------


def _make_validate(setup: Setup, objective_fn: Callable) -> Callable:
  """Builds `validate(state, frozen, task)`: loss and accuracy in percent on validation images.

  Both are NaN if there are none.
  """

  @jax.jit
  def evaluate_rows(state, frozen, split, inputs, num_classes, rows):
    """Returns [sum of losses, hits] on some rows of a split."""
    batch = batches.make_batch(split, inputs, num_classes, rows)
    loss, logits, _ = objective_fn(state.params, frozen, state.stats, batch, False, None)
    return jnp.stack([len(rows) * loss, losses.count_right(logits, batch)])

  def validate(state, frozen, task) -> tuple[float, float]:
    num_images = len(task.valid.index)
    if not num_images:
      return math.nan, math.nan
    num_classes = jnp.asarray(task.num_classes, jnp.int32)
    args = (state, frozen, task.valid, task.inputs, num_classes)
    parts = [
      evaluate_rows(*args, rows)
      for rows in batches.consecutive(num_images, setup.evaluation_batch_size)
    ]
    loss, hits = functools.reduce(np.add, [np.asarray(x, np.float64) for x in parts]) / num_images
    return float(loss), 100 * float(hits)

  return validate


def _keep_best(keep: str, best: Params, state: TrainState, loss: float, accuracy: float) -> Params:
  """Returns score, params and stats of the best epoch so far; of equal ones the first."""
  score = {"last": -np.inf, "best": accuracy, "best_loss": -loss}[keep]
  if keep == "last" or not score > best[0]:
    return best
  return np.float64(score), *jax.tree.map(jnp.array, (state.params, state.stats))


def _cut_rate(protocol: keys.Protocol, plateau: Plateau, loss: float) -> Plateau:
  """Returns the plateau after an epoch: `patience` epochs without a lower loss cut the rate.

  GPM and WSN do so in their code.
  """
  patience = np.int32(protocol.patience)
  if loss < plateau.best:
    return Plateau(np.float64(loss), patience, plateau.rate)
  if plateau.left > 1:
    return plateau._replace(left=np.int32(plateau.left - 1))
  return Plateau(plateau.best, patience, np.float64(plateau.rate * protocol.plateau_factor))


@processes.on_leader
def _is_due(checkpoint: keys.Checkpoint, num_epochs: int, saved_at: float) -> bool:
  """Returns whether to write a checkpoint, which takes longer than a short epoch."""
  elapsed = time.perf_counter() - saved_at
  return num_epochs % checkpoint.every_epochs == 0 and elapsed >= checkpoint.every_seconds


def _watch(
  event: Json,
  store: Store,
  state: TrainState,
  sums: jax.Array,
  step: int,
  num_steps: int,
) -> None:
  """Reports progress between two chunks of an epoch.

  Raises:
    Diverged: if the loss became NaN or infinite. The weights are stored first.
    Stopped: if the run was asked to stop.
  """
  if not np.isfinite(sums).all():
    path = store.progress.write(
      f"{store.name}/diverged", {"params": state.params, "stats": state.stats, "step": state.step}
    )
    raise Diverged(
      f"{event['phase']}, epoch {event['epoch']}, step {step} of {num_steps}: the loss became "
      f"{float(sums[0])}; try a smaller learning_rate or protocol.gradient_scale"
      + (f" (the weights are in {path}: halrp_jax.runs.checkpoint.load reads them)" if path else "")
    )
  store.log(event | {"event": "progress", "step": step, "steps": num_steps})
  store.progress.check()
