"""The benchmarks by name, and the steps that are the same for all of them.

These steps are: drawing a fraction of the training images, holding out validation images, putting
the tasks in order, and hashing the data.

The module of a benchmark family has two functions of the config. `outline` describes the tasks of
the protocol without reading the data. `read` reads the tasks in the order of their ids. Their
training split has all images that are not for testing, and their validation split is empty, unless
the benchmark itself has validation images. To add a benchmark, add a module to this folder and a
line to `BENCHMARKS`.
"""

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

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
  residence,
  sources,
  tinyimagenet,
)
from halrp_jax.data.tasks import Outline, resizing
from halrp_jax.keys import Config
from halrp_jax.types import Array, Benchmark, Split, Task, UserError

T = TypeVar("T")


class Family(NamedTuple):
  """A benchmark: how to describe its tasks and how to read them."""

  summary: str  # one line for --list
  outline: Callable[[Config], Outline | None]  # the protocol; None: the data alone decide
  read: Callable[..., list[Task]]  # (config) -> tasks by id
  originals: tuple[str, ...] = ()  # the data sets that it uses: keys of `sources.ORIGINALS`
  has_num_tasks: bool = False  # reads `data.num_tasks`
  notifies: bool = False  # read(config, notify) calls notify with lines about the files


BENCHMARKS: dict[str, Family] = {
  "cifar100_split": Family(
    "CIFAR100-Split: 10 tasks of 10 classes.",
    cifar100.outline_split,
    cifar100.read_split,
    ("cifar100",),
  ),
  "cifar100_superclass": Family(
    "CIFAR100-SuperClass: 20 tasks of 5 classes, the superclasses.",
    cifar100.outline_superclass,
    cifar100.read_superclass,
    ("cifar100",),
  ),
  "pmnist": Family(
    "P-MNIST: 10 permutations of MNIST, 32 x 32 x 3.",
    mnist.outline,
    mnist.read,
    ("mnist",),
    has_num_tasks=True,
  ),
  "five_datasets": Family(
    "Five-dataset: CIFAR-10, MNIST, SVHN, FashionMNIST, notMNIST.",
    five_datasets.outline,
    five_datasets.read,
    five_datasets.NAMES,
  ),
  "omniglot_rotation": Family(
    "Omniglot-Rotation: 100 tasks of 12 characters in 4 rotations, 32 x 32.",
    omniglot.outline,
    omniglot.read,
    ("omniglot",),
    has_num_tasks=True,
  ),
  "tinyimagenet20": Family(
    "TinyImageNet 20-split: 20 tasks of 10 classes, 64 x 64.",
    tinyimagenet.outline_20,
    tinyimagenet.read_20,
    ("tiny_imagenet",),
  ),
  "tinyimagenet40": Family(
    "TinyImageNet 40-split: 40 tasks of 5 classes, 64 x 64.",
    tinyimagenet.outline_40,
    tinyimagenet.read_40,
    ("tiny_imagenet",),
  ),
  "pmnist20": Family(
    "PMNIST-20: 20 permutations of MNIST, 28 x 28 (IRU's setting).",
    mnist.outline_20,
    mnist.read_20,
    ("mnist",),
    has_num_tasks=True,
  ),
  "cifar100_20": Family(
    "CIFAR100-20: 20 tasks of 5 random classes (IRU's setting).",
    cifar100.outline_random,
    cifar100.read_random,
    ("cifar100",),
  ),
  "digits": Family(
    "Permuted digits: 10 permutations of 8 x 8 digits; needs no files.",
    digits.outline,
    digits.read,
    has_num_tasks=True,
  ),
  "custom": Family(
    "Your own tasks: folders of images, .npz files, or TFDS sets (see data/custom.py).",
    custom.outline,
    custom.read,
    notifies=True,
  ),
}


def load(config: Config) -> Benchmark:
  """Reads the benchmark of a config and puts its arrays on the device.

  Returns:
    What `read` returns, with the images as one array that all tasks share, on the device or where
    `data.residence` says.

  Raises:
    sources.Missing: if the data are not found.
    UserError: if the data are damaged or too few, or the config has no valid task order.
  """
  benchmark = read(config)
  image, notes = residence.place(config, benchmark.tasks[0].train.image)
  tasks = tuple(_on_device(task, image) for task in benchmark.tasks)
  return benchmark._replace(tasks=tasks, notes=(*benchmark.notes, *notes))


