"""A run's folder -> its model, ready to predict or to learn more; needs no data."""

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax import data, methods, models
from halrp_jax.config import resolve
from halrp_jax.deploy.inputs import require_ids, require_images, require_index
from halrp_jax.devices import parallel
from halrp_jax.keys import Config
from halrp_jax.runs import checkpoint, experiment, identity, standing, states, workdir
from halrp_jax.training import batches, losses, networks, population
from halrp_jax.training.evaluate import evaluate
from halrp_jax.types import Benchmark, Method, State, Store, Task, UserError, one_at_a_time
from halrp_jax.weights import perturb


class Saved(NamedTuple):
  """A run that is finished, or was interrupted after some task."""

  path: str
  config: Config
  benchmark: Benchmark  # its tasks without images, in the order of training
  model: nn.Module  # it evaluates with the statistics that are stored
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
  config = resolve(identity.read_config(path))
  benchmark = states.read_benchmark(path)
  model = models.with_stored_statistics(experiment.network_of(config, benchmark.max_classes))
  state, results = states.newest_state(path)
  state = methods.restore(config.method.name, state)
  state = population.complete(state, networks.statistics_of(model, benchmark.image_shape))
  method = methods.make(config, model, benchmark)
  return Saved(path, config, benchmark, model, method, state, results)


def find_task(saved: Saved, wanted: str) -> int:
  """Returns the position of a learned task.

  Args:
    saved: from `open_run`.
    wanted: its name, or id:N; N alone where no other task has that name.

  Raises:
    UserError: if no task or several are meant, or it is not learned yet.
  """
  tasks = saved.benchmark.tasks
  meant = [
    t for t, task in enumerate(tasks) if wanted in (task.name, f"id:{task.id}", str(task.id))
  ]
  if len(meant) > 1:
    choice = " or ".join(f"--task=id:{tasks[t].id} (called {tasks[t].name!r})" for t in meant)
    raise UserError(f"--task={wanted} can mean several tasks: write {choice}")
  if meant and meant[0] < len(saved.learned):
    return meant[0]
  if meant:
    raise UserError(f"--task={wanted}: {saved.path} has not learned it yet")
  known = ", ".join(f"{task.id} ({task.name})" for task in saved.learned)
  what = f"--task={wanted}: there is no such task" if wanted else "--task is missing"
  raise UserError(f"{what}; learned: {known}")


def lacks_statistics(saved: Saved) -> str:
  """Returns a line on the tasks that older versions kept no BatchNorm statistics of, or nothing.

  Such a task is predicted with the statistics of the batch, as it was then.
  """
  if not (positions := population.unmeasured(saved.state)):
    return ""
  names = ", ".join(saved.learned[t].name for t in positions[:3])
  names += " ..." if len(positions) > 3 else ""
  return (
    f"{saved.path} was written by a version that kept no BatchNorm statistics (tasks {names}): "
    "predictions depend on which images share a batch; learn it again for a model of single images"
  )


def predict_fn(saved: Saved, t: int) -> Callable:
  """Returns (state, t, image) -> logits [B, K] as a task has to be predicted."""
  if t not in population.unmeasured(saved.state):
    return saved.method.predict
  batch_model = models.with_batch_statistics(saved.model)
  return methods.make(saved.config, batch_model, saved.benchmark).predict


def make_classifier(saved: Saved, t: int) -> Callable[[np.ndarray], np.ndarray]:
  """Builds uint8 images [B, H, W, C] -> probabilities [B, K] of a task.

  Args:
    saved: from `open_run`.
    t: position of a learned task, from `find_task`.

  Raises:
    UserError: if `t` is none. The function that is built: if the images are of another kind.
  """
  require_index(t, len(saved.learned), "make_classifier: position of a learned task")
  shape = ("B", *saved.benchmark.tasks[t].train.image.shape[1:])
  inputs = saved.benchmark.tasks[t].inputs
  prepare = jax.jit(lambda image: batches.prepare_images(image, inputs))
  predict = predict_fn(saved, t)

  def classify(image):
    require_images(image, shape, "classify")
    logits = predict(saved.state, t, prepare(image))
    return np.asarray(jax.nn.softmax(logits))

  return classify


