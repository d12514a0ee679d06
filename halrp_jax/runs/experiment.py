"""The task loop: `run` learns the tasks of a config, `plan` describes what it would do.

This is the only place where tasks, method and metrics meet.
"""

import datetime
import functools
import gc
import json
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import config_dict

from halrp_jax import data, keys, methods, metrics, models
from halrp_jax.config import resolve, setting_of
from halrp_jax.devices import determinism, parallel, processes, replicas
from halrp_jax.keys import Config
from halrp_jax.runs import checkpoint, identity, measure, pretrained, standing, states, workdir
from halrp_jax.training import networks, population, sizes
from halrp_jax.training.evaluate import evaluate
from halrp_jax.types import SCHEMA, Benchmark, History, Method, Size, State, Store, UserError
from halrp_jax.weights import trees

Built = tuple[Benchmark, nn.Module, Method, parallel.Layout]  # from `build`

# --- what a config names: data, network, method ---------------------------------------


def build(config: Config) -> Built:
  """Returns the benchmark in the order of training, the network, the method and the layout.

  Args:
    config: resolved.

  Raises:
    UserError: if the data are missing or damaged, or do not fit the config.
  """
  benchmark = data.load(pretrained.framed(config))
  for task in benchmark.tasks:
    if not config.steps_per_epoch(len(task.train.index)):
      raise UserError(
        f"batch_size = {config.batch_size} with protocol.last_batch = 'drop' leaves task "
        f"{task.name!r} no batch out of {len(task.train.index)} images: take a smaller batch_size"
      )
  benchmark = _apply_evaluate_on(config, benchmark)
  single = models.of_config(config, benchmark.max_classes)
  models.require_image_shape(single, benchmark.image_shape)
  start = None
  if config.method.batch_norm == "frozen" and not config.base:
    raise UserError(
      "method.batch_norm = 'frozen' keeps the statistics of parameters that were trained "
      "elsewhere: set base=FILE, or method.batch_norm=population"
    )
  if config.base_training != "all" and not config.base:
    raise UserError(
      f"base_training = {config.base_training!r} needs parameters that were trained elsewhere: set "
      "base=FILE, or base_training=all to train a random network"
    )
  if config.base:
    base = pretrained.open_base(config, benchmark)
    benchmark, start = pretrained.prepared(benchmark, base, config), base.start
  layout = parallel.make_layout(config.parallel)
  benchmark = layout.replicate(benchmark)
  model = models.of_config(config, benchmark.max_classes, layout.axis_name)
  return benchmark, model, methods.make(config, model, benchmark, layout, start), layout


def _apply_evaluate_on(config: Config, benchmark: Benchmark) -> Benchmark:
  """Returns the benchmark, its test images replaced if protocol.evaluate_on is "validation".

  Raises:
    UserError: if the config needs validation images and a task has none.
  """
  needs = {"keep": ("best", "best_loss"), "schedule": ("plateau",), "evaluate_on": ("validation",)}
  named = [f"protocol.{k} = {v}" for k, v in vars(config.protocol).items() if v in needs.get(k, ())]
  for task in benchmark.tasks:
    if named and not len(task.valid.index):
      raise UserError(
        f"{', '.join(named)}: task {task.name!r} has no validation images; add some, or raise "
        "protocol.validation_fraction"
      )
  if config.protocol.evaluate_on != "validation":
    return benchmark
  return benchmark._replace(tasks=tuple(t._replace(test=t.valid) for t in benchmark.tasks))


# --- the plan -------------------------------------------------------------------------


def plan(config: config_dict.ConfigDict | Config) -> dict:
  """Describes what a run of this config would do, as plain numbers and texts (--dry_run).

  Args:
    config: a config made by `make_config`, with overrides applied.

  Returns:
    "config" (dotted key -> value), "benchmark", "tasks" (a dict each, with the number of images per
    split), "missing" (why the data can't be read, or ""), "image_shape", "layers" (name, number of
    parameters, whether it is perturbed), "parameters" and "steps" (numbers).

  Raises:
    UserError: if the config is wrong, or the data are missing and the protocol doesn't fix sizes.
  """
  config = resolve(config)
  image_shape, tasks, missing = _planned_tasks(config)
  model = models.of_config(config, max(t["num_classes"] for t in tasks))
  shapes, _ = jax.eval_shape(
    lambda key: networks.initialize(model, key, image_shape), jax.random.key(0)
  )
  perturbed = trees.layer_names(shapes)
  flat: dict[str, Any] = traverse_util.flatten_dict(shapes, sep="/")
  layers = {}
  for path, x in flat.items():
    layer = path.rpartition("/")[0]
    layers[layer] = layers.get(layer, 0) + x.size
  epochs = getattr(config.method, "epochs", config.epochs)
  steps = sum(epochs * config.steps_per_epoch(t["train"]) for t in tasks)
  return {
    "config": keys.flat(config.to_dict()),
    "benchmark": config.benchmark,
    "tasks": tasks,
    "missing": missing,
    "image_shape": image_shape,
    "layers": [(name, count, name in perturbed) for name, count in layers.items()],
    "parameters": sum(layers.values()),
    "steps": steps,
  }