def read(config: Config) -> Benchmark:
  """Reads the benchmark of a config into memory.

  Returns:
    The tasks in the order of training, each split into training, validation and test images.

  Raises:
    sources.Missing: if the data are not found.
    UserError: if the data are damaged or too few, or the config has no valid task order.
  """
  drawn, missing, notes = _read_and_split(config)
  split_hash = _hash(drawn)
  # .npz files of custom are as large as they are, unless they are for a pretrained network
  has_size = config.base or BENCHMARKS[config.benchmark].outline(config)
  if config.data.image_size and has_size:
    drawn = [_resized(task, config.data.image_size) for task in drawn]
  tasks = in_order(config, {task.id: task for task in drawn})
  is_partial = bool(missing) or len(tasks) < len(drawn)
  return Benchmark(config.benchmark, tasks, split_hash, is_partial, notes)


def _resized(task: Task, size: int) -> Task:
  """Returns a task whose network input has `size` x `size` pixels; its images stay as stored."""
  _, height, width, _ = task.train.image.shape
  stored = height, width
  if stored == (size, size):
    return task
  return task._replace(inputs=task.inputs._replace(resize=resizing(stored, (size, size))))


def in_order(config: Config, found: dict[int, T]) -> tuple[T, ...]:
  """Returns the values of a dict with task ids as keys, in the order of training."""
  outline = BENCHMARKS[config.benchmark].outline(config)
  order = _order(config, len(outline.tasks) if outline else len(found))
  return tuple(found[i] for i in order if i in found)


def _read_and_split(config: Config) -> tuple[list[Task], list[str], tuple[str, ...]]:
  """Reads the tasks of a benchmark, splits their images and hashes them.

  Returns:
    The tasks in the order of their ids, lines that say what is missing of the protocol, and notes
    for the user about the files.
  """
  family = BENCHMARKS[config.benchmark]
  outline = family.outline(config)
  if outline:
    _order(config, len(outline.tasks))  # raises an error before the data are read
  notes: list[str] = []
  tasks = family.read(config, notes.append) if family.notifies else family.read(config)
  for task in tasks:
    _require_classes(task)
  missing = _shortages(tasks, outline) if outline else []
  if missing and not config.allow_partial:
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    raise UserError(f"{missing[0]}{more}; complete the data, or set allow_partial=True")
  tasks = tasks if config.data.normalise else [_without_normalisation(task) for task in tasks]
  splits = [_draw_and_hold_out(task, config, not outline) for task in tasks]
  notes += _empty_classes(splits, config)
  return content.with_hashes(tasks, splits), missing, tuple(notes)


def load_task(
  text: str,
  config: Config,
  shape: tuple[int, int, int],
  task_id: int,
  notify: Callable[[str], None] = lambda line: None,
) -> Task:
  """Reads one task of the user's own images, splits it, and puts its arrays on the device.

  Args:
    text: path of a folder with a folder for each class, or of an .npz file (see custom.py).
    config: the config whose fractions and seed apply.
    shape: [H, W, C] to which images are converted.
    task_id: the id that the task gets.
    notify: is called with lines that say what was converted and which files are not used.

  Raises:
    UserError: if the images can't be read or are too few.
  """
  task = custom.read_one(text, config, shape, task_id, notify)
  _require_classes(task)
  whole = task if config.data.normalise else _without_normalisation(task)
  (task,) = content.with_hashes([whole], [_draw_and_hold_out(whole, config, True)])
  image, notes = residence.place(config, task.train.image)
  for note in notes:
    notify(note)
  return _on_device(task, image)


def shortages(config: Config) -> list[str]:
  """Reads the data and returns lines that say which tasks and images of the protocol are missing.

  Raises:
    sources.Missing: if the data are not found.
    UserError: if the data are damaged.
  """
  family = BENCHMARKS[config.benchmark]
  outline = family.outline(config)
  return _shortages(family.read(config), outline) if outline else []


