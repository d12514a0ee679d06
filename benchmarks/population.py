"""Measures the cost of BatchNorm's population statistics: their time over that of one epoch.

  python benchmarks/population.py [--networks=lenet,alexnet,resnet18] [--images=1280] [--rounds=3]

Both are measured on random 32 x 32 images, compiled beforehand, in alternating rounds. Printed is
the ratio of the medians.
"""

import argparse
import statistics
import time

from halrp_jax.devices import allocator, environment

if __name__ == "__main__":
  allocator.tune()
  environment.prepare()

import jax
import numpy as np

from halrp_jax import methods, models
from halrp_jax.config import make_config, resolve
from halrp_jax.methods import stl
from halrp_jax.training import evaluate, networks, population
from halrp_jax.types import Benchmark, Inputs, Split, Store, Task


def main():
  """Measures and prints a line per network."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--networks", default="lenet,alexnet,resnet18")
  parser.add_argument("--images", type=int, default=1280)
  parser.add_argument("--rounds", type=int, default=3)
  args = parser.parse_args()
  for network in args.networks.split(","):
    layers, epoch, taken = compare(network, args.images, args.rounds)
    print(
      f"{network}: {layers} BatchNorm layers, an epoch {epoch:.2f} s, statistics {taken:.2f} s, "
      f"ratio {taken / epoch:.2f}"
    )


def compare(network: str, num_images: int, rounds: int) -> tuple[int, float, float]:
  """Returns the number of BatchNorm layers and the median seconds of an epoch and of statistics."""
  config = resolve(
    make_config(
      "stl", protocol={}, network=network, epochs=rounds + 1, batch_size=128, parallel="none"
    )
  )
  rng = np.random.default_rng(0)
  image = jax.device_put(rng.integers(0, 256, (num_images, 32, 32, 3), np.uint8))
  index = jax.device_put(np.arange(num_images, dtype=np.int32))
  split = Split(image, index, index % 10)
  inputs = Inputs(np.full(3, 0.5, np.float32), np.full(3, 0.3, np.float32), None)
  task = Task(0, "random", tuple("0123456789"), jax.device_put(inputs), split, split, split)
  benchmark = Benchmark("random", (task,), "", False)
  model = models.of_config(config, 10)
  setup = methods.setup_of(config, model, benchmark)
  method = stl.make(config.method, setup)
  measure = population.make_measure(evaluate.logits_of(model, method.network), 128)
  learned, epochs, taken = None, [], []

  def watch(event):
    if event["event"] == "epoch":
      epochs.append(event["seconds"])
      if learned:
        start = time.perf_counter()
        measure({}, learned, task)
        taken.append(time.perf_counter() - start)

  params, stats = networks.initialize(model, jax.random.key(0), (32, 32, 3))
  learned = stl.TaskState(params, stats, np.int32(10))
  method.learn(
    method.init(jax.random.key(0), benchmark), (task,), jax.random.key(0), Store("task00", watch)
  )
  layers = len(jax.tree.leaves(stats)) // 2
  return layers, statistics.median(epochs[1:]), statistics.median(taken[1:])


if __name__ == "__main__":
  main()
