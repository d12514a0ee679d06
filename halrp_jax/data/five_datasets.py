"""Five-dataset: CIFAR-10, MNIST, SVHN, FashionMNIST and notMNIST, one task each, 32 x 32 x 3.

As in the authors' code, grey images are padded with zeros from 28 to 32 pixels and repeated in
three channels, and each data set has its own normalisation. notMNIST is the "small" set with 18,724
readable images; the last tenth of the images of every class, in the order of their names, are the
test images. (The paper uses the split of HAT, which is not published as a list.) With
`allow_partial` a missing data set is left out.

References: Y. Netzer et al., "Reading digits in natural images", 2011 (SVHN); H. Xiao et al.,
"Fashion-MNIST", 2017; Y. Bulatov, notMNIST, 2011; J. Serrà et al., "Overcoming catastrophic
forgetting with hard attention to the task", ICML 2018 (HAT).
"""

import warnings

import numpy as np

from halrp_jax.data import archives, cache, folders, formats, mnist_family, residence, sources
from halrp_jax.data.tasks import (
  ImageSet,
  Outline,
  TaskOutline,
  grey_to_rgb,
  make_task,
  offsets_of,
)
from halrp_jax.keys import Config
from halrp_jax.types import Inputs, Task, UserError

# name, training images, test images, mean, std
_SETS = (
  ("cifar10", 50_000, 10_000, (0.49137, 0.48235, 0.44667), (0.24706, 0.24353, 0.26157)),
  ("mnist", 60_000, 10_000, (0.1,) * 3, (0.2752,) * 3),
  ("svhn", 73_257, 26_032, (0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197)),
  ("fashion_mnist", 60_000, 10_000, (0.2190,) * 3, (0.3318,) * 3),
  ("notmnist", 16_854, 1_870, (0.4254,) * 3, (0.4501,) * 3),
)
NAMES = tuple(s[0] for s in _SETS)
# Two files of the original archive that are not images.
_NOT_IMAGES = {
  "A/RGVtb2NyYXRpY2FCb2xkT2xkc3R5bGUgQm9sZC50dGY=.png",
  "F/Q3Jvc3NvdmVyIEJvbGRPYmxpcXVlLnR0Zg==.png",
}


def outline(config: Config) -> Outline:
  """Describes Five-dataset: a task for each of five data sets."""
  return Outline((32, 32, 3), tuple(TaskOutline(s[0], 10, *s[1:3]) for s in _SETS))


def read(config: Config) -> list[Task]:
  """Reads the tasks.

  Raises:
    sources.Missing: if a data set is not found and `allow_partial` is False.
    UserError: if a file is damaged, or no data set is found.
  """
  found = {}
  for i, (name, *_) in enumerate(_SETS):
    try:
      found[i] = _read(config, name)
    except sources.Missing as e:
      if not config.allow_partial:
        raise
      warnings.warn(f"{name} is left out: {e}", stacklevel=2)
  if not found:
    raise UserError(
      f"data_dir={config.data_dir}: contains none of the data sets {', '.join(NAMES)}; see "
      "docs/protocols.md for the folder of each"
    )
  images = [data.image for data in found.values()]
  image, offsets = residence.joined(config, images), offsets_of(images)
  tasks = []
  for (i, data), offset in zip(found.items(), offsets, strict=True):
    name, _, _, mean, std = _SETS[i]
    inputs = Inputs(np.array(mean, np.float32), np.array(std, np.float32), None)
    task = make_task(i, name, data, range(10), inputs)
    moved = {
      split: getattr(task, split)._replace(image=image, index=getattr(task, split).index + offset)
      for split in ("train", "valid", "test")
    }
    tasks.append(task._replace(**moved))
  return tasks


def _read(config: Config, name: str) -> ImageSet:
  """Reads one of the data sets, with its images as uint8 [N, 32, 32, 3]."""
  if name in ("mnist", "fashion_mnist"):
    data = mnist_family.read(config, name)
    padded = np.pad(data.image[..., 0], ((0, 0), (2, 2), (2, 2)))
    return data._replace(image=grey_to_rgb(padded))
  if name == "notmnist":
    return _read_notmnist(sources.find(config.data_dir, name), config.data.cache)
  if config.data.source == "tfds":
    from halrp_jax.data import prepared

    return prepared.labelled(config.data_dir, name, (32, 32, 3))
  files = sources.find(config.data_dir, name)
  return _read_cifar10(files) if name == "cifar10" else _read_svhn(files)


def _read_cifar10(files: archives.Files) -> ImageSet:
  """Reads the binary version of CIFAR-10."""
  names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
  *contents, meta = files.read(*names, "batches.meta.txt")
  parts = [formats.cifar(c, f"{files.path}: {n}", 1) for c, n in zip(contents, names, strict=True)]
  images, labels = zip(*parts, strict=True)
  label = np.concatenate(labels)[:, 0].astype(np.int64)
  classes = tuple(meta.decode("utf-8", "replace").split())
  if label.max() > 9:
    raise UserError(
      f"{files.path}: a label is out of range; the file is damaged, delete and download it again"
    )
  if len(classes) != 10:
    raise UserError(
      f"{files.path}: batches.meta.txt has {len(classes)} names, expected 10; delete and download "
      "it again"
    )
  num_train = sum(map(len, images[:-1]))
  return ImageSet(np.concatenate(images), label, num_train, classes)


def _read_svhn(files: archives.Files) -> ImageSet:
  """Reads the cropped digits of SVHN."""
  names = ("train_32x32.mat", "test_32x32.mat")
  parts = [
    formats.svhn(c, f"{files.path}: {n}") for c, n in zip(files.read(*names), names, strict=True)
  ]
  (x, y), (x_test, y_test) = parts
  label = np.concatenate([y, y_test])
  return ImageSet(np.concatenate([x, x_test]), label, len(x), tuple("0123456789"))


def _read_notmnist(files: archives.Files, setting: str) -> ImageSet:
  """Reads notMNIST; `setting` is the config key `data.cache`."""
  classes = tuple("ABCDEFGHIJ")
  names = [n for n in files.names if n.endswith(".png") and n not in _NOT_IMAGES]
  by_class = [[n for n in names if n.startswith(f"{c}/")] for c in classes]
  for c, members in zip(classes, by_class, strict=True):
    if len(members) < 10:
      raise UserError(
        f"{files.path}: class {c} has {len(members)} images, expected at least 10; download the "
        "archive again"
      )
  train = [n for members in by_class for n in members[: len(members) - len(members) // 10]]
  test = [n for members in by_class for n in members[len(members) - len(members) // 10 :]]
  row = {n: i for i, n in enumerate(train + test)}

  def decode(out):
    def decode_one(item):
      name, contents = item
      image = formats.picture(contents, f"{files.path}: {name}", "L", (28, 28))
      out[row[name]] = np.pad(np.asarray(image), 2)[..., None]

    folders.for_all(decode_one, files.stream(frozenset(row)))

  key = f"notmnist-{archives.fingerprint(files, row)}"
  image = cache.images(setting, key, (len(row), 32, 32, 3), decode)
  label = np.array([classes.index(n[0]) for n in row])
  return ImageSet(image, label, len(train), classes)
