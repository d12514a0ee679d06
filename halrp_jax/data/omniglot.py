"""Omniglot-Rotation: 100 tasks of 12 characters, each drawing also turned by 90, 180, 270 degrees.

As in the loader of WSN, which the paper follows (spec c): all 1,623 characters in the order of
their paths (background before evaluation), the first 1,200 of them; 1 x 32 x 32, value / 255. Of
the 80 images of a character 60 are for training, 20 for testing, drawn once for all seeds.

Reference: B. Lake et al., "Human-level concept learning through probabilistic program induction",
2015.
"""

import numpy as np
from PIL import Image

from halrp_jax.data import cache, folders, formats, sources
from halrp_jax.data.tasks import ImageSet, Outline, TaskOutline, make_task
from halrp_jax.keys import Config
from halrp_jax.types import Inputs, Task, UserError

_NUM_TASKS, _NUM_CLASSES, _DRAWINGS, _TURNS, _NUM_TEST = 100, 12, 20, 4, 20
_ALPHABETS = ("images_background", "images_evaluation")
_MOST = 400_000_000  # bytes of one archive, unpacked


def outline(config: Config) -> Outline:
  """Omniglot-Rotation: 100 tasks of 12 characters in 4 rotations, 32 x 32."""
  num_train = _NUM_CLASSES * (_DRAWINGS * _TURNS - _NUM_TEST)
  task = (_NUM_CLASSES, num_train, _NUM_CLASSES * _NUM_TEST)
  names = (f"characters {12 * i} to {12 * i + 11}" for i in range(_NUM_TASKS))
  return Outline((32, 32, 1), tuple(TaskOutline(name, *task) for name in names))


def read(config: Config) -> list[Task]:
  archives = _archives(config.data_dir, config.allow_partial)
  characters = _characters(archives, config.allow_partial)
  wanted = [(archive, name) for _, files in characters for archive, name in files]
  fingerprint = "-".join(
    sources.fingerprint(files, [name for archive, name in wanted if archive == half])
    for half, files in archives.items()
  )
  shape = (len(wanted) * _TURNS, 32, 32, 1)
  image = cache.images(
    config.data.cache, f"omniglot-{fingerprint}", shape, lambda out: _decode(archives, wanted, out)
  )
  sizes = [len(files) * _TURNS for _, files in characters]
  data = ImageSet(
    image,
    np.repeat(np.arange(len(characters)), sizes),
    len(image),
    tuple(name for name, _ in characters),
  )
  inputs = Inputs(np.zeros(1, np.float32), np.ones(1, np.float32), None)
  tasks = []
  for i, task in enumerate(outline(config).tasks[: -(-len(characters) // _NUM_CLASSES)]):
    classes = range(_NUM_CLASSES * i, min(_NUM_CLASSES * (i + 1), len(characters)))
    train, test = zip(*(_drawn(data, c) for c in classes), strict=True)
    rows = {"train": np.concatenate(train), "test": np.concatenate(test)}
    tasks.append(make_task(i, task.name, data, classes, inputs, **rows))
  return tasks


def _archives(data_dir: str, allow_partial: bool) -> dict[str, sources.Files]:
  """The two halves, each a zip file or its folder."""
  files = sources.find(data_dir, "omniglot")
  found = {}
  for half in _ALPHABETS:
    if f"{half}.zip" in files.names:
      found[half] = sources.archive(files.place / f"{half}.zip", half, _MOST)
    elif (files.place / half).is_dir():
      found[half] = sources.folder(files.place / half, _MOST)
    elif not allow_partial or not found:
      raise UserError(f"{files.place}: neither {half}/ nor {half}.zip is there; get the archive")
  return found


def _characters(archives, allow_partial: bool) -> list[tuple[str, list[tuple[str, str]]]]:
  """The first 1,200 characters: name, its drawings as (archive, file)."""
  drawings = {}
  for half, files in archives.items():
    for name in files.names:
      if name.endswith(".png") and name.count("/") == 2:
        character, _, _ = name.rpartition("/")
        drawings.setdefault((half, character), []).append((half, name))
  characters = sorted(drawings.items())[: _NUM_TASKS * _NUM_CLASSES]
  for (half, name), files in characters:
    if len(files) < 2 or (len(files) != _DRAWINGS and not allow_partial):
      raise UserError(
        f"{archives[half].place}: character {name} has {len(files)} drawings, expected {_DRAWINGS};"
        " get the original archive again"
      )
  if not characters:
    raise UserError(f"{archives[_ALPHABETS[0]].place}: holds no drawings; get the original archive")
  return [(name, files) for (_, name), files in characters]


def _decode(archives, wanted, out: np.ndarray) -> None:
  for half, files in archives.items():
    place = {name: i for i, (archive, name) in enumerate(wanted) if archive == half}

    def decode_one(item, files=files, place=place):
      name, contents = item
      drawing = formats.picture(contents, f"{files.place}: {name}", "L", (105, 105))
      small = np.asarray(drawing.resize((32, 32), Image.Resampling.BILINEAR))
      for turn in range(_TURNS):
        out[_TURNS * place[name] + turn, :, :, 0] = np.rot90(small, turn)

    folders.for_all(decode_one, files.stream(frozenset(place)))


def _drawn(data: ImageSet, c: int) -> tuple[np.ndarray, np.ndarray]:
  """Rows of character c for training and for testing."""
  rows = np.flatnonzero(data.label == c)
  rows = np.random.default_rng((0, c)).permutation(rows)
  num_test = max(1, len(rows) * _NUM_TEST // (_DRAWINGS * _TURNS))
  return rows[num_test:], rows[:num_test]
