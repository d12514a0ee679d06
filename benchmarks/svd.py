"""Compares the exact with the randomised SVD of one large residual.

  python benchmarks/svd.py [--rows=9216] [--columns=2048] [--rank=256]

The residual is random with falling singular values, as after a warm-up. Prints the seconds, the
largest relative error of a singular value, and the energy outside the singular values that were
found.
"""

import argparse
import sys
import time

from halrp_jax.devices import allocator, environment

if __name__ == "__main__":
  allocator.tune()
  environment.prepare()

import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax.weights import lowrank


def seconds_of(fn):
  """Returns the seconds of fn() after it has been compiled, and its result."""
  jax.block_until_ready(fn())  # compiles
  start = time.perf_counter()
  result = jax.block_until_ready(fn())
  return time.perf_counter() - start, result


def compare(rows: int, columns: int, rank: int) -> dict[str, float]:
  """Returns the seconds of both decompositions and the errors of the randomised one."""
  shape, keys = (rows, columns), jax.random.split(jax.random.key(0), 4)
  base = jax.random.normal(keys[0], shape)
  left, right = (jax.random.normal(k, (n, 400)) for k, n in zip(keys[1:3], shape, strict=True))
  falling = 0.98 ** jnp.arange(400.0)
  free = base + (left * falling[None]) @ right.T + 0.1 * jax.random.normal(keys[3], shape)
  exact = jax.jit(lowrank.decompose)
  random = jax.jit(lowrank.decompose_randomized, static_argnums=3)
  slow, want = seconds_of(lambda: exact(base, free))
  fast, got = seconds_of(lambda: random(base, free, jax.random.key(1), rank))
  sigma = np.asarray(want.sigma[:rank])
  error = np.abs(np.asarray(got.sigma) - sigma) / sigma
  best = float(want.energy) - float((sigma**2).sum())
  found = float(got.energy) - float((np.asarray(got.sigma) ** 2).sum())
  share = np.cumsum(sigma**2) / float(want.energy)
  kept = int(np.argmax(share > 0.9)) + 1
  return {
    "exact": slow,
    "randomised": fast,
    "kept": kept,  # singular values that hold 90 % of the energy
    "error_of_kept": float(error[:kept].max()),
    "error": float(error.max()),
    "left_exact": best,
    "left_randomised": found,
  }


def main() -> int:
  """Compares and prints the results; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--rows", type=int, default=9216)
  parser.add_argument("--columns", type=int, default=2048)
  parser.add_argument("--rank", type=int, default=256)
  args = parser.parse_args()
  got = compare(args.rows, args.columns, args.rank)
  print(
    f"{args.rows} x {args.columns}: exact {got['exact']:.2f} s, "
    f"randomised rank {args.rank} {got['randomised']:.2f} s"
  )
  print(
    f"ratio {got['exact'] / got['randomised']:.1f}; largest relative error of a singular value: of "
    f"the {got['kept']} that hold"
  )
  print(f"90 % of the energy {got['error_of_kept']:.1e}, of all {args.rank} {got['error']:.1e}")
  print(f"energy left over: exact {got['left_exact']:.6g}, randomised {got['left_randomised']:.6g}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
