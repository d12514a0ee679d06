"""Your own images: a folder per task, an .npz per task, or data sets that TFDS has prepared.

`data_dir` holds, for `data.source` = "original", either

  TASK/CLASS/IMAGE              `data.test_fraction` of every class is the test set, or
  TASK/train/CLASS/IMAGE        beside train/: test/ (without it the test set is drawn from train/)
                                and val/, the validation set (without it one is drawn, too); also
                                called training, testing, valid, validation, in any capitals, or
  TASK.npz                      image uint8 [N, H, W] or [N, H, W, C], label [N] from 0 up;
                                optional: test_image, test_label, val_image, val_label, class_names

or one task's CLASS/IMAGE or train/CLASS/IMAGE. For "tfds": what TFDS prepared for the sets named in
`data.tasks`. Tasks and classes are numbered in the order of their names, numbers by their values.
Images are made `data.image_size` high and wide as formats.py describes. Normalised by mean and
standard deviation of each task's training images.
"""

import functools
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from halrp_jax.data import cache, folders, formats, sources
from halrp_jax.data.tasks import ImageSet, join, make_task
from halrp_jax.keys import Config
from halrp_jax.types import Inputs, Task, UserError, brief

_MOST = 2_000_000_000  # bytes of one file
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


class Own(NamedTuple):
  """A task of the user's."""

  data: ImageSet
  part: np.ndarray  # int [N] _TRAIN, _VAL or _TEST
  done: np.ndarray = np.zeros(0, np.uint8)  # `formats.conversions`
  unused: tuple[str, ...] = ()  # files


def outline(config: Config) -> None:
  """Your own tasks: folders of images, .npz files, or TFDS sets (see data/custom.py)."""
  return None


def read(config: Config, tell: Callable[[str], None] = lambda line: None) -> list[Task]:
  """Reads all tasks.

  Args:
    config: resolved.
    tell: is called with a line that says what was converted, and one that says what is not used.

  Raises:
    UserErrors: names everything that can't be read.
  """
  sets = _read_tfds(config) if config.data.source == "tfds" else _read_folder(config, tell)
  shapes = {own.data.image.shape[1:3] for own in sets.values()}
  if len(shapes) > 1:
    raise UserError(
      f"data_dir={config.data_dir}: the tasks' images differ in size "
      f"({', '.join(f'{h} x {w}' for h, w in sorted(shapes))}); give them one size"
    )
  channels = max(own.data.image.shape[3] for own in sets.values())
  images = [own.data.image for own in sets.values()]
  image, offsets = join([np.broadcast_to(x, (*x.shape[:3], channels)) for x in images])
  image = np.ascontiguousarray(image)
  tasks = []
  for i, ((name, own), offset) in enumerate(zip(sets.items(), offsets, strict=True)):
    task = _task(i, name, own, config)
    moved = {
      split: getattr(task, split)._replace(image=image, index=getattr(task, split).index + offset)
      for split in ("train", "valid", "test")
    }
    task = task._replace(**moved)
    tasks.append(task._replace(inputs=_inputs(task)))
  return tasks


def read_one(
  text: str,
  config: Config,
  shape: tuple[int, int, int],
  task_id: int,
  tell: Callable[[str], None] = lambda line: None,
) -> Task:
  """Reads one more task: a folder as TASK above, or an .npz, its images as [H, W, C]."""
  path = sources.path_of("--data", text)
  if not path.exists():
    raise UserError(f"--data={text}: no such folder or .npz")
  if path.is_dir():
    tree = folders.walk(path)
    reads = [*_refusals(tree), lambda: _pictures(tree, config, shape)]
    own, name = folders.for_all(lambda read: read(), reads)[0], path.resolve().name
  else:
    own, name = _npz(path), path.resolve().stem
  _tell_of(f"--data={text}", [own], tell)
  image = own.data.image
  if image.shape[1:] not in (shape, (*shape[:2], 1)):
    raise UserError(f"--data={text}: images are {image.shape[1:]}, the run's {shape}")
  image = np.ascontiguousarray(np.broadcast_to(image, (len(image), *shape)))
  own = own._replace(data=own.data._replace(image=image))
  task = _task(task_id, folders.shown(name), own, config)
  return task._replace(inputs=_inputs(task))


def _task(i: int, name: str, own: Own, config: Config) -> Task:
  rows = {n: np.flatnonzero(own.part == p) for p, n in enumerate(("train", "valid", "test"))}
  own_test = bool(len(rows["test"]))
  if not own_test:
    rows |= _drawn(own.data, rows["train"], (config.seed, i), config.data.test_fraction)
  task = make_task(i, name, own.data, range(len(own.data.class_names)), None, **rows)
  return task._replace(own_test=own_test)


