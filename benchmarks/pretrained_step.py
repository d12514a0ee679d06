"""Compares a training step of HALRP with one of full fine-tuning on pretrained networks' sizes.

  python benchmarks/pretrained_step.py [--networks=vit_s16,efficientnet_lite0] [--ranks=8]
      [--private=all] [--rounds=5] [--no_time]

The steps are those of a run: the network, the objective with its penalty, and Adam, from
`training.fit` and `methods.halrp`. Full fine-tuning is the step of STL. All are compiled first;
then they take turns in this process, so that a slow phase of the machine affects all of them.
Parameters and images are random; every layer has the rank given, or its largest.

Per step: milliseconds (median over the rounds) and the median ratio within a round to full
fine-tuning; of the compiled program the operations (GFLOP) and the bytes that it reads and writes;
MiB of its arguments, of its temporary memory and of both together with the results that do not
replace an argument ("peak"); MiB of Adam's state, which is among the arguments.
"""

import argparse
import functools
import statistics
import sys
import time
from typing import NamedTuple

from halrp_jax.devices import allocator, environment

if __name__ == "__main__":
  allocator.tune()
  environment.prepare()

import jax
import jax.numpy as jnp
import numpy as np
from accelerator_steps import draw, row

from halrp_jax import methods, models
from halrp_jax.config import make_config, resolve
from halrp_jax.methods import halrp
from halrp_jax.training import contract, fit, losses, networks
from halrp_jax.weights import lowrank, trees

SETTINGS = {"vit_s16": (224, 8), "efficientnet_lite0": (96, 32)}  # network: pixels, batch
SMOKE = {"vit_s16": (32, 4), "efficientnet_lite0": (32, 4)}
NUM_CLASSES = 10


class Step(NamedTuple):
  """A compiled training step, and what XLA says about it."""

  run: object  # () -> None, one step
  gflop: float
  gigabytes: float  # read and written
  arguments: float  # MiB
  temporary: float  # MiB
  peak: float  # MiB: arguments, temporary memory and results beside the arguments
  optimizer: float  # MiB of Adam's state


def setting(network: str, size: int, batch: int, method: str, **method_keys):
  """Returns the method's config, the setup of a run, and the training split of a drawn task."""
  config = make_config(
    method,
    network=network,
    batch_size=batch,
    parallel="none",
    protocol={"gradient_scale": 1.0},
    every_method={"batch_norm": "running"},
    methods_={method: method_keys},
  )
  config = resolve(config)
  benchmark = draw((size, size, 3), batch, 1, 2 * batch, batch, NUM_CLASSES)
  model = models.of_config(config, NUM_CLASSES)
  return config.method, methods.setup_of(config, model, benchmark), benchmark.tasks[0]


def perturbations(params, rank: int):
  """Returns small random perturbations of all layers but the head."""

  def random(i, shape):
    num_in, num_out = shape
    columns, key = min(rank, *shape), jax.random.fold_in(jax.random.key(1), i)
    u, v = (0.01 * jax.random.normal(key, (n, columns)) for n in (num_out, num_in))
    return lowrank.Perturbation(jnp.ones(num_out), jnp.ones(num_in), u, None, v)

  shapes = contract.guessed_matrix_shapes(params)
  return {name: random(i, shape) for i, (name, shape) in enumerate(shapes.items())}


def compiled(setup, task, params, stats, frozen, apply_fn, penalty_fn, edit_fn=None) -> Step:
  """Compiles the step that `training.fit.make_fit` would make of these functions."""
  tx = fit.optimizer(fit.protocol_recipe(setup))
  objective = losses.cross_entropy_objective(apply_fn)
  edit = edit_fn or (lambda updates, frozen: updates)
  step = fit.make_step(setup, tx, objective, penalty_fn, edit)
  optimizer_state = jax.jit(tx.init)(params)
  state = fit.TrainState(params, stats, optimizer_state, jnp.zeros((), jnp.int32))
  state = jax.tree.map(jnp.array, state)  # the step donates it
  one = jnp.float32(1e-4)
  data = (task.train, task.inputs, jnp.int32(task.num_classes), one, jnp.float32(1))
  rows = np.arange(setup.batch_size, dtype=np.int32)
  rest = (rows, frozen, data, jax.random.key(0))
  program = jax.jit(step, donate_argnums=0).lower(state, *rest).compile()
  cost, memory = program.cost_analysis(), program.memory_analysis()
  held = [state]

  def run():
    held[0], sums = program(held[0], *rest)
    jax.block_until_ready((held[0], sums))

  beside = memory.output_size_in_bytes - memory.alias_size_in_bytes
  mib = 2**20
  return Step(
    run,
    cost["flops"] / 1e9,
    cost["bytes accessed"] / 1e9,
    memory.argument_size_in_bytes / mib,
    memory.temp_size_in_bytes / mib,
    (memory.argument_size_in_bytes + memory.temp_size_in_bytes + beside) / mib,
    sum(x.nbytes for x in jax.tree.leaves(optimizer_state)) / mib,
  )


