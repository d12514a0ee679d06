"""What APD and APDfix share: theta_t = sigma * m_t + tau_t, a mask per output and sparse additions.

| symbol  | here                | meaning |
|---------|---------------------|---------|
| sigma   | shared["kernels"]   | kernels that all tasks share |
| m_t     | tasks[t].mask       | factor for every output: sigmoid(v_t), `masks_of` |
| v_t     | `draw_v`            | trained parameters of the mask |
| tau_t   | tasks[t].tau        | additions of the task to the kernels |

tau is dense while it is trained. For predictions, its entries whose magnitude does not exceed the
L1 coefficient are set to 0.
"""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp

from halrp_jax import keys
from halrp_jax.training import sizes
from halrp_jax.types import Array, Size, State

Arrays = TypeVar("Arrays")  # a pytree of arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.NetworkConfig):
  """Config keys `method.*` that APD and APDfix share."""

  l1: float = keys.number(
    4e-4, 0, None, "L1 coefficient on tau, and magnitude up to which tau is 0 in predictions"
  )


def draw_v(key: jax.Array, kernels: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Draws v near 0, so that masks are near 1/2.

  Its standard deviation is about 1/sqrt(J) for a layer with J outputs (variance scaling).

  Args:
    key: random key for v.
    kernels: [.., J] by layer path.

  Returns:
    v [J] by layer path.
  """
  keys = jax.random.split(key, len(kernels))
  return {
    name: jax.random.truncated_normal(k, -2, 2, w.shape[-1:]) / jnp.sqrt(w.shape[-1])
    for k, (name, w) in zip(keys, kernels.items(), strict=True)
  }


def masks_of(v: Arrays) -> Arrays:
  """Returns the masks m = sigmoid(v), a tree like `v`."""
  return jax.tree.map(jax.nn.sigmoid, v)


def compose(
  sigma: Mapping[str, Array], mask: Mapping[str, Array], tau: Mapping[str, Array]
) -> dict[str, Array]:
  """Returns the kernels sigma * m + tau.

  Args:
    sigma: shared kernels [.., J] by layer path.
    mask: m [J] by layer path.
    tau: additions [.., J] by layer path; a layer without an entry has none.
  """
  return {n: times(w, mask[n]) + tau.get(n, 0) for n, w in sigma.items()}


def times(kernel: Array, mask: Array) -> Array:
  """Returns a kernel [.., J] times masks [*leading, J], as [*leading, .., J]."""
  lead, width = mask.shape[:-1], mask.shape[-1]
  kernel = kernel.reshape((1,) * len(lead) + kernel.shape)
  return kernel * mask.reshape(*lead, *(1,) * (kernel.ndim - len(lead) - 1), width)


def prune(tau: Arrays, threshold: float) -> Arrays:
  """Sets the entries of tau to 0 whose magnitude does not exceed `threshold`."""
  return jax.tree.map(lambda x: jnp.where(jnp.abs(x) <= threshold, 0, x), tau)


def size(state: State, num_local: int, nonzero_local: int, training_only: int) -> Size:
  """Returns the size with masks, BatchNorm, heads, and sparse tau with a bit for every entry.

  The base is the network of the first task. If the first task has a mask and tau, they are counted
  too.

  Args:
    state: its task states have `mask`, `tau` (pruned), `rest`, `stats` and `num_classes`.
    num_local: numbers of dense arrays that some of the tasks share.
    nonzero_local: how many of them are not 0.
    training_only: see `Size`.
  """
  kernels, (first, *later) = state.shared["kernels"], state.tasks
  counts = [sizes.count_rest(p.rest, kernels, int(p.num_classes)) for p in later]
  base = sizes.network_count(kernels, first.rest, int(first.num_classes))
  masks = sizes.count_leaves([p.mask for p in state.tasks])
  taus = jax.tree.leaves([p.tau for p in state.tasks])
  num_tau, nonzero_tau = sum(x.size for x in taus), sum(int(jnp.count_nonzero(x)) for x in taus)
  counted = masks + sum(c.counted for c in counts)
  stats = sizes.count_task_statistics(state)
  uncounted = stats + sum(c.biases for c in counts)
  sparse = nonzero_tau + nonzero_local
  return Size(
    base=base,
    dense=base + counted + uncounted + num_tau + num_local,
    nonzero=base + counted + uncounted + sparse,
    mask_bits=num_tau + num_local,
    training_only=training_only,
    paper=base + counted + sparse,
  )
