"""Checks the images of a benchmark and draws a contact sheet.

  python -m halrp_jax check_data --config=FILE [--config.KEY=VALUE ...] [--sheet=FILE.png]

Prints tasks, classes, counts and image sizes, what is converted or not used, says what is wrong,
and draws a contact sheet: one row per task, images of its classes in turn, training images left,
test images right. Files that can't be read are all listed, and nothing is drawn. Exit code 1 if
something is wrong.
"""

import pathlib

import jax
import numpy as np
from PIL import Image

from halrp_jax import arguments, data, files
from halrp_jax.config import resolve
from halrp_jax.types import Task, UserError, UserErrors

_FLAGS = {"sheet": "where the contact sheet goes; default: check_data.png"}
_PER_ROW = 16  # images of each split
_MARGIN = 2  # pixels
_MOST_LINES = 12


def main(argv: list[str]) -> int:
  """Prints what it finds; 1 if anything is wrong."""
  argv, switches = ["check_data", *argv], {"help": "show this text"}
  args = arguments.parse_config(argv, _FLAGS, switches, ("config",), "--config=configs/custom.py")
  if args.help:
    print(__doc__)
    return 0
  with args.config.unlocked():
    complete = args.config.allow_partial
    args.config.allow_partial = True  # look at what is there, then say what lacks
  config = resolve(args.config)
  try:
    benchmark = data.load(config)
  except UserErrors as e:
    for line in e.lines:
      print(f"WRONG  {line}")
    return 1
  image = np.asarray(benchmark.tasks[0].train.image)
  print(f"{benchmark.name}: {len(benchmark.tasks)} tasks, images {benchmark.image_shape}")
  for note in benchmark.notes:
    print(f"note   {note}")
  wrong = []
  for task in benchmark.tasks:
    print(_task_line(task))
    wrong += _oddities(task, image)
  if benchmark.partial:
    wrong += [] if complete else data.shortages(config)
  for line in wrong[:_MOST_LINES]:
    print(f"WRONG  {line}")
  if len(wrong) > _MOST_LINES:
    print(f"WRONG  and {len(wrong) - _MOST_LINES} more of this kind")
  place = pathlib.Path(args.sheet or "check_data.png")
  _write(contact_sheet(benchmark.tasks, image), place)
  print(f"split hash {benchmark.split_hash[:16]}; contact sheet {place}")
  return 1 if wrong else 0


def _task_line(task: Task) -> str:
  splits = {"train": task.train, "valid": task.valid, "test": task.test}
  counts = ", ".join(
    f"{name} {len(split.index)} ({_range(split.label, task.num_classes)})"
    for name, split in splits.items()
  )
  names = ", ".join(task.class_names[:12]) + (", ..." if task.num_classes > 12 else "")
  return f"  {task.id} {task.name}: {task.num_classes} classes ({names}); {counts}"


def _range(label, num_classes: int) -> str:
  """Smallest and largest number of images of a class."""
  counts = np.bincount(np.asarray(label), minlength=num_classes)
  low, high = counts.min(), counts.max()
  return f"{low} a class" if low == high else f"{low} to {high} a class"


def _oddities(task: Task, image: np.ndarray) -> list[str]:
  """What no reader can refuse, but nobody wants."""
  lines = []
  *learned, test = (np.asarray(s.index) for s in (task.train, task.valid, task.test))
  train = np.concatenate(learned)
  blank = [r for r in np.concatenate([train, test]) if (image[r] == image[r][:1, :1]).all()]
  if blank:
    lines.append(f"task {task.name!r}: {len(blank)} images have one colour only")
  seen = {image[r].tobytes() for r in train}
  if both := sum(image[r].tobytes() in seen for r in test):
    lines.append(f"task {task.name!r}: {both} test images are training images too")
  return lines


def contact_sheet(tasks: tuple[Task, ...], image: np.ndarray) -> np.ndarray:
  """uint8 [H, W, 3]: a row per task, its classes in turn, training images left, test right."""
  size_h, size_w = image.shape[1] + _MARGIN, image.shape[2] + _MARGIN
  sheet = np.full((size_h * len(tasks), size_w * (2 * _PER_ROW + 1), 3), 255, np.uint8)
  for y, task in enumerate(tasks):
    for side, split in enumerate((task.train, task.test)):
      for x, row in enumerate(_one_of_each(split)):
        top, left = y * size_h, (x + side * (_PER_ROW + 1)) * size_w
        sheet[top : top + image.shape[1], left : left + image.shape[2]] = image[row]
  return sheet


def _one_of_each(split) -> list[int]:
  """Rows of images, the classes in turn."""
  index, label = jax.device_get((split.index, split.label))
  turn = np.zeros(len(label), int)  # the how many-th image of its class it is
  for c in np.unique(label):
    turn[label == c] = np.arange((label == c).sum())
  return list(index[np.lexsort((label, turn))][:_PER_ROW])


def _write(sheet: np.ndarray, place: pathlib.Path) -> None:
  try:
    with files.replacing(place) as temporary:
      Image.fromarray(sheet).save(temporary, "PNG")
  except OSError as e:
    raise UserError(f"--sheet={place}: {e.strerror or e}; name a file that can be written") from e
