"""Compares predict_many with a loop over the tasks, for batches with images of 10 and of 40 tasks.

  python benchmarks/mixed_batches.py [--batch=256] [--ranks=1,4,100,33] [--rounds=15]

The network is LeNet. Prints the milliseconds per batch (median over rounds in which the forms take
turns) and ratios. The loop predicts each task's images separately: once with the stored factors,
and once with merged weights, which keeps a whole network per task in memory. The largest difference
is that between probabilities. --ranks are those of conv1, conv2, fc1 and fc2 in every task; the
default is what HALRP chooses for CIFAR100-Split.
"""

import argparse
import statistics
import sys
import time

from halrp_jax.devices import allocator, environment

if __name__ == "__main__":
  allocator.tune()
  environment.prepare()

import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax import models
from halrp_jax.weights import lowrank, perturb, trees

NUM_CLASSES, SHAPE = 10, (32, 32, 3)


def make_task(key, kernels, rest, ranks):
  """Returns random factors of the given ranks near the base, and the task's other parameters."""
  perturbation = {}
  for i, (name, kernel) in enumerate(sorted(kernels.items())):
    num_in, num_out = kernel.shape[-2:]
    k = jax.random.split(jax.random.fold_in(key, i), 4)
    perturbation[name] = lowrank.Perturbation(
      1 + 0.05 * jax.random.normal(k[0], (num_out,)),
      1 + 0.05 * jax.random.normal(k[1], (num_in,)),
      0.05 * jax.random.normal(k[2], (num_out, ranks[i])),
      None,
      0.05 * jax.random.normal(k[3], (num_in, ranks[i])),
    )
  return perturbation, jax.tree.map(lambda x: x + 0.01, rest)


def median_milliseconds(rounds: int, **calls) -> dict[str, float]:
  """Returns the median milliseconds of each function, which take turns in every round."""
  seconds = {name: [] for name in calls}
  for call in calls.values():
    call()  # compiles
  for _ in range(rounds):
    for name, call in calls.items():
      start = time.perf_counter()
      call()
      seconds[name].append(time.perf_counter() - start)
  return {name: 1e3 * statistics.median(x) for name, x in seconds.items()}


def compare(num_tasks: int, batch: int, ranks: list[int], rounds: int) -> dict[str, float]:
  """Returns the milliseconds of many (`predict_many`), loop and loop_merged, and the difference."""
  model = models.make("lenet", NUM_CLASSES)
  x = jax.random.normal(jax.random.key(1), (batch, *SHAPE))
  variables = model.init(jax.random.key(0), x[:1], train=False)
  kernels, rest = trees.split(variables["params"])
  stats = variables["batch_stats"]
  keys = jax.random.split(jax.random.key(2), num_tasks)
  tasks = [make_task(key, kernels, rest, ranks) for key in keys]
  t = np.random.default_rng(0).permutation(np.arange(batch) % num_tasks)
  rows_of = [np.flatnonzero(t == i) for i in range(num_tasks)]
  stacked = perturb.stack([p for p, _ in tasks])
  others = [{"params": own, "batch_stats": stats} for _, own in tasks]
  all_others = jax.tree.map(lambda *leaves: jnp.stack(leaves), *others)
  merged = [perturb.merge(kernels, p, own) for p, own in tasks]

  @jax.jit
  def at_once(kernels, stacked, variables, t, x):
    return jax.nn.softmax(perturb.apply_many(model, kernels, stacked, variables, t, x, train=False))

  @jax.jit
  def one(kernels, p, variables, x):
    return jax.nn.softmax(perturb.apply(model, kernels, p, variables, x, train=False))

  @jax.jit
  def one_merged(params, x):
    return jax.nn.softmax(model.apply({"params": params, "batch_stats": stats}, x, train=False))

  def scattered(run):
    out = np.empty((batch, NUM_CLASSES), np.float32)
    parts = [(rows, run(i, x[rows])) for i, rows in enumerate(rows_of)]
    for rows, part in parts:
      out[rows] = part
    return out

  def many():
    return np.asarray(at_once(kernels, stacked, all_others, jnp.asarray(t), x))

  def loop():
    return scattered(lambda i, part: one(kernels, tasks[i][0], others[i], part))

  def loop_merged():
    return scattered(lambda i, part: one_merged(merged[i], part))

  got = median_milliseconds(rounds, many=many, loop=loop, loop_merged=loop_merged)
  return got | {"difference": float(np.abs(many() - loop()).max())}


def main() -> int:
  """Measures and prints a line for 10 and for 40 tasks; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--batch", type=int, default=256)
  parser.add_argument("--ranks", default="1,4,100,33")
  parser.add_argument("--rounds", type=int, default=15)
  args = parser.parse_args()
  for num_tasks in (10, 40):
    got = compare(num_tasks, args.batch, [int(k) for k in args.ranks.split(",")], args.rounds)
    print(
      f"{num_tasks} tasks, batch {args.batch}: predict_many {got['many']:.1f} ms | loop "
      f"{got['loop']:.1f} ms, ratio {got['loop'] / got['many']:.2f} | merged loop "
      f"{got['loop_merged']:.1f} ms, ratio {got['loop_merged'] / got['many']:.2f} | largest "
      f"difference {got['difference']:.1e}"
    )
  return 0


if __name__ == "__main__":
  sys.exit(main())
