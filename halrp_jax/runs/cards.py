"""Converts a benchmark to the JSON of tasks.json, which predictions need, and back.

schema        version of this format
benchmark     name of the benchmark
image_shape   [H, W, C] of the stored 8-bit images
input_shape   [H, W, C] of the network's input (may have more channels: a permutation can repeat a
              pixel value)
num_classes   number of the network's outputs; a task with K classes uses the first K
split_hash    hash of images, indices and labels (`Benchmark.split_hash`)
tasks         per task: id, name, class_names, mean, std, permutation (null: none), resize (height
              and width of the network's input, where they are not those of the stored images),
              framing (of photographs: crop and interpolation of `types.Framing`, where they are not
              its defaults)
"""

import numpy as np

from halrp_jax.data.tasks import resizing
from halrp_jax.types import Benchmark, Framing, Inputs, Split, Task, UserError

SCHEMA = 1


def of_benchmark(benchmark: Benchmark) -> dict:
  """Returns the card of a benchmark, with its tasks in the order of training."""
  stored = benchmark.tasks[0].train.image.shape[1:]
  return {
    "schema": SCHEMA,
    "benchmark": benchmark.name,
    "image_shape": list(map(int, stored)),
    "input_shape": list(map(int, benchmark.image_shape)),
    "num_classes": benchmark.max_classes,
    "split_hash": benchmark.split_hash,
    "tasks": [of_task(task) for task in benchmark.tasks],
  }


def of_task(task: Task) -> dict:
  """Returns the card's entry for one task."""
  permutation = task.inputs.permutation
  more = {} if task.inputs.resize is None else {"resize": [len(w) for w in task.inputs.resize]}
  more |= {} if task.framing == Framing() else {"framing": task.framing._asdict()}
  return {
    "id": task.id,
    "name": task.name,
    "class_names": list(task.class_names),
    "mean": np.asarray(task.inputs.mean, float).tolist(),
    "std": np.asarray(task.inputs.std, float).tolist(),
    "permutation": None if permutation is None else np.asarray(permutation).tolist(),
  } | more


def to_benchmark(card: dict, source: str) -> Benchmark:
  """Inverts `of_benchmark`, except for the images: all splits are empty.

  Args:
    card: the parsed JSON.
    source: the file it was read from, for the error message.

  Raises:
    UserError: if the card has another schema, or is damaged.
  """
  try:
    if card["schema"] != SCHEMA:
      raise UserError(
        f"{source}: has schema {card['schema']!r}, expected {SCHEMA}; open it with the version of "
        "halrp_jax that wrote it"
      )
    shape = tuple(map(int, card["image_shape"]))
    tasks = tuple(to_task(task, shape) for task in card["tasks"])
    benchmark = Benchmark(str(card["benchmark"]), tasks, str(card["split_hash"]), False)
    sizes = list(benchmark.image_shape), benchmark.max_classes
    if sizes != (card["input_shape"], card["num_classes"]):
      raise ValueError("input_shape and num_classes are not those of the tasks")
    return benchmark
  except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
    raise UserError(f"{source}: was changed or damaged ({type(e).__name__}: {e})") from e


def to_task(card: dict, image_shape: tuple[int, ...]) -> Task:
  """Inverts `of_task`, except for the images: all splits are empty.

  Args:
    card: the entry of one task.
    image_shape: [H, W, C] of the stored images.

  Raises:
    ValueError: if shapes don't fit together. KeyError, TypeError: if the card is damaged.
  """
  if len(image_shape) != 3 or min(image_shape) < 1:
    raise ValueError(f"image_shape is {image_shape}")
  mean, std = (np.asarray(card[k], np.float32) for k in ("mean", "std"))
  permutation = card["permutation"]
  if permutation is not None:
    permutation = np.asarray(permutation, np.int32)
    num_values = image_shape[0] * image_shape[1] * len(mean)
    if permutation.shape != (num_values,) or permutation.min() < 0:
      raise ValueError(f"permutation has shape {permutation.shape}")
    if permutation.max() >= np.prod(image_shape):
      raise ValueError("permutation has an index outside the image")
  elif len(mean) != image_shape[2]:
    raise ValueError(f"mean has {len(mean)} values for {image_shape[2]} channels")
  if mean.shape != std.shape or mean.ndim != 1 or not (std > 0).all():
    raise ValueError("mean and std are not one number per channel, with std > 0")
  image = np.zeros((0, *image_shape), np.uint8)
  empty = Split(image, np.zeros(0, np.int32), np.zeros(0, np.int32))
  names = tuple(map(str, card["class_names"]))
  resize = card.get("resize")
  if resize is not None:
    height, width = map(int, resize)
    if min(height, width) < 1:
      raise ValueError(f"resize is {resize}")
    resize = resizing(image_shape[:2], (height, width))
  inputs = Inputs(mean, std, permutation, resize)
  framing = Framing(**card.get("framing", {}))
  if framing.interpolation not in ("bilinear", "bicubic") or not 0 <= framing.crop <= 1:
    raise ValueError(f"framing is {framing}")
  task = Task(int(card["id"]), str(card["name"]), names, inputs, empty, empty, empty)
  return task._replace(framing=framing)
