"""run(config, workdir): THE task loop, the one place where tasks, method and metrics meet."""

import datetime
import functools
import json
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util
from ml_collections import config_dict

from halrp_jax import data, keys, methods, metrics, models
from halrp_jax.config import resolve, setting_of
from halrp_jax.devices import determinism, parallel, processes, replicas
from halrp_jax.keys import Config
from halrp_jax.runs import checkpoint, identity, measure, standing, workdir
from halrp_jax.training import networks, population
from halrp_jax.training.evaluate import evaluate
from halrp_jax.types import SCHEMA, Benchmark, Method, Store, UserError
from halrp_jax.weights import trees

# --- the run --------------------------------------------------------------------------


def network_of(config: Config, num_classes: int, axis_name: str | None = None) -> nn.Module:
  """Returns the network of a config."""
  return models.make(
    config.network, num_classes, config.method.batch_norm, config.precision, axis_name
  )


def build(config: Config) -> tuple[Benchmark, nn.Module, Method, parallel.Layout]:
  """Returns the benchmark in the order of training, the network, the method and the layout."""
  benchmark = data.load(config)
  for task in benchmark.tasks:
    if not config.steps_per_epoch(len(task.train.index)):
      raise UserError(
        f"batch_size = {config.batch_size} with protocol.last_batch = 'drop' leaves task "
        f"{task.name!r} no batch out of {len(task.train.index)} images: take a smaller one"
      )
  benchmark = _with_validation_images(config, benchmark)
  layout = parallel.make_layout(config.parallel)
  benchmark = layout.replicate(benchmark)
  model = network_of(config, benchmark.max_classes, layout.axis_name)
  return benchmark, model, methods.make(config, model, benchmark, layout), layout


def _with_validation_images(config: Config, benchmark: Benchmark) -> Benchmark:
  """Refuses a config that needs validation images where there are none; hides the test images
  with protocol.evaluate_on = "validation"."""
  needs = {"keep": ("best", "best_loss"), "schedule": ("plateau",), "evaluate_on": ("validation",)}
  named = [f"protocol.{k} = {v}" for k, v in vars(config.protocol).items() if v in needs.get(k, ())]
  for task in benchmark.tasks:
    if named and not len(task.valid.index):
      raise UserError(
        f"{', '.join(named)}: task {task.name!r} has no validation images; give some, or raise "
        "protocol.validation_fraction"
      )
  if config.protocol.evaluate_on == "test":
    return benchmark
  return benchmark._replace(tasks=tuple(t._replace(test=t.valid) for t in benchmark.tasks))


def plan(config: Config) -> dict:
  """What a run of this config would do, as plain numbers and texts (--dry_run)."""
  config = resolve(config)
  image_shape, tasks, missing = _planned_tasks(config)
  model = network_of(config, max(t["num_classes"] for t in tasks))
  shapes, _ = jax.eval_shape(
    lambda key: networks.initialize(model, key, image_shape), jax.random.key(0)
  )
  perturbed = trees.layer_names(shapes)
  flat = traverse_util.flatten_dict(shapes, sep="/")
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


def _planned_tasks(config: Config) -> tuple[tuple, list[dict], str]:
  """Image shape, tasks; of the protocol if the data are not there, and then why."""
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


def run(
  config: config_dict.ConfigDict | Config,
  path: str,
  show: Callable[[dict], None] = lambda event: None,
  overwrite: bool = False,
  stop_asked: Callable[[], bool] = lambda: False,
  gang: replicas.Gang | None = None,
  read: Callable | None = None,
) -> dict:
  """Learns all tasks of a config one after another and writes the record.

  A run that was interrupted goes on where it was; one that is finished returns its record.

  Args:
    config: from `make_config`, overrides applied.
    path: folder of the run (`workdir.py`); made if it isn't there.
    show: is called with every event that goes to metrics.jsonl.
    overwrite: delete the run that is in the folder first.
    stop_asked: asked between the chunks of training; True stops the run.
    gang: of the threads in which other runs are learned at the same time.
    read: for a run that is finished, by default from `identity.shared_read`.

  Returns:
    The contents of record.json.

  Raises:
    UserError: for a config, data or folder that can't be used; nothing is lost or half-written.
    Stopped: if `stop_asked` said so; the same call goes on from there.
    Diverged: if the loss is not a number.
  """
  config = resolve(config)
  if config.deterministic and jax.distributed.is_initialized():
    determinism.require()  # before the first message starts the backend
  _require_one_run(config, overwrite)
  if not overwrite and (record := identity.finished_record(path, config.to_dict())):
    known = read or identity.shared_read()
    processes.run_on_leader(lambda: identity.require_same_data(config, path, known, show))
    show({"event": "finished"})
    return record
  if config.deterministic:
    determinism.require()
  built = processes.run_on_all(lambda: gang.build(build, config) if gang else build(config))
  benchmark = built[0]
  processes.require_same("other images", lambda: benchmark.split_hash)
  now = standing.of(benchmark)
  software = now["flags"] | standing.versions()
  processes.require_same("other JAX flags or versions", lambda: json.dumps(software))
  now["machine"] = standing.machine()
  strict = config.checkpoint.strict
  with (
    workdir.opened(path, config.to_dict(), overwrite, strict, stop_asked, now) as folder,
    measure.compile_clock() as compiled,
  ):

    def log(event: dict):
      if event["event"] != "progress":  # between the chunks of an epoch: to be seen, not kept
        folder.log(event)
      show(event)

    if folder.said:
      show({"event": "standing", "said": folder.said})
    folder.describe(benchmark)
    record = _learn_all(config, built, folder, log, show, compiled, gang)
    record["standing"] = folder.standing
    folder.finish(record)
  return record


