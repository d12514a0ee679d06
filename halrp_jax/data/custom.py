"""Your own images: a folder per task, an .npz per task, or data sets that TFDS has prepared.

`data_dir` holds, for `data.source` = "original", either

  TASK/CLASS/*.png or *.jpg     resized to `data.image_size` where they have another size;
                                `data.test_fraction` of every class is the test set, or
  TASK/train/CLASS/..., TASK/test/CLASS/...
  TASK.npz                      image uint8 [N, H, W] or [N, H, W, C], label [N] from 0 up;
                                optional: test_image, test_label, class_names

or, for "tfds", what TFDS prepared for the sets named in `data.tasks`. Tasks are numbered in the
order of their names. Normalised by mean and standard deviation of each task's training images.
"""

import pathlib

import numpy as np
from PIL import Image

from halrp_jax.data import cache, formats, sources
from halrp_jax.data.tasks import ImageSet, join, make_task
from halrp_jax.types import Inputs, Task, UserError, brief

_SUFFIXES = (".png", ".jpg", ".jpeg")
_MOST = 2_000_000_000  # bytes of one file


def outline(config) -> None:
  """Your own tasks: folders of images, .npz files, or TFDS sets (see data/custom.py)."""
  return None


def read(config) -> list[Task]:
  sets = _read_tfds(config) if config.data.source == "tfds" else _read_folder(config)
  shapes = {data.image.shape[1:3] for data in sets.values()}
  if len(shapes) > 1:
    raise UserError(
      f"data_dir={config.data_dir}: the tasks' images differ in size "
      f"({', '.join(f'{h} x {w}' for h, w in sorted(shapes))}); give them one size"
    )
  channels = max(data.image.shape[3] for data in sets.values())
  images = [np.broadcast_to(d.image, (*d.image.shape[:3], channels)) for d in sets.values()]
  image, offsets = join(images)
  image = np.ascontiguousarray(image)
  tasks = []
  for i, ((name, data), offset) in enumerate(zip(sets.items(), offsets, strict=True)):
    task = make_task(i, name, data, range(len(data.class_names)), None, **_rows(data, i, config))
    moved = {
      split: getattr(task, split)._replace(image=image, index=getattr(task, split).index + offset)
      for split in ("train", "valid", "test")
    }
    task = task._replace(**moved)
    tasks.append(task._replace(inputs=_inputs(task)))
  return tasks


def read_one(text: str, config, shape: tuple[int, int, int], task_id: int) -> Task:
  """One more task: a folder with a folder per class, or an .npz, its images as [H, W, C]."""
  place = sources.path_of("--data", text)
  if not place.exists():
    raise UserError(f"--data={text}: no such folder or .npz")
  data = _pictures(place, config, shape) if place.is_dir() else _npz(place)
  if data.image.shape[1:] not in (shape, (*shape[:2], 1)):
    raise UserError(f"--data={text}: images are {data.image.shape[1:]}, the run's {shape}")
  image = np.ascontiguousarray(np.broadcast_to(data.image, (len(data.image), *shape)))
  data = data._replace(image=image)
  name = place.resolve().stem if place.suffix == ".npz" else place.resolve().name
  rows = _rows(data, task_id, config)
  task = make_task(task_id, name, data, range(len(data.class_names)), None, **rows)
  return task._replace(inputs=_inputs(task))


def _rows(data: ImageSet, i: int, config) -> dict[str, np.ndarray]:
  """Rows for training and testing; drawn per class where there is no test set."""
  if data.num_train < len(data.label):
    return {}
  train, test = [], []
  for c in range(len(data.class_names)):
    rows = np.random.default_rng((config.seed, i, c)).permutation(data.rows([c], False))
    n = max(1, round(config.data.test_fraction * len(rows)))
    test.append(rows[:n])
    train.append(rows[n:])
  return {"train": np.concatenate(train), "test": np.concatenate(test)}


def _inputs(task: Task) -> Inputs:
  """Mean and standard deviation of at most 10,000 training images."""
  rows = np.sort(task.train.index[:10_000])
  x = task.train.image[rows] / np.float32(255)
  return Inputs(x.mean((0, 1, 2), np.float32), np.maximum(x.std((0, 1, 2), np.float32), 1e-3), None)


# --- folders and .npz -----------------------------------------------------------------


