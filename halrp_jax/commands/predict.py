"""Writes the classes of new images as a table.

  python -m halrp_jax predict --workdir=RUN --task=NAME --images=FOLDER|FILE.npz --out=FILE.csv
  python -m halrp_jax predict --workdir=runs/digits-halrp --task=3 --images=new --out=pred.csv

The run may be finished or interrupted; its data are not needed. --task is the task's name or
id:N; N alone will do where no other task is called so. FOLDER: its images (PNG, JPEG, WebP, BMP,
GIF, TIFF, PPM), as they are meant to be seen, resized where they have another size. FILE.npz:
`image`, uint8 [N, H, W] or [N, H, W, C], of the network's size. FILE.csv has a row per image: its
name, the class, its probability, and the probability of every class. What can't be read is listed
and skipped; the exit code is then 1.

What is said of an image does not depend on the images beside it: BatchNorm uses the statistics of
the task's training images. A run of a version that kept none says so, and uses those of the batch.
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
_SECONDS = 5.0  # between two lines of progress


def main(argv: list[str]) -> int:
  """Writes the table; 1 if an image was skipped."""
  parser = arguments.parser("predict", __doc__, _EXAMPLE)
  needed = {"required": True, "type": arguments.filled}
  parser.add_argument("--workdir", help="the folder of a run", **needed)
  parser.add_argument("--task", default="", help="name of a learned task, or id:N")
  parser.add_argument("--images", help="a folder, or an .npz", **needed)
  parser.add_argument("--out", help="the table, CSV", **needed)
  parser.add_argument("--batch_size", type=int, default=0, help="default: that of the run")
  options = parser.parse_args(argv)
  if options.batch_size < 0:
    raise UserError(f"predict: --batch_size={options.batch_size} must be at least 1")
  run = saved.open_run(options.workdir)
  t = saved.find_task(run, options.task)
  batch_size = options.batch_size or run.config.images_per_evaluation
  shape = tuple(run.benchmark.tasks[t].train.image.shape[1:])
  images = incoming.open_images(options.images, shape, batch_size)
  if line := saved.lacks_statistics(run):
    print(f"note: {line}")
  try:
    skipped = _write(run, t, images, pathlib.Path(options.out))
  except OSError as e:
    raise UserError(f"--out={options.out}: {e.strerror or e}") from e
  return 1 if skipped else 0


def _write(run: saved.Saved, t: int, images: incoming.Incoming, place: pathlib.Path) -> int:
  """Writes the table, whole or not at all; returns how many images were skipped."""
  task, classify = run.learned[t], saved.make_classifier(run, t)
  start = told = time.perf_counter()
  done, skipped, converted = 0, 0, [np.zeros(0, np.uint8)]
  with (
    files.replacing(place) as temporary,
    # a file's name may hold bytes that are no text
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
      if time.perf_counter() - told > _SECONDS:
        told = time.perf_counter()
        print(f"{done + skipped:,} of {images.total:,} images", file=sys.stderr, flush=True)
  for said in (formats.conversions(np.concatenate(converted)), images.unused):
    if said:
      print(f"note: {said}")
  seconds = time.perf_counter() - start
  print(
    f"task {task.id} ({task.name}): {done:,} images predicted, {skipped:,} skipped, "
    f"{seconds:.1f} s ({done / seconds:,.0f} a second, reading and compiling too); {place}"
  )
  return skipped
