"""Checks the images of a benchmark and draws a contact sheet of them.

  python -m halrp_jax check_data --config=FILE [--config.KEY=VALUE ...] [--sheet=FILE.png]

Prints tasks, classes, numbers of images and image sizes. Lines that begin with "note" say which
images are converted and which files are not used. Lines that begin with "WRONG" say what is wrong
with the data; the exit code is then 1. If files can't be read, all of them are listed and no sheet
is drawn. The contact sheet (default: check_data.png) has a row per task, with an image of every
class in turn: training images on the left, test images on the right.
"""

import pathlib

import jax
import numpy as np
from PIL import Image

from halrp_jax import arguments, data, files
from halrp_jax.commands import terminal
from halrp_jax.config import resolve
from halrp_jax.runs import pretrained
from halrp_jax.types import Array, Split, Task, UserError, UserErrors

_FLAGS = {"sheet": "file for the contact sheet; default: check_data.png"}
_PER_ROW = 16  # training images in a row of the sheet, and as many test images
_MARGIN = 2  # pixels between images
_MOST_LINES = 12  # largest number of lines that begin with WRONG


def main(argv: list[str]) -> int:
  """Prints the findings and writes the sheet; returns 1 if anything is wrong."""
  argv, switches = ["check_data", *argv], {"help": "show this text"}
  args = arguments.parse_config(argv, _FLAGS, switches, ("config",), "--config=configs/custom.py")
  if args.help:
    print(terminal.verb_help_text(__doc__, _FLAGS | switches))
    return 0
  with args.config.unlocked():
    accepts_partial = args.config.allow_partial
    args.config.allow_partial = True  # reads what there is; what is missing is printed below
  config = resolve(args.config)
  try:
    benchmark = data.load(pretrained.framed(config))
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
  if benchmark.partial and not accepts_partial:
    wrong += data.shortages(config)
  for line in wrong[:_MOST_LINES]:
    print(f"WRONG  {line}")
  if len(wrong) > _MOST_LINES:
    print(f"WRONG  and {len(wrong) - _MOST_LINES} more findings")
  path = pathlib.Path(args.sheet or "check_data.png")
  _write(contact_sheet(benchmark.tasks, image), path)
  print(f"split hash {benchmark.split_hash[:16]}; contact sheet {path}")
  return 1 if wrong else 0


def _task_line(task: Task) -> str:
  """Returns one line with the classes of a task and its images per split."""
  splits = {"train": task.train, "valid": task.valid, "test": task.test}
  counts = ", ".join(
    f"{name} {len(split.index)} ({_range(split.label, task.num_classes)})"
    for name, split in splits.items()
  )
  names = ", ".join(task.class_names[:12]) + (", ..." if task.num_classes > 12 else "")
  return f"  {task.id} {task.name}: {task.num_classes} classes ({names}); {counts}"


def _range(label: Array, num_classes: int) -> str:
  """Returns the smallest and the largest number of images of a class, as a text."""
  counts = np.bincount(np.asarray(label), minlength=num_classes)
  low, high = counts.min(), counts.max()
  return f"{low} a class" if low == high else f"{low} to {high} a class"


def _oddities(task: Task, image: np.ndarray) -> list[str]:
  """Returns lines on images that can be read but are probably a mistake."""
  lines = []
  train, valid, test = (np.asarray(s.index) for s in (task.train, task.valid, task.test))
  train = np.concatenate([train, valid])
  blank = [r for r in np.concatenate([train, test]) if (image[r] == image[r][:1, :1]).all()]
  if blank:
    lines.append(f"task {task.name!r}: {len(blank)} images have one colour only")
  seen = {image[r].tobytes() for r in train}
  if both := sum(image[r].tobytes() in seen for r in test):
    lines.append(f"task {task.name!r}: {both} test images are also training or validation images")
  return lines


def contact_sheet(tasks: tuple[Task, ...], image: np.ndarray) -> np.ndarray:
  """Draws a row per task, its classes in turn: training images left, test images right.

  Args:
    tasks: tasks of a benchmark.
    image: uint8 [N, H, W, C], the images of all tasks.

  Returns:
    uint8 [H, W, 3].
  """
  size_h, size_w = image.shape[1] + _MARGIN, image.shape[2] + _MARGIN
  sheet = np.full((size_h * len(tasks), size_w * (2 * _PER_ROW + 1), 3), 255, np.uint8)
  for y, task in enumerate(tasks):
    for side, split in enumerate((task.train, task.test)):
      for x, row in enumerate(_one_of_each(split)):
        top, left = y * size_h, (x + side * (_PER_ROW + 1)) * size_w
        sheet[top : top + image.shape[1], left : left + image.shape[2]] = image[row]
  return sheet


def _one_of_each(split: Split) -> list[int]:
  """Returns the rows of `_PER_ROW` images of a split, the classes in turn."""
  index, label = jax.device_get((split.index, split.label))
  rank = np.zeros(len(label), int)  # index of an image within its class
  for c in np.unique(label):
    rank[label == c] = np.arange((label == c).sum())
  return list(index[np.lexsort((label, rank))][:_PER_ROW])


def _write(sheet: np.ndarray, path: pathlib.Path) -> None:
  """Writes the sheet as PNG."""
  try:
    with files.replacing(path) as temporary:
      Image.fromarray(sheet).save(temporary, "PNG")
  except OSError as e:
    raise UserError(f"--sheet={path}: {e.strerror or e}; name a file that can be written") from e