def _planned_tasks(config: Config) -> tuple[tuple[int, int, int], list[dict], str]:
  """Returns image shape and tasks: of the data, or of the protocol and then why."""
  try:
    benchmark, *_ = build(config)
  except data.sources.Missing as e:
    if (planned := data.planned(config)) is None:
      raise
    return *planned, str(e)
  tasks = [
    {"id": t.id, "name": t.name, "num_classes": t.num_classes, "class_names": t.class_names}
    | {split: len(getattr(t, split).index) for split in ("train", "valid", "test")}
    for t in benchmark.tasks
  ]
  return benchmark.image_shape, tasks, ""


# --- the run --------------------------------------------------------------------------


def run(
  config: config_dict.ConfigDict | Config,
  path: str,
  show: Callable[[dict], None] = lambda event: None,
  overwrite: bool = False,
  stop_asked: Callable[[], bool] = lambda: False,
  gang: replicas.Gang | None = None,
  read: Callable[[Config], dict] | None = None,
) -> dict:
  """Learns all tasks of a config one after another and writes the record.

  An interrupted run resumes where it was. A finished run returns its record.

  Args:
    config: a config made by `make_config`, with overrides applied.
    path: folder of the run (workdir.py); it is made if it doesn't exist.
    show: is called with every event that goes to metrics.jsonl, and with some for display only.
    overwrite: whether to delete a run that is in the folder first.
    stop_asked: is called between the chunks of training; if it returns True, the run stops.
    gang: the threads in which other runs are learned at the same time.
    read: result of `identity.shared_read`, which reads the data once for several finished runs.

  Returns:
    The contents of record.json.

  Raises:
    UserError: if the config, the data or the folder can't be used; nothing is lost or half-written.
    Stopped: if `stop_asked` returned True; the same call resumes from there.
    Diverged: if the loss became NaN or infinite.
  """
  config = resolve(config)
  if config.deterministic and jax.distributed.is_initialized():
    determinism.require()  # before the first message between processes starts JAX's backend
  _check_processes(config, overwrite)
  if not overwrite and (record := identity.finished_record(path, config.to_dict())):
    reader = read or identity.shared_read()
    processes.run_on_leader(lambda: identity.require_same_data(config, path, reader, show))
    show({"event": "finished"})
    return record
  if config.deterministic:
    determinism.require()
  built = processes.run_on_all(lambda: gang.build(build, config) if gang else build(config))
  now = _shared_standing(config, built[0])
  strict = config.checkpoint.strict
  with (
    workdir.opened(path, config.to_dict(), overwrite, strict, stop_asked, now) as folder,
    measure.compile_clock() as compile_seconds,
  ):
    log = make_log(folder, show)
    if folder.new_changes:
      show({"event": "standing", "said": folder.new_changes})
    folder.describe(built[0])
    record = _learn_all(config, built, folder, log, show, compile_seconds, gang)
    record["standing"] = folder.standing
    folder.finish(record)
  return record


def make_log(folder: workdir.Workdir, show: Callable[[dict], None]) -> Callable[[dict], None]:
  """Builds log(event), which writes an event to metrics.jsonl and shows it."""

  def log(event: dict):
    if event["event"] != "progress":  # within an epoch: for display only
      folder.log(event)
    show(event)

  return log


def log_once(store: Store, events: list[dict]) -> None:
  """Logs the first events of a task, unless they were logged before an interruption."""

  def log_all():
    for event in events:
      store.log(event)
    return True

  store.once("begin", log_all)


