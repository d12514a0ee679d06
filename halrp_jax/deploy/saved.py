"""Opens a run's folder as a model that predicts or learns one more task; needs no training data."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax import data, methods, models
from halrp_jax.config import WITH_FROZEN_BASE, resolve
from halrp_jax.deploy.inputs import require_ids, require_images, require_index
from halrp_jax.devices import parallel
from halrp_jax.keys import Config
from halrp_jax.runs import (
  checkpoint,
  experiment,
  identity,
  pretrained,
  standing,
  states,
  workdir,
)
from halrp_jax.training import batches, losses, networks, population
from halrp_jax.training.evaluate import evaluate
from halrp_jax.types import (
  Array,
  Benchmark,
  Framing,
  Method,
  Params,
  State,
  Store,
  Task,
  UserError,
  one_at_a_time,
)
from halrp_jax.weights import perturb

Results = dict[str, Any]  # JSON: "accuracy" and "rows" of the tasks learned so far
Record = dict[str, Any]  # JSON: the contents of record.json
Show = Callable[[dict[str, Any]], None]  # is called with the events of a run


class Saved(NamedTuple):
  """A run that is finished, or was interrupted after some task."""

  path: str  # of its folder
  config: Config
  benchmark: Benchmark  # its tasks without images, in the order of training
  model: nn.Module  # evaluates BatchNorm with the statistics that are stored
  method: Method
  state: State
  results: Results

  @property
  def learned(self) -> tuple[Task, ...]:
    """Returns the tasks that are learned, in the order of training."""
    return self.benchmark.tasks[: len(self.state.tasks)]

  @property
  def stored_shape(self) -> tuple[int, int, int]:
    """Returns [H, W, C] of the images as they are stored."""
    _, height, width, channels = self.benchmark.tasks[0].train.image.shape
    return height, width, channels


def open_run(path: str) -> Saved:
  """Opens the folder of a run.

  Args:
    path: path of the folder.

  Raises:
    UserError: if the folder is not a run's, is of a version that wrote no tasks.json, or holds no
      complete state.
  """
  config = resolve(identity.read_config(path))
  benchmark = states.read_benchmark(path)
  model = models.with_stored_statistics(models.of_config(config, benchmark.max_classes))
  state, results = states.newest_state(path)
  state = methods.restore(config.method.name, state)
  state = population.complete(state, networks.statistics_of(model, benchmark.image_shape))
  method = methods.make(config, model, benchmark)
  return Saved(path, config, benchmark, model, method, state, results)


def find_task(saved: Saved, name: str) -> int:
  """Returns the position of a learned task in the order of training.

  Args:
    saved: a run opened by `open_run`.
    name: name of the task, or id:N for the task with id N; N alone if no other task has this name.

  Raises:
    UserError: if there is no such task or several, or it is not learned yet.
  """
  tasks = saved.benchmark.tasks
  meant = [t for t, task in enumerate(tasks) if name in (task.name, f"id:{task.id}", str(task.id))]
  if len(meant) > 1:
    choice = " or ".join(f"--task=id:{tasks[t].id} (called {tasks[t].name!r})" for t in meant)
    raise UserError(f"--task={name} can mean several tasks: write {choice}")
  if meant and meant[0] < len(saved.learned):
    return meant[0]
  if meant:
    raise UserError(f"--task={name}: {saved.path} has not learned it yet")
  known = ", ".join(f"{task.id} ({task.name})" for task in saved.learned)
  problem = f"--task={name}: there is no such task" if name else "--task is missing"
  raise UserError(f"{problem}; learned: {known}")


def missing_statistics(saved: Saved) -> str:
  """Returns a line that names the tasks without BatchNorm statistics, or "" if there are none.

  Older versions stored none. Such a task is predicted with the statistics of the batch, as it was
  by those versions.
  """
  if not (positions := population.unmeasured(saved.state)):
    return ""
  names = ", ".join(saved.learned[t].name for t in positions[:3])
  names += " ..." if len(positions) > 3 else ""
  return (
    f"{saved.path} was written by a version that stored no BatchNorm statistics (tasks {names}): "
    "predictions depend on which images share a batch; learn it again for predictions that do not"
  )


def predict_fn(saved: Saved, t: int) -> Callable[..., Array]:
  """Returns (state, t, image [B, H, W, C]) -> logits [B, K] for the task at position t."""
  predict = saved.method.predict
  if t in population.unmeasured(saved.state):
    batch_model = models.with_batch_statistics(saved.model)
    predict = methods.make(saved.config, batch_model, saved.benchmark).predict
  assert predict is not None  # set by `methods.make`
  return predict


def make_classifier(saved: Saved, t: int) -> Callable[[Array], np.ndarray]:
  """Builds classify(uint8 images [B, H, W, C]) -> probabilities [B, K] of a task.

  Args:
    saved: a run opened by `open_run`.
    t: position of a learned task, from `find_task`.

  Raises:
    UserError: if there is no learned task at `t`. classify: if the images have another shape or
      dtype.
  """
  require_index(t, len(saved.learned), "make_classifier: position of a learned task")
  shape = ("B", *saved.stored_shape)
  inputs = saved.benchmark.tasks[t].inputs
  predict = predict_fn(saved, t)

  @jax.jit
  def prepare(image: jax.Array) -> jax.Array:
    return batches.prepare_images(image, inputs)

  def classify(image: Array) -> np.ndarray:
    require_images(image, shape, "classify")
    logits = predict(saved.state, t, prepare(image))
    return np.asarray(jax.nn.softmax(logits))

  return classify


def make_predict_many(run: Saved) -> Callable[[object, Array], np.ndarray]:
  """Builds predict_many(task ids [B], uint8 images [B, H, W, C]) -> probabilities [B, K].

  Each image is predicted with the weights of its own task, all of them in one compiled call (which
  is compiled again for another B). K is the number of classes of the widest task; classes that an
  image's task does not have get probability 0. For HALRP and BE.

  Args:
    run: a run opened by `open_run`.

  Raises:
    UserError: if the method has no perturbations, or the run is of a version that stored no
      BatchNorm statistics. predict_many: if an id is unknown, or the images have another shape or
      dtype.
  """
  if not hasattr(run.state.tasks[0], "perturbation"):
    raise UserError(f"predict_many: {run.config.method.name} has no perturbations of a base")
  if line := missing_statistics(run):
    raise UserError(f"predict_many: {line}")
  positions = {task.id: t for t, task in enumerate(run.learned)}
  kernels, tasks = run.state.shared["kernels"], run.state.tasks
  perturbation = perturb.stack([task.perturbation for task in tasks])
  others = [(task.rest, task.stats, task.num_classes) for task in tasks]
  others = jax.tree.map(lambda *x: jnp.stack(x), *others)
  inputs = batches.stack_inputs(run.learned)

  @jax.jit
  def compute(
    kernels: Params,
    perturbation: Params,
    others: Params,
    inputs: Params,
    t: jax.Array,
    image: jax.Array,
  ) -> jax.Array:
    x = batches.prepare_images(image, inputs, t)
    rest, stats, num_classes = others
    variables = {"params": rest, "batch_stats": stats}
    logits = perturb.apply_many(run.model, kernels, perturbation, variables, t, x, train=False)
    return jax.nn.softmax(losses.mask_classes(logits, num_classes[t][:, None]))

  def predict_many(task_ids: object, image: Array) -> np.ndarray:
    ids = [int(i) for i in require_ids(task_ids, "predict_many")]
    if unknown := [i for i in ids if i not in positions]:
      raise UserError(
        f"predict_many: task {unknown[0]} is not learned; known: "
        + ", ".join(map(str, sorted(positions)))
      )
    require_images(image, (len(ids), *run.stored_shape), "predict_many")
    t = np.array([positions[i] for i in ids], np.int32)
    return np.asarray(compute(kernels, perturbation, others, inputs, t, np.asarray(image)))

  return predict_many


# --- one more task --------------------------------------------------------------------


def extend(
  run: Saved,
  data_path: str,
  out: str,
  show: Show = lambda event: None,
  stop_asked: Callable[[], bool] = lambda: False,
) -> Record:
  """Learns one more task on top of a run, and saves all tasks in the folder of another run.

  With methods that do not change what the tasks share, the base and the old tasks stay the same to
  the bit; HALRP then prunes only the new task.

  Args:
    run: a run opened by `open_run`.
    data_path: path of the new task's images (data/custom.py): a folder with a folder per class, or
      an .npz file. All its images are used, whatever the run's train_fraction.
    out: the new folder; an interrupted extension in it is resumed.
    show: is called with every event.
    stop_asked: see `experiment.run`.

  Returns:
    The contents of record.json: "task", "accuracy" (test accuracies of all tasks; null for old
    ones whose shared weights have changed), "unchanged" (whether the old tasks are), "increment",
    "ranks", "seconds" and more.

  Raises:
    UserError: if the method or the network has no room for the task, or a path can't be used.
    Stopped: if `stop_asked` returned True; the same call resumes from there.
  """
  config, t = run.config, len(run.learned)
  notes: list[str] = []
  task = _load_new_task(run, data_path, notes.append)
  _check_room(run, task)
  benchmark = run.benchmark._replace(tasks=(*run.learned, task))
  extension = {"task": task.name, "data": data_path, "t": t}
  own_config = config.to_dict() | {identity.EXTENDED: extension}
  now = _standing(run, benchmark)
  if (record := identity.finished_record(out, own_config)) is not None:
    identity.require_standing(out, own_config, now)
    return record
  method = _method_of(run, benchmark)  # may refuse the task, before a folder is made
  strict = config.checkpoint.strict
  with workdir.opened(out, own_config, False, strict, stop_asked, now) as folder:
    if changes := [*now["changes"], *folder.new_changes]:
      show({"event": "standing", "said": changes})
    folder.describe(benchmark)
    start = time.perf_counter()
    store = Store(f"task{t:02d}", experiment.make_log(folder, show), folder.progress_store())
    experiment.log_once(store, [{"event": "note", "note": note} for note in notes])
    state, ranks, unchanged = _learn_one(run, benchmark, method, store)
    rows = _rows(run, benchmark, state, ranks, unchanged)
    folder.save_state(t + 1, state, rows)
    seconds = time.perf_counter() - start
    record = _record(run, task, state, rows, unchanged) | {"seconds": seconds}
    record["standing"] = folder.standing
    folder.finish(record)
  return record


def _load_new_task(run: Saved, data_path: str, note: Callable[[str], None]) -> Task:
  """Reads the images of the new task as the run's were read; `note` gets lines on the files."""
  task_id = 1 + max(task.id for task in run.benchmark.tasks)
  # a run without test images (protocol.evaluate_on) learns a new task as others do
  protocol = dataclasses.replace(run.config.protocol, evaluate_on="test")
  all_images = dataclasses.replace(run.config, train_fraction=1.0, protocol=protocol)
  framings = [task.framing for task in run.learned if task.framing != Framing()]
  all_images = pretrained.with_framing(all_images, framings[0] if framings else Framing())
  task = data.load_task(data_path, all_images, run.stored_shape, task_id, note)
  own = run.learned[0].inputs
  inputs = task.inputs._replace(resize=own.resize)
  means = {tuple(map(float, known.inputs.mean)) for known in run.learned}
  if run.config.base and len(means) == 1:  # all tasks are normalised as the base's images were
    inputs = inputs._replace(mean=own.mean, std=own.std)
  return task._replace(inputs=inputs)


