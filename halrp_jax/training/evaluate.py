"""Predictions, and accuracies on the splits of tasks."""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax.devices import processes
from halrp_jax.training import batches, networks
from halrp_jax.types import Array, Method, Network, Params, Task

_IN_FLIGHT = 4  # batches of images on the host that are sent before the first result is awaited


def logits_of(
  model: nn.Module, network: Callable[[dict, Params], Network]
) -> Callable[[dict, Params, Array], Array]:
  """Builds `Method.logits` of a method that has a plain network for every task.

  Args:
    model: the network.
    network: `Method.network`.
  """

  def logits(shared, task, image):
    return networks.apply_model(model, *network(shared, task), image, False, None)[0]

  return logits


def make_predict(method: Method) -> Callable[..., Array]:
  """Builds `Method.predict` from `Method.logits`.

  It is compiled once for all tasks, and returns the logits of a task's own classes alone.
  """
  assert method.logits is not None, "make_predict needs a method with logits"
  logits_fn = jax.jit(method.logits)

  def predict(state, t, image):
    logits = logits_fn(method.served(state), state.tasks[t], image)
    return logits[:, : int(state.tasks[t].num_classes)]

  return predict


@jax.jit
def _count_hits(logits: jax.Array, label: jax.Array) -> jax.Array:
  """Returns how many images of a batch are classified correctly."""
  return jnp.sum(jnp.argmax(logits, -1) == label)


def evaluate(
  predict_fn: Callable[[int, jax.Array], Array],
  tasks: Sequence[Task],
  split: str,
  batch_size: int,
) -> list[float]:
  """Returns the accuracy in percent on one split of every task, NaN where the split is empty.

  The batches of all tasks are sent to the device before the first result is read, or a few at a
  time if the images are on the host. With several processes, each evaluates some of the batches.

  Args:
    predict_fn: (index in `tasks`, image [B, H, W, C]) -> logits [B, K]
    tasks: the tasks.
    split: "train", "valid" or "test".
    batch_size: images per batch; with `method.batch_norm=batch` accuracies depend on it.
  """
  hits = []
  for i, task in enumerate(tasks):
    data = getattr(task, split)
    own = batches.consecutive(len(data.index), batch_size)[processes.index() :: processes.count()]
    found = []
    for image, label in batches.load_batches(data, task.inputs, own):
      found.append(_count_hits(predict_fn(i, image), label))
      if batches.is_on_host(data):
        jax.block_until_ready(found[-_IN_FLIGHT:][0])
    hits.append(found)
  hits = processes.total(np.array([sum(map(int, h)) for h in hits], np.int32))
  sizes = [len(getattr(task, split).index) for task in tasks]
  return [100 * int(h) / n if n else math.nan for h, n in zip(hits, sizes, strict=True)]
