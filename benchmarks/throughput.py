"""Compares training steps of this package with those of plain Flax networks and of PyTorch.

  python benchmarks/throughput.py [--networks=lenet,alexnet] [--rounds=5] [--torch]

Prints milliseconds (median over the rounds), images per second, and ratios. The steps take turns,
so that a slow phase of the machine affects all of them. --torch needs the extra [bench].
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
import optax
import plain_networks

from halrp_jax import models
from halrp_jax.training import losses, networks
from halrp_jax.weights import lowrank, perturb, trees

SETTINGS = {  # name: (network, batch, image, classes)
  "lenet": ("lenet", 128, (32, 32, 3), 10),
  "alexnet32": ("alexnet", 128, (32, 32, 3), 10),
  "alexnet64": ("alexnet", 128, (64, 64, 3), 10),
  "resnet18": ("resnet18", 128, (32, 32, 3), 10),
  "resnet18_64": ("resnet18", 128, (64, 64, 3), 10),
  "wide_lenet": ("wide_lenet", 16, (32, 32, 1), 12),
  "mlp": ("mlp", 128, (32, 32, 3), 10),
}
UPPER_RANK = 100


def jax_step(loss_fn, params, stats):
  """Compiles a step of Adam with donated state; returns it as a function without arguments."""
  tx = optax.adam(1e-3)

  def step(state, key):
    params, stats, opt_state = state
    key, dropout = jax.random.split(key)
    grad, stats = jax.grad(loss_fn, has_aux=True)(params, stats, dropout)
    updates, opt_state = tx.update(grad, opt_state)
    return (optax.apply_updates(params, updates), stats, opt_state), key

  state = [jax.tree.map(jnp.array, (params, stats, tx.init(params))), jax.random.key(0)]
  compiled = jax.jit(step, donate_argnums=0).lower(*state).compile()

  def run():
    state[:] = compiled(*state)
    jax.block_until_ready(state)

  return run


def plain_step(model, params, stats, image, label):
  """Returns a step of single-task learning with the L2 term on the kernels."""

  def loss_fn(params, stats, key):
    logits, stats = networks.apply_model(model, params, stats, image, True, key)
    kernels, _ = trees.split(params)
    loss = losses.cross_entropy(logits, label, logits.shape[-1])
    return loss + 0.5e-4 * losses.sum_squares(kernels), stats

  return jax_step(loss_fn, params, stats)


def halrp_step(model, params, stats, image, label):
  """Returns a step of fine-tuning <R, S, U, Sigma, V> with the largest ranks allowed."""
  kernels, rest = trees.split(params)
  perturbation = {}
  for name, w in kernels.items():
    rank = min(UPPER_RANK, *w.shape[-2:])
    d = lowrank.decompose(w, w + 0.1 * jnp.sin(9 * w))
    perturbation[name] = lowrank.truncate(d, rank, rank, True)

  def loss_fn(params, stats, key):
    variables = {"params": params["rest"], "batch_stats": stats}
    logits, new = perturb.apply(
      model,
      kernels,
      params["perturbation"],
      variables,
      image,
      train=True,
      rngs={"dropout": key},
      mutable=["batch_stats"],
    )
    loss = losses.cross_entropy(logits, label, logits.shape[-1])
    for p in params["perturbation"].values():
      loss += 1e-4 * losses.sum_absolute((p.U, p.V)) + 0.5e-4 * losses.sum_squares(p)
    return loss, new.get("batch_stats", {})

  return jax_step(loss_fn, {"rest": rest, "perturbation": perturbation}, stats)


def steps_of(name, with_torch):
  """Returns {name: step} of a setting, its batch size, and the operations of a step."""
  network, batch, image_shape, num_classes = SETTINGS[name]
  rng = np.random.default_rng(0)
  image = rng.normal(size=(batch, *image_shape)).astype(np.float32)
  label = rng.integers(0, num_classes, batch).astype(np.int32)
  model = models.make(network, num_classes)
  params, stats = networks.initialize(model, jax.random.key(0), image_shape)
  plain = plain_networks.NETWORKS[network](num_classes)
  steps = {
    "STL": plain_step(model, params, stats, image, label),
    "HALRP": halrp_step(model, params, stats, image, label),
  }
  plain_params, plain_stats = networks.initialize(plain, jax.random.key(0), image_shape)
  steps["plain"] = plain_step(plain, plain_params, plain_stats, image, label)
  if with_torch:
    import torch_networks

    steps["torch"] = torch_networks.make_step(network, image, label, num_classes)
  return steps, batch, 3 * flops_forward(plain, plain_params, plain_stats, image)


def flops_forward(model, params, stats, image) -> float:
  """Returns the floating-point operations of one forward pass of a plain network.

  XLA counts them in the program for the CPU before it is compiled, because programs compiled for
  accelerators hide products in library calls. The arguments may be shapes instead of arrays.
  """

  def forward(variables, x):
    return model.apply(variables, x, train=False, mutable=["batch_stats"])[0]

  with jax.default_device(jax.devices("cpu")[0]):
    lowered = jax.jit(forward).lower({"params": params, "batch_stats": stats}, image)
  return lowered.cost_analysis()["flops"]


def matrix_product_rate(size: int = 1024, dtype="float32", precision=None) -> float:
  """Returns the GFLOP/s of a product of two square matrices."""
  a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
  product = jax.jit(lambda a: jnp.matmul(a, a, precision=precision))
  return 2 * size**3 / measure(lambda: product(a).block_until_ready(), 10) / 1e9


def measure(run, repeats: int) -> float:
  """Returns the mean seconds of run() after a first call."""
  run()
  start = time.perf_counter()
  for _ in range(repeats):
    run()
  return (time.perf_counter() - start) / repeats


def main() -> int:
  """Measures and prints a table; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--networks", default=",".join(SETTINGS))
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--torch", action="store_true")
  args = parser.parse_args()
  rate = matrix_product_rate()
  print(f"1024^3 float32 matrix product: {rate:.0f} GFLOP/s")
  print("share: 3 x the forward pass's operations at that rate, over the step's time")
  print("network      step     ms   images/s   share   time over STL   its spread over rounds")
  for name in args.networks.split(","):
    steps, batch, flops = steps_of(name, args.torch)
    times = {k: [] for k in steps}
    for _ in range(args.rounds):
      for k, run in steps.items():
        times[k].append(measure(run, args.repeats))
    for k, t in times.items():
      ratios = sorted(a / b for a, b in zip(t, times["STL"], strict=True))
      ms = 1e3 * statistics.median(t)
      print(
        f"{name:<12} {k:<6} {ms:6.1f} {1e3 * batch / ms:10.0f} {flops / rate / ms / 1e6:7.2f}"
        f" {statistics.median(ratios):15.2f}"
        f"       {ratios[0]:.2f} to {ratios[-1]:.2f}",
        flush=True,
      )
  return 0


if __name__ == "__main__":
  sys.exit(main())
