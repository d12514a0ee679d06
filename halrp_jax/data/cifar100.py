"""CIFAR-100, divided into tasks in three ways.

CIFAR100-Split has 10 tasks of 10 classes: task i has the fine labels from 10 i to 10 i + 9.

CIFAR100-SuperClass has 20 tasks of 5 classes: task i has the fine labels whose coarse label is i.

CIFAR100-20 has 20 tasks of 5 random classes, the setting of IRU in Table 4 of the paper. No source
says how the classes were drawn, so NumPy's random permutation with seed 0 is used.

Images are normalised as in the authors' code and not augmented.

References: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009; R. Hyder
et al., "Incremental task learning with incremental rank updates", 2022, arXiv:2207.09074 (IRU).
"""

from collections.abc import Iterable, Sequence

import numpy as np

from halrp_jax.data import formats, sources
from halrp_jax.data.tasks import ImageSet, Outline, TaskOutline, make_task
from halrp_jax.keys import Config
from halrp_jax.types import Inputs, Task, UserError

_MEAN, _STD = (
  np.array([0.507, 0.487, 0.441], np.float32),
  np.array([0.267, 0.256, 0.276], np.float32),
)
# Names of the superclasses in the archive. Which classes belong to one follows from the labels.
_COARSE = (
  "aquatic_mammals",
  "fish",
  "flowers",
  "food_containers",
  "fruit_and_vegetables",
  "household_electrical_devices",
  "household_furniture",
  "insects",
  "large_carnivores",
  "large_man-made_outdoor_things",
  "large_natural_outdoor_scenes",
  "large_omnivores_and_herbivores",
  "medium_mammals",
  "non-insect_invertebrates",
  "people",
  "reptiles",
  "small_mammals",
  "trees",
  "vehicles_1",
  "vehicles_2",
)


def outline_split(config: Config) -> Outline:
  """Describes CIFAR100-Split: 10 tasks of 10 classes."""
  return _outline([f"classes {10 * i} to {10 * i + 9}" for i in range(10)], 10)


def outline_superclass(config: Config) -> Outline:
  """Describes CIFAR100-SuperClass: 20 tasks of 5 classes."""
  return _outline(_COARSE, 5)


def outline_random(config: Config) -> Outline:
  """Describes CIFAR100-20: 20 tasks of 5 random classes."""
  return _outline([f"group {i}" for i in range(20)], 5)


def _outline(names: Sequence[str], num_classes: int) -> Outline:
  """Describes tasks that all have the same number of classes."""
  sizes = (num_classes, 500 * num_classes, 100 * num_classes)
  return Outline((32, 32, 3), tuple(TaskOutline(name, *sizes) for name in names))


def read_split(config: Config) -> list[Task]:
  """Reads the tasks of CIFAR100-Split. Errors as in `read`."""
  data, _, _ = read(config)
  groups = [(t.name, range(10 * i, 10 * i + 10)) for i, t in enumerate(outline_split(config).tasks)]
  return _tasks(data, groups)


def read_superclass(config: Config) -> list[Task]:
  """Reads the tasks of CIFAR100-SuperClass. Errors as in `read`."""
  data, coarse, names = read(config)
  return _tasks(data, [(name, np.unique(data.label[coarse == i])) for i, name in enumerate(names)])


def read_random(config: Config) -> list[Task]:
  """Reads the tasks of CIFAR100-20. Errors as in `read`."""
  data, _, _ = read(config)
  groups = np.random.RandomState(0).permutation(100).reshape(20, 5)
  return _tasks(data, [(f"group {i}", sorted(g)) for i, g in enumerate(groups)])


def read(config: Config) -> tuple[ImageSet, np.ndarray, tuple[str, ...]]:
  """Reads CIFAR-100 from the original files or from TFDS, by `data.source`.

  Returns:
    The images with their fine labels, the coarse labels [N], and the names of the superclasses.

  Raises:
    sources.Missing: if the files are not found.
    UserError: if a file is damaged.
  """
  if config.data.source == "tfds":
    from halrp_jax.data import prepared

    return prepared.cifar100(config.data_dir)
  files = sources.find(config.data_dir, "cifar100")
  names = ("train.bin", "test.bin", "fine_label_names.txt", "coarse_label_names.txt")
  train, test, fine, coarse = files.read(*names)
  (x, y), (x_test, y_test) = (
    formats.cifar(c, f"{files.path}: {n}", 2) for c, n in ((train, names[0]), (test, names[1]))
  )
  label = np.concatenate([y, y_test])
  if label[:, 0].max() >= 20 or label[:, 1].max() >= 100:
    raise UserError(
      f"{files.path}: a label is out of range; the file is damaged, delete and download it again"
    )
  data = ImageSet(
    np.concatenate([x, x_test]),
    label[:, 1],
    len(x),
    _names(fine, f"{files.path}: {names[2]}", 100),
  )
  return data, label[:, 0], _names(coarse, f"{files.path}: {names[3]}", 20)


def _names(contents: bytes, name: str, expected: int) -> tuple[str, ...]:
  """Returns the names in a text file; raises UserError if their number is not `expected`."""
  names = tuple(contents.decode("utf-8", "replace").split())
  if len(names) != expected:
    raise UserError(
      f"{name}: {len(names)} names, expected {expected}; delete and download it again"
    )
  return names


def _tasks(data: ImageSet, groups: Iterable[tuple[str, Sequence[int] | np.ndarray]]) -> list[Task]:
  """Makes a task of each (name, fine labels)."""
  inputs = Inputs(_MEAN, _STD, None)
  return [make_task(i, name, data, classes, inputs) for i, (name, classes) in enumerate(groups)]
