"""Trains methods on random images as a run does, and measures how long the steps take."""

import resource
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import plain_networks
import throughput

from halrp_jax import methods, models
from halrp_jax.config import make_config, resolve
from halrp_jax.training import networks
from halrp_jax.types import Benchmark, Inputs, Split, Store, Task

PHASES = {"base": "STL", "warmup": "warm-up", "finetune": "HALRP"}  # the first task trains like STL


def row(name: str, value: float | None, unit: str, **more) -> dict:
  """Returns a result with further fields."""
  return {"name": name, "value": value, "unit": unit} | more


def compile_clock():
  """Returns a function that returns the seconds spent on tracing and compiling since this call."""
  total = [0.0]

  def listen(event, seconds, **_):
    total[0] += seconds * event.startswith("/jax/core/compile/")

  jax.monitoring.register_event_duration_secs_listener(listen)
  return lambda: total[0]


def peak_bytes() -> int:
  """Returns the largest memory use so far: of the accelerator, or on a CPU of the process."""
  stats = jax.local_devices()[0].memory_stats() or {}
  peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return stats.get("peak_bytes_in_use") or peak


def draw(shape, batch: int, num_tasks: int, num_train: int, num_test: int, num_classes: int):
  """Returns a benchmark whose tasks share the same random images."""
  rng = np.random.default_rng(0)
  counts = np.cumsum([0, num_train, batch, num_test])
  image = jax.device_put(rng.integers(0, 256, (counts[-1], *shape), np.uint8))
  inputs = Inputs(np.full(shape[-1:], 0.5, np.float32), np.full(shape[-1:], 0.3, np.float32), None)
  names = tuple(str(i) for i in range(num_classes))

  def split(a, b):
    label = rng.integers(0, num_classes, b - a).astype(np.int32)
    return Split(image, *jax.device_put((np.arange(a, b, dtype=np.int32), label)))

  tasks = tuple(
    Task(i, str(i), names, jax.device_put(inputs), *map(split, counts, counts[1:]))
    for i in range(num_tasks)
  )
  return Benchmark("drawn", tasks, "", False)


def make(setting: str, method: str, smoke: bool, num_tasks: int = 2, **keys):
  """Returns config, benchmark, method and batch size of a setting of throughput.py.

  Two of its tasks are learned in seconds. All ranks are the largest allowed ones, so that choosing
  them takes no gradients.
  """
  network, batch, shape, num_classes = throughput.SETTINGS[setting]
  batch, steps = (min(batch, 16), 3) if smoke else (batch, 60 if shape[0] > 32 else 200)
  config = make_config(
    method,
    protocol={},
    methods_={
      "halrp": {"rank_rule": "flat", "svd": "randomized", "svd_rank": 100, "warmup_epochs": 3}
    },
    **{"network": network, "batch_size": batch, "epochs": 7, "parallel": "none"} | keys,
  )
  config = resolve(config)
  benchmark = draw(
    shape, batch, num_tasks, batch * steps, 1000 // (20 if smoke else 1), num_classes
  )
  model = models.of_config(config, benchmark.max_classes)
  return config, benchmark, methods.make(config, model, benchmark), batch


def learn(made, num_tasks: int, seen=lambda event: None):
  """Learns the first tasks as `experiment.run` does, but without a folder; returns the state."""
  _, benchmark, method, _ = made
  state = method.init(jax.random.key(0), benchmark)
  for t in range(num_tasks):
    store = Store(f"task{t + 1:02d}", seen)
    state, _ = method.learn(state, (benchmark.tasks[t],), jax.random.key(t), store)
  return jax.block_until_ready(state)


def operations(setting: str, batch: int) -> float:
  """Returns the floating-point operations of a step: three times those of a plain forward pass."""
  network, _, shape, num_classes = throughput.SETTINGS[setting]
  plain = plain_networks.NETWORKS[network](num_classes)
  image = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
  shapes = jax.eval_shape(lambda: networks.initialize(plain, jax.random.key(0), shape))
  return 3 * throughput.flops_forward(plain, *shapes, image)


def measure_steps(setting: str, precision: str, smoke: bool, clock, **keys):
  """Yields a row for each phase of HALRP, from the seconds that the training itself reports."""
  made = make(setting, "halrp", smoke, precision=precision, **keys)
  config, benchmark, _, batch = made
  steps = config.steps_per_epoch(len(benchmark.tasks[0].train.index))
  seen, compiled, peaks, last = {}, {}, {}, clock()

  def watch(event):
    nonlocal last
    phase = event["phase"].rpartition("/")[2]
    compiled[phase] = compiled.get(phase, 0.0) + clock() - last
    last = clock()
    if event["event"] == "epoch":
      seen.setdefault(phase, []).append(event["seconds"] / steps)
      peaks[phase] = peak_bytes()

  learn(made, 2, watch)
  flops = operations(setting, batch)
  how = " ".join([setting, precision, *(f"{k}={v}" for k, v in keys.items())])
  for phase, name in PHASES.items():
    seconds = seen[phase][1:]  # the first epoch compiles
    yield row(
      f"{how} {name}",
      1e3 * statistics.median(seconds),
      "ms",
      fastest=1e3 * min(seconds),
      images_per_second=batch / statistics.median(seconds),
      tflops=flops / statistics.median(seconds) / 1e12,
      precision=precision,
      compile_seconds=compiled[phase],
      peak_mib=peaks[phase] / 2**20,
    )