def full_step(network: str, size: int, batch: int) -> Step:
  """Compiles the step of full fine-tuning."""
  own, setup, task = setting(network, size, batch, "stl")
  params, stats = networks.initialize(setup.model, jax.random.key(0), setup.image_shape)
  frozen = {"l2": jnp.float32(own.l2)}
  return compiled(setup, task, params, stats, frozen, *networks.plain_network(setup.model))


def halrp_step(network: str, size: int, batch: int, rank: int, private: str) -> Step:
  """Compiles the step of HALRP's fine-tuning."""
  own, setup, task = setting(network, size, batch, "halrp", private=private)
  params, stats = networks.initialize(setup.model, jax.random.key(0), setup.image_shape)
  kernels, rest = trees.split(params)
  start = {"perturbation": perturbations(params, rank), "rest": rest}
  tuning = halrp.fine_tuning(own, setup.model)
  return compiled(setup, task, start, stats, {"kernels": kernels}, *tuning)


def steps_of(network: str, ranks: list[int], privates: list[str], smoke: bool) -> dict[str, Step]:
  """Compiles the steps of a network: full fine-tuning, and HALRP's with each rank and `private`."""
  size, batch = (SMOKE if smoke else SETTINGS)[network]
  makers = {"full": functools.partial(full_step, network, size, batch)} | {
    f"halrp rank={rank} private={private}": functools.partial(
      halrp_step, network, size, batch, rank, private
    )
    for rank in ranks
    for private in privates
  }
  return {name: make() for name, make in makers.items()}


def compare(network: str, ranks, privates, rounds: int, smoke: bool = False):
  """Yields a row of results for each step of a network; without times if `rounds` is 0."""
  steps = steps_of(network, ranks, privates, smoke)
  seconds = {name: [] for name in steps}
  for i in range(rounds + 1 if rounds else 0):
    for name, step in steps.items():
      start = time.perf_counter()
      step.run()
      if i:  # the first call is slower
        seconds[name].append(time.perf_counter() - start)
  for name, step in steps.items():
    found = {k: x for k, x in step._asdict().items() if k != "run"}
    for k in ("gflop", "peak"):
      found[f"{k}_ratio"] = getattr(step, k) / getattr(steps["full"], k)
    if rounds:
      pairs = zip(seconds[name], seconds["full"], strict=True)
      ratios = sorted(a / b for a, b in pairs)
      found |= {"ratio": statistics.median(ratios), "spread": [ratios[0], ratios[-1]]}
    value = 1e3 * statistics.median(seconds[name]) if rounds else None
    yield row(f"{network} {name}", value, "ms", **found)


def main(argv=None) -> int:
  """Prints a table; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--networks", default=",".join(SETTINGS))
  parser.add_argument("--ranks", default="8")
  parser.add_argument("--private", default="all")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--no_time", action="store_true", help="compile only")
  parser.add_argument("--smoke", action="store_true", help="small images and batches")
  options = parser.parse_args(argv)
  ranks = [int(rank) for rank in options.ranks.split(",")]
  rounds = 0 if options.no_time else options.rounds
  columns = ("ratio", "gflop", "gflop_ratio", "gigabytes", "arguments", "temporary", "peak")
  columns = (*columns, "peak_ratio", "optimizer")
  print(" ".join([f"{'step':<46}", f"{'ms':>8}", *(f"{c:>11}" for c in columns)]))
  for network in options.networks.split(","):
    for found in compare(network, ranks, options.private.split(","), rounds, options.smoke):
      ms = found["value"]
      cells = [f"{found[c]:>11.2f}" if c in found else f"{'-':>11}" for c in columns]
      print(" ".join([f"{found['name']:<46}", f"{ms:>8.1f}" if ms else f"{'-':>8}", *cells]))
      sys.stdout.flush()
  return 0


if __name__ == "__main__":
  sys.exit(main())
