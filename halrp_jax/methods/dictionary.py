"""What IRU and IBPWF share: a dictionary of rank-1 factors per layer, W_t = A diag(z_t) B.

| symbol | here               | meaning |
|--------|--------------------|---------|
| A, B   | shared["A"], ["B"] | [d, F], [F, J] by layer; a kernel seen as a matrix is [d, J] |

Factors that a task uses never change again, and those that come later meet zeros in its z: its
outputs stay the same bits. F is that of the last task from the beginning.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from halrp_jax import keys
from halrp_jax.training import sizes
from halrp_jax.types import Array, Network, Params, Size, State
from halrp_jax.weights import trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(keys.NetworkConfig):
  """The keys `method.*` of the methods of this file."""

  start: str = keys.one_of(
    "task_before",
    ("fresh", "task_before"),
    "where a task's weights of the factors, biases and BatchNorm start: from nothing, or where the "
    "task before ended",
  )


class TaskState(NamedTuple):
  z: Params  # z_t: [F] by layer, 0 where the task doesn't use a factor
  rest: Params  # biases, BatchNorm and head
  stats: Params  # BatchNorm's statistics
  num_classes: Array  # int32 []


SERVES = ("A", "B")  # `Method.serves`
Shapes = Mapping[str, jax.ShapeDtypeStruct]  # of the kernels by layer


def kernel_shapes(initialize: Callable) -> Shapes:
  """Returns the shapes of the kernels that have factors.

  `initialize` is what `networks.make_initialize` builds.
  """
  params, _ = jax.eval_shape(initialize, jax.random.key(0))
  return trees.split(params)[0]


def matrix_shape(kernel) -> tuple[int, int]:
  """Returns (d, J): inputs, for a convolution kh * kw * I of them, and outputs."""
  return math.prod(kernel.shape[:-1]), kernel.shape[-1]


def compose(a, b, z, shapes: Shapes) -> dict[str, jax.Array]:
  """Returns A diag(z) B as kernels by layer."""
  return {n: ((a[n] * z[n][None]) @ b[n]).reshape(s.shape) for n, s in shapes.items()}


def make_network(shapes: Shapes) -> Callable[[dict, TaskState], Network]:
  """Builds `Method.network`."""

  def network(shared, task):
    kernels = compose(shared["A"], shared["B"], task.z, shapes)
    return Network(trees.join(kernels, task.rest), task.stats)

  return network


def size(state: State, shapes: Shapes, used, coefficients: int, masks: int, training: int) -> Size:
  """Counts in numbers. There is no dense base: a model may be smaller than the network.

  Args:
    state: its tasks are `TaskState`.
    shapes: from `kernel_shapes`.
    used: by layer, how many factors some task uses.
    coefficients: numbers that all z have.
    masks: bits that say which factors these belong to.
    training: numbers kept for training alone.
  """
  classes = [int(p.num_classes) for p in state.tasks]
  first, *later = (
    sizes.count_rest(p.rest, shapes, k) for p, k in zip(state.tasks, classes, strict=True)
  )
  base = sizes.network_count(shapes, state.tasks[0].rest, classes[0])
  factors = sum(int(used[n]) * sum(matrix_shape(s)) for n, s in shapes.items())
  counted = factors + coefficients + first.counted + first.biases + sum(c.counted for c in later)
  uncounted = sizes.count_leaves([p.stats for p in state.tasks]) + sum(c.biases for c in later)
  dense = counted + uncounted
  return Size(base, dense, dense, masks, training, counted)


def in_use(learned: TaskState) -> dict[str, int]:
  """Counts by layer the factors that a task uses."""
  return {n: int(np.count_nonzero(z)) for n, z in learned.z.items()}