def make_predict_many(run: Saved) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
  """Builds predict_many(task ids [B], uint8 images [B, H, W, C]) -> probabilities [B, K].

  Every image with the weights of its own task, all in one compiled call (one for each B); a class
  that an image's task has not has probability 0, K being the classes of the widest task. For HALRP
  and BE.

  Raises:
    UserError: if the method has no perturbations, or the run is of a version that kept no
      BatchNorm statistics. predict_many: if an id is unknown or the images are of another kind.
  """
  if not hasattr(run.state.tasks[0], "perturbation"):
    raise UserError(f"predict_many: {run.config.method.name} keeps no perturbations of a base")
  if line := lacks_statistics(run):
    raise UserError(f"predict_many: {line}")
  place = {task.id: t for t, task in enumerate(run.learned)}
  shape = tuple(run.benchmark.tasks[0].train.image.shape[1:])
  kernels, tasks = run.state.shared["kernels"], run.state.tasks
  perturbation = perturb.stack([task.perturbation for task in tasks])
  others = [(task.rest, task.stats, task.num_classes) for task in tasks]
  others = jax.tree.map(lambda *x: jnp.stack(x), *others)
  inputs = batches.stack_inputs(run.learned)

  @jax.jit
  def compute(kernels, perturbation, others, inputs, t, image):
    x = batches.prepare_images(image, inputs, t)
    rest, stats, num_classes = others
    variables = {"params": rest, "batch_stats": stats}
    logits = perturb.apply_many(run.model, kernels, perturbation, variables, t, x, train=False)
    return jax.nn.softmax(losses.mask_classes(logits, num_classes[t][:, None]))

  def predict_many(task_ids, image):
    task_ids = require_ids(task_ids, "predict_many")
    t = [place.get(int(i)) for i in task_ids]
    if None in t:
      raise UserError(
        f"predict_many: task {task_ids[t.index(None)]} is not learned; known: "
        + ", ".join(map(str, sorted(place)))
      )
    require_images(image, (len(t), *shape), "predict_many")
    args = (kernels, perturbation, others, inputs, np.asarray(t, np.int32), np.asarray(image))
    return np.asarray(compute(*args))

  return predict_many


# --- one more task --------------------------------------------------------------------


def extend(
  run: Saved,
  data_path: str,
  out: str,
  show: Callable[[dict], None] = lambda event: None,
  stop_asked: Callable[[], bool] = lambda: False,
) -> dict:
  """Learns one more task on what a run has learned, and saves it all as another run's folder.

  The base and the old tasks' parts stay the same bits where the method holds what tasks share:
  HALRP then prunes the new task alone.

  Args:
    run: from `open_run`.
    data_path: the new task (data/custom.py): a folder with a folder per class, or an .npz. All its
      images are used, whatever the run's train_fraction.
    out: the new folder; one where this was interrupted goes on.
    show: is called with every event.
    stop_asked: see `experiment.run`.

  Returns:
    The contents of record.json: "task", "accuracy" (tests of all tasks, null where the method moved
    what they share), "unchanged" (whether the old tasks are), "increment", "ranks", "seconds".

  Raises:
    UserError: if the method or the network has no room for the task, or a path can't be used.
  """
  config, learned = run.config, run.learned
  shape = tuple(run.benchmark.tasks[0].train.image.shape[1:])
  task_id = 1 + max(task.id for task in run.benchmark.tasks)
  whole = dataclasses.replace(config, train_fraction=1.0)
  notes = []
  task = data.load_task(data_path, whole, shape, task_id, notes.append)
  _require_room(run, task)
  benchmark = run.benchmark._replace(tasks=(*learned, task))
  layout = parallel.make_layout(config.parallel)  # its training goes on as it was
  trained = experiment.network_of(config, run.benchmark.max_classes, layout.axis_name)
  method = methods.make(config, trained, benchmark, layout)
  t = len(learned)
  known = config.to_dict() | {identity.EXTENDED: {"task": task.name, "data": data_path, "t": t}}
  now = _standing(run, benchmark)
  if (record := identity.finished_record(out, known)) is not None:
    identity.require_standing(out, known, now)
    return record
  with workdir.opened(out, known, False, config.checkpoint.strict, stop_asked, now) as folder:

    def log(event: dict):
      if event["event"] != "progress":
        folder.log(event)
      show(event)

    if said := [*now["changes"], *folder.new_changes]:
      show({"event": "standing", "said": said})
    folder.describe(benchmark)
    start = time.perf_counter()
    store = Store(f"task{t:02d}", log, folder.keep())
    store.once("begin", lambda: [log({"event": "note", "note": x}) for x in notes] and True)
    state, ranks, unchanged = _learn_one(run, method, task, store)
    method = methods.make(config, run.model, benchmark)
    results = _results_with(run, method, state, task, ranks, unchanged)
    folder.save_state(t + 1, state, results)
    record = results["rows"][-1] | {
      "extended_from": str(run.path),
      "task": {"id": task.id, "name": task.name, "class_names": list(task.class_names)},
      "accuracy": results["accuracy"][-1],
      "unchanged": unchanged,
      "seconds": time.perf_counter() - start,
      "state_hash": checkpoint.fingerprint(state),
      "standing": folder.standing,
    }
    folder.finish(record)
  return record