def planned(config: Config) -> tuple[tuple[int, int, int], list[dict]] | None:
  """Describes what `load` returns for complete data, without reading any.

  Returns:
    The shape [H, W, C] of the network's input, and a dict for each task, in the order of training,
    with its id, name, number of classes and numbers of images. None if the tasks depend on the
    data.

  Raises:
    UserError: if the config has no valid task order.
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
  size = config.data.image_size
  shape = (size, size, outline.image_shape[2]) if size else outline.image_shape
  return shape, tasks


def _planned_fraction(config: Config, num_images: int, num_classes: int) -> int:
  """Returns how many images `_draw_fraction` draws if all classes have equally many."""
  groups = num_classes if config.protocol.fraction_per_class else 1
  return min(num_images, groups * math.ceil(config.train_fraction * (num_images / groups)))


def _order(config: Config, num_tasks: int) -> tuple[int, ...]:
  """Returns the ids of the tasks in the order of training."""
  return orders.resolve(config.order, config.benchmark, num_tasks, config.protocol.order_source)


def _require_classes(task: Task) -> None:
  """Raises UserError if a class has no training images or no test images."""
  for split, kind in ((task.train, "training"), (task.test, "test")):
    counts = np.bincount(split.label, minlength=task.num_classes)
    if not counts.all():
      name = task.class_names[int(counts.argmin())]
      raise UserError(
        f"task {task.name!r} has no {kind} images of class {name!r}; add some: every class needs "
        "them, also with allow_partial=True"
      )


def _shortages(tasks: list[Task], outline: Outline) -> list[str]:
  """Returns a line for each task that is missing or has fewer images than the protocol."""
  found, lines = {task.id: task for task in tasks}, []
  for i, expected in enumerate(outline.tasks):
    if i not in found:
      lines.append(f"task {expected.name!r} is missing")
      continue
    counts = [len(split.index) for split in (found[i].train, found[i].test, found[i].valid)]
    sizes = (expected.num_train, expected.num_test, expected.num_valid)
    for count, size, kind in zip(counts, sizes, ("training", "test", "validation"), strict=True):
      if count < size:
        lines.append(
          f"task {expected.name!r} has {count:,} {kind} images, {size - count:,} fewer than the "
          f"{size:,} of the protocol"
        )
  return lines


def _without_normalisation(task: Task) -> Task:
  """Returns a task whose network inputs are the stored values, from 0 to 255."""
  mean, std = np.zeros_like(task.inputs.mean), np.full_like(task.inputs.std, 1 / 255)
  return task._replace(inputs=task.inputs._replace(mean=mean, std=std))


def _draw_and_hold_out(task: Task, config: Config, is_own: bool) -> Task:
  """Draws `train_fraction` of the training images, and holds out validation images from them.

  The draw depends on the seed and on the task's id, so it is the same in every task order. The
  test images stay complete, unless `protocol.evaluate_on` says otherwise. Every class keeps at
  least one training image if as many images as classes are drawn. A class of the user's own
  images always keeps at least one training image, and at least one validation image unless
  `validation_fraction` is 0.

  Args:
    task: the task with all its images.
    config: has seed, `train_fraction` and `protocol.validation_fraction`.
    is_own: whether these are the user's own images.

  Raises:
    UserError: if there are too few images.
  """
  task = task._replace(test=_shuffle_if_sorted(task.test, task.id))
  pool, fraction, key = task.train, config.protocol.validation_fraction, (config.seed, task.id)
  has_valid = bool(len(task.valid.index))
  # every class must have validation images
  every_class = is_own and fraction > 0 and not has_valid
  drawn = _draw_fraction(pool, config, key, 1 + every_class, is_own)
  if config.protocol.evaluate_on == "unused":
    task = task._replace(test=_unused(task, drawn))
  if has_valid:
    return task._replace(train=drawn, valid=_draw_fraction(task.valid, config, key, 1, is_own))
  num_valid = math.floor(fraction * len(drawn.index))
  spare = int(is_own or len(drawn.index) - num_valid >= task.num_classes)
  held_out = _first_of_classes(np.asarray(drawn.label), num_valid, int(every_class), spare)
  counts = np.bincount(drawn.label[held_out], minlength=task.num_classes)
  if every_class and not counts.all():
    raise UserError(
      f"task {task.name!r}: class {task.class_names[int(counts.argmin())]!r} has 1 image beside "
      f"its test images, but protocol.validation_fraction = {fraction} needs 2, one for training "
      "and one for validation: add images of this class, or set protocol.validation_fraction=0"
    )
  if fraction > 0 and not counts.any():
    larger_helps = math.floor(fraction * len(pool.index)) and config.train_fraction < 1
    raise UserError(
      f"train_fraction = {config.train_fraction} leaves task {task.name!r} with {len(drawn.index)} "
      f"training and 0 validation images of {len(pool.index)}: set a larger train_fraction"
      if larger_helps
      else f"protocol.validation_fraction = {fraction} of the {len(drawn.index)} images of task "
      f"{task.name!r} is less than one image: set a larger fraction, or 0, or add images"
    )
  valid, train = (
    Split(drawn.image, drawn.index[rows], drawn.label[rows]) for rows in (held_out, ~held_out)
  )
  return task._replace(valid=valid, train=train)


def _unused(task: Task, drawn: Split) -> Split:
  """Returns training images that were not drawn, at most as many as the task has test images.

  They are in random order, and at least one of every class is among them.

  Args:
    task: the task with all its images.
    drawn: the training images that were drawn.

  Raises:
    UserError: if a class has none.
  """
  pool = task.train
  rows = np.flatnonzero(~np.isin(pool.index, drawn.index))
  rows = np.random.default_rng((task.id,)).permutation(rows)
  rows = rows[_first_of_classes(np.asarray(pool.label[rows]), len(task.test.index), 1, 0)]
  unused = Split(pool.image, pool.index[rows], pool.label[rows])
  counts = np.bincount(unused.label, minlength=task.num_classes)
  if not counts.all():
    raise UserError(
      f"protocol.evaluate_on = 'unused': no training images of class "
      f"{task.class_names[int(counts.argmin())]!r} of task {task.name!r} are unused: set a smaller "
      "train_fraction, or protocol.evaluate_on=validation"
    )
  return unused


def _empty_classes(tasks: list[Task], config: Config) -> list[str]:
  """Returns a line with the number of classes without training images; no line if it is 0."""
  counts = [np.bincount(t.train.label, minlength=t.num_classes) for t in tasks]
  num_empty = sum(int((c == 0).sum()) for c in counts)
  line = (
    f"train_fraction = {config.train_fraction} leaves {num_empty} of {sum(map(len, counts))} "
    "classes without training images"
  )
  return [line] if num_empty else []


def _first_of_classes(label: np.ndarray, count: int, least: int, spare: int) -> np.ndarray:
  """Marks the first `count` images, with a minimum and a maximum for each class.

  Of each class, at least its first `least` images are marked, and its last `spare` images are not.
  If marking the first `count` images breaks such a limit, as few marks as possible are moved.

  Args:
    label: labels of the images in the order in which they were drawn. [N]
    count: number of images to mark. More are marked if `least` requires it, fewer if `spare` does.
    least: minimum number of marked images of a class, if the class has that many.
    spare: minimum number of unmarked images of a class, if the class has that many.

  Returns:
    The marks, bool [N].
  """
  sizes = np.bincount(label)
  most = np.maximum(sizes - spare, 0)
  n = np.bincount(label[:count], minlength=len(sizes)).clip(least, None).clip(None, most)
  for c in label[count:]:  # too few marks: later images replace the spared ones
    if n.sum() >= count:
      break
    n[c] += n[c] < most[c]
  for c in label[:count][::-1]:  # too many marks: the last ones make room for the minimum
    if n.sum() <= count:
      break
    n[c] -= n[c] > least
  rank = np.empty(len(label), int)  # the index of an image within its class
  rank[np.argsort(label, kind="stable")] = np.arange(len(label))
  rank -= (np.cumsum(sizes) - sizes)[label]
  return rank < n[label]


def _shuffle_if_sorted(split: Split, task_id: int) -> Split:
  """Shuffles a split whose images are sorted by class, always in the same way.

  A network that evaluates with the statistics of a batch needs images of all classes in the batch.
  """
  if (np.diff(split.label) < 0).any():
    return split
  rows = np.random.default_rng((task_id,)).permutation(len(split.index))
  return Split(split.image, split.index[rows], split.label[rows])


def _draw_fraction(
  split: Split, config: Config, key: tuple[int, int], least: int, is_own: bool
) -> Split:
  """Draws `train_fraction` of a split.

  The fraction is of every class or of all images together, by `protocol.fraction_per_class`.

  Args:
    split: all images.
    config: has `train_fraction` and `protocol.fraction_per_class`.
    key: seed of the random numbers.
    least: minimum number of drawn images of a class, if the class has that many. If the fraction is
      of all images together, it applies to the user's own images, and to others if at least as many
      images as classes are drawn.
    is_own: whether these are the user's own images.
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
    rows = rows[_first_of_classes(np.asarray(label), count, least, 0)]
  return Split(split.image, split.index[rows], split.label[rows])


