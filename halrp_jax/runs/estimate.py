"""How long runs will take on this machine: a few training steps timed, the rest is counted."""

import time

import jax
import numpy as np

from halrp_jax import data, methods
from halrp_jax.devices import parallel
from halrp_jax.keys import Config
from halrp_jax.runs import experiment
from halrp_jax.types import Benchmark, Inputs, Split, Store, Task

_STEPS = 4  # per epoch, each of a whole batch
_CLASSES = 10


def steps(config: Config) -> tuple[int, int]:
  """Optimizer steps of a run, and its tasks, by the protocol's sizes. config: resolved.

  Methods that train longer than `epochs`, or several networks, take more.
  """
  _, tasks = data.planned(config)
  per_epoch = sum(config.steps_per_epoch(task["train"]) for task in tasks)
  return config.epochs * per_epoch, len(tasks)


def kind(config: Config) -> tuple:
  """What decides the time of a step: calibrated once. HALRP's own; all else as STL's."""
  image_shape, _ = data.planned(config)
  method = "halrp" if config.method.name == "halrp" else "stl"
  return (method, config.network, *image_shape, config.batch_size)


def calibrate(config: Config) -> tuple[float, float]:
  """Seconds of one step, and those a task takes beside its steps (selection).

  config: resolved, of the method "stl" or "halrp". Learns random images: two tasks, then the
  second once more with everything compiled, which is timed.
  """
  image_shape, _ = data.planned(config)
  layout = parallel.make_layout(config.parallel)
  model = experiment.network_of(config, _CLASSES, layout.axis_name)
  benchmark = _random_benchmark(image_shape, config.batch_size)
  method = methods.make(config, model, benchmark, layout)
  key, store = jax.random.key(0), Store("calibration", lambda event: None)
  state = method.init(key, benchmark)
  for task in benchmark.tasks:
    before = state
    state, _ = method.learn(before, (task,), key, store)
  jax.block_until_ready(state)
  start = time.perf_counter()
  state, history = method.learn(before, benchmark.tasks[1:], key, store)
  jax.block_until_ready(state)
  select = history.get("select_seconds", 0.0)
  return (time.perf_counter() - start - select) / (config.epochs * _STEPS), select


def _random_benchmark(image_shape, batch_size: int) -> Benchmark:
  rng = np.random.default_rng(0)
  count = _STEPS * batch_size
  image = jax.device_put(rng.integers(0, 256, (count + batch_size, *image_shape), np.uint8))
  label = rng.integers(0, _CLASSES, count + batch_size).astype(np.int32)
  rows = np.arange(count + batch_size, dtype=np.int32)
  train_, rest = (
    Split(image, jax.device_put(rows[part]), jax.device_put(label[part]))
    for part in (slice(count), slice(count, None))
  )
  channels = image_shape[-1]
  inputs = Inputs(np.zeros(channels, np.float32), np.ones(channels, np.float32), None)
  names = tuple(map(str, range(_CLASSES)))
  tasks = tuple(Task(i, str(i), names, inputs, train_, rest, rest) for i in range(2))
  return Benchmark("calibration", tasks, "", False)
