"""Omniglot-Rotation: 100 tasks of 12 characters, with drawings rotated by 0, 90, 180, 270 degrees.

The paper refers to WSN for this benchmark, and so its loader is followed: the 1,623 characters are
sorted by their paths, those of images_background before those of images_evaluation, and the first
1,200 are used. Images have 32 x 32 pixels and one channel; values are divided by 255. Of the 80
images of a character, 60 are for training and 20 for testing, drawn in the same way for all seeds.
With `data.num_tasks` fewer or more characters are used, up to 135 tasks.

References: B. Lake et al., "Human-level concept learning through probabilistic program induction",
2015; H. Kang et al., "Forget-free continual learning with winning subnetworks", ICML 2022 (WSN).
"""

import numpy as np
from PIL import Image

from halrp_jax.data import archives, cache, folders, formats, sources
from halrp_jax.data.tasks import ImageSet, Outline, TaskOutline, make_task
from halrp_jax.keys import Config
from halrp_jax.types import Inputs, Task, UserError

_NUM_TASKS, _NUM_CLASSES = 100, 12
_DRAWINGS, _ROTATIONS, _NUM_TEST = 20, 4, 20  # of a character: drawings, rotations, test images
_ALPHABETS = ("images_background", "images_evaluation")
_MOST_TASKS = 135  # 12 of the 1,623 characters each
_MOST_BYTES = 400_000_000  # of one archive, unpacked


def outline(config: Config) -> Outline:
  """Describes Omniglot-Rotation: tasks of 12 characters.

  Raises:
    UserError: if `data.num_tasks` asks for more characters than there are.
  """
  if (count := config.data.num_tasks or _NUM_TASKS) > _MOST_TASKS:
    raise UserError(f"data.num_tasks = {count}: omniglot_rotation has {_MOST_TASKS} at most")
  num_train = _NUM_CLASSES * (_DRAWINGS * _ROTATIONS - _NUM_TEST)
  task = (_NUM_CLASSES, num_train, _NUM_CLASSES * _NUM_TEST)
  names = (f"characters {12 * i} to {12 * i + 11}" for i in range(count))
  return Outline((32, 32, 1), tuple(TaskOutline(name, *task) for name in names))


def read(config: Config) -> list[Task]:
  """Reads the tasks.

  Raises:
    sources.Missing: if the files are not found.
    UserError: if a file is damaged, or a character does not have 20 drawings and `allow_partial` is
      False.
  """
  tasks_planned = outline(config).tasks
  halves = _halves(config.data_dir, config.allow_partial)
  characters = _characters(halves, len(tasks_planned) * _NUM_CLASSES, config.allow_partial)
  drawings = [drawing for _, of_character in characters for drawing in of_character]
  fingerprint = "-".join(
    archives.fingerprint(files, [name for archive, name in drawings if archive == half])
    for half, files in halves.items()
  )
  shape = (len(drawings) * _ROTATIONS, 32, 32, 1)
  image = cache.images(
    config.data.cache,
    f"omniglot-{fingerprint}",
    shape,
    lambda out: _decode(halves, drawings, out),
  )
  sizes = [len(of_character) * _ROTATIONS for _, of_character in characters]
  data = ImageSet(
    image,
    np.repeat(np.arange(len(characters)), sizes),
    len(image),
    tuple(name for name, _ in characters),
  )
  inputs = Inputs(np.zeros(1, np.float32), np.ones(1, np.float32), None)
  tasks = []
  for i, task in enumerate(tasks_planned[: -(-len(characters) // _NUM_CLASSES)]):
    classes = range(_NUM_CLASSES * i, min(_NUM_CLASSES * (i + 1), len(characters)))
    train, test = zip(*(_drawn(data, c) for c in classes), strict=True)
    rows = {"train": np.concatenate(train), "test": np.concatenate(test)}
    tasks.append(make_task(i, task.name, data, classes, inputs, **rows))
  return tasks


def _halves(data_dir: str, allow_partial: bool) -> dict[str, archives.Files]:
  """Returns the files of images_background and images_evaluation, each a zip file or a folder."""
  files = sources.find(data_dir, "omniglot")
  found = {}
  for half in _ALPHABETS:
    if f"{half}.zip" in files.names:
      found[half] = archives.archive(files.path / f"{half}.zip", half, _MOST_BYTES)
    elif (files.path / half).is_dir():
      found[half] = archives.folder(files.path / half, _MOST_BYTES)
    elif not allow_partial or not found:
      raise UserError(f"{files.path}: found neither {half}/ nor {half}.zip; download the archive")
  return found


def _characters(
  halves: dict[str, archives.Files], count: int, allow_partial: bool
) -> list[tuple[str, list[tuple[str, str]]]]:
  """Returns the first `count` characters: the name of each, and its drawings as (archive, file)."""
  drawings: dict[tuple[str, str], list[tuple[str, str]]] = {}
  for half, files in halves.items():
    for name in files.names:
      if name.endswith(".png") and name.count("/") == 2:
        character, _, _ = name.rpartition("/")
        drawings.setdefault((half, character), []).append((half, name))
  characters = sorted(drawings.items())[:count]
  for (half, name), files in characters:
    if len(files) < 2 or (len(files) != _DRAWINGS and not allow_partial):
      raise UserError(
        f"{halves[half].path}: character {name} has {len(files)} drawings, expected {_DRAWINGS};"
        " download the original archive again"
      )
  if not characters:
    raise UserError(
      f"{halves[_ALPHABETS[0]].path}: contains no drawings; download the original archive"
    )
  return [(name, files) for (_, name), files in characters]


def _decode(
  halves: dict[str, archives.Files], drawings: list[tuple[str, str]], out: np.ndarray
) -> None:
  """Decodes the drawings and their rotations into an array.

  Args:
    halves: the files, by archive.
    drawings: the drawings as (archive, file).
    out: the array to fill, each drawing followed by its rotations. uint8 [N, 32, 32, 1]
  """
  for half, files in halves.items():
    index = {name: i for i, (archive, name) in enumerate(drawings) if archive == half}

    def decode_one(item, files=files, index=index):
      name, contents = item
      drawing = formats.picture(contents, f"{files.path}: {name}", "L", (105, 105))
      small = np.asarray(drawing.resize((32, 32), Image.Resampling.BILINEAR))
      for turn in range(_ROTATIONS):
        out[_ROTATIONS * index[name] + turn, :, :, 0] = np.rot90(small, turn)

    folders.for_all(decode_one, files.stream(frozenset(index)))


def _drawn(data: ImageSet, c: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the rows of character c for training and for testing."""
  rows = np.flatnonzero(data.label == c)
  rows = np.random.default_rng((0, c)).permutation(rows)
  num_test = max(1, len(rows) * _NUM_TEST // (_DRAWINGS * _ROTATIONS))
  return rows[num_test:], rows[:num_test]