def _read_folder(config) -> dict[str, ImageSet]:
  if not config.data_dir:
    raise UserError("data_dir is not set: give the folder with one folder or .npz per task")
  root = sources.path_of("data_dir", config.data_dir)
  try:
    entries = sorted(p for p in root.iterdir() if not p.name.startswith("."))
  except OSError as e:
    raise UserError(f"data_dir={config.data_dir}: {e.strerror or e}") from e
  sets = {p.stem: _npz(p) for p in entries if p.suffix == ".npz"}
  shape = (config.data.image_size, config.data.image_size, 3)
  sets |= {p.name: _pictures(p, config, shape) for p in entries if p.is_dir()}
  if not sets:
    raise UserError(f"data_dir={config.data_dir}: holds neither folders nor .npz files of tasks")
  return sets


def _pictures(place: pathlib.Path, config, shape: tuple[int, int, int]) -> ImageSet:
  """A task's folder, its images as [H, W, C]."""
  files = sources.folder(place, _MOST)
  names = [n for n in files.names if n.lower().endswith(_SUFFIXES)]
  has_test = all(any(n.startswith(f"{part}/") for n in names) for part in ("train", "test"))
  depth = 2 if has_test else 1
  if wrong := [n for n in names if n.count("/") != depth]:
    expected = "train/CLASS/ and test/CLASS/" if has_test else "CLASS/"
    raise UserError(f"{place}: {wrong[0]} is not in {expected}, where images belong")
  classes = _classes(place, names, has_test)
  if has_test:
    names.sort(key=lambda n: not n.startswith("train/"))  # stable: training images first
  height, width, channels = shape

  def decode(out):
    for name, contents in files.stream(frozenset(names)):
      image = formats.picture(contents, str(place / name), "L" if channels == 1 else "RGB", None)
      if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
      out[position[name]] = np.asarray(image).reshape(shape)

  position = {n: i for i, n in enumerate(names)}
  key = f"custom-{sources.fingerprint(files, names)}"
  image = cache.images(config.data.cache, key, (len(names), *shape), decode)
  label = np.array([classes.index(n.split("/")[-2]) for n in names])
  num_train = sum(n.startswith("train/") for n in names) if has_test else len(names)
  return ImageSet(image, label, num_train, classes)


def _classes(place, names, has_test) -> tuple[str, ...]:
  """The class folders in order, each with enough images."""
  classes = tuple(sorted({n.split("/")[-2] for n in names}))
  folders = [place / part for part in ("train", "test")] if has_test else [place]
  for folder in folders:
    for c in sorted({p.name for p in folder.iterdir() if p.is_dir()} | set(classes)):
      start = (folder / c).relative_to(place).as_posix() + "/"
      count = sum(n.startswith(start) for n in names)
      if count < (1 if has_test else 2):
        raise UserError(
          f"{folder / c}: {count} PNG or JPEG images; a class needs at least "
          + ("1 for training and 1 for testing" if has_test else "2")
        )
  if len(classes) < 2:
    raise UserError(f"{place}: {len(classes)} class folders; a task needs at least 2")
  return classes


def _npz(path: pathlib.Path) -> ImageSet:
  """A task's .npz."""
  try:
    with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
      found = {k: archive[k] for k in archive.files}
  except Exception as e:  # zipfile, zlib and numpy raise many kinds
    raise UserError(f"{path}: can't be read ({brief(e)}); write it with numpy.savez") from e
  parts = [_npz_part(path, found, "")]
  if "test_image" in found:
    parts.append(_npz_part(path, found, "test_"))
  label = np.concatenate([y for _, y in parts])
  names = found.get("class_names", np.arange(max(2, int(label.max()) + 1)))
  names = tuple(map(str, np.asarray(names).reshape(-1)))
  for (_, y), kind in zip(parts, ("", "test "), strict=False):
    counts = np.bincount(y, minlength=len(names))
    least = 2 if len(parts) == 1 else 1
    if len(counts) > len(names) or counts.min() < least:
      c = len(names) if len(counts) > len(names) else int(counts.argmin())
      raise UserError(
        f"{path}: label {c} has {counts[c]} {kind}images; labels go from 0 to {len(names) - 1}, "
        f"each with at least {least}"
      )
  if len({x.shape[1:] for x, _ in parts}) > 1:
    raise UserError(f"{path}: image and test_image differ in size")
  return ImageSet(np.concatenate([x for x, _ in parts]), label, len(parts[0][0]), names)


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


def _read_tfds(config) -> dict[str, ImageSet]:
  from halrp_jax.data import prepared

  names = [n.strip() for n in config.data.tasks.split(",") if n.strip()]
  if not names:
    raise UserError("data.tasks is empty: name TFDS sets, with commas, for example mnist,emnist")
  size = config.data.image_size
  return {name: prepared.any_images(config.data_dir, name, size) for name in names}
