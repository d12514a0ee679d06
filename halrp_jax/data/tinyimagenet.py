"""TinyImageNet: its 200 classes, ordered by wnid, as 20 tasks of 10 or 40 tasks of 5; 64 x 64 x 3.

Of the 500 training images of a class 50 are held out. The authors' program swaps the splits (spec
c): the accuracy it reports is on these 50, and its validation images are the official validation
set.
The published numbers are made so, hence `data.tiny_test` = "held_out" is the default; "official" is
what the paper says. Random crops and flips are made in training (`protocol.augment`).

Reference: Y. Le and X. Yang, "Tiny ImageNet visual recognition challenge", 2015.
"""

import numpy as np

from halrp_jax.data import cache, folders, formats, sources
from halrp_jax.data.tasks import ImageSet, Outline, TaskOutline, make_task
from halrp_jax.keys import Config
from halrp_jax.types import Inputs, Task, UserError

_NUM_CLASSES, _NUM_TRAIN, _HELD_OUT = 200, 500, 50  # per class
_MEAN, _STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def outline_20(config: Config) -> Outline:
  """TinyImageNet 20-split: 20 tasks of 10 classes, 64 x 64."""
  return _outline(20)


def outline_40(config: Config) -> Outline:
  """TinyImageNet 40-split: 40 tasks of 5 classes, 64 x 64."""
  return _outline(40)


def _outline(num_tasks: int) -> Outline:
  n = _NUM_CLASSES // num_tasks
  sizes = (n, n * (_NUM_TRAIN - _HELD_OUT), n * _HELD_OUT, n * _HELD_OUT)
  names = (f"classes {n * i} to {n * i + n - 1}" for i in range(num_tasks))
  return Outline((64, 64, 3), tuple(TaskOutline(name, *sizes) for name in names))


def read_20(config: Config) -> list[Task]:
  return _tasks(config, outline_20(config))


def read_40(config: Config) -> list[Task]:
  return _tasks(config, outline_40(config))


def _tasks(config: Config, outline: Outline) -> list[Task]:
  data = _read(sources.find(config.data_dir, "tiny_imagenet"), config.data.cache)
  inputs = Inputs(_MEAN, _STD, None)
  tasks = []
  for i, task in enumerate(outline.tasks):
    classes = range(task.num_classes * i, task.num_classes * (i + 1))
    train, held_out = zip(*(_drawn(data, c, config.seed) for c in classes), strict=True)
    held_out, official = np.concatenate(held_out), data.rows(classes, True)
    swapped = config.data.tiny_test == "held_out"
    test, valid = (held_out, official) if swapped else (official, held_out)
    rows = {"train": np.concatenate(train), "valid": valid, "test": test}
    tasks.append(make_task(i, task.name, data, classes, inputs, **rows))
  return tasks


def _drawn(data: ImageSet, c: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Rows of class c for training, and those held out."""
  rows = np.random.default_rng((seed, c)).permutation(data.rows([c], False))
  num_held_out = len(rows) * _HELD_OUT // _NUM_TRAIN
  return rows[num_held_out:], rows[:num_held_out]


def _read(files: sources.Files, setting: str) -> ImageSet:
  """All images, training images first, classes in the order of their wnids."""
  wnids, words, annotations = _texts(files)
  official = [line.split("\t")[:2] for line in annotations.splitlines() if "\t" in line]
  label = {f"val/images/{file}": wnids.index(w) for file, w in official if w in wnids}
  train = [n for n in files.names if n.startswith("train/") and n.endswith(".JPEG")]
  for name in train:
    wnid = name.split("/")[1]
    if wnid not in wnids:
      raise UserError(f"{files.place}: {name}: {wnid} is not in wnids.txt; get the archive again")
    label[name] = wnids.index(wnid)
  test = [n for n in files.names if n in label and n.startswith("val/")]
  for kind, names in (("training", train), ("validation", test)):
    if lacking := set(range(len(wnids))) - {label[n] for n in names}:
      wnid = wnids[min(lacking)]
      raise UserError(f"{files.place}: class {wnid} has no {kind} images; get the archive again")
  place = {n: i for i, n in enumerate(train + test)}

  def decode(out):
    def decode_one(item):
      name, contents = item
      out[place[name]] = formats.picture(contents, f"{files.place}: {name}", "RGB", (64, 64))

    folders.for_all(decode_one, files.stream(frozenset(place)))

  key = f"tinyimagenet-{sources.fingerprint(files, place)}"
  image = cache.images(setting, key, (len(place), 64, 64, 3), decode)
  return ImageSet(image, np.array([label[n] for n in place]), len(train), words)


def _texts(files: sources.Files) -> tuple[list[str], tuple[str, ...], str]:
  """The wnids in order, the names of their classes, the labels of the validation images."""
  texts = files.read("wnids.txt", "words.txt", "val/val_annotations.txt")
  wnids, words, annotations = (t.decode("utf-8", "replace") for t in texts)
  wnids = sorted(wnids.split())
  if len(set(wnids)) != _NUM_CLASSES:
    raise UserError(f"{files.place}: wnids.txt names {len(set(wnids))} classes, not {_NUM_CLASSES}")
  names = dict(line.split("\t", 1) for line in words.splitlines() if "\t" in line)
  return wnids, tuple(names.get(w, w) for w in wnids), annotations
