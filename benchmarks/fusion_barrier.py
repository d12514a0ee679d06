"""Compares training steps with the fusion barrier of nn/isolate.py, with XLA's own, and with none.

  python benchmarks/fusion_barrier.py [--networks=lenet,alexnet32] [--rounds=7] [--repeats=5]

Prints the median milliseconds of a step (wall-clock time, and CPU time of all threads, which other
programs disturb less), the seconds of tracing and compiling it, and the ratio of its wall-clock
time to that of a step with the barrier of nn/isolate.py. The steps take turns, so that a slow phase
of the machine affects all of them. Runs on CPUs only, because other platforms do not use the
barrier.
"""

import argparse
import statistics
import sys
import time
from unittest import mock

from halrp_jax.devices import allocator, environment

if __name__ == "__main__":
  allocator.tune()
  environment.prepare()

import jax
import jaxlib
import numpy as np
import throughput

from halrp_jax import models
from halrp_jax.nn import isolate
from halrp_jax.training import networks


def with_optimization_barrier(fn, *args):
  """Computes fn(*args) between two of XLA's barriers."""
  return jax.lax.optimization_barrier(fn(*jax.lax.optimization_barrier(args)))


FORMS = {
  "nn/isolate.py": isolate.call,
  "optimization_barrier": with_optimization_barrier,
  "none": lambda fn, *args: fn(*args),
}


def compile_step(make_step, setting: str, barrier):
  """Compiles a training step with `barrier` in place of `isolate.call`; returns it and seconds."""
  network, batch, image_shape, num_classes = throughput.SETTINGS[setting]
  rng = np.random.default_rng(0)
  image = rng.normal(size=(batch, *image_shape)).astype(np.float32)
  label = rng.integers(0, num_classes, batch).astype(np.int32)
  model = models.make(network, num_classes)
  jax.clear_caches()  # or else functions traced with another barrier would be used
  with mock.patch.object(isolate, "call", barrier):
    params, stats = networks.initialize(model, jax.random.key(0), image_shape)
    start = time.perf_counter()
    step = make_step(model, params, stats, image, label)
    return step, time.perf_counter() - start


def measure(step, repeats: int) -> tuple[float, float]:
  """Returns the milliseconds of a step: wall-clock time and CPU time."""
  step()
  wall, cpu = time.perf_counter(), time.process_time()
  for _ in range(repeats):
    step()
  spent = time.perf_counter() - wall, time.process_time() - cpu
  return tuple(1e3 * seconds / repeats for seconds in spent)


def main() -> int:
  """Measures and prints a table; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--networks", default="lenet,alexnet32", help=", ".join(throughput.SETTINGS))
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--repeats", type=int, default=5, help="steps per round")
  args = parser.parse_args()
  if jax.default_backend() != "cpu":
    parser.error("the barrier is used on CPUs only; set JAX_PLATFORMS=cpu")
  print(f"jax {jax.__version__}, jaxlib {jaxlib.__version__}")
  print(f"1024^3 float32 matrix product: {throughput.matrix_product_rate():.0f} GFLOP/s")
  print(
    f"{'network':10} {'step':6} {'barrier':21} {'ms':>7} {'compile s':>10} {'ratio':>6}  spread"
  )
  makers = {"STL": throughput.plain_step, "HALRP": throughput.halrp_step}
  for setting in args.networks.split(","):
    for maker, make_step in makers.items():
      steps = {name: compile_step(make_step, setting, form) for name, form in FORMS.items()}
      found = {name: [] for name in FORMS}
      for _ in range(args.rounds):
        for name, (step, _) in steps.items():
          found[name].append(measure(step, args.repeats))
      first = [wall for wall, _ in found["nn/isolate.py"]]
      for name, times in found.items():
        wall, cpu = zip(*times, strict=True)
        ratios = sorted(a / b for a, b in zip(wall, first, strict=True))
        print(
          f"{setting:10} {maker:6} {name:21} {statistics.median(wall):7.1f}"
          f" {statistics.median(cpu):7.1f} {steps[name][1]:10.1f} {statistics.median(ratios):6.2f}"
          f"  {ratios[0]:.2f} to {ratios[-1]:.2f}",
          flush=True,
        )
  return 0


if __name__ == "__main__":
  sys.exit(main())