def _standing(run: Saved, benchmark: Benchmark) -> dict:
  """Returns what an extended run stands on: the old run, the new task, JAX's flags, the machine.

  Raises:
    UserError: if the run was learned with other JAX flags.
  """
  now = standing.of(benchmark) | {"machine": standing.machine()}
  flags = {key: now[key] for key in ("flags", "machine")}
  _, said = identity.require_standing(run.path, run.config.to_dict(), flags)
  old = identity.read_standing(run.path).get("tasks", now["tasks"])[: len(run.learned)]
  tasks = [*old, now["tasks"][-1]]
  return now | {"tasks": tasks, "extends": checkpoint.fingerprint(run.state), "changes": said}


def _learn_one(run: Saved, method: Method, task: Task, store: Store):
  """-> state, ranks, whether the old tasks' parts are what they were"""
  t, before = len(run.learned), run.state
  _, learn_key = jax.random.split(jax.random.key(run.config.seed))
  state, history = method.learn(before, (task,), jax.random.fold_in(learn_key, t), store)
  unchanged = checkpoint.fingerprint(state.shared) == checkpoint.fingerprint(before.shared)
  if unchanged:  # HALRP prunes all tasks alike; those in service must not move
    state = State(before.shared, (*before.tasks, state.tasks[-1]))
  return state, history.get("ranks"), unchanged


def _results_with(run: Saved, method: Method, state: State, task: Task, ranks, unchanged) -> dict:
  """The run's results with a row for the new task; the old tasks are not tested again."""
  t = len(run.learned)
  (accuracy,) = evaluate(
    lambda _, image: method.predict(state, t, image),
    (task,),
    "test",
    run.config.images_per_evaluation,
  )
  old = run.results["accuracy"][t - 1][:t] if unchanged else [None] * t
  size = method.size(state)
  row = {"ranks": ranks, "increment": size.increment}
  row["size"] = {k: v for k, v in size._asdict().items() if k != "paper"}
  rows = [a[:t] + [None] for a in run.results["accuracy"][:t]]
  return {"rows": [*run.results["rows"], row], "accuracy": [*rows, [*old, accuracy]]}


def _require_room(run: Saved, task: Task) -> None:
  name, width = run.config.method.name, run.benchmark.max_classes
  if run.method.groups(2) != one_at_a_time(2):
    raise UserError(f"{name} learns all tasks at once: it can't be extended")
  if not run.method.extensible:
    raise UserError(f"{name} has room for the tasks of its benchmark only: it can't be extended")
  if same := [old.id for old in run.learned if old.name == task.name]:
    raise UserError(
      f"task {same[0]} of {run.path} is called {task.name!r} already: rename the new images' folder"
    )
  if task.num_classes > width:
    raise UserError(
      f"task {task.name!r} has {task.num_classes} classes, the heads of {run.path} {width} outputs"
    )