def _check_processes(config: Config, overwrite: bool) -> None:
  """Checks, if there are several processes, that they work on one run and compute the same.

  Raises:
    UserError: if the config does not shard batches, differs between processes, or is not
      deterministic on GPUs.
  """
  if processes.count() == 1:
    return
  if config.parallel in ("none", "replicas"):
    raise UserError(
      f"parallel = {config.parallel!r} shards no batch, so {processes.count()} processes would "
      "do the same work: set parallel=auto, or use sweep with --shard"
    )
  if config.deterministic:
    determinism.require()  # before the first message between processes starts JAX's backend
  flat = keys.flat(config.to_dict()) | {"overwrite": overwrite}
  compared = {k: v for k, v in flat.items() if k not in ("data_dir", "data.cache")}
  processes.require_same("other config", lambda: repr(sorted(compared.items())))
  if jax.default_backend() == "gpu" and not config.deterministic:
    raise UserError("several processes on GPUs must compute the same bits: set deterministic=True")


def _shared_standing(config: Config, benchmark: Benchmark) -> dict:
  """Returns the standing of the run, after checking that all processes have the same."""
  processes.require_same("other images", lambda: benchmark.split_hash)
  now = standing.of(benchmark)
  if config.base:
    now["base"] = pretrained.digest(config.base)
    processes.require_same("another base", lambda: now["base"])
  software = now["flags"] | standing.versions()
  processes.require_same("other JAX flags or versions", lambda: json.dumps(software))
  now["machine"] = standing.machine()
  return now


# --- the tasks ------------------------------------------------------------------------


def _learn_all(
  config: Config,
  built: Built,
  folder: workdir.Workdir,
  log: Callable[[dict], None],
  show: Callable[[dict], None],
  compile_seconds: Callable[[], float],
  gang: replicas.Gang | None,
) -> dict:
  """Learns the groups of tasks that are not learned yet, one after another; returns the record."""
  benchmark, model, method, layout = built
  num_tasks = len(benchmark.tasks)
  gc.collect()  # of an earlier run; not before every task: it takes as long as one of digits
  init_key, learn_key = jax.random.split(jax.random.key(config.seed))
  done, state, rows = folder.restore_state() or (0, method.init(init_key, benchmark), [])
  state = _restored(config, model, benchmark, state, show)
  accuracy, parts = states.accuracies(rows, num_tasks), {}
  for position, group in list(enumerate(method.groups(num_tasks), 1))[done:]:
    t = group[-1]
    tasks = tuple(benchmark.tasks[i] for i in group)
    label = {"t": t, "num_tasks": num_tasks, "task": tasks[-1].name, "task_id": tasks[-1].id}
    measure.forget_peak()
    with measure.measure(compile_seconds) as learning:
      store = Store(f"task{t:02d}", log, folder.progress_store(), gang)
      notes = benchmark.notes if position == 1 else ()
      log_once(store, [*({"event": "note", "note": n} for n in notes), {"event": "task"} | label])
      before = state
      state, history = method.learn(state, tasks, jax.random.fold_in(learn_key, t), store)
      same = _unchanged(method, before, state)
      changed = state.shared, [p for i, p in enumerate(state.tasks) if i not in same]
      jax.block_until_ready(changed)
    hashed = functools.partial(checkpoint.fingerprint, changed)
    processes.require_same(f"other weights after task {t}", hashed)
    with measure.measure(compile_seconds) as evaluating:
      last = accuracy[group[0] - 1]
      known = {i: float(last[i]) for i in same if not np.isnan(last[i])}
      known = known if config.evaluation == "changed" else {}
      accuracy[t, : t + 1], valid = _evaluate(config, benchmark, method, layout, state, t, known)
    seconds = measure.seconds(learning, evaluating, history.get("select_seconds", 0.0))
    size, parts = _size(method, state, {i: parts[i] for i in same & parts.keys()})
    row = _row(size, history, seconds, valid)
    row["evaluated"] = [i for i in range(t + 1) if i not in known]
    known_so_far = states.nulls(accuracy[t : t + 1, : t + 1])[0]
    log({"event": "evaluation"} | label | row | {"accuracy": known_so_far})
    row |= {"t": t, "accuracy": [known_so_far[i] for i in row["evaluated"]]}
    rows = [*rows, row]  # a new list: the writer's thread may still be reading the old one
    folder.save_state(position, state, rows)
    state = folder.spill(state)
    folder.check()
  return _record(config, benchmark, model, accuracy, rows, state)


