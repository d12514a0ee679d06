"""The user's own images: a folder or an .npz file for each task, or data sets of TFDS.

With `data.source` = "original", `data_dir` contains any of these for each task:

  TASK/CLASS/IMAGE          The fraction `data.test_fraction` of every class is for testing.
  TASK/train/CLASS/IMAGE    Beside train/ there may be test/ and val/ with test and validation
                            images; if one of them is missing, its images are drawn from train/.
                            The names training, testing, valid and validation are accepted, too, in
                            upper or lower case.
  TASK.npz                  Arrays image, uint8 [N, H, W] or [N, H, W, C], and label [N], from 0 on;
                            optionally test_image, test_label, val_image, val_label, class_names.

If there is only one task, its CLASS/IMAGE or train/CLASS/IMAGE may be in `data_dir` itself.

With `data.source` = "tfds", the tasks are the data sets of TFDS that `data.tasks` names.

Tasks and classes are sorted by name, numbers in names by value. Images are resized to a height and
width of `data.image_size`, whole or by their central square (`data.framing`), as formats.py
describes, and normalised by mean and standard deviation of the training images of their task.
"""

import functools
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from halrp_jax.data import archives, cache, decoding, folders, formats, residence, sources
from halrp_jax.data.tasks import ImageSet, make_task, offsets_of
from halrp_jax.keys import Config, Data
from halrp_jax.types import Framing, Inputs, Task, UserError, brief

_MOST_BYTES = 2_000_000_000  # largest accepted file
_CHUNK = 256  # number of images whose mean is taken in one step
_PARTS = ("train", "val", "test")
_TRAIN, _VAL, _TEST = range(3)
_PART_NAMES = {
  "train": _TRAIN,
  "training": _TRAIN,
  "val": _VAL,
  "valid": _VAL,
  "validation": _VAL,
  "test": _TEST,
  "testing": _TEST,
}
_LAYOUTS = "CLASS/, or in train/CLASS/, val/CLASS/ and test/CLASS/"


class _OwnTask(NamedTuple):
  """The images of one task of the user's."""

  data: ImageSet
  part: np.ndarray  # int [N] _TRAIN, _VAL or _TEST
  done: np.ndarray = np.zeros(0, np.uint8)  # [N] conversions as bits, for `formats.conversions`
  unused: tuple[str, ...] = ()  # files that are not used
  framing: Framing = Framing()  # of its photographs; not of an .npz file's images


def framing_of(keys: Data) -> Framing:
  """Returns how photographs become stored images, from the keys `data.*`.

  What is "auto" or 0 in them and depends on a base is filled in by `runs.pretrained.with_framing`.
  """
  interpolation = "bilinear" if keys.interpolation == "auto" else keys.interpolation
  return Framing(keys.crop or 1.0 if keys.framing == "central" else 0.0, interpolation)


def outline(config: Config) -> None:
  """Returns None: the tasks depend on the user's data."""
  return None


def read(config: Config, notify: Callable[[str], None] = lambda line: None) -> list[Task]:
  """Reads all tasks, sorted by name.

  Args:
    config: has the keys `data_dir` and `data`.
    notify: is called with a line about conversions and a line about unused files, if there are any.

  Raises:
    UserError: if there are no tasks, or images can't be read. A UserErrors has a line for each file
      that can't be read.
  """
  sets = _read_tfds(config) if config.data.source == "tfds" else _read_folder(config, notify)
  shapes = {own.data.image.shape[1:3] for own in sets.values()}
  if len(shapes) > 1:
    raise UserError(
      f"data_dir={config.data_dir}: the tasks' images differ in size "
      f"({', '.join(f'{h} x {w}' for h, w in sorted(shapes))}); resize them to one size"
    )
  images = [own.data.image for own in sets.values()]
  image, offsets = residence.joined(config, images), offsets_of(images)
  tasks = []
  for i, ((name, own), offset) in enumerate(zip(sets.items(), offsets, strict=True)):
    task = _task(i, name, own, config)
    moved = {
      split: getattr(task, split)._replace(image=image, index=getattr(task, split).index + offset)
      for split in ("train", "valid", "test")
    }
    task = task._replace(**moved)
    tasks.append(task._replace(inputs=_inputs(task), framing=own.framing))
  return tasks


