"""New perturbations, which change nothing yet."""

import fnmatch
import math
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from halrp_jax.types import UserError
from halrp_jax.weights import lowrank


def check_rank_and_pattern(rank: object, pattern: object) -> None:
  """Raises UserError if `rank` is no whole number from 0 on, or `pattern` no text."""
  if not isinstance(rank, int | np.integer) or rank < 0:
    raise UserError(f"rank = {rank!r} must be a whole number, at least 0")
  if not isinstance(pattern, str):
    raise UserError(f"pattern = {pattern!r} must be a text such as '*/attn/*'")


def matching(names: Iterable[str], pattern: str) -> list[str]:
  """Returns the layers whose paths match a pattern, as in file names.

  Raises:
    UserError: if there is none.
  """
  names = list(names)
  found = [n for n in names if fnmatch.fnmatchcase(n, pattern)]
  if not found:
    known = ", ".join(names) or "none"
    raise UserError(f"no layer's path matches {pattern!r}; layers with a kernel: {known}")
  return found


def perturbations(
  key: jax.Array,
  kernels: Mapping[str, jax.Array],
  shapes: Mapping[str, tuple[int, int]],
  rank: int,
) -> dict[str, lowrank.Perturbation]:
  """Returns perturbations with R = S = 1, U = 0 and V random within +-1/sqrt(I), by layer path.

  Args:
    key: random key for V.
    kernels: by layer path.
    shapes: (I, J) of the kernels as matrices.
    rank: columns of U and V; a layer has at most min(I, J).

  Raises:
    UserError: if `key` is no key.
  """
  try:
    keys = jax.random.split(key, len(kernels))
  except (TypeError, ValueError) as e:
    raise UserError(f"key: expected one such as jax.random.key(0), given {key!r}") from e
  found: dict[str, lowrank.Perturbation] = {}
  for layer_key, (name, kernel) in zip(keys, kernels.items(), strict=True):
    num_in, num_out = shapes[name]
    columns, bound = min(rank, num_in, num_out), 1 / math.sqrt(num_in)
    p = lowrank.identity(kernel.reshape(-1, num_in, num_out), columns, fold=True)
    v = jax.random.uniform(layer_key, p.V.shape, kernel.dtype, -bound, bound)
    found[name] = p._replace(V=v)
  return found
