"""The benchmarks by name, and what all of them share: fractions, validation split, order, hash.

A family gives two functions of the config: `outline` (what the protocol asks for, known without
the data) and `read` (the tasks in the order of their ids, `train` being the whole pool and `valid`
empty, but where the benchmark has a validation set of its own). To add one: a file beside this one
and a line in `BENCHMARKS`.
"""

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from halrp_jax.data import (
  cifar100,
  content,
  custom,
  digits,
  five_datasets,
  mnist,
  omniglot,
  orders,
  sources,
  tinyimagenet,
)
from halrp_jax.data.tasks import Outline
from halrp_jax.keys import Config
from halrp_jax.types import Benchmark, Split, Task, UserError


class Family(NamedTuple):
  outline: Callable[..., Outline | None]  # (config) -> what the protocol asks for; None: anything
  read: Callable[..., list[Task]]  # (config) -> tasks by id
  originals: tuple[str, ...] = ()  # data sets it is made of: keys of `sources.ORIGINALS`
  tells: bool = False  # read(config, tell) calls tell with lines about the files


BENCHMARKS: dict[str, Family] = {
  "cifar100_split": Family(cifar100.outline_split, cifar100.read_split, ("cifar100",)),
  "cifar100_superclass": Family(
    cifar100.outline_superclass, cifar100.read_superclass, ("cifar100",)
  ),
  "pmnist": Family(mnist.outline, mnist.read, ("mnist",)),
  "five_datasets": Family(five_datasets.outline, five_datasets.read, five_datasets.NAMES),
  "omniglot_rotation": Family(omniglot.outline, omniglot.read, ("omniglot",)),
  "tinyimagenet20": Family(tinyimagenet.outline_20, tinyimagenet.read_20, ("tiny_imagenet",)),
  "tinyimagenet40": Family(tinyimagenet.outline_40, tinyimagenet.read_40, ("tiny_imagenet",)),
  "pmnist20": Family(mnist.outline_20, mnist.read_20, ("mnist",)),
  "cifar100_20": Family(cifar100.outline_random, cifar100.read_random, ("cifar100",)),
  "digits": Family(digits.outline, digits.read),
  "custom": Family(custom.outline, custom.read, tells=True),
}


def load(config: Config) -> Benchmark:
  """Returns the benchmark a config names, split, in the order of training, images on the device.

  Raises: as `read`.
  """
  benchmark = read(config)
  image = jax.device_put(benchmark.tasks[0].train.image)  # one array for all tasks
  return benchmark._replace(tasks=tuple(_on_device(task, image) for task in benchmark.tasks))


def read(config: Config) -> Benchmark:
  """Returns what `load` does, with the images as they were read.

  Raises:
    sources.Missing: if the data are not there.
    UserError: if they are damaged or too few, or the order is none.
  """
  drawn, lacks, notes = _drawn(config)
  tasks = in_order(config, {task.id: task for task in drawn})
  is_partial = bool(lacks) or len(tasks) < len(drawn)
  return Benchmark(config.benchmark, tasks, _hash(drawn), is_partial, notes)


def in_order(config: Config, found: dict[int, object]) -> tuple:
  """Returns what belongs to the tasks, by their ids, in the order of training."""
  outline = BENCHMARKS[config.benchmark].outline(config)
  order = _order(config, len(outline.tasks) if outline else len(found))
  return tuple(found[i] for i in order if i in found)


def _drawn(config: Config) -> tuple[list[Task], list[str], tuple[str, ...]]:
  """Returns the tasks by their ids, split and hashed; what the data lack; notes on the files."""
  family = BENCHMARKS[config.benchmark]
  outline = family.outline(config)
  if outline:
    _order(config, len(outline.tasks))  # refused before the data are read
  notes = []
  tasks = family.read(config, notes.append) if family.tells else family.read(config)
  for task in tasks:
    _require_classes(task)
  lacks = _lacks(tasks, outline) if outline else []
  if lacks and not config.allow_partial:
    more = f" (and {len(lacks) - 1} more)" if len(lacks) > 1 else ""
    raise UserError(f"{lacks[0]}{more}; complete the data, or set allow_partial=True")
  tasks = tasks if config.data.normalise else [_raw(task) for task in tasks]
  splits = [_hold_out(task, config, not outline) for task in tasks]
  notes += _empty_classes(splits, config)
  return content.with_hashes(tasks, splits), lacks, tuple(notes)


def load_task(
  text: str,
  config: Config,
  shape: tuple[int, int, int],
  task_id: int,
  tell: Callable[[str], None] = lambda line: None,
) -> Task:
  """One task of the user's own images, split as a config says, images on the device.

  Args:
    text: path of a folder with a folder per class, or an .npz (custom.py).
    config: resolved.
    shape: [H, W, C] that its images get.
    task_id: its number.
    tell: is called with lines that say what was converted or is not used.
  """
  task = custom.read_one(text, config, shape, task_id, tell)
  _require_classes(task)
  whole = task if config.data.normalise else _raw(task)
  (task,) = content.with_hashes([whole], [_hold_out(whole, config, True)])
  return _on_device(task, jax.device_put(task.train.image))