def _standing(run: Saved, benchmark: Benchmark) -> dict[str, Any]:
  """Returns the standing (runs/standing.py) of an extended run, with the state it begins with.

  Raises:
    UserError: if the run was learned with other JAX flags.
  """
  now = standing.of(benchmark) | {"machine": standing.machine()}
  if base := identity.read_standing(run.path).get("base"):
    now["base"] = base
  software = {key: now[key] for key in ("flags", "machine")}
  _, changes = identity.require_standing(run.path, run.config.to_dict(), software)
  old = identity.read_standing(run.path).get("tasks", now["tasks"])[: len(run.learned)]
  tasks = [*old, now["tasks"][-1]]
  return now | {"tasks": tasks, "extends": checkpoint.fingerprint(run.state), "changes": changes}


def _method_of(run: Saved, benchmark: Benchmark) -> Method:
  """Builds the method that trains, with the run's own network and layout.

  `run.method` has those for predictions.
  """
  layout = parallel.make_layout(run.config.parallel)
  network = models.of_config(run.config, run.benchmark.max_classes, layout.axis_name)
  start = None
  # the states of those that leave the base as it is have it
  if run.config.base and run.config.method.name not in WITH_FROZEN_BASE:
    known = identity.read_standing(run.path).get("base")
    if known and pretrained.digest(run.config.base) != known:
      raise UserError(f"base={run.config.base}: is another file than {run.path} began with")
    start = pretrained.open_base(run.config, run.benchmark).start
  return methods.make(run.config, network, benchmark, layout, start)


