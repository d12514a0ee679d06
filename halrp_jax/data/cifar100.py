"""CIFAR-100 from the original binary version: 10 tasks of 10 classes, or the 20 superclasses.

Split: task i holds the fine labels 10i to 10i+9. SuperClass: task i holds the fine labels whose
coarse label is i. The label within a task is the position in the ascending list of its class ids.
Normalisation as in the authors' program; no augmentation.

Reference: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

import numpy as np

from halrp_jax.data import sources
from halrp_jax.types import Inputs, Split, Task, UserError

FOLDER, ARCHIVE = "cifar-100-binary", "cifar-100-binary.tar.gz"
NUM_TRAIN, NUM_TEST = 50_000, 10_000
_NUM_COARSE, _NUM_FINE = 20, 100
_RECORD = 2 + 3 * 32 * 32  # coarse label, fine label, red, green and blue plane
_MEAN, _STD = np.float32([0.507, 0.487, 0.441]), np.float32([0.267, 0.256, 0.276])


def load_split(config) -> tuple[list[Task], bool]:
  """CIFAR100-Split, 10 tasks of 10 classes. -> tasks by id, whether images are missing"""
  data = _read(config)
  groups = [(f"classes {10 * i} to {10 * i + 9}", range(10 * i, 10 * i + 10)) for i in range(10)]
  return _tasks(data, groups), data["partial"]


def load_superclass(config) -> tuple[list[Task], bool]:
  """CIFAR100-SuperClass, 20 tasks of 5 classes. -> tasks by id, whether images are missing"""
  data = _read(config)
  groups = [
    (name, sorted({int(c) for c in data["fine"][data["coarse"] == i]}))
    for i, name in enumerate(data["coarse_names"])
  ]
  return _tasks(data, groups), data["partial"]


def _read(config) -> dict:
  names = ("train.bin", "test.bin", "fine_label_names.txt", "coarse_label_names.txt")
  files = sources.read_members(config.data_dir, FOLDER, ARCHIVE, names)
  parts = [
    _records(files[name], name, expected, config.allow_partial)
    for name, expected in (("train.bin", NUM_TRAIN), ("test.bin", NUM_TEST))
  ]
  records = np.concatenate(parts)
  coarse, fine = records[:, 0], records[:, 1]
  if coarse.max() >= _NUM_COARSE or fine.max() >= _NUM_FINE:
    raise UserError(
      f"{FOLDER}: a label is out of range; the files are damaged, download them again"
    )
  image = records[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  return {
    "image": np.ascontiguousarray(image),  # uint8 [N, 32, 32, 3], training images first
    "coarse": coarse,
    "fine": fine,
    "num_train": len(parts[0]),
    "fine_names": _label_names(files, "fine_label_names.txt", _NUM_FINE),
    "coarse_names": _label_names(files, "coarse_label_names.txt", _NUM_COARSE),
    "partial": len(records) < NUM_TRAIN + NUM_TEST,
  }


def _records(contents: bytes, name: str, expected: int, allow_partial: bool) -> np.ndarray:
  num_images, rest = divmod(len(contents), _RECORD)
  whole = num_images == expected and not rest
  if not whole and not (allow_partial and num_images and not rest):
    raise UserError(
      f"{FOLDER}/{name}: {len(contents)} bytes, expected {expected * _RECORD} "
      f"({expected} images); truncated or damaged, download it again"
      + ("" if rest or allow_partial else ", or set allow_partial=True")
    )
  return np.frombuffer(contents, np.uint8).reshape(-1, _RECORD)


def _label_names(files: dict[str, bytes], name: str, expected: int) -> tuple[str, ...]:
  names = tuple(files[name].decode("utf-8", "replace").split())
  if len(names) != expected:
    raise UserError(f"{FOLDER}/{name}: {len(names)} names, expected {expected}")
  return names


def _tasks(data: dict, groups) -> list[Task]:
  is_train = np.arange(len(data["fine"])) < data["num_train"]

  def split(mask, classes):
    rows = np.flatnonzero(mask)
    return Split(data["image"], rows, np.searchsorted(classes, data["fine"][rows]))

  tasks = []
  for i, (name, classes) in enumerate(groups):
    classes = np.asarray(classes)
    member = np.isin(data["fine"], classes)
    train, test = split(member & is_train, classes), split(member & ~is_train, classes)
    for part, kind in ((train, "training"), (test, "test")):
      if len(np.unique(part.label)) < len(classes):
        raise UserError(f"{FOLDER}: task {name!r} lacks {kind} images of some classes")
    names = tuple(data["fine_names"][c] for c in classes)
    empty = split(np.zeros_like(is_train), classes)
    tasks.append(Task(i, name, names, Inputs(_MEAN, _STD, None), train, empty, test))
  return tasks
