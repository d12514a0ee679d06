"""What IRU and IBPWF share: a dictionary of rank-1 factors per layer, W_t = A diag(z_t) B.

| symbol | here               | meaning |
|--------|--------------------|---------|
| A, B   | shared["A"], ["B"] | [d, F], [F, J] by layer; a kernel seen as a matrix is [d, J] |

Factors that a task uses never change again, and z_t is 0 for all others, so the outputs of a task
never change. A and B have room for the factors of all tasks from the beginning.
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
  """Config keys `method.*` that IRU and IBPWF share."""

  start: str = keys.one_of(
    "task_before",
    ("fresh", "task_before"),
    "where a task's z, biases and BatchNorm start: freshly drawn, or from the previous task's",
  )


class TaskState(NamedTuple):
  """State of a task."""

  z: Params  # z_t: [F] by layer, 0 for factors that the task does not use
  rest: Params  # biases, BatchNorm and head
  stats: Params  # BatchNorm's statistics
  num_classes: Array  # int32 []


SERVES = ("A", "B")  # `Method.serves`
Shapes = Mapping[str, jax.Array | jax.ShapeDtypeStruct]  # of the kernels by layer


def kernel_shapes(initialize: Callable[[jax.Array], tuple[Params, Params]]) -> Shapes:
  """Returns the shapes of the kernels that have factors, by layer.

  Args:
    initialize: function from `networks.make_initialize`.
  """
  params, _ = jax.eval_shape(initialize, jax.random.key(0))
  return trees.split(params)[0]


def matrix_shape(kernel: jax.Array | jax.ShapeDtypeStruct) -> tuple[int, int]:
  """Returns the shape (d, J) of a kernel as a matrix; d is kh * kw * I for a convolution."""
  return math.prod(kernel.shape[:-1]), kernel.shape[-1]


def compose(
  a: Mapping[str, Array], b: Mapping[str, Array], z: Mapping[str, Array], shapes: Shapes
) -> dict[str, Array]:
  """Returns the kernels A diag(z) B by layer.

  Args:
    a: A [d, F] by layer.
    b: B [F, J] by layer.
    z: [F] by layer.
    shapes: shapes of the kernels, from `kernel_shapes`.
  """
  return {n: ((a[n] * z[n][None]) @ b[n]).reshape(s.shape) for n, s in shapes.items()}


def make_network(shapes: Shapes) -> Callable[[dict, TaskState], Network]:
  """Builds `Method.network` for kernels of these shapes."""

  def network(shared, task):
    kernels = compose(shared["A"], shared["B"], task.z, shapes)
    return Network(trees.join(kernels, task.rest), task.stats)

  return network


def size(
  state: State,
  shapes: Shapes,
  used: Mapping[str, int],
  coefficients: int,
  mask_bits: int,
  training_only: int,
) -> Size:
  """Returns the size of a method with a dictionary of factors.

  There is no dense base, so a model may be smaller than the network.

  Args:
    state: the method state, with task states as `TaskState`.
    shapes: shapes of the kernels, from `kernel_shapes`.
    used: by layer, the number of factors that at least one task uses.
    coefficients: numbers that are stored for the z of all tasks.
    mask_bits: bits that say which factors these numbers belong to.
    training_only: numbers that are stored for training alone.
  """
  classes = [int(p.num_classes) for p in state.tasks]
  first, *later = (
    sizes.count_rest(p.rest, shapes, k) for p, k in zip(state.tasks, classes, strict=True)
  )
  base = sizes.network_count(shapes, state.tasks[0].rest, classes[0])
  factors = sum(int(used[n]) * sum(matrix_shape(s)) for n, s in shapes.items())
  counted = factors + coefficients + first.counted + first.biases + sum(c.counted for c in later)
  uncounted = sizes.count_task_statistics(state) + sum(c.biases for c in later)
  dense = counted + uncounted
  return Size(base, dense, dense, mask_bits, training_only, counted)


def in_use(task_state: TaskState) -> dict[str, int]:
  """Returns by layer how many factors a task uses."""
  return {n: int(np.count_nonzero(z)) for n, z in task_state.z.items()}