def lacking(config: Config) -> list[str]:
  """Lines that say what the data lack of the protocol."""
  family = BENCHMARKS[config.benchmark]
  outline = family.outline(config)
  return _lacks(family.read(config), outline) if outline else []


def planned(config: Config) -> tuple[tuple[int, int, int], list[dict]] | None:
  """What `load` would give if the data were there: image shape, tasks in the order of training.

  None: the benchmark asks for nothing certain.
  """
  outline = BENCHMARKS[config.benchmark].outline(config)
  if outline is None:
    return None
  fraction, tasks = config.protocol.validation_fraction, []
  for i in _order(config, len(outline.tasks)):
    task = outline.tasks[i]
    used = _planned_fraction(config, task.num_train, task.num_classes)
    valid = math.floor(fraction * used)
    sizes = {"train": used - valid, "valid": valid, "test": task.num_test}
    if task.num_valid:
      valid = _planned_fraction(config, task.num_valid, task.num_classes)
      sizes |= {"train": used, "valid": valid}
    tasks.append({"id": i, "name": task.name, "num_classes": task.num_classes} | sizes)
  return outline.image_shape, tasks


def _planned_fraction(config: Config, num_images: int, num_classes: int) -> int:
  """How many images `_fraction` leaves, if the classes are equally large."""
  groups = num_classes if config.protocol.fraction_per_class else 1
  return min(num_images, groups * math.ceil(config.train_fraction * (num_images / groups)))


def _order(config: Config, num_tasks: int) -> tuple[int, ...]:
  return orders.resolve(config.order, config.benchmark, num_tasks, config.protocol.order_source)


def _require_classes(task: Task) -> None:
  for split, kind in ((task.train, "training"), (task.test, "test")):
    counts = np.bincount(split.label, minlength=task.num_classes)
    if not counts.all():
      name = task.class_names[int(counts.argmin())]
      raise UserError(
        f"task {task.name!r} has no {kind} images of class {name!r}; complete the data: every "
        "class needs some, also with allow_partial"
      )


def _lacks(tasks: list[Task], outline: Outline) -> list[str]:
  """Lines that say which task has fewer images than the protocol asks for, and by how many."""
  found, lines = {task.id: task for task in tasks}, []
  for i, wanted in enumerate(outline.tasks):
    if i not in found:
      lines.append(f"task {wanted.name!r} is missing")
      continue
    counts = [len(split.index) for split in (found[i].train, found[i].test, found[i].valid)]
    asked = (wanted.num_train, wanted.num_test, wanted.num_valid)
    for count, ask, kind in zip(counts, asked, ("training", "test", "validation"), strict=True):
      if count < ask:
        lines.append(
          f"task {wanted.name!r} has {count:,} {kind} images, {ask - count:,} fewer than the "
          f"{ask:,} of the protocol"
        )
  return lines


def _raw(task: Task) -> Task:
  """Network inputs from 0 to 255."""
  mean, std = np.zeros_like(task.inputs.mean), np.full_like(task.inputs.std, 1 / 255)
  return task._replace(inputs=task.inputs._replace(mean=mean, std=std))


def _hold_out(task: Task, config: Config, is_own: bool) -> Task:
  """Takes `train_fraction` of the images and holds out the validation images.

  Keyed by seed and the task's own id: the same images in every order. The test set stays whole. No
  class is left without training images, if as many images as classes are asked for; of a user's own
  images, none without training and validation images whatever is asked for.

  Raises:
    UserError: if there are too few images.
  """
  task = task._replace(test=_mixed(task.test, task.id))
  pool, fraction, key = task.train, config.protocol.validation_fraction, (config.seed, task.id)
  if len(task.valid.index):
    train = _fraction(pool, config, key, 1, is_own)
    return task._replace(train=train, valid=_fraction(task.valid, config, key, 1, is_own))
  asked = is_own and fraction > 0  # for validation images of every class
  used = _fraction(pool, config, key, 1 + asked, is_own)
  num_valid = math.floor(fraction * len(used.index))
  spare = int(is_own or len(used.index) - num_valid >= task.num_classes)
  held_out = _first_of_classes(used.label, num_valid, int(asked), spare)
  counts = np.bincount(used.label[held_out], minlength=task.num_classes)
  if asked and not counts.all():
    raise UserError(
      f"task {task.name!r}: class {task.class_names[int(counts.argmin())]!r} has 1 image beside "
      f"those for testing, and protocol.validation_fraction = {fraction} needs 2, to train and to "
      "validate on: add images of this class, or set protocol.validation_fraction=0"
    )
  if fraction > 0 and not counts.any():
    larger_helps = math.floor(fraction * len(pool.index)) and config.train_fraction < 1
    raise UserError(
      f"train_fraction = {config.train_fraction} leaves task {task.name!r} {len(used.index)} "
      f"training and 0 validation images of {len(pool.index)}: take a larger fraction"
      if larger_helps
      else f"protocol.validation_fraction = {fraction} of the {len(used.index)} images of task "
      f"{task.name!r} is less than one: take a larger one, or 0, or add images"
    )
  valid, train = (
    Split(used.image, used.index[rows], used.label[rows]) for rows in (held_out, ~held_out)
  )
  return task._replace(valid=valid, train=train)


