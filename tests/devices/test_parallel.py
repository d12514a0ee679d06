"""Several devices give what one gives. In processes of their own: XLA counts devices once."""

import functools
import itertools
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halrp_jax import methods, models
from halrp_jax.config import make_config, resolve
from halrp_jax.devices import compile_cache, parallel
from halrp_jax.methods import stl
from halrp_jax.runs import checkpoint, experiment, sweep
from halrp_jax.training import networks, population
from halrp_jax.training.fit import make_fit
from halrp_jax.types import Benchmark, Inputs, Split, Store, Task, UserError

from ..conftest import ROOT, interrupt
from ..methods.test_networks_and_methods import SMALL

MODES = ("sharded", "pmap")
SHAPES = SMALL | {"lenet": {"channels": (4,), "hidden": (12,)}}
SLOW = pytest.mark.slow


def in_a_process(num_devices: int, call: str):
  """Returns what a function of this module returns where there are so many devices, by JSON."""
  flags = os.environ.get("XLA_FLAGS", "")
  flags += f" --xla_force_host_platform_device_count={num_devices}"
  code = f"import json; import tests.devices.test_parallel as t; print(json.dumps(t.{call}))"
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def trained(network: str) -> dict:
  """Losses of three epochs of 22 images in batches of 8, and norms of what was learned, by mode."""
  return {mode: _trained(network, mode) for mode in MODES}


def _trained(network: str, mode: str) -> dict:
  config = make_config(
    "stl",
    benchmark="digits",
    network=network,
    epochs=3,
    batch_size=8,
    parallel=mode,
    protocol={},
  )
  config = resolve(config)
  rng = np.random.default_rng(0)
  image = jnp.asarray(rng.integers(0, 256, (30, 32, 32, 3), np.uint8))

  def split(*rows):
    index = np.arange(*rows, dtype=np.int32)
    return Split(image, jnp.asarray(index), jnp.asarray(index % 3))

  inputs = Inputs(np.full(3, 0.5, np.float32), np.full(3, 0.3, np.float32), None)
  task = Task(0, "a", ("a", "b", "c"), inputs, split(22), split(22, 26), split(26, 30))
  layout = parallel.make_layout(config.parallel)
  model = models.make(network, 3, axis_name=layout.axis_name).clone(**SHAPES[network])
  setup = methods.setup_of(config, model, Benchmark("", (task,), "", False), layout)
  fit = make_fit(setup, *networks.plain_network(model))
  params, stats = networks.initialize(model, jax.random.key(0), (32, 32, 3))
  losses = []
  store = Store("fit", lambda e: losses.append(e["loss"]) if e["event"] == "epoch" else None)
  params, stats = fit(params, stats, {"l2": 1e-3}, task, jax.random.key(1), 3, store)
  leaves = jax.tree.leaves((params, stats))
  return {
    "losses": losses,
    "norms": [float(jnp.linalg.norm(x)) for x in leaves],
    "devices": max(len(x.sharding.device_set) for x in leaves),
  }


def learned(method: str, mode: str, folder: str, **keys) -> dict:
  """A short run of four tasks of digits, with the programs compiled for each of them."""
  count, seen = 0, []

  def listen(event, seconds, **_):
    nonlocal count
    count += event == "/jax/core/compile/backend_compile_duration"

  def show(event):
    if event["event"] == "evaluation":
      seen.append(count)

  jax.monitoring.register_event_duration_secs_listener(listen)
  config = digits(method, order="0,1,2,3", parallel=mode, **keys)
  record = experiment.run(config, folder, show)
  jax.monitoring.unregister_event_duration_listener(listen)
  compiled = [b - a for a, b in itertools.pairwise([0, *seen])]
  found = {key: record[key] for key in ("accuracy", "ranks", "state_hash")}
  return found | {"compiled": compiled}


def digits(method: str, **keys):
  shape = {"benchmark": "digits", "order": "0,1", "network": "mlp", "epochs": 3, "batch_size": 64}
  return make_config(method, protocol={}, **(shape | keys))


def runs(method: str, folder: str) -> dict:
  """(method, folder) -> the run in every mode."""
  return {mode: learned(method, mode, f"{folder}/{mode}") for mode in MODES}


def half(folder: str) -> None:
  """A run that ends after its first task; the second trains the same weights further."""
  interrupt(digits("l2"), folder, 1)


def continued(folder: str) -> dict:
  """What becomes of the run in a folder; it says how many devices its weights lie on."""
  record = experiment.run(digits("l2"), folder)
  return {"accuracy": record["accuracy"], "devices": jax.local_device_count()}


def statistics() -> str:
  """The hash of population statistics measured with arrays that are whole on every device here."""
  rng = np.random.default_rng(30)
  image = jnp.asarray(rng.integers(0, 256, (30, 32, 32, 3), np.uint8))
  index = jnp.arange(30, dtype=jnp.int32)
  split = Split(image, index, index % 3)
  inputs = Inputs(np.full(3, 0.4, np.float32), np.full(3, 0.3, np.float32), None)
  task = Task(0, "random", ("a", "b", "c"), inputs, split, split, split)
  layout = parallel.make_layout("sharded")
  model = models.make("lenet", 3, "population").clone(**SHAPES["lenet"])
  params, stats = networks.initialize(model, jax.random.key(1), (32, 32, 3))
  stats = jax.tree.map(lambda x: x + 5, stats)
  params, stats, task = (layout.replicate(x) for x in (params, stats, task))

  def logits_fn(shared, learned, image):
    return networks.apply_model(model, learned.params, learned.stats, image, False, None)[0]

  learned = stl.TaskState(params, stats, np.int32(3))
  return checkpoint.fingerprint(population.make_measure(logits_fn, 8)({}, learned, task))


