"""What APD and APDfix share: theta_t = sigma * m_t + tau_t, a mask per output and sparse additions.

| symbol  | here                | meaning |
|---------|---------------------|---------|
| sigma   | shared["kernels"]   | kernels that all tasks share |
| v_t     | `draw_v`            | what is trained: m_t = sigmoid(v_t), `masks_of` |

m_t and tau_t are in the states of the tasks. tau is trained dense; in prediction its entries of at
most the L1 coefficient in size are 0.
"""

import dataclasses

import jax
import jax.numpy as jnp

from halrp_jax import keys
from halrp_jax.training import sizes
from halrp_jax.types import Size, State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.NetworkConfig):
  """The keys `method.*` of the methods of this file."""

  l1: float = keys.number(
    4e-4, 0, None, "L1 coefficient on tau, and the size up to which tau is 0 in prediction"
  )


def draw_v(key: jax.Array, kernels) -> dict[str, jax.Array]:
  """Draws v near 0, hence masks near 1/2: variance scaling over a layer's J outputs."""
  keys = jax.random.split(key, len(kernels))
  return {
    name: jax.random.truncated_normal(k, -2, 2, w.shape[-1:]) / jnp.sqrt(w.shape[-1])
    for k, (name, w) in zip(keys, kernels.items(), strict=True)
  }


def masks_of(v):
  """Returns m = sigmoid(v)."""
  return jax.tree.map(jax.nn.sigmoid, v)


def compose(sigma, mask, tau):
  """Returns sigma * m + tau by layer; a layer that is missing in `tau` has none."""
  return {n: times(w, mask[n]) + tau.get(n, 0) for n, w in sigma.items()}


def times(kernel, mask):
  """Returns sigma * m, with a factor m [.., J] for every output; leading axes of m come first."""
  lead, width = mask.shape[:-1], mask.shape[-1]
  kernel = kernel.reshape((1,) * len(lead) + kernel.shape)
  return kernel * mask.reshape(*lead, *(1,) * (kernel.ndim - len(lead) - 1), width)


def prune(tau, threshold: float):
  """Sets the entries of tau to 0 that are at most `threshold` in size."""
  return jax.tree.map(lambda x: jnp.where(jnp.abs(x) <= threshold, 0, x), tau)


def size(state: State, num_local: int, nonzero_local: int, training_only: int) -> Size:
  """Counts sparse tau with a bit for every entry, masks, BatchNorm and heads.

  The first task's network counts as a whole; its mask and tau come on top where it has any.

  Args:
    state: its tasks have `mask`, `tau` (as predicted with), `rest`, `stats` and `num_classes`.
    num_local: numbers that some tasks share besides sigma, dense.
    nonzero_local: how many of them are not 0.
    training_only: as in `Size`.
  """
  kernels, (first, *later) = state.shared["kernels"], state.tasks
  counts = [sizes.count_rest(p.rest, kernels, int(p.num_classes)) for p in later]
  base = sizes.network_count(kernels, first.rest, int(first.num_classes))
  masks = sizes.count_leaves([p.mask for p in state.tasks])
  taus = jax.tree.leaves([p.tau for p in state.tasks])
  num_tau, nonzero_tau = sum(x.size for x in taus), sum(int(jnp.count_nonzero(x)) for x in taus)
  counted = masks + sum(c.counted for c in counts)
  stats = sizes.count_leaves([p.stats for p in state.tasks])
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
