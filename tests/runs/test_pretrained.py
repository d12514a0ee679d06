"""A base that others have trained: read by name and shape, and built upon."""

import flax.linen as nn
import jax
import numpy as np
import pytest
import safetensors.numpy as safetensors
from flax import traverse_util

from halrp_jax import data, methods, models
from halrp_jax.config import resolve
from halrp_jax.deploy import export, saved
from halrp_jax.runs import checkpoint, experiment, identity, pretrained
from halrp_jax.training import batches, networks
from halrp_jax.training.fit import make_fit
from halrp_jax.types import Stopped, Store, UserError

SHAPE = (8, 8, 1)
MODEL = models.make("mlp", 10)


@pytest.fixture(scope="module")
def params():
  return networks.initialize(MODEL, jax.random.key(3), SHAPE)[0]


def write(path, params, separator="/", **more):
  flat = traverse_util.flatten_dict(params, sep=separator)
  safetensors.save_file({k: np.asarray(x) for k, x in flat.items()} | more, path)


@pytest.mark.parametrize("kind", ["slashes", "dots", "collections", "orbax"])
def test_parameters_come_back_from_every_form(tmp_path, params, kind):
  path = tmp_path / "base"
  if kind == "orbax":
    checkpoint.save_plain(path, {"params": params})
  else:
    tree = {"params": params} if kind == "collections" else params
    write(path, tree, "." if kind == "dots" else "/")
  got, stats = pretrained.load(str(path), MODEL, SHAPE)
  jax.tree.map(np.testing.assert_array_equal, got, params)
  assert stats == {}


def test_a_head_for_other_classes_starts_fresh(tmp_path, params):
  write(tmp_path / "base", params)
  wide = models.make("mlp", 7)
  got, _ = pretrained.load(str(tmp_path / "base"), wide, SHAPE, jax.random.key(5))
  fresh, _ = networks.initialize(wide, jax.random.key(5), SHAPE)
  np.testing.assert_array_equal(got["fc1"]["kernel"], params["fc1"]["kernel"])
  np.testing.assert_array_equal(got["head"]["kernel"], fresh["head"]["kernel"])


