"""Estimates how long runs take on this machine: times a few training steps, counts the rest."""

import time

import jax
import numpy as np

from halrp_jax import data, methods, models
from halrp_jax.devices import parallel
from halrp_jax.keys import Config
from halrp_jax.types import Benchmark, Inputs, Split, Store, Task, UserError

_STEPS = 4  # full batches per epoch of the calibration
_CLASSES = 10


def steps(config: Config) -> tuple[int, int]:
  """Counts the optimizer steps and the tasks of a run, from the sizes that the protocol asks for.

  Methods that train longer than `epochs`, or several networks, take more steps.

  Args:
    config: resolved.
  """
  _, tasks = _planned(config)
  per_epoch = sum(config.steps_per_epoch(task["train"]) for task in tasks)
  return config.epochs * per_epoch, len(tasks)


def kind(config: Config) -> tuple:
  """Returns what decides the time of a step; runs of one kind need only one calibration.

  HALRP has a kind of its own; all other methods count as single-task learning.

  Args:
    config: resolved.
  """
  image_shape, _ = _planned(config)
  method = "halrp" if config.method.name == "halrp" else "stl"
  return (method, config.network, *image_shape, config.batch_size)


def calibrate(config: Config) -> tuple[float, float]:
  """Measures the seconds of one step, and the seconds per task for selecting the ranks.

  Learns two tasks of random images, then times the second one again with everything compiled.

  Args:
    config: resolved, of the method "stl" or "halrp".
  """
  image_shape, _ = _planned(config)
  layout = parallel.make_layout(config.parallel)
  model = models.of_config(config, _CLASSES, layout.axis_name)
  benchmark = _random_benchmark(image_shape, config.batch_size)
  method = methods.make(config, model, benchmark, layout)
  key, store = jax.random.key(0), Store("calibration", lambda event: None)
  first, second = benchmark.tasks
  before, _ = method.learn(method.init(key, benchmark), (first,), key, store)
  jax.block_until_ready(method.learn(before, (second,), key, store)[0])
  start = time.perf_counter()
  state, history = method.learn(before, (second,), key, store)
  jax.block_until_ready(state)
  select = history.get("select_seconds", 0.0)
  return (time.perf_counter() - start - select) / (config.epochs * _STEPS), select


def _planned(config: Config) -> tuple[tuple[int, int, int], list[dict]]:
  """Returns the image shape and the tasks of a benchmark whose protocol fixes them."""
  if (planned := data.planned(config)) is None:
    raise UserError(f"benchmark = {config.benchmark!r} has no fixed sizes: use --dry_run")
  return planned


def _random_benchmark(image_shape: tuple[int, ...], batch_size: int) -> Benchmark:
  """Returns two tasks of the same random images, labels included."""
  rng = np.random.default_rng(0)
  count = _STEPS * batch_size
  image = jax.device_put(rng.integers(0, 256, (count + batch_size, *image_shape), np.uint8))
  label = rng.integers(0, _CLASSES, count + batch_size).astype(np.int32)
  rows = np.arange(count + batch_size, dtype=np.int32)
  train, rest = (
    Split(image, jax.device_put(rows[part]), jax.device_put(label[part]))
    for part in (slice(count), slice(count, None))
  )
  channels = image_shape[-1]
  inputs = Inputs(np.zeros(channels, np.float32), np.ones(channels, np.float32), None)
  names = tuple(map(str, range(_CLASSES)))
  tasks = tuple(Task(i, str(i), names, inputs, train, rest, rest) for i in range(2))
  return Benchmark("calibration", tasks, "", False)