def _empty_classes(tasks, config: Config) -> list[str]:
  """Returns a line that counts the classes without training images, if there are any."""
  counts = [np.bincount(t.train.label, minlength=t.num_classes) for t in tasks]
  num_empty = sum(int((c == 0).sum()) for c in counts)
  line = (
    f"train_fraction = {config.train_fraction} leaves {num_empty} of {sum(map(len, counts))} "
    "classes without training images"
  )
  return [line] if num_empty else []


def _first_of_classes(label: np.ndarray, count: int, least: int, spare: int) -> np.ndarray:
  """Marks the first `count` of drawn images, changed as little as these need: of each class at
  least its first `least`, and not its last `spare`.

  Args:
    label: in the order of drawing. [N]
    count: number of images to mark; more are if `least` needs it, fewer if `spare` does.
    least: of each class, if it has so many.
    spare: of each class.

  Returns:
    bool [N].
  """
  sizes = np.bincount(label)
  most = np.maximum(sizes - spare, 0)
  n = np.bincount(label[:count], minlength=len(sizes)).clip(least, None).clip(None, most)
  for c in label[count:]:  # the next ones, in the place of those that are spared
    if n.sum() >= count:
      break
    n[c] += n[c] < most[c]
  for c in label[:count][::-1]:  # the last ones, whose place is needed
    if n.sum() <= count:
      break
    n[c] -= n[c] > least
  rank = np.empty(len(label), int)  # the index of an image within its class
  rank[np.argsort(label, kind="stable")] = np.arange(len(label))
  rank -= (np.cumsum(sizes) - sizes)[label]
  return rank < n[label]


def _mixed(split: Split, task_id: int) -> Split:
  """Images that come class by class in a random order, always the same: a network that evaluates
  with the statistics of a batch needs all classes in it.
  """
  if (np.diff(split.label) < 0).any():
    return split
  rows = np.random.default_rng((task_id,)).permutation(len(split.index))
  return Split(split.image, split.index[rows], split.label[rows])


def _fraction(
  split: Split, config: Config, key: tuple[int, int], least: int, is_own: bool
) -> Split:
  """Draws `train_fraction` of a split, of every class or of all images together.

  At least `least` images of each class, if it has so many and there are to be as many images as
  classes or they are the user's own.
  """
  rows = np.random.default_rng(key).permutation(len(split.index))
  label, fraction = split.label[rows], config.train_fraction
  if config.protocol.fraction_per_class and fraction < 1:
    parts = [np.flatnonzero(label == c) for c in np.unique(label)]
    kept = [p[: max(math.ceil(fraction * len(p)), least)] for p in parts]
    rows = rows[np.sort(np.concatenate(kept))]
  else:
    count = math.ceil(fraction * len(rows))
    least = least if is_own or count >= len(np.unique(label)) else 0
    rows = rows[_first_of_classes(label, count, least, 0)]
  return Split(split.image, split.index[rows], split.label[rows])


def _hash(tasks) -> str:
  tasks = list(tasks)
  digest = hashlib.sha256(np.ascontiguousarray(tasks[0].train.image))
  for task in tasks:
    for split in (task.train, task.valid, task.test):
      digest.update(np.asarray(split.index, np.int64).tobytes())
      digest.update(np.asarray(split.label, np.int64).tobytes())
    for leaf in jax.tree.leaves(task.inputs):
      digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()


def _on_device(task: Task, image: jax.Array) -> Task:
  def move(split):
    index, label = (jax.device_put(np.asarray(x, np.int32)) for x in (split.index, split.label))
    return Split(image, index, label)

  return task._replace(
    inputs=jax.device_put(task.inputs),
    train=move(task.train),
    valid=move(task.valid),
    test=move(task.test),
  )


def download(config: Config, tell: Callable[[str], None]) -> None:
  """Fetches the original files that the config's benchmark needs and `data_dir` lacks."""
  if config.data.source == "tfds":
    raise UserError("--download fetches originals; with data.source=tfds, TFDS prepares its own")
  sources.download(config.data_dir, BENCHMARKS[config.benchmark].originals, tell)