def _drawn(data: ImageSet, pool: np.ndarray, key: tuple[int, int], fraction: float) -> dict:
  """Returns rows for training and testing, drawn per class; both have some of every class."""
  train, test = [], []
  for c in range(len(data.class_names)):
    rows = np.random.default_rng((*key, c)).permutation(pool[data.label[pool] == c])
    n = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    test.append(rows[:n])
    train.append(rows[n:])
  return {"train": np.concatenate(train), "test": np.concatenate(test)}


def _inputs(task: Task) -> Inputs:
  """Mean and standard deviation of at most 10,000 training images."""
  rows = np.sort(task.train.index[:10_000])
  x = task.train.image[rows] / np.float32(255)
  return Inputs(x.mean((0, 1, 2), np.float32), np.maximum(x.std((0, 1, 2), np.float32), 1e-3), None)


def _tell_of(what: str, owns: list[Own], tell: Callable[[str], None]) -> None:
  """Says once what was done to the images of several tasks, and which files are not used."""
  if said := formats.conversions(np.concatenate([own.done for own in owns])):
    tell(f"{what}: {said}")
  if said := folders.unused([name for own in owns for name in own.unused]):
    tell(f"{what}: {said}")


# --- folders --------------------------------------------------------------------------


def _read_folder(config: Config, tell: Callable[[str], None]) -> dict[str, Own]:
  if not config.data_dir:
    raise UserError("data_dir is not set: give the folder with one folder or .npz per task")
  what = f"data_dir={config.data_dir}"
  tree = folders.walk(sources.path_of("data_dir", config.data_dir), what)
  shape = (config.data.image_size, config.data.image_size, 3)
  archives = [n for n in tree.files if "/" not in n and n.lower().endswith(".npz")]
  stray = [n for n in (*tree.files, *tree.skipped) if "/" not in n and n not in archives]
  if not archives and _is_one_task(tree):
    tasks = [(tree.path.resolve().name, functools.partial(_pictures, tree, config, shape))]
    stray = []
    tell(f"{what}: read as one task, whose classes its folders are")
  else:
    tasks = [(n[:-4], functools.partial(_npz, tree.path / n)) for n in archives]
    tasks += [
      (name, functools.partial(_pictures, child, config, shape, f"{name}/"))
      for name, child in tree.children().items()
    ]
  tasks = folders.unique(((folders.shown(n), read) for n, read in tasks), f"{what}: task")
  refusals = _refusals(tree)
  if not tasks and not refusals:
    raise UserError(f"{what}: holds neither folders nor .npz files of tasks")
  owns = folders.for_all(lambda read: read(), [*refusals, *tasks.values()])
  _tell_of(what, [*owns, owns[-1]._replace(done=owns[-1].done[:0], unused=tuple(stray))], tell)
  return dict(zip(tasks, owns, strict=True))


def _refusals(tree: folders.Tree) -> list[Callable]:
  """Returns a function for each thing that can't be read, which raises its UserError."""

  def refuse(line):
    raise UserError(line)

  return [functools.partial(refuse, line) for line in tree.broken.values()]


def _is_one_task(tree: folders.Tree) -> bool:
  """Returns whether a folder holds the classes, or train/ and so on, of one task alone."""
  tops = {n for n in tree.folders if "/" not in n}
  parts = _parts(tree)
  if parts and (len(parts) > 1 or tops == set(parts)):
    return True
  return any("/" in n for n in _images(tree)) and all(n.count("/") <= 1 for n in _images(tree))


def _images(tree: folders.Tree) -> list[str]:
  return [n for n in tree.files if folders.is_image(n)]


def _parts(tree: folders.Tree) -> dict[str, int]:
  """Returns the part of each of the folders train/, val/ and test/; empty if they are none."""
  found = {n: _PART_NAMES[n.lower()] for n in tree.folders if n.lower() in _PART_NAMES}
  train = tuple(f"{n}/" for n, part in found.items() if part == _TRAIN)
  if not train or not any(n.startswith(train) for n in tree.folders):  # a class of that name
    return {}
  for part, name in enumerate(_PARTS):
    if len(same := [n for n in found if found[n] == part]) > 1:
      raise UserError(f"{tree.path}: {same[0]}/ and {same[1]}/ are both {name}/; keep one of them")
  return found


