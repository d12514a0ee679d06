"""Population statistics: what they are, and that a prediction depends on its image alone."""

import contextlib
import functools
import io
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halrp_jax import __main__ as verbs
from halrp_jax import methods, models
from halrp_jax.config import make_config, resolve
from halrp_jax.deploy import export, saved
from halrp_jax.methods import stl
from halrp_jax.models import lenet
from halrp_jax.runs import experiment, states, workdir
from halrp_jax.training import batches, networks, population, sizes
from halrp_jax.types import CHECKPOINTS, CONFIG, RECORD, Inputs, Split, State, Task, UserError

from ..conftest import interrupt
from ..methods.test_networks_and_methods import SMALL

INPUTS = Inputs(np.full(3, 0.4, np.float32), np.full(3, 0.3, np.float32), None)


def random_task(num_images: int, size: int = 32) -> Task:
  rng = np.random.default_rng(num_images)
  image = jnp.asarray(rng.integers(0, 256, (num_images, size, size, 3), np.uint8))
  index = jnp.asarray(rng.permutation(num_images), jnp.int32)
  split = Split(image, index, index % 3)
  return Task(0, "random", ("a", "b", "c"), INPUTS, split, split, split)


def network(name: str, size: int = 32):
  """A small model, parameters and statistics that do not fit anything."""
  model = models.make(name, 3, "population").clone(**SMALL[name])
  params, stats = jax.jit(lambda key: networks.initialize(model, key, (size, size, 3)))(
    jax.random.key(1)
  )
  # by NumPy: nothing is compiled for it
  shifts = jax.tree.map(lambda x: 0.1 * np.cos(np.arange(x.size)).reshape(x.shape), params)
  move = lambda x, shift: jnp.asarray(np.asarray(x) + shift, jnp.float32)
  return model, jax.tree.map(move, params, shifts), jax.tree.map(lambda x: move(x, 5), stats)


def measured(name: str, task: Task, batch_size: int, size: int = 32):
  model, params, stats = network(name, size)

  def logits_fn(shared, learned, image):
    return networks.apply_model(model, params, learned.stats, image, False, None)[0]

  return population.make_measure(logits_fn, batch_size)(
    {}, stl.TaskState(params, stats, np.int32(3)), task
  )


@pytest.mark.parametrize(
  "name", ["lenet", pytest.param("alexnet", marks=pytest.mark.slow), "resnet18"]
)
def test_statistics_are_those_of_each_layers_inputs_over_all_images(name):
  """Against mean and unbiased variance in float64 of what reaches each layer, all images at once,
  every layer using its own."""
  task = random_task(50)
  model, params, _ = network(name)
  stats = measured(name, task, 16)

  @jax.jit
  def inputs_of_layers(variables, image):
    seen = {}

    def record(next_fun, args, kwargs, context):
      if type(context.module).__name__ == "BatchNorm" and context.method_name == "__call__":
        seen[context.module.path] = args[0], context.module.get_variable("params", "input_bias")
      return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
      model.apply(variables, image, train=False)
    return seen

  image, _ = batches.load_batch(task.train, task.inputs, np.arange(50))
  seen = inputs_of_layers({"params": params, "batch_stats": stats}, image)
  assert len(seen) == len(jax.tree.leaves(stats)) / 2 > 3
  for path, (x, shift) in seen.items():
    found = stats
    for key in path:
      found = found[key]
    rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    np.testing.assert_allclose(
      found["mean"], rows.mean(0) + np.asarray(shift), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(found["var"], rows.var(0, ddof=1), rtol=1e-5, atol=1e-7)


def test_of_a_network_computed_by_hand():
  """A whole small LeNet in float64 numpy, layer after layer, each pass over all images."""
  task = random_task(20, 8)
  _, params, _ = network("lenet", 8)
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  mean, std = (np.asarray(x, np.float64)[None, None, None] for x in INPUTS[:2])
  x = (np.asarray(task.train.image, np.float64) / 255 - mean) / std
  want = {}

  def norm(x, name):
    rows, q = x.reshape(-1, x.shape[-1]), p[name]
    want[name] = {"mean": rows.mean(0) + q["input_bias"], "var": rows.var(0, ddof=1)}
    rows = (rows - rows.mean(0)[None]) / np.sqrt(rows.var(0, ddof=1) + 1e-5)[None]
    return np.maximum(rows * q["scale"][None] + q["bias"][None], 0).reshape(x.shape)

  for i in (1, 2):
    kernel, side = p[f"conv{i}"]["kernel"], x.shape[1]
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    x = sum(
      padded[:, a : a + side, b : b + side] @ kernel[a, b] for a in range(5) for b in range(5)
    )
    x = norm(x, f"bn{i}")
    x = x.reshape(len(x), side // 2, 2, side // 2, 2, -1).max((2, 4))
  x = x.reshape(len(x), -1)
  for i in (1, 2):
    x = norm(x @ p[f"fc{i}"]["kernel"], f"bn_fc{i}")
  for batch_size in (3, 20, 64):
    got = measured("lenet", task, batch_size, 8)
    check = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(check, got, want)


def test_a_network_without_batch_norm_has_none():
  learned = stl.TaskState({}, {}, np.int32(3))
  assert population.make_measure(lambda *args: None, 8)({}, learned, random_task(4)) == {}


def test_flax_batch_norm_is_measured_too():
  """Also along another axis."""

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
      x = nn.BatchNorm(use_running_average=not train, axis=1, name="norm")(x)
      return nn.Dense(3, name="head")(x.reshape(len(x), -1))

  task = random_task(9, 4)
  variables = Net().init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))

  def logits_fn(shared, learned, image):
    return Net().apply({"params": variables["params"], "batch_stats": learned.stats}, image)

  learned = stl.TaskState(variables["params"], variables["batch_stats"], np.int32(3))
  got = population.make_measure(logits_fn, 4)({}, learned, task)
  x = np.asarray(batches.load_batch(task.train, INPUTS, np.arange(9))[0], np.float64)
  np.testing.assert_allclose(got["norm"]["mean"], x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
  rows = x.transpose(0, 2, 3, 1).reshape(-1, 4)
  np.testing.assert_allclose(got["norm"]["var"], rows.var(0, ddof=1), rtol=1e-5)


def test_a_batch_norm_that_can_not_be_watched_is_refused_before_training():
  class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x)))

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
      x = nn.remat(Block)()(x)
      return nn.Dense(3, name="head")(x.reshape(len(x), -1))

  with pytest.raises(UserError, match="method.batch_norm=running"):
    population.require_measurable(Net(), (4, 4, 3))
  population.require_measurable(models.make("lenet", 3).clone(**SMALL["lenet"]), (8, 8, 3))


