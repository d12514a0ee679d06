"""What has to be known beside a model's numbers to use it, as JSON: classes, normalisation, shape.

image_shape   [H, W, C] of the images as they are stored, 8 bits
input_shape   [H, W, C] of the network's input (a permutation may name a value several times)
num_classes   outputs of the network; a task uses its own first ones
tasks         per task: id, name, class_names, mean, std, permutation (null: none)
"""

import numpy as np

from halrp_jax.types import Benchmark, Inputs, Split, Task, UserError

SCHEMA = 1


def of_benchmark(benchmark: Benchmark) -> dict:
  """The card of a benchmark, its tasks in the order of training."""
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
  permutation = task.inputs.permutation
  return {
    "id": task.id,
    "name": task.name,
    "class_names": list(task.class_names),
    "mean": np.asarray(task.inputs.mean, float).tolist(),
    "std": np.asarray(task.inputs.std, float).tolist(),
    "permutation": None if permutation is None else np.asarray(permutation).tolist(),
  }


def to_benchmark(card: dict, place: str) -> Benchmark:
  """The inverse of `of_benchmark`, but for the images: all splits are empty.

  Args:
    card: what JSON gave.
    place: what to call it in an error.
  """
  try:
    if card["schema"] != SCHEMA:
      raise UserError(f"{place}: schema {card['schema']!r}, this version reads {SCHEMA}")
    shape = tuple(map(int, card["image_shape"]))
    tasks = tuple(to_task(task, shape) for task in card["tasks"])
    benchmark = Benchmark(str(card["benchmark"]), tasks, str(card["split_hash"]), False)
    sizes = list(benchmark.image_shape), benchmark.max_classes
    if sizes != (card["input_shape"], card["num_classes"]):
      raise ValueError("input_shape and num_classes are not those of the tasks")
    return benchmark
  except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
    raise UserError(f"{place}: is not what was written ({type(e).__name__}: {e})") from e


def to_task(card: dict, image_shape: tuple[int, ...]) -> Task:
  """A task without images."""
  if len(image_shape) != 3 or min(image_shape) < 1:
    raise ValueError(f"image_shape is {image_shape}")
  mean, std = (np.asarray(card[k], np.float32) for k in ("mean", "std"))
  permutation = card["permutation"]
  if permutation is not None:
    permutation = np.asarray(permutation, np.int32)
    inputs = image_shape[0] * image_shape[1] * len(mean)
    if permutation.shape != (inputs,) or permutation.min() < 0:
      raise ValueError(f"permutation has shape {permutation.shape}")
    if permutation.max() >= np.prod(image_shape):
      raise ValueError("permutation names a pixel that no image has")
  elif len(mean) != image_shape[2]:
    raise ValueError(f"mean has {len(mean)} values for {image_shape[2]} channels")
  if mean.shape != std.shape or mean.ndim != 1 or not (std > 0).all():
    raise ValueError("mean and std are no numbers per channel")
  image = np.zeros((0, *image_shape), np.uint8)
  empty = Split(image, np.zeros(0, np.int32), np.zeros(0, np.int32))
  names = tuple(map(str, card["class_names"]))
  inputs = Inputs(mean, std, permutation)
  return Task(int(card["id"]), str(card["name"]), names, inputs, empty, empty, empty)
