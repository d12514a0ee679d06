"""Classifies new images with a run and writes a table.

  python -m halrp_jax predict --workdir=RUN --task=NAME --images=FOLDER|FILE.npz --out=FILE.csv
  python -m halrp_jax predict --workdir=runs/digits-halrp --task=3 --images=new --out=pred.csv

RUN is the folder of a run that is finished, or interrupted after the task was learned; the data it
was trained on are not needed. NAME is the task's name, or id:N for the task with id N; the number
alone is enough unless another task has it as its name. FOLDER holds images (PNG, JPEG, WebP, BMP,
GIF, TIFF, PPM), which are resized and cropped as those that the task was trained on. FILE.npz holds
an array `image`, uint8 [N, H, W] or [N, H, W, C], of the size that the network was trained on.

FILE.csv gets a row per image: its name, the most probable class, the probability of this class, and
then the probability of every class. Images that can't be read are listed and skipped; the exit code
is then 1. The prediction for an image does not depend on the other images of its batch, except with
a run of an older version that stored no BatchNorm statistics; such a run prints a note.
"""

import csv
import pathlib
import sys
import time

import numpy as np

from halrp_jax import arguments, files
from halrp_jax.data import formats, incoming
from halrp_jax.deploy import saved
from halrp_jax.types import UserError

_EXAMPLE = "--workdir=runs/digits-halrp --task=3 --images=new --out=pred.csv"
_PROGRESS_SECONDS = 5.0  # between two lines of progress


def main(argv: list[str]) -> int:
  """Writes the table; returns 1 if an image was skipped."""
  parser = arguments.parser("predict", __doc__, _EXAMPLE)
  for name, text in (
    ("--workdir", "folder of a run"),
    ("--images", "a folder of images, or an .npz file"),
    ("--out", "file for the table, in CSV"),
  ):
    parser.add_argument(name, required=True, type=arguments.filled, help=text)
  parser.add_argument("--task", default="", help="name of a learned task, or id:N; required")
  parser.add_argument(
    "--batch_size", type=int, default=0, help="images per batch; default: as in the run"
  )
  options = parser.parse_args(argv)
  if options.batch_size < 0:
    raise UserError(f"predict: --batch_size={options.batch_size} must be at least 1")
  run = saved.open_run(options.workdir)
  t = saved.find_task(run, options.task)
  batch_size = options.batch_size or run.config.images_per_evaluation
  images = incoming.open_images(
    options.images, run.stored_shape, batch_size, run.learned[t].framing
  )
  if line := saved.missing_statistics(run):
    print(f"note: {line}")
  try:
    skipped = _write(run, t, images, pathlib.Path(options.out))
  except OSError as e:
    raise UserError(f"--out={options.out}: {e.strerror or e}") from e
  return 1 if skipped else 0


def _write(run: saved.Saved, t: int, images: incoming.Incoming, path: pathlib.Path) -> int:
  """Writes the whole table, or no file if it fails; returns how many images were skipped."""
  task, classify = run.learned[t], saved.make_classifier(run, t)
  start = printed = time.perf_counter()
  done, skipped, converted = 0, 0, [np.zeros(0, np.uint8)]
  with (
    files.replacing(path) as temporary,
    # The names of files may hold bytes that can't be decoded.
    open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as stream,
  ):
    table = csv.writer(stream)
    table.writerow(["image", "class", "probability", *(f"p({c})" for c in task.class_names)])
    for batch in images.batches:
      for line in batch.skipped:
        print(f"skipped {line}")
      for name, p in zip(batch.names, classify(batch.image) if batch.names else [], strict=True):
        best = int(p.argmax())
        row = [name, task.class_names[best], *(f"{x:.6f}" for x in (p[best], *p))]
        table.writerow(row)
      done, skipped = done + len(batch.names), skipped + len(batch.skipped)
      converted.append(batch.done)
      if time.perf_counter() - printed > _PROGRESS_SECONDS:
        printed = time.perf_counter()
        print(f"{done + skipped:,} of {images.total:,} images", file=sys.stderr, flush=True)
  for note in (formats.conversions(np.concatenate(converted)), images.unused):
    if note:
      print(f"note: {note}")
  seconds = time.perf_counter() - start
  print(
    f"{task.name} (id {task.id}): {done:,} images predicted, {skipped:,} skipped, "
    f"{seconds:.1f} s ({done / seconds:,.0f} a second, reading and compiling too); {path}"
  )
  return skipped