def _learn_one(
  run: Saved, benchmark: Benchmark, method: Method, store: Store
) -> tuple[State, dict[str, int] | None, bool]:
  """Learns the last task of a benchmark.

  Returns the state, the ranks, and whether the old tasks are unchanged.
  """
  config, t, before = run.config, len(run.learned), run.state
  _, learn_key = jax.random.split(jax.random.key(config.seed))
  key = jax.random.fold_in(learn_key, t)
  state, history = method.learn(before, benchmark.tasks[t:], key, store)
  unchanged = checkpoint.fingerprint(state.shared) == checkpoint.fingerprint(before.shared)
  if unchanged:  # HALRP has pruned the old tasks too, but those in service must not change
    state = State(before.shared, (*before.tasks, state.tasks[-1]))
  return state, history.get("ranks"), unchanged


def _rows(
  run: Saved, benchmark: Benchmark, state: State, ranks: dict[str, int] | None, unchanged: bool
) -> states.Rows:
  """Returns the run's results with a row for the new task; the old tasks are not tested again."""
  t = len(run.learned)
  method = methods.make(run.config, run.model, benchmark)
  predict = method.predict
  assert predict is not None  # set by `methods.make`
  (accuracy,) = evaluate(
    lambda _, image: predict(state, t, image),
    benchmark.tasks[t:],
    "test",
    run.config.images_per_evaluation,
  )
  size = method.size(state)
  row = {"ranks": ranks, "increment": size.increment}
  row["size"] = {k: v for k, v in size._asdict().items() if k != "paper"}
  # what is known of the old tasks still holds, or nothing is known any more
  old = [] if unchanged else [*range(t)]
  row |= {"t": t, "evaluated": [*old, t], "accuracy": [*[None] * len(old), accuracy]}
  return [*run.results["rows"], row]