def _require_one_run(config: Config, overwrite: bool) -> None:
  """Of several processes: that they share batches, mean the same run and compute the same."""
  if processes.count() == 1:
    return
  if config.parallel in ("none", "replicas"):
    raise UserError(
      f"parallel = {config.parallel!r} shares no batch out, so {processes.count()} processes would "
      "do the same work: set parallel=auto, or sweep with --shard"
    )
  if config.deterministic:
    determinism.require()  # before the first message starts the backend
  flat = keys.flat(config.to_dict()) | {"overwrite": overwrite}
  known = {k: v for k, v in flat.items() if k not in ("data_dir", "data.cache")}
  processes.require_same("other config", lambda: repr(sorted(known.items())))
  if jax.default_backend() == "gpu" and not config.deterministic:
    raise UserError("several processes on GPUs must compute the same bits: set deterministic=True")


def _learn_all(config: Config, built, folder, log, show, compiled, gang) -> dict:
  """Folds `learn` over the tasks that are not learned yet; returns the record."""
  benchmark, model, method, layout = built
  num_tasks = len(benchmark.tasks)
  init_key, learn_key = jax.random.split(jax.random.key(config.seed))
  done, state, results = folder.restore_state() or (0, method.init(init_key, benchmark), {})
  state = methods.restore(config.method.name, state)
  state = population.complete(state, networks.statistics_of(model, benchmark.image_shape))
  if unmeasured := population.unmeasured(state):
    note = f"{len(unmeasured)} tasks are of a version that kept no statistics of BatchNorm: "
    note += "what is predicted for them depends on the other images of a batch"
    show({"event": "note", "note": note})
  rows = results.get("rows", [])
  accuracy = np.array(results.get("accuracy", np.full((num_tasks, num_tasks), np.nan)), float)
  for position, group in list(enumerate(method.groups(num_tasks), 1))[done:]:
    t = group[-1]
    tasks = tuple(benchmark.tasks[i] for i in group)
    place = {"t": t, "num_tasks": num_tasks, "task": tasks[-1].name, "task_id": tasks[-1].id}
    measure.forget_peak()
    with measure.measure(compiled) as learning:
      store = Store(f"task{t:02d}", log, folder.keep(), gang)
      notes = benchmark.notes if position == 1 else ()
      begin = [*({"event": "note", "note": note} for note in notes), {"event": "task"} | place]
      # logged once: a task that goes on after an interruption has begun already
      store.once("begin", lambda begin=begin: [log(event) for event in begin] and True)
      state, history = method.learn(state, tasks, jax.random.fold_in(learn_key, t), store)
      jax.block_until_ready(state)
    processes.require_same(
      f"other weights after task {t}", functools.partial(checkpoint.fingerprint, state)
    )
    with measure.measure(compiled) as evaluating:
      accuracy[t, : t + 1], valid = _evaluate(config, benchmark, method, layout, state, t)
    size = method.size(state)
    row = {
      "ranks": history.get("ranks"),
      "ranks_exact": history.get("ranks_exact"),
      "size": {k: v for k, v in size._asdict().items() if k != "paper"},
      "increment": size.increment,
      "seconds": measure.seconds(learning, evaluating, history.get("select_seconds", 0.0)),
      "validation_accuracy": None if np.isnan(valid) else valid,
      "memory_bytes": measure.peak_memory(),
    }
    rows = [*rows, row]  # the list before may still be on its way to the disk
    log({"event": "evaluation"} | place | row | {"accuracy": accuracy[t, : t + 1].tolist()})
    nulls = [[None if np.isnan(x) else x for x in a] for a in accuracy]
    folder.save_state(position, state, {"rows": rows, "accuracy": nulls})
    folder.check()
  return _record(config, benchmark, model, accuracy, rows, state)


def _evaluate(config: Config, benchmark, method, layout, state, t) -> tuple[list[float], float]:
  """Test accuracy on the tasks up to t, validation accuracy on task t."""
  size = config.images_per_evaluation
  test = evaluate(
    lambda i, image: method.predict(state, i, layout.shard(image)),
    benchmark.tasks[: t + 1],
    "test",
    size,
  )
  (valid,) = evaluate(
    lambda _, image: method.predict(state, t, layout.shard(image)),
    benchmark.tasks[t : t + 1],
    "valid",
    size,
  )
  return test, valid


def _record(config: Config, benchmark, model, accuracy, rows, state) -> dict:
  """The contents of record.json (docs/configuration.md for `config`)."""
  return {
    "schema": SCHEMA,
    "method": config.method.name,
    "benchmark": benchmark.name,
    "order": config.order,
    "seed": config.seed,
    "accuracy": [[None if np.isnan(x) else x for x in row] for row in accuracy],
    "task_ids": [task.id for task in benchmark.tasks],
    "task_names": [task.name for task in benchmark.tasks],
    "average_accuracy": metrics.average_accuracy(accuracy),
    "bwt": metrics.bwt(accuracy),
    "forgetting": metrics.forgetting(accuracy),
    **{key: [row[key] for row in rows] for key in rows[0]},
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