def read_one(
  text: str,
  config: Config,
  shape: tuple[int, int, int],
  task_id: int,
  notify: Callable[[str], None] = lambda line: None,
) -> Task:
  """Reads one task.

  Args:
    text: path of a folder with the structure of TASK/ above, or of an .npz file, given as --data.
    config: has the keys `data`.
    shape: shape [H, W, C] of the task's images. Images of a folder are resized to it.
    task_id: id of the task.
    notify: is called with a line about conversions and a line about unused files, if there are any.

  Raises:
    UserError: if the images can't be read, or those of an .npz file have another shape.
  """
  path = sources.path_of("--data", text)
  if not path.exists():
    raise UserError(f"--data={text}: no such folder or .npz file")
  if path.is_dir():
    tree = folders.walk(path)
    reads = [*_failures(tree), lambda: _read_images(tree, config, shape)]
    own, name = folders.for_all(lambda read: read(), reads)[0], path.resolve().name
  else:
    own, name = _read_npz(path), path.resolve().stem
  _notify_about(f"--data={text}", [own], notify)
  image = own.data.image
  if image.shape[1:] not in (shape, (*shape[:2], 1)):
    raise UserError(
      f"--data={text}: images are {image.shape[1:]}, expected {shape} as in the run; resize them"
    )
  image = np.ascontiguousarray(np.broadcast_to(image, (len(image), *shape)))
  own = own._replace(data=own.data._replace(image=image))
  task = _task(task_id, folders.shown(name), own, config)
  return task._replace(inputs=_inputs(task), framing=own.framing)


def _task(i: int, name: str, own: _OwnTask, config: Config) -> Task:
  """Makes a task with id i, without its normalisation; draws test images if there are none."""
  rows = {n: np.flatnonzero(own.part == p) for p, n in enumerate(("train", "valid", "test"))}
  own_test = bool(len(rows["test"]))
  if not own_test:
    rows |= _draw_test(own.data, rows["train"], (config.seed, i), config.data.test_fraction)
  unset = Inputs(np.zeros(0, np.float32), np.zeros(0, np.float32), None)  # see `_inputs`
  task = make_task(i, name, own.data, range(len(own.data.class_names)), unset, **rows)
  return task._replace(own_test=own_test)


def _draw_test(
  data: ImageSet, pool: np.ndarray, key: tuple[int, int], fraction: float
) -> dict[str, np.ndarray]:
  """Draws test images from a pool: the given fraction of every class, but at least one image.

  Args:
    data: the images.
    pool: the rows to draw from.
    key: seed of the random numbers.
    fraction: fraction of test images in every class. At least one image remains for training.

  Returns:
    The rows of "train" and "test".
  """
  train, test = [], []
  for c in range(len(data.class_names)):
    rows = np.random.default_rng((*key, c)).permutation(pool[data.label[pool] == c])
    n = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    test.append(rows[:n])
    train.append(rows[n:])
  return {"train": np.concatenate(train), "test": np.concatenate(test)}


def _inputs(task: Task) -> Inputs:
  """Returns the normalisation of a task: mean and standard deviation of its training images.

  At most 10,000 images are used.
  """
  rows = np.sort(task.train.index[:10_000])
  return Inputs(*_mean_and_std(np.asarray(task.train.image), rows), None)


