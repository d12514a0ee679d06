"""fit(): the only optimisation loop.

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
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from halrp_jax.devices import processes
from halrp_jax.training import batches, epoch, losses, networks
from halrp_jax.training.setup import Setup
from halrp_jax.types import Diverged, Params, Store, Task


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


# --- fit ------------------------------------------------------------------------------


def recipe(setup: Setup) -> Recipe:
  """Returns the protocol's."""
  p = setup.protocol
  return Recipe(p.optimizer, p.momentum, setup.learning_rate, p.gradient_scale, p.schedule, p.keep)


def _moments(how: Recipe) -> optax.GradientTransformation:
  if how.optimizer == "adam":
    return optax.scale_by_adam()
  return optax.trace(how.momentum) if how.optimizer == "sgd" else how.optimizer


def learning_rate_decay(setup: Setup, schedule: str, task: Task | batches.Joint) -> float:
  """Returns the factor on the learning rate per optimizer step of a `protocol.schedule`.

  "code" is the authors' formula, which hard-codes the 50,000 images of CIFAR-100 for every
  benchmark; "epoch" multiplies by 0.95 per true epoch; "constant" does not decay, "plateau" not
  here.
  """
  if schedule in ("constant", "plateau"):
    return 1.0
  images = len(task.train.index)
  if schedule == "code":
    num_joint = len(task.num_classes) if isinstance(task, batches.Joint) else 1
    share = num_joint / setup.num_tasks
    images = 50000 * share * setup.train_fraction * (1 - setup.protocol.validation_fraction)
  return 0.95 ** (setup.batch_size / images)


def _make_step(setup: Setup, tx, objective_fn: Callable, penalty_fn: Callable, edit_fn: Callable):
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
    params = jax.tree.map(lambda x, u: x + rate * u, state.params, updates)
    return TrainState(params, stats, opt_state, state.step + 1), sums

  return step


def make_fit(
  setup: Setup,
  apply_fn: Callable,
  penalty_fn: Callable,
  *,
  objective_fn: Callable | None = None,
  edit_fn: Callable = lambda updates, frozen: updates,
  how: Recipe | None = None,
):
  """Builds `fit(params, stats, frozen, task, key, epochs, store) -> params, stats`.

  The optimizer sees gradient_scale * gradient and starts with empty moments and the full learning
  rate, which is multiplied by `learning_rate_decay` after every step; with schedule="plateau" it is
  cut when the validation loss has stopped falling, and training ends when it is too low. Returned
  are the weights of the last epoch, or of the best one on the validation images (keep).

  Args:
    setup: its protocol, batch sizes, loop, checkpoints and layout.
    apply_fn: see the top of this file.
    penalty_fn: see the top of this file.
    objective_fn: what is minimised beside the penalty, by default `cross_entropy_objective`.
    edit_fn: (updates, frozen) -> updates, applied to what the optimizer makes of the gradients.
    how: by default the protocol's recipe.
  """
  how = how or recipe(setup)
  objective_fn = objective_fn or losses.cross_entropy_objective(apply_fn)
  tx = optax.chain(optax.scale(how.gradient_scale), _moments(how))
  run_epoch = epoch.make(setup, _make_step(setup, tx, objective_fn, penalty_fn, edit_fn))
  is_judged = how.schedule == "plateau" or how.keep != "last"
  validate = _make_validate(setup, objective_fn)

  def fit(params, stats, frozen, task: Task | batches.Joint, key, epochs: int, store: Store):
    _check(params, task)
    result = f"{store.name}/result"
    if (kept := store.keep.read(result, (params, stats))) is not None:
      return jax.tree.map(jnp.asarray, kept)
    num_classes = jnp.asarray(task.num_classes, jnp.int32)
    blocks = task.blocks if isinstance(task, batches.Joint) else (len(task.train.index),)
    num_images = sum(blocks)
    if setup.protocol.last_batch == "drop":
      num_images -= sum(n % setup.batch_size for n in blocks)
    data = (task.train, task.inputs, num_classes)
    gamma = jnp.float32(learning_rate_decay(setup, how.schedule, task))
    done, state, best, plateau = start(params, stats, store)
    kept_at = time.perf_counter()
    for i in range(done, epochs):
      if plateau.rate < setup.protocol.stop_rate and how.schedule == "plateau":
        break
      begin = time.perf_counter()
      event = {"event": "epoch", "phase": store.name, "epoch": i + 1, "epochs": epochs}
      state, total = run_epoch(
        store.gang,
        state,
        frozen,
        (*data, jnp.float32(plateau.rate), gamma),
        blocks,
        jax.random.fold_in(key, i),
        functools.partial(_watch, event, store),
      )
      loss, accuracy = (float(x) / num_images for x in total)
      event |= {"loss": loss, "train_accuracy": 100 * accuracy}
      if is_judged:
        valid = processes.run_on_leader(lambda s=state: validate(s, frozen, task, num_classes))
        event |= {"valid_loss": valid[0], "valid_accuracy": valid[1]}
        best = _keep_best(how.keep, best, state, *valid)
        plateau = _slow_down(setup.protocol, plateau, valid[0])
      store.log(event | {"seconds": time.perf_counter() - begin})
      if i + 1 < epochs and _is_due(setup.checkpoint, i + 1, kept_at):
        progress = (np.int32(i + 1), state, best, plateau)
        store.keep.write(f"{store.name}/fit", jax.tree.leaves(progress))
        kept_at = time.perf_counter()
      store.keep.check()
    params, stats = (state.params, state.stats) if how.keep == "last" or not epochs else best[1:]
    store.keep.write(result, jax.tree.leaves((params, stats)))
    return params, stats

  def start(params, stats, store):
    """Returns epochs done, state, best epoch so far and plateau: as kept, or as at the start."""
    # the state is donated to every epoch: the caller's arrays must not be
    params, stats = jax.tree.map(jnp.array, (params, stats))
    state = TrainState(params, stats, tx.init(params), jnp.zeros((), jnp.int32))
    state = setup.layout.replicate(state)  # where it will be after the first step
    best = () if how.keep == "last" else (np.float64(-np.inf), params, stats)
    patience = np.int32(setup.protocol.patience)
    plateau = Plateau(np.float64(np.inf), patience, np.float64(how.learning_rate))
    kept = store.keep.read(f"{store.name}/fit", (np.int32(0), state, best, plateau))
    if kept is None:
      # `best` keeps arrays that the first epoch is given away with `state`
      return 0, jax.tree.map(jnp.array, state), best, plateau
    done, state, best, plateau = kept
    state, best = jax.tree.map(lambda x: jnp.array(x) if np.ndim(x) else x, (state, best))
    return int(done), state._replace(step=jnp.int32(state.step)), best, plateau

  return fit


