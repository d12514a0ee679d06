"""TinyImageNet: 20 tasks of 10 classes or 40 tasks of 5, with images of 64 x 64 x 3.

The 200 classes are ordered by their ids in WordNet (wnids). Of the 500 training images of a class,
50 are held out. The paper tests on the official validation images. The authors' code does the
reverse: it tests on the held-out images and validates on the official validation images.
The published numbers come from that code, so `data.tiny_test` = "held_out" is the default;
"official" follows the paper. Training images are cropped and flipped at random
(`protocol.augment`).

Reference: Y. Le and X. Yang, "Tiny ImageNet visual recognition challenge", 2015.
"""

import numpy as np

from halrp_jax.data import archives, cache, folders, formats, sources
from halrp_jax.data.tasks import ImageSet, Outline, TaskOutline, make_task
from halrp_jax.keys import Config
from halrp_jax.types import Inputs, Task, UserError

_NUM_CLASSES = 200
_NUM_TRAIN, _HELD_OUT = 500, 50  # training images of a class; how many of them are held out
_MEAN, _STD = (
  np.array([0.485, 0.456, 0.406], np.float32),
  np.array([0.229, 0.224, 0.225], np.float32),
)


def outline_20(config: Config) -> Outline:
  """Describes TinyImageNet 20-split: 20 tasks of 10 classes."""
  return _outline(20)


def outline_40(config: Config) -> Outline:
  """Describes TinyImageNet 40-split: 40 tasks of 5 classes."""
  return _outline(40)


def _outline(num_tasks: int) -> Outline:
  """Describes tasks of equally many classes."""
  n = _NUM_CLASSES // num_tasks
  sizes = (n, n * (_NUM_TRAIN - _HELD_OUT), n * _HELD_OUT, n * _HELD_OUT)
  names = (f"classes {n * i} to {n * i + n - 1}" for i in range(num_tasks))
  return Outline((64, 64, 3), tuple(TaskOutline(name, *sizes) for name in names))


def read_20(config: Config) -> list[Task]:
  """Reads the 20 tasks of 10 classes.

  Raises:
    sources.Missing: if the files are not found.
    UserError: if a file is damaged or missing in the archive.
  """
  return _tasks(config, outline_20(config))


def read_40(config: Config) -> list[Task]:
  """Reads the 40 tasks of 5 classes. Errors as in `read_20`."""
  return _tasks(config, outline_40(config))


def _tasks(config: Config, outline: Outline) -> list[Task]:
  """Reads the images and divides them into tasks."""
  data = _read(sources.find(config.data_dir, "tiny_imagenet"), config.data.cache)
  inputs = Inputs(_MEAN, _STD, None)
  tasks = []
  for i, task in enumerate(outline.tasks):
    classes = range(task.num_classes * i, task.num_classes * (i + 1))
    train, held_out = zip(*(_split_class(data, c, config.seed) for c in classes), strict=True)
    held_out, official = np.concatenate(held_out), data.rows(classes, True)
    swapped = config.data.tiny_test == "held_out"
    test, valid = (held_out, official) if swapped else (official, held_out)
    rows = {"train": np.concatenate(train), "valid": valid, "test": test}
    tasks.append(make_task(i, task.name, data, classes, inputs, **rows))
  return tasks


def _split_class(data: ImageSet, c: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Divides the rows of class c at random into training rows and held-out rows."""
  rows = np.random.default_rng((seed, c)).permutation(data.rows([c], False))
  num_held_out = len(rows) * _HELD_OUT // _NUM_TRAIN
  return rows[num_held_out:], rows[:num_held_out]


def _read(files: archives.Files, setting: str) -> ImageSet:
  """Reads all images, classes in the order of their wnids.

  Args:
    files: the original files.
    setting: the config key `data.cache`.

  Returns:
    The official training images, followed by the official validation images as test images.
  """
  wnids, words, annotations = _texts(files)
  official = [line.split("\t")[:2] for line in annotations.splitlines() if "\t" in line]
  label = {f"val/images/{file}": wnids.index(w) for file, w in official if w in wnids}
  train = [n for n in files.names if n.startswith("train/") and n.endswith(".JPEG")]
  for name in train:
    wnid = name.split("/")[1]
    if wnid not in wnids:
      raise UserError(
        f"{files.path}: {name}: {wnid} is not in wnids.txt; download the archive again"
      )
    label[name] = wnids.index(wnid)
  test = [n for n in files.names if n in label and n.startswith("val/")]
  for kind, names in (("training", train), ("validation", test)):
    if missing := set(range(len(wnids))) - {label[n] for n in names}:
      wnid = wnids[min(missing)]
      raise UserError(
        f"{files.path}: class {wnid} has no {kind} images; download the archive again"
      )
  row = {n: i for i, n in enumerate(train + test)}

  def decode(out):
    def decode_one(item):
      name, contents = item
      image = formats.picture(contents, f"{files.path}: {name}", "RGB", (64, 64))
      out[row[name]] = np.asarray(image)

    folders.for_all(decode_one, files.stream(frozenset(row)))

  key = f"tinyimagenet-{archives.fingerprint(files, row)}"
  image = cache.images(setting, key, (len(row), 64, 64, 3), decode)
  return ImageSet(image, np.array([label[n] for n in row]), len(train), words)


def _texts(files: archives.Files) -> tuple[list[str], tuple[str, ...], str]:
  """Returns the sorted wnids, the names of their classes, and the text of val_annotations.txt."""
  texts = files.read("wnids.txt", "words.txt", "val/val_annotations.txt")
  wnids, words, annotations = (t.decode("utf-8", "replace") for t in texts)
  wnids = sorted(wnids.split())
  if len(set(wnids)) != _NUM_CLASSES:
    raise UserError(
      f"{files.path}: wnids.txt has {len(set(wnids))} classes, expected {_NUM_CLASSES}; download "
      "the archive again"
    )
  names = dict(line.split("\t", 1) for line in words.splitlines() if "\t" in line)
  return wnids, tuple(names.get(w, w) for w in wnids), annotations