def _record(run: Saved, task: Task, state: State, rows: states.Rows, unchanged: bool) -> Record:
  """Returns the contents of record.json without the seconds and the standing."""
  row = {k: v for k, v in rows[-1].items() if k not in ("t", "evaluated")}
  return row | {
    "extended_from": str(run.path),
    "task": {"id": task.id, "name": task.name, "class_names": list(task.class_names)},
    "accuracy": states.results(rows)["accuracy"][-1],
    "unchanged": unchanged,
    "state_hash": checkpoint.fingerprint(state),
  }


def _check_room(run: Saved, task: Task) -> None:
  """Raises UserError if the method or the network has no room for the new task."""
  name, width = run.config.method.name, run.benchmark.max_classes
  if run.method.groups(2) != one_at_a_time(2):
    raise UserError(f"{name} learns all tasks at once: it can't be extended")
  if not run.method.extensible:
    raise UserError(f"{name} has room for the tasks of its benchmark only: it can't be extended")
  if same := [old.id for old in run.learned if old.name == task.name]:
    raise UserError(
      f"task {same[0]} of {run.path} is called {task.name!r} already: rename the folder or file of "
      "the new images"
    )
  if task.num_classes > width:
    raise UserError(
      f"task {task.name!r} has {task.num_classes} classes, but the heads of {run.path} have only "
      f"{width} outputs"
    )