# --- in a run ---------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def small_lenet():
  """One convolution and one hidden layer, each with BatchNorm, are enough in a run."""
  small = functools.partial(lenet.LeNet, channels=(4,), hidden=(12,))
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(models.NETWORKS, "lenet", small)
    yield


def of_digits(digits_config, **keys):
  defaults = {"network": "lenet", "epochs": 2, "train_fraction": 0.2, "order": "0,1"}
  return digits_config(keys.pop("method", "halrp"), **(defaults | keys))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
  """HALRP on two tasks of digits with a network that has BatchNorm, learned with `batch`."""
  config = make_config(
    "halrp",
    benchmark="digits",
    network="lenet",
    order="0,1",
    epochs=2,
    batch_size=64,
    train_fraction=0.2,
    protocol={},
    every_method={"batch_norm": "batch"},
    methods_={"halrp": {"l1": 1e-5}},
  )
  folder = tmp_path_factory.mktemp("population") / "run"
  experiment.run(config, str(folder))
  return folder


def images_of(run, t: int):
  """A thousand images with noise, so that no two are the same."""
  rng = np.random.default_rng(t)
  return rng.integers(0, 256, (1000, *run.benchmark.tasks[t].train.image.shape[1:]), np.uint8)


@pytest.mark.parametrize("form", ["run", "many", "safetensors", "orbax", "merged", "stablehlo"])
def test_an_image_is_predicted_alone_as_in_any_batch(run_folder, form, tmp_path):
  """Although the run's own accuracies are those of test batches."""
  run = saved.open_run(str(run_folder))
  image = images_of(run, 1)
  if form == "run":
    classify = saved.make_classifier(run, 1)
  elif form == "many":
    many = saved.make_predict_many(run)

    def classify(image):
      return many(np.full(len(image), run.benchmark.tasks[1].id), image)

  elif form == "stablehlo":
    program = export.program(run, 1)

    def classify(image):
      return np.asarray(program.call(image))

  else:
    format_ = "safetensors" if form == "merged" else form
    list(export.write(run, str(tmp_path), [1], format_, form == "merged"))
    classify = export.load(str(tmp_path), run.benchmark.tasks[1].id).classify
  whole, order = np.asarray(classify(image)), np.argsort(image.sum((1, 2, 3)))
  np.testing.assert_allclose(np.asarray(classify(image[order])), whole[order], atol=1e-5)
  for i in (0, 17, 999):
    np.testing.assert_allclose(np.asarray(classify(image[i : i + 1])), whole[i : i + 1], atol=1e-5)
  assert np.ptp(whole, 0).max() > 0.01