def _restored(
  config: Config, model: nn.Module, benchmark: Benchmark, state: State, show: Callable
) -> State:
  """Returns a state that may be of an older version in the form of this one."""
  state = methods.restore(config.method.name, state)
  state = population.complete(state, networks.statistics_of(model, benchmark.image_shape))
  if unmeasured := population.unmeasured(state):
    note = f"{len(unmeasured)} tasks are of a version that stored no BatchNorm statistics: "
    note += "predictions for them depend on the other images of the batch"
    show({"event": "note", "note": note})
  return state


def _unchanged(method: Method, before: State, now: State) -> set[int]:
  """Returns the positions of the tasks whose predictions are as they were.

  They are those whose predictions depend on the very arrays that they depended on.

  Args:
    method: whose `serves` names what predictions depend on besides the states of the tasks.
    before: the state before the last task.
    now: the state now.
  """
  if not before.tasks or not states.is_same(method.served(before), method.served(now)):
    return set()
  pairs = enumerate(zip(before.tasks, now.tasks, strict=False))
  return {i for i, (old, new) in pairs if states.is_same(old, new)}


def _size(method: Method, state: State, known: dict[int, Size]) -> tuple[Size, dict[int, Size]]:
  """Returns the size of the model, and the parts of it that the tasks have, by position.

  Args:
    method: the method.
    state: its state.
    known: the parts of tasks that have not changed.
  """
  if method.size_of is None:
    return method.size(state), {}
  count = range(len(state.tasks))
  parts = known | {t: method.size_of(state, t) for t in count if t not in known}
  return sizes.total(parts.values()), parts


def _evaluate(
  config: Config,
  benchmark: Benchmark,
  method: Method,
  layout: parallel.Layout,
  state: State,
  t: int,
  known: dict[int, float],
) -> tuple[list[float], float]:
  """Returns the test accuracy on the tasks up to t and the validation accuracy on task t, in %.

  Tasks with a `known` test accuracy are not evaluated again.
  """
  predict = method.predict
  assert predict is not None  # set by `methods.make`

  @functools.lru_cache(maxsize=1)
  def with_task(i: int) -> State:
    """Returns the state with task i on the device, where it may be on disk."""
    task = jax.tree.map(jnp.asarray, state.tasks[i])
    return State(state.shared, (*state.tasks[:i], task, *state.tasks[i + 1 :]))

  def accuracies(indices: list[int], split: str) -> list[float]:
    return evaluate(
      lambda i, image: predict(with_task(indices[i]), indices[i], layout.shard(image)),
      [benchmark.tasks[i] for i in indices],
      split,
      config.images_per_evaluation,
    )

  new = [i for i in range(t + 1) if i not in known]
  test = known | dict(zip(new, accuracies(new, "test"), strict=True))
  (valid,) = accuracies([t], "valid")
  return [test[i] for i in range(t + 1)], valid


def _row(size: Size, history: History, seconds: dict[str, float], valid: float) -> dict:
  """Returns what the record says of the last task, but for its test accuracies."""
  return {
    "ranks": history.get("ranks"),
    "ranks_exact": history.get("ranks_exact"),
    "size": {k: v for k, v in size._asdict().items() if k != "paper"},
    "increment": size.increment,
    "seconds": seconds,
    "validation_accuracy": None if np.isnan(valid) else valid,
    "memory_bytes": measure.peak_memory(),
  }


def _record(
  config: Config,
  benchmark: Benchmark,
  model: nn.Module,
  accuracy: np.ndarray,
  rows: list[dict],
  state: State,
) -> dict:
  """Returns the contents of record.json; docs/configuration.md describes its `config`."""
  return {
    "schema": SCHEMA,
    "method": config.method.name,
    "benchmark": benchmark.name,
    "order": config.order,
    "seed": config.seed,
    "accuracy": states.nulls(accuracy),
    "task_ids": [task.id for task in benchmark.tasks],
    "task_names": [task.name for task in benchmark.tasks],
    "average_accuracy": metrics.average_accuracy(accuracy),
    "bwt": metrics.bwt(accuracy),
    "forgetting": metrics.forgetting(accuracy),
    **{key: [row[key] for row in rows] for key in rows[0] if key not in ("t", "accuracy")},
    "peak_memory_bytes": max(row.get("memory_bytes", 0) for row in rows),
    "partial": benchmark.partial,
    "split_hash": benchmark.split_hash,
    "state_hash": checkpoint.fingerprint(state),
    "statistics": models.statistics(config.method.batch_norm, model),
    "config": config.to_dict(),
    "setting": setting_of(config.to_dict()),
    "versions": standing.versions(),
    "device": measure.device(),
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  }