def _pictures(
  tree: folders.Tree, config: Config, shape: tuple[int, int, int], prefix: str = ""
) -> Own:
  """Reads a task's folder, its images as [H, W, C]; `prefix` goes before names of unused files."""
  parts, names = _parts(tree), _images(tree)
  depth = 2 if parts else 1
  if wrong := [n for n in names if n.count("/") != depth or parts and n.split("/")[0] not in parts]:
    raise UserError(f"{tree.path}: {wrong[0]} is not in {_LAYOUTS}, where images belong")
  classes = _classes(tree, names, parts)
  part_of = {n: parts[n.split("/")[0]] if parts else _TRAIN for n in names}
  names.sort(key=part_of.get)  # stable: training images first
  num_extra = math.ceil(len(names) / math.prod(shape))  # rows that hold a byte for each image

  def decode(out):
    done = np.zeros(num_extra * math.prod(shape), np.uint8)

    def read_into(i):
      out[i], done[i] = formats.read_photo(tree.path / names[i], shape)

    folders.for_all(read_into, range(len(names)))
    out[len(names) :] = done.reshape(num_extra, *shape)

  files = sources.files_of(tree, _MOST)._replace(names=tuple(names))
  # photos: decoded as formats.read_photo does; another way of decoding needs another word
  key = f"photos-{sources.fingerprint(files, names)}"
  array = cache.images(config.data.cache, key, (len(names) + num_extra, *shape), decode)
  label = np.array([classes.index(folders.shown(n.split("/")[-2])) for n in names])
  part = np.array([part_of[n] for n in names])
  data = ImageSet(array[: len(names)], label, int((part == _TRAIN).sum()), classes)
  unused = tuple(f"{prefix}{n}" for n in (*tree.files, *tree.skipped) if n not in part_of)
  return Own(data, part, array[len(names) :].reshape(-1)[: len(names)], unused)


def _classes(tree: folders.Tree, names: list[str], parts: dict[str, int]) -> tuple[str, ...]:
  """Returns the names of the class folders in order; each has enough images in each part."""
  places = [f"{n}/" for n in parts] or [""]
  found = {
    place: folders.unique(
      (
        (folders.shown(n.removeprefix(place)), n)
        for n in tree.folders
        if n.startswith(place) and n.count("/") == place.count("/")
      ),
      f"{tree.path / place}: class",
    )
    for place in places
  }
  classes = tuple(sorted(set().union(*found.values()), key=folders.order))
  least = 1 if _TEST in parts.values() else 2  # one of two is tested on
  for place in places:
    counts = dict.fromkeys(classes, 0)
    for n in names:
      if n.startswith(place):
        counts[folders.shown(n.split("/")[-2])] += 1
    needed = least if parts.get(place[:-1], _TRAIN) == _TRAIN else 1
    for c, count in counts.items():
      if count < needed:
        raise UserError(
          f"{tree.path / (found[place].get(c, place + c))}: {count} images; a class needs at least "
          + (f"{needed}" if not parts else f"{needed} in {place}")
        )
  if len(classes) < 2:
    raise UserError(f"{tree.path}: {len(classes)} class folders; a task needs at least 2")
  return classes


# --- .npz -----------------------------------------------------------------------------


def _npz(path: pathlib.Path) -> Own:
  """Reads a task's .npz."""
  prefixes = ("", "val_", "test_")
  known = {f"{p}{key}" for p in prefixes for key in ("image", "label")} | {"class_names"}
  try:
    with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
      alias = {n: n.replace("validation_", "val_").replace("valid_", "val_") for n in archive.files}
      found = {alias[n]: archive[n] for n in archive.files if alias[n] in known}
      unused = tuple(f"array {n} of {path.name}" for n in alias if alias[n] not in known)
  except Exception as e:  # zipfile, zlib and numpy raise many kinds
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
    raise UserError(f"{path}: its arrays of images differ in size")
  part = np.repeat(kinds, [len(y) for _, y in parts])
  data = ImageSet(np.concatenate([x for x, _ in parts]), label, len(parts[0][0]), names)
  return Own(data, part, unused=unused)


def _names(path: pathlib.Path, found: dict, label: np.ndarray) -> tuple[str, ...]:
  """Returns the names of the classes in an .npz, or their numbers."""
  given = found.get("class_names", np.arange(max(2, int(label.max()) + 1))).reshape(-1)
  names = [n.decode("utf-8", "backslashreplace") if isinstance(n, bytes) else str(n) for n in given]
  folders.unique(((n, n) for n in names), f"{path}: class_names:")
  return tuple(names)


def _npz_part(path, found: dict, prefix: str) -> tuple[np.ndarray, np.ndarray]:
  for key in (f"{prefix}image", f"{prefix}label"):
    if key not in found:
      raise UserError(f"{path}: holds no array {key!r}; expected image and label")
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


def _read_tfds(config: Config) -> dict[str, Own]:
  from halrp_jax.data import prepared

  names = [n.strip() for n in config.data.tasks.split(",") if n.strip()]
  if not names:
    raise UserError("data.tasks is empty: name TFDS sets, with commas, for example mnist,emnist")
  folders.unique(((n, n) for n in names), "data.tasks: TFDS set")
  size = config.data.image_size
  sets = {name: prepared.any_images(config.data_dir, name, size) for name in names}
  return {
    name: Own(data, np.where(np.arange(len(data.label)) < data.num_train, _TRAIN, _TEST))
    for name, data in sets.items()
  }