def test_the_kinds_train_alike_and_differ_in_evaluation(digits_config, run_folder, tmp_path):
  config = of_digits(digits_config, epochs=2, **{"method.l2": 0.0})
  record = experiment.run(config, str(tmp_path / "run"))
  batch = json.loads((run_folder / "record.json").read_text(encoding="utf-8"))
  assert record["state_hash"] == batch["state_hash"]
  assert record["ranks"] == batch["ranks"] and record["bwt"] == 0
  assert record["accuracy"] != batch["accuracy"]


def test_a_task_keeps_the_statistics_of_its_own_images(digits_config):
  """Where shared weights move on, they are not taken again."""
  config = resolve(of_digits(digits_config, method="l2"))
  benchmark, _, method, _ = experiment.build(config)
  state = method.init(jax.random.key(0), benchmark)
  store = experiment.Store("test", lambda event: None)
  states = []
  for t in range(2):
    state, _ = method.learn(state, (benchmark.tasks[t],), jax.random.key(t), store)
    states.append(state)
  first, last = (s.tasks[0].stats for s in states)
  jax.tree.map(np.testing.assert_array_equal, first, last)
  second = states[1].tasks[1].stats
  assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True))
  size = method.size(state)
  own = sizes.count_leaves([p.stats for p in state.tasks])
  assert own and size.dense == size.paper + own
  assert size.training_only > sizes.count_leaves(state.shared["stats"])


def test_running_statistics_are_left_as_training_made_them(digits_config):
  config = resolve(of_digits(digits_config, **{"method.batch_norm": "running"}))
  benchmark, model, method, _ = experiment.build(config)
  plain = methods.METHODS["halrp"].make(config.method, methods.setup_of(config, model, benchmark))
  store, task = experiment.Store("test", lambda event: None), benchmark.tasks[:1]
  states = [
    m.learn(m.init(jax.random.key(0), benchmark), task, jax.random.key(0), store)[0]
    for m in (method, plain)
  ]
  jax.tree.map(np.testing.assert_array_equal, *states)


# --- folders of versions that kept none -----------------------------------------------


def without_statistics(folder) -> None:
  """Makes a run's folder one of an older version, whose tasks were dicts without statistics."""
  state, results = states.newest_state(str(folder))
  config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
  shutil.rmtree(folder / CHECKPOINTS)
  (folder / RECORD).unlink(missing_ok=True)
  tasks = tuple(p._asdict() | {"stats": {}} for p in state.tasks)
  now = json.loads((folder / "standing.json").read_text(encoding="utf-8"))
  with workdir.opened(str(folder), config, False, False, lambda: False, now) as opened:
    opened.save_state(len(tasks), State(state.shared, tasks), results["rows"])


def test_an_old_folder_is_opened_and_says_what_it_lacks(run_folder, tmp_path):
  folder = tmp_path / "old"
  shutil.copytree(run_folder, folder)
  without_statistics(folder)
  run = saved.open_run(str(folder))
  assert population.unmeasured(run.state) == (0, 1)
  assert "stored no BatchNorm statistics" in saved.missing_statistics(run)
  p = saved.make_classifier(run, 0)(images_of(run, 0)[:8])
  assert np.isfinite(p).all()
  with pytest.raises(saved.UserError, match="stored no BatchNorm statistics"):
    saved.make_predict_many(run)
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    code = verbs.main(
      ["halrp_jax", "export", f"--workdir={folder}", f"--out={tmp_path}/model", "--merge"]
    )
  assert code == 0 and out.getvalue().count("stored no BatchNorm statistics") == 1
  loaded = export.load(f"{tmp_path}/model", run.benchmark.tasks[0].id)
  assert loaded.card["depends_on_batch"]
  np.testing.assert_allclose(loaded.classify(images_of(run, 0)[:8]), p, atol=1e-5)


def test_an_old_run_that_was_interrupted_goes_on(digits_config, tmp_path):
  """The tasks to come have statistics."""
  config = of_digits(digits_config, method="stl", **{"method.batch_norm": "batch"})
  interrupt(config, tmp_path / "run", 1)
  without_statistics(tmp_path / "run")
  events = []
  record = experiment.run(config, str(tmp_path / "run"), events.append)
  assert np.isfinite(record["average_accuracy"])
  assert [
    e for e in events if e["event"] == "note" and "stored no BatchNorm statistics" in e["note"]
  ]
  assert population.unmeasured(saved.open_run(str(tmp_path / "run")).state) == (0,)