@pytest.mark.parametrize(
  ("spoil", "says"),
  [
    (lambda p: p["fc1"].pop("kernel"), "missing array params/fc1/kernel for network=mlp"),
    (
      lambda p: p.update(fc9={"bias": np.zeros(2)}),
      "unexpected array params/fc9/bias for network=mlp",
    ),
    (lambda p: p["fc2"].update(bias=np.zeros(3)), r"fc2/bias is \(3,\), expected \(256,\)"),
  ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, params, spoil, says):
  params = {name: dict(layer) for name, layer in params.items()}
  spoil(params)
  write(tmp_path / "base", params)
  with pytest.raises(UserError, match=says):
    pretrained.load(str(tmp_path / "base"), MODEL, SHAPE)


@pytest.mark.parametrize("name", ["nowhere", "text", "folder"])
def test_what_is_no_such_file_is_refused(tmp_path, name):
  (tmp_path / "text").write_text("x")
  (tmp_path / "folder").mkdir()
  with pytest.raises(UserError, match=f"{name}: can't be read"):
    pretrained.load(str(tmp_path / name), MODEL, SHAPE)


def test_a_head_is_trained_on_it_and_the_next_task_learned(params, digits_config):
  """The features stay those of the file, in both."""
  config = resolve(digits_config("halrp", **{"method.prune": "none"}))
  benchmark, model, method, _ = experiment.build(config)
  first, second = benchmark.tasks[:2]
  store = Store("test", lambda event: None)
  setup = methods.setup_of(config, model, benchmark)
  head_fit = make_fit(setup, *networks.head_network(model))
  features = {name: x for name, x in params.items() if name != "head"}
  trained, stats = head_fit(
    {"head": params["head"]}, {}, {"params": features}, first, jax.random.key(0), 2, store
  )
  assert not np.allclose(trained["head"]["kernel"], params["head"]["kernel"])
  state = pretrained.base_state(config.method, first, features | trained, stats)
  np.testing.assert_array_equal(state.shared["kernels"]["fc1"], params["fc1"]["kernel"])
  for task, t in ((first, 0), (second, 1)):
    if t:
      state, _ = method.learn(state, (task,), jax.random.key(1), store.child("next"))
    image, label = batches.load_batch(task.test, task.inputs, np.arange(100))
    hits = np.argmax(method.predict(state, t, image), 1) == np.asarray(label)
    assert hits.mean() > 0.6  # chance is 0.1


def test_a_kernel_that_is_no_matrix_is_refused_by_name(params, digits_config):
  config = resolve(digits_config("halrp"))
  task = data.load(config).tasks[0]
  odd = params | {"gate": {"kernel": np.ones(3, np.float32)}}
  with pytest.raises(UserError, match=r"gate/kernel: shape \(3,\), expected at least two axes"):
    pretrained.base_state(config.method, task, odd, {})


# --- from the command line ----------------------------------------------------------------


@pytest.fixture
def base_file(tmp_path, params):
  write(tmp_path / "base.safetensors", params)
  return str(tmp_path / "base.safetensors")


@pytest.mark.parametrize("training", ["all", "head", "none"])
def test_the_first_task_trains_what_base_training_says(training, base_file, params, digits_config):
  more = {"base": base_file, "base_training": training, "order": "3,1", "epochs": 2}
  config = resolve(digits_config("halrp", **more))
  benchmark, _, method, _ = experiment.build(config)
  state, _ = method.learn(
    method.init(jax.random.key(0), benchmark),
    benchmark.tasks[:1],
    jax.random.key(1),
    Store("test", lambda event: None),
  )
  kept = np.array_equal(state.shared["kernels"]["fc1"], params["fc1"]["kernel"])
  head = np.array_equal(state.tasks[0].rest["head"]["kernel"], params["head"]["kernel"])
  assert (kept, head) == {"all": (False, False), "head": (True, False), "none": (True, True)}[
    training
  ]


@pytest.mark.parametrize("method_name", ["halrp", "inflora", "sdlora"])
def test_the_first_task_can_be_learned_as_the_later_ones(
  method_name, base_file, params, digits_config
):
  """With base_training=perturb it leaves the base as it is, and what it adds is counted."""
  more = {"base": base_file, "base_training": "perturb", "order": "3,1", "epochs": 4}
  if method_name != "halrp":
    more |= {"method.rank": 4}
  config = resolve(digits_config(method_name, **more))
  benchmark, _, method, _ = experiment.build(config)
  state = method.init(jax.random.key(0), benchmark)
  for t, task in enumerate(benchmark.tasks):
    store = Store(f"{t}", lambda event: None)
    state, _ = method.learn(state, (task,), jax.random.key(t), store)
    image, label = batches.load_batch(task.test, task.inputs, np.arange(100))
    hits = np.argmax(method.predict(state, t, image), 1) == np.asarray(label)
    assert hits.mean() > 0.6  # chance is 0.1
    size = method.size(state)
    if method_name == "inflora":  # its branches are added to the kernels
      assert size.paper == size.base + t * (256 * 10 + 10)
    else:
      assert size.paper > size.base + t * (256 * 10 + 10) + 1000 * (t + 1)
  if method_name != "inflora":
    np.testing.assert_array_equal(state.shared["kernels"]["fc1"], params["fc1"]["kernel"])


def test_every_network_of_stl_starts_from_it(base_file, params, digits_config):
  config = resolve(digits_config("stl", base=base_file, learning_rate=1e-9, epochs=1))
  benchmark, _, method, _ = experiment.build(config)
  state = method.init(jax.random.key(0), benchmark)
  for i in (0, 1):
    key, store = jax.random.key(i), Store(f"{i}", lambda event: None)
    state, _ = method.learn(state, benchmark.tasks[i : i + 1], key, store)
    np.testing.assert_allclose(
      state.tasks[i].params["fc1"]["kernel"], params["fc1"]["kernel"], atol=1e-6
    )
  heads = [np.asarray(task.params["head"]["kernel"]) for task in state.tasks]
  assert not np.allclose(heads[0], heads[1]), "each network has a head of its own"


def test_a_run_is_resumed_with_the_same_base_alone(base_file, params, digits_config, tmp_path):
  config = digits_config("stl", base=base_file, order="3,1", epochs=1)
  asked = iter([False] * 3 + [True] * 100)
  with pytest.raises(Stopped):
    experiment.run(config, str(tmp_path / "run"), stop_asked=lambda: next(asked))
  other = jax.tree.map(lambda x: x + 1, params)
  write(tmp_path / "base.safetensors", other)
  with pytest.raises(UserError, match="base is another file"):
    experiment.run(config, str(tmp_path / "run"))
  write(tmp_path / "moved.safetensors", params)
  moved = digits_config("stl", base=str(tmp_path / "moved.safetensors"), order="3,1", epochs=1)
  record = experiment.run(moved, str(tmp_path / "run"))
  assert len(record["accuracy"]) == 2


@pytest.mark.parametrize(
  ("method_name", "more", "said"),
  [
    ("halrp", {"base_training": "head"}, "needs parameters that were trained elsewhere: set base="),
    (
      "stl",
      {"base_training": "head", "base": "F"},
      "is for halrp, inflora, sdlora; stl trains all",
    ),
    ("halrp", {"method.batch_norm": "frozen"}, "keeps the statistics of parameters that were"),
    ("halrp", {"base": "nowhere.safetensors"}, "nowhere.safetensors: can't be read"),
  ],
)
def test_configs_that_do_not_fit_are_refused(method_name, more, said, digits_config):
  with pytest.raises(UserError, match=said):
    experiment.build(resolve(digits_config(method_name, **more)))


class Normalised(nn.Module):
  """A user's own network, whose BatchNorm changes in training."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(8)(x.reshape(len(x), -1))
    return nn.Dense(10, name="head")(nn.BatchNorm(use_running_average=not train)(x))


def test_frozen_statistics_need_a_network_that_keeps_them(digits_config):
  config = resolve(digits_config("stl", **{"method.batch_norm": "frozen"}))
  with pytest.raises(UserError, match="Normalised has BatchNorm that training changes: give it"):
    methods.make(config, Normalised(), data.load(config))


@pytest.mark.parametrize(("benchmark", "framing"), [("custom", "whole"), ("digits", "auto")])
def test_older_runs_took_photographs_whole(benchmark, framing):
  config = {"base": "x.npz", "benchmark": benchmark, "data": {}, "method": {"name": "stl"}}
  identity._fill_in(config)
  assert config["data"]["framing"] == framing


def test_images_are_resized_for_the_network_and_its_export(base_file, digits_config, tmp_path):
  """The card of a task knows the size, so predictions take images as they are stored."""
  config = digits_config("stl", order="3,1", epochs=1, **{"data.image_size": 12})
  record = experiment.run(config, str(tmp_path / "run"))
  run = saved.open_run(str(tmp_path / "run"))
  assert run.benchmark.image_shape == (12, 12, 1) and run.stored_shape == (8, 8, 1)
  task = experiment.build(resolve(config))[0].tasks[0]
  image = np.asarray(task.test.image)[np.asarray(task.test.index)]
  found = saved.make_classifier(run, 0)(image)
  hits = np.mean(np.argmax(found, 1) == np.asarray(task.test.label))
  assert 100 * hits == pytest.approx(record["accuracy"][1][0])
  list(export.write(run, str(tmp_path / "out"), [0], "safetensors", True))
  np.testing.assert_allclose(export.load(tmp_path / "out", 3).classify(image), found, atol=1e-6)


def test_a_finished_run_is_of_one_base(base_file, params, digits_config, tmp_path):
  config = digits_config("stl", base=base_file, order="3,1", epochs=1)
  record = experiment.run(config, str(tmp_path / "run"))
  assert experiment.run(config, str(tmp_path / "run")) == record
  write(tmp_path / "base.safetensors", jax.tree.map(lambda x: x + 1, params))
  with pytest.raises(UserError, match="base is another file"):
    experiment.run(config, str(tmp_path / "run"))


def test_layers_may_be_named_as_those_of_another_library(tmp_path):
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      x = nn.relu(nn.Dense(5, name="embedding")(x.reshape(x.shape[0], -1)))
      return nn.Dense(3, name="head")(x)

  own = networks.initialize(Net(), jax.random.key(0), SHAPE)[0]
  write(tmp_path / "base", own)
  found, _ = pretrained.load(str(tmp_path / "base"), Net(), SHAPE)
  jax.tree.map(np.testing.assert_array_equal, found, own)


@pytest.mark.parametrize("name", ["ibpwf", "iru"])
def test_methods_whose_kernels_are_factors_refuse_a_base(name, base_file, digits_config):
  with pytest.raises(UserError, match=f"base: {name} makes its kernels of factors"):
    resolve(digits_config(name, base=base_file))