def everything(folder: str) -> dict:
  """All that the tests ask of four devices, in one process; `folder` gets a run to be continued."""
  compile_cache.use("")
  half(f"{folder}/half")
  hosted = {
    mode: learned("l2", mode, f"{folder}/hosted/{mode}", data_={"residence": "host"})
    for mode in MODES
  }
  found = {"trained": trained("lenet"), "runs": runs("l2", folder), "statistics": statistics()}
  return found | {"hosted": hosted}


@pytest.fixture(scope="module")
def four(tmp_path_factory):
  """What four devices give, and "folder" of the run that they left."""
  folder = str(tmp_path_factory.mktemp("four"))
  return {"folder": f"{folder}/half"} | in_a_process(4, f"everything({folder!r})")


@pytest.fixture(scope="module")
def alone():
  """(network) -> what is trained on the one device here."""
  return functools.cache(lambda network: _trained(network, "sharded"))


def check_trained(found: dict, num_devices: int, want: dict) -> None:
  """The last batch of an epoch has 6 images: no multiple of 4."""
  assert want["devices"] == 1 and found.keys() == set(MODES)
  for got in found.values():
    assert got["devices"] == num_devices
    np.testing.assert_allclose(got["losses"], want["losses"], rtol=2e-3)
    np.testing.assert_allclose(got["losses"][0], want["losses"][0], rtol=1e-4)
    np.testing.assert_allclose(got["norms"], want["norms"], rtol=0.02, atol=1e-3)


def test_four_devices_train_as_one_does(four, alone):
  check_trained(four["trained"], 4, alone("lenet"))


@SLOW
@pytest.mark.parametrize("num_devices", [2, 4, 8])
@pytest.mark.parametrize("network", ["lenet", "resnet18"])
def test_many_devices_train_as_one_does(network, num_devices, alone):
  found = in_a_process(num_devices, f"trained({network!r})")
  check_trained(found, num_devices, alone(network))


def check_runs(found: dict, method: str, folder) -> None:
  """Ranks and accuracies are those of one device."""
  want = learned(method, "sharded", str(folder))
  for got in found.values():
    assert got["ranks"] == want["ranks"]
    for a, b in zip(got["accuracy"], want["accuracy"], strict=True):
      np.testing.assert_allclose(*([x for x in row if x is not None] for row in (a, b)), atol=1.5)


def test_runs_on_many_devices_have_the_same_accuracies(four, tmp_path):
  check_runs(four["runs"], "l2", tmp_path)


@SLOW
@pytest.mark.parametrize("method", ["halrp", "ewc", "gpm", "wsn"])
def test_runs_of_other_methods_have_the_same_ranks_and_accuracies(method, tmp_path):
  found = in_a_process(4, f"runs({method!r}, {str(tmp_path / 'four')!r})")
  check_runs(found, method, tmp_path)
  if method == "halrp":
    for run in found.values():
      check_compiled(run["compiled"])


def check_compiled(counts: list[int]) -> None:
  first, second, third, fourth = counts
  assert first and second and (third, fourth) == (0, 0)


@pytest.mark.parametrize("mode", MODES)
def test_images_in_host_memory_give_the_same_bits_on_many_devices(mode, four):
  on_device, hosted = four["runs"][mode], four["hosted"][mode]
  assert hosted["state_hash"] == on_device["state_hash"]
  assert hosted["accuracy"] == on_device["accuracy"]


@pytest.mark.parametrize("mode", MODES)
def test_later_tasks_compile_nothing(mode, four):
  check_compiled(four["runs"][mode]["compiled"])


def test_a_run_of_four_devices_goes_on_with_one_and_with_eight(four, tmp_path):
  for name in ("one", "eight"):
    shutil.copytree(four["folder"], tmp_path / name)
  one = continued(str(tmp_path / "one"))
  eight = in_a_process(8, f"continued({str(tmp_path / 'eight')!r})")
  assert (one["devices"], eight["devices"]) == (1, 8)
  assert one["accuracy"][0] == eight["accuracy"][0] and one["accuracy"][1][1] > 50
  np.testing.assert_allclose(one["accuracy"][1], eight["accuracy"][1], atol=1.5)


def test_several_devices_measure_population_statistics_to_the_same_bits(four):
  assert four["statistics"] == statistics()


def at_once(folder: str) -> dict:
  """Four runs as one program."""
  cells = sweep.cells({"halrp": digits("halrp")}, "", "0,1,2,3")
  rows = sweep.run(cells, folder, lambda rows: None, lambda: False, True)
  return {"accuracy": [row["accuracy"] for row in rows]}


@SLOW
def test_runs_at_once_are_shared_out_over_devices(tmp_path):
  one, many = (in_a_process(n, f"at_once({str(tmp_path / str(n))!r})") for n in (1, 4))
  np.testing.assert_allclose(one["accuracy"], many["accuracy"], atol=1.5)
  assert len(set(many["accuracy"])) > 1


def test_what_needs_the_whole_batch_refuses_pmap():
  with pytest.raises(UserError, match="parallel = 'pmap'.*prd.*set parallel=sharded"):
    resolve(digits("prd", parallel="pmap"))


def test_one_device_is_left_alone():
  layout = parallel.make_layout("auto")
  assert layout.axis_name is None
  tree = {"x": np.zeros(3)}
  assert layout.shard(tree) is tree and layout.replicate(tree) is tree