def _check(params, task: Task | batches.Joint) -> None:
  """Raises AssertionError if the arguments of `fit` have other ranks or types than it is made for.

  Parameters are floating point; images uint8 [N, H, W, C]; rows, labels and owners
  integers [n].
  """
  for path, x in jax.tree.leaves_with_path({"params": params}):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    chex.assert_type(x, float, custom_message=f"{name} must be floating point")
  for kind, split in (("train", task.train), ("valid", task.valid)):
    message = f"{kind}: images must be uint8 [N, H, W, C]"
    chex.assert_rank(split.image, 4, custom_message=message)
    chex.assert_type(split.image, np.uint8, custom_message=message)
    rows = [x for x in (split.index, split.label, split.owner) if x is not None]
    message = f"{kind}: index, label and owner must be integers [n], one of each per image"
    chex.assert_rank(rows, 1, custom_message=message)
    chex.assert_type(rows, int, custom_message=message)
    chex.assert_equal_shape(rows, custom_message=message)
  message = "num_classes must be a number of one task, or [T] of several that are learned at once"
  chex.assert_rank(task.num_classes, int(isinstance(task, batches.Joint)), custom_message=message)


def plain_fit(setup: Setup, l2: float):
  """Builds `fit(params, stats, task, key, store) -> params, stats` of the plain network.

  It minimises the cross-entropy + l2 |W|^2 (kernels of the features) for `setup.epochs`.
  """
  fit, frozen = make_fit(setup, *networks.plain_network(setup.model)), {"l2": l2}

  def fit_plain(params, stats, task, key, store):
    return fit(params, stats, frozen, task, key, setup.epochs, store)

  return fit_plain


def _make_validate(setup: Setup, objective_fn: Callable) -> Callable:
  """Builds `validate(state, frozen, task, num_classes)`: loss and accuracy in percent."""

  @jax.jit
  def judge(state, frozen, split, inputs, num_classes, rows):
    """Returns [sum of losses, hits] on some rows of a split."""
    batch = batches.make_batch(split, inputs, num_classes, rows)
    loss, logits, _ = objective_fn(state.params, frozen, state.stats, batch, False, None)
    return jnp.stack([len(rows) * loss, losses.count_right(logits, batch)])

  def validate(state, frozen, task, num_classes) -> tuple[float, float]:
    num_images = len(task.valid.index)
    if not num_images:
      return math.nan, math.nan
    args = (state, frozen, task.valid, task.inputs, num_classes)
    parts = [
      judge(*args, rows) for rows in batches.consecutive(num_images, setup.evaluation_batch_size)
    ]
    loss, hits = sum(np.asarray(x, np.float64) for x in parts) / num_images
    return float(loss), 100 * float(hits)

  return validate


def _keep_best(keep: str, best, state: TrainState, loss: float, accuracy: float):
  """Returns score and weights of the best epoch; an earlier one wins a tie."""
  score = {"last": -np.inf, "best": accuracy, "best_loss": -loss}[keep]
  if keep == "last" or not score > best[0]:
    return best
  return np.float64(score), *jax.tree.map(jnp.array, (state.params, state.stats))


def _slow_down(protocol, plateau: Plateau, loss: float) -> Plateau:
  """Cuts the rate after `patience` epochs that are no better, as GPM and WSN do."""
  patience = np.int32(protocol.patience)
  if loss < plateau.best:
    return Plateau(np.float64(loss), patience, plateau.rate)
  if plateau.left > 1:
    return plateau._replace(left=np.int32(plateau.left - 1))
  return Plateau(plateau.best, patience, np.float64(plateau.rate * protocol.plateau_factor))


@processes.on_leader
def _is_due(often, num_epochs: int, kept_at: float) -> bool:
  """Returns whether to write a checkpoint, which takes longer than a short epoch computes."""
  elapsed = time.perf_counter() - kept_at
  return num_epochs % often.every_epochs == 0 and elapsed >= often.every_seconds


def _watch(event: dict, store: Store, state, sums, step: int, num_steps: int) -> None:
  """Reports progress between two chunks of an epoch; raises Diverged if the loss is not finite."""
  if not np.isfinite(sums).all():
    place = store.keep.write(
      f"{store.name}/diverged", {"params": state.params, "stats": state.stats, "step": state.step}
    )
    raise Diverged(
      f"{event['phase']}, epoch {event['epoch']}, step {step} of {num_steps}: the loss is "
      f"{float(sums[0])}; try a smaller learning_rate or protocol.gradient_scale"
      + (f" (the weights then: {place}, read by halrp_jax.runs.checkpoint.load)" if place else "")
    )
  store.log(event | {"event": "progress", "step": step, "steps": num_steps})
  store.keep.check()