def _hash(tasks: list[Task]) -> str:
  """Returns the SHA-256 of images, index sets, labels and input transformations of all tasks."""
  digest = hashlib.sha256(np.ascontiguousarray(tasks[0].train.image).data)
  for task in tasks:
    for split in (task.train, task.valid, task.test):
      digest.update(np.asarray(split.index, np.int64).tobytes())
      digest.update(np.asarray(split.label, np.int64).tobytes())
    for leaf in jax.tree.leaves(task.inputs):
      digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()


def _on_device(task: Task, image: Array) -> Task:
  """Returns a task with all other arrays on the device and `image` as the images of its splits."""

  def move(split):
    index, label = (jax.device_put(np.asarray(x, np.int32)) for x in (split.index, split.label))
    return Split(image, index, label)

  return task._replace(
    inputs=jax.device_put(task.inputs),
    train=move(task.train),
    valid=move(task.valid),
    test=move(task.test),
  )


def download(config: Config, notify: Callable[[str], None]) -> None:
  """Downloads the original files of the config's benchmark that are missing in `data_dir`.

  Args:
    config: has `data_dir` and the name of the benchmark.
    notify: is called with a line for each file.

  Raises:
    UserError: if a file can't be downloaded, or the config asks for data of TFDS.
  """
  if config.data.source == "tfds":
    raise UserError(
      "--download fetches original files only; with data.source=tfds, TFDS prepares the data itself"
    )
  sources.download(config.data_dir, BENCHMARKS[config.benchmark].originals, notify)