def _mean_and_std(image: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns mean and standard deviation of each channel of some images, float32 [C].

  With several channels the images are read a few at a time. NumPy adds up such pixels one after
  another, so that this gives the bits of `ndarray.mean` and `ndarray.std` of all of them.
  """
  num_channels = image.shape[3]
  if num_channels == 1:  # NumPy adds up a single channel in pairs
    x = image[rows] / np.float32(255)
    return x.mean((0, 1, 2), np.float32), np.maximum(x.std((0, 1, 2), np.float32), 1e-3)

  def mean(fn: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    total = np.zeros((1, num_channels), np.float32)
    for start in range(0, len(rows), _CHUNK):
      x = image[rows[start : start + _CHUNK]] / np.float32(255)
      pixels = fn(x).reshape(-1, num_channels)
      total = np.add.reduce(np.concatenate([total, pixels]), axis=0, keepdims=True)
    num_pixels = np.intp(len(rows) * image.shape[1] * image.shape[2])
    return np.true_divide(total[0], num_pixels, out=total[0], casting="unsafe")

  centre = mean(lambda x: x)
  return centre, np.maximum(np.sqrt(mean(lambda x: (x - centre) ** 2)), 1e-3)


def _notify_about(what: str, owns: list[_OwnTask], notify: Callable[[str], None]) -> None:
  """Calls notify with a line about the conversions of images, and one about unused files."""
  if text := formats.conversions(np.concatenate([own.done for own in owns])):
    notify(f"{what}: {text}")
  if text := folders.unused([name for own in owns for name in own.unused]):
    notify(f"{what}: {text}")


# --- folders --------------------------------------------------------------------------


def _read_folder(config: Config, notify: Callable[[str], None]) -> dict[str, _OwnTask]:
  """Reads the tasks in `data_dir`, by name."""
  if not config.data_dir:
    raise UserError("data_dir is not set: give the folder with one folder or .npz file per task")
  what = f"data_dir={config.data_dir}"
  tree = folders.walk(sources.path_of("data_dir", config.data_dir), what)
  shape = (config.data.image_size, config.data.image_size, 3)
  npz_files = [n for n in tree.files if "/" not in n and n.lower().endswith(".npz")]
  stray = [n for n in (*tree.files, *tree.skipped) if "/" not in n and n not in npz_files]
  if not npz_files and _is_one_task(tree):
    tasks = [(tree.path.resolve().name, functools.partial(_read_images, tree, config, shape))]
    stray = []
    notify(f"{what}: read as one task, with its folders as classes")
  else:
    tasks = [(n[:-4], functools.partial(_read_npz, tree.path / n)) for n in npz_files]
    tasks += [
      (name, functools.partial(_read_images, child, config, shape, f"{name}/"))
      for name, child in tree.children().items()
    ]
  by_name = folders.unique(((folders.shown(n), read) for n, read in tasks), f"{what}: task")
  failures = _failures(tree)
  if not by_name and not failures:
    raise UserError(f"{what}: contains neither folders nor .npz files of tasks")
  # If there are failures, for_all raises them all. So `owns` has an item for each task.
  owns = folders.for_all(lambda read: read(), [*failures, *by_name.values()])
  no_task = owns[-1]._replace(done=owns[-1].done[:0], unused=tuple(stray))
  _notify_about(what, [*owns, no_task], notify)
  return dict(zip(by_name, owns, strict=True))


def _failures(tree: folders.Tree) -> list[Callable[[], _OwnTask]]:
  """Returns, for each entry that can't be read, a function that raises its UserError."""

  def fail(line: str) -> _OwnTask:
    raise UserError(line)

  return [functools.partial(fail, line) for line in tree.broken.values()]


def _is_one_task(tree: folders.Tree) -> bool:
  """Returns whether a folder is that of a single task: it contains classes, or train/ etc."""
  tops = {n for n in tree.folders if "/" not in n}
  parts = _parts(tree)
  if parts and (len(parts) > 1 or tops == set(parts)):
    return True
  return any("/" in n for n in _images(tree)) and all(n.count("/") <= 1 for n in _images(tree))


def _images(tree: folders.Tree) -> list[str]:
  """Returns the names of the images in a folder."""
  return [n for n in tree.files if folders.is_image(n)]


def _parts(tree: folders.Tree) -> dict[str, int]:
  """Returns the names of the folders train/, val/ and test/ and the part that each contains.

  The dict is empty if the folder is not divided into parts. A folder called train that contains no
  folders is a class of that name.
  """
  found = {n: _PART_NAMES[n.lower()] for n in tree.folders if n.lower() in _PART_NAMES}
  train = tuple(f"{n}/" for n, part in found.items() if part == _TRAIN)
  if not train or not any(n.startswith(train) for n in tree.folders):
    return {}
  for part, name in enumerate(_PARTS):
    if len(same := [n for n in found if found[n] == part]) > 1:
      raise UserError(f"{tree.path}: {same[0]}/ and {same[1]}/ both mean {name}/; keep one of them")
  return found


def _read_images(
  tree: folders.Tree, config: Config, shape: tuple[int, int, int], prefix: str = ""
) -> _OwnTask:
  """Reads the folder of a task.

  The cache entry contains the images followed by the conversion bits of each image, as bytes in
  further rows.

  Args:
    tree: the folder.
    config: has the keys `data.cache`, `data.decode_processes` and `data.framing`.
    shape: shape [H, W, C] to which images are converted.
    prefix: is put before the names of unused files.
  """
  parts, names = _parts(tree), _images(tree)
  depth = 2 if parts else 1
  if wrong := [n for n in names if n.count("/") != depth or parts and n.split("/")[0] not in parts]:
    raise UserError(f"{tree.path}: {wrong[0]} is not in {_LAYOUTS}; move or delete it")
  classes = _classes(tree, names, parts)
  part_of = {n: parts[n.split("/")[0]] if parts else _TRAIN for n in names}
  names.sort(key=part_of.__getitem__)  # training images first; the order within a part stays
  num_extra = math.ceil(len(names) / math.prod(shape))  # rows for one byte for each image
  framing = framing_of(config.data)

  def decode(out):
    done = np.zeros(num_extra * math.prod(shape), np.uint8)
    paths = [tree.path / name for name in names]
    decoding.photos(paths, shape, out, done, config.data.decode_processes, framing)
    out[len(names) :] = done.reshape(num_extra, *shape)

  files = archives.files_of(tree, _MOST_BYTES)._replace(names=tuple(names))
  # "photos" stands for the decoding by formats.read_photo. If that changes, so must this word.
  kind = "" if framing == Framing() else f"{framing.interpolation}-{framing.crop:.6g}-"
  key = f"photos-{kind}{archives.fingerprint(files, names)}"
  array = cache.images(config.data.cache, key, (len(names) + num_extra, *shape), decode)
  label = np.array([classes.index(folders.shown(n.split("/")[-2])) for n in names])
  part = np.array([part_of[n] for n in names])
  data = ImageSet(array[: len(names)], label, int((part == _TRAIN).sum()), classes)
  unused = tuple(f"{prefix}{n}" for n in (*tree.files, *tree.skipped) if n not in part_of)
  return _OwnTask(data, part, array[len(names) :].reshape(-1)[: len(names)], unused, framing)


def _classes(tree: folders.Tree, names: list[str], parts: dict[str, int]) -> tuple[str, ...]:
  """Returns the sorted names of the classes.

  Args:
    tree: the folder of a task.
    names: names of the images.
    parts: folders train/, val/ and test/, as `_parts` returns them.

  Raises:
    UserError: if a class has too few images in a part, or there are fewer than 2 classes.
  """
  prefixes = [f"{n}/" for n in parts] or [""]
  found = {
    prefix: folders.unique(
      (
        (folders.shown(n.removeprefix(prefix)), n)
        for n in tree.folders
        if n.startswith(prefix) and n.count("/") == prefix.count("/")
      ),
      f"{tree.path / prefix}: class",
    )
    for prefix in prefixes
  }
  classes = tuple(
    sorted({name for of_part in found.values() for name in of_part}, key=folders.order)
  )
  least = 1 if _TEST in parts.values() else 2  # without test/, one image is drawn for testing
  for prefix in prefixes:
    counts = dict.fromkeys(classes, 0)
    for n in names:
      if n.startswith(prefix):
        counts[folders.shown(n.split("/")[-2])] += 1
    needed = least if parts.get(prefix[:-1], _TRAIN) == _TRAIN else 1
    for c, count in counts.items():
      if count < needed:
        raise UserError(
          f"{tree.path / (found[prefix].get(c, prefix + c))}: {count} images; a class needs at "
          + (f"least {needed}" if not parts else f"least {needed} in {prefix}")
        )
  if len(classes) < 2:
    raise UserError(f"{tree.path}: {len(classes)} class folders; a task needs at least 2")
  return classes


# --- .npz -----------------------------------------------------------------------------


def _read_npz(path: pathlib.Path) -> _OwnTask:
  """Reads the .npz file of a task."""
  prefixes = ("", "val_", "test_")
  known = {f"{p}{key}" for p in prefixes for key in ("image", "label")} | {"class_names"}
  try:
    with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
      alias = {n: n.replace("validation_", "val_").replace("valid_", "val_") for n in archive.files}
      found = {alias[n]: archive[n] for n in archive.files if alias[n] in known}
      unused = tuple(f"array {n} of {path.name}" for n in alias if alias[n] not in known)
  except Exception as e:  # zipfile, zlib and numpy raise many types of exceptions
    raise UserError(f"{path}: can't be read ({brief(e)}); write it with numpy.savez") from e
  folders.unique(((a, n) for n, a in alias.items()), f"{path}: array")
  kinds = [i for i, p in enumerate(prefixes) if not p or {f"{p}image", f"{p}label"} & found.keys()]
  parts = [_npz_part(path, found, prefixes[i]) for i in kinds]
  label = np.concatenate([y for _, y in parts])
  names = _names(path, found, label)
  for (_, y), kind in zip(parts, kinds, strict=True):
    counts = np.bincount(y, minlength=len(names))
    least = 2 if kind == _TRAIN and _TEST not in kinds else 1
    if len(counts) > len(names) or counts.min() < least:
      c = len(names) if len(counts) > len(names) else int(counts.argmin())
      raise UserError(
        f"{path}: label {c} has {counts[c]} {prefixes[kind].replace('_', ' ')}images; labels go "
        f"from 0 to {len(names) - 1}, each with at least {least}"
      )
  if len({x.shape[1:] for x, _ in parts}) > 1:
    raise UserError(f"{path}: its arrays of images differ in size; resize them to one size")
  part = np.repeat(kinds, [len(y) for _, y in parts])
  data = ImageSet(np.concatenate([x for x, _ in parts]), label, len(parts[0][0]), names)
  return _OwnTask(data, part, unused=unused)


def _names(path: pathlib.Path, found: dict, label: np.ndarray) -> tuple[str, ...]:
  """Returns the array class_names of an .npz file, or the labels as names if it is missing."""
  given = found.get("class_names", np.arange(max(2, int(label.max()) + 1))).reshape(-1)
  names = [n.decode("utf-8", "backslashreplace") if isinstance(n, bytes) else str(n) for n in given]
  folders.unique(((n, n) for n in names), f"{path}: class_names:")
  return tuple(names)


def _npz_part(
  path: pathlib.Path, found: dict[str, np.ndarray], prefix: str
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the images and labels of one part of an .npz file.

  Args:
    path: the file, for error messages.
    found: its arrays.
    prefix: "", "val_" or "test_".

  Returns:
    Images, uint8 [N, H, W, C], and labels, int64 [N].
  """
  for key in (f"{prefix}image", f"{prefix}label"):
    if key not in found:
      raise UserError(f"{path}: contains no array {key!r}; expected image and label")
  image, label = found[f"{prefix}image"], found[f"{prefix}label"]
  shape = image.shape if image.ndim == 4 else (*image.shape, 1)
  if image.dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3):
    raise UserError(
      f"{path}: {prefix}image is {image.dtype} {image.shape}, expected uint8 [N, H, W], "
      "[N, H, W, 1] or [N, H, W, 3]"
    )
  whole = np.issubdtype(label.dtype, np.integer) and label.ndim == 1
  if not whole or len(label) != len(image) or not len(label) or label.min() < 0:
    raise UserError(
      f"{path}: {prefix}label is {label.dtype} {label.shape}, expected whole numbers >= 0 "
      f"[{len(image)}]"
    )
  return image.reshape(shape), label.astype(np.int64)


# --- TFDS -----------------------------------------------------------------------------


def _read_tfds(config: Config) -> dict[str, _OwnTask]:
  """Reads the data sets of TFDS that `data.tasks` names."""
  from halrp_jax.data import prepared

  names = [n.strip() for n in config.data.tasks.split(",") if n.strip()]
  if not names:
    raise UserError(
      "data.tasks is empty: name TFDS sets, separated by commas, for example mnist,emnist"
    )
  folders.unique(((n, n) for n in names), "data.tasks: TFDS set")
  size, framing = config.data.image_size, framing_of(config.data)
  sets = {name: prepared.any_images(config.data_dir, name, size, framing) for name in names}

  def part_of(data: ImageSet) -> np.ndarray:
    return np.where(np.arange(len(data.label)) < data.num_train, _TRAIN, _TEST)

  return {name: _OwnTask(x, part_of(x), framing=framing) for name, x in sets.items()}
