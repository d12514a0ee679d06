"""A run's folder -> its model, ready to predict or to learn more; needs no data."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import config_dict

from halrp_jax import experiment, methods, models, train, workdir
from halrp_jax.types import Benchmark, Method, State, Task, UserError


class Saved(NamedTuple):
  """A run that is finished, or was interrupted after some task."""

  path: str
  config: object  # resolved
  benchmark: Benchmark  # its tasks without images, in the order of training
  model: object  # the Flax module
  method: Method
  state: State
  results: dict  # "accuracy" and "rows" so far

  @property
  def learned(self) -> tuple[Task, ...]:
    return self.benchmark.tasks[: len(self.state.tasks)]


def open_run(path: str) -> Saved:
  """Reads what a run has learned.

  Args:
    path: its folder.

  Raises:
    UserError: if it is no run, is of an older version, or no state of it is whole.
  """
  config = experiment.resolve(config_dict.ConfigDict(workdir.read_config(path)))
  benchmark = workdir.read_benchmark(path)
  model = models.make(config.network, benchmark.max_classes, config.method.batch_norm)
  state, results = workdir.newest_state(path)
  method = methods.make(config, model, benchmark)
  return Saved(path, config, benchmark, model, method, state, results)


def find_task(saved: Saved, wanted: str) -> int:
  """Position of the learned task with that id or name."""
  for key in (lambda task: str(task.id), lambda task: task.name):
    for t, task in enumerate(saved.benchmark.tasks):
      if key(task) == wanted:
        if t < len(saved.learned):
          return t
        raise UserError(f"--task={wanted}: {saved.path} has not learned it yet")
  known = ", ".join(f"{task.id} ({task.name})" for task in saved.learned)
  what = f"--task={wanted}: there is no such task" if wanted else "--task is missing"
  raise UserError(f"{what}; learned: {known}")


def depends_on_batch(model) -> bool:
  """Whether the network evaluates with the statistics of the batch: predictions then depend on
  which images share one."""
  return not getattr(model, "running", True)


def make_classifier(saved: Saved, t: int) -> Callable[[np.ndarray], np.ndarray]:
  """Builds uint8 images [B, H, W, C] -> probabilities [B, K] of a task."""
  inputs = saved.benchmark.tasks[t].inputs
  prepare = jax.jit(lambda image: train.prepare_images(image, inputs))

  def classify(image):
    logits = saved.method.predict(saved.state, t, prepare(image))
    return np.asarray(jax.nn.softmax(logits))

  return classify
