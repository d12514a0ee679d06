"""Several devices give what one gives. In processes of their own: XLA counts devices once."""

import functools
import itertools
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from halrp_jax import methods, models
from halrp_jax.config import make_config, resolve
from halrp_jax.devices import parallel
from halrp_jax.runs import experiment, sweep
from halrp_jax.training import networks
from halrp_jax.training.fit import make_fit
from halrp_jax.types import Benchmark, Inputs, Split, Store, Task, UserError

from ..conftest import ROOT, interrupt
from ..methods.test_networks_and_methods import SMALL

MODES = ("sharded", "pmap")
SLOW = pytest.mark.slow


def in_a_process(num_devices: int, call: str, module: str = "devices.test_parallel"):
  """Returns what a function of a test module returns where there are so many devices, by JSON."""
  flags = f"--xla_force_host_platform_device_count={num_devices}"
  code = f"import json; import tests.{module} as t; print(json.dumps(t.{call}))"
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
  import jax

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
  image = jax.numpy.asarray(rng.integers(0, 256, (30, 32, 32, 3), np.uint8))

  def split(*rows):
    index = np.arange(*rows, dtype=np.int32)
    return Split(image, jax.numpy.asarray(index), jax.numpy.asarray(index % 3))

  inputs = Inputs(np.full(3, 0.5, np.float32), np.full(3, 0.3, np.float32), None)
  task = Task(0, "a", ("a", "b", "c"), inputs, split(22), split(22, 26), split(26, 30))
  layout = parallel.make_layout(config.parallel)
  model = models.make(network, 3, axis_name=layout.axis_name).clone(**SMALL[network])
  setup = methods.setup_of(config, model, Benchmark("", (task,), "", False), layout)
  fit = make_fit(setup, *networks.plain_network(model))
  params, stats = networks.initialize(model, jax.random.key(0), (32, 32, 3))
  losses = []
  store = Store("fit", lambda e: losses.append(e["loss"]) if e["event"] == "epoch" else None)
  params, stats = fit(params, stats, {"l2": 1e-3}, task, jax.random.key(1), 3, store)
  leaves = jax.tree.leaves((params, stats))
  return {
    "losses": losses,
    "norms": [float(jax.numpy.linalg.norm(x)) for x in leaves],
    "devices": max(len(x.sharding.device_set) for x in leaves),
  }


def learned(method: str, folder: str) -> dict:
  """Short runs on digits, by mode."""
  keys = ("accuracy", "ranks")
  runs = {mode: experiment.run(digits(method, parallel=mode), f"{folder}/{mode}") for mode in MODES}
  return {mode: {k: record[k] for k in keys} for mode, record in runs.items()}


def digits(method: str, **keys):
  shape = {"benchmark": "digits", "order": "0,1", "network": "mlp", "epochs": 2, "batch_size": 64}
  return make_config(method, protocol={}, **(shape | keys))


@pytest.fixture(scope="module")
def alone():
  """(call) -> what it returns on one device."""
  return functools.cache(functools.partial(in_a_process, 1))


@pytest.mark.parametrize("num_devices", [8, *(pytest.param(n, marks=SLOW) for n in (2, 4))])
@pytest.mark.parametrize("network", ["lenet", pytest.param("resnet18", marks=SLOW)])
def test_many_devices_train_as_one_does(network, num_devices, alone):
  """The last batch of an epoch has 6 images: no multiple of 4."""
  want = alone(f"trained({network!r})")["sharded"]
  assert want["devices"] == 1
  for got in in_a_process(num_devices, f"trained({network!r})").values():
    assert got["devices"] == num_devices
    np.testing.assert_allclose(got["losses"], want["losses"], rtol=2e-3)
    np.testing.assert_allclose(got["losses"][0], want["losses"][0], rtol=1e-4)
    np.testing.assert_allclose(got["norms"], want["norms"], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(
  "method", ["halrp", *(pytest.param(m, marks=SLOW) for m in ("ewc", "gpm", "wsn"))]
)
def test_runs_on_many_devices_have_the_same_ranks_and_accuracies(method, tmp_path, alone):
  want = alone(f"learned({method!r}, {str(tmp_path / 'one')!r})")["sharded"]
  for got in in_a_process(4, f"learned({method!r}, {str(tmp_path / 'four')!r})").values():
    assert got["ranks"] == want["ranks"]
    for a, b in zip(got["accuracy"], want["accuracy"], strict=True):
      np.testing.assert_allclose(*([x for x in row if x is not None] for row in (a, b)), atol=1.5)


def continued(folder: str) -> dict:
  """What becomes of the run in a folder; it says how many devices its weights lie on."""
  import jax

  record = experiment.run(digits("halrp"), folder)
  return {"accuracy": record["accuracy"], "devices": jax.local_device_count()}


def half(folder: str) -> int:
  """A run that ends after its first task."""
  interrupt(digits("halrp"), folder, 1)
  return 1


def test_a_run_of_four_devices_goes_on_with_one_and_with_eight(tmp_path):
  in_a_process(4, f"half({str(tmp_path / 'one')!r})")
  shutil.copytree(tmp_path / "one", tmp_path / "eight")
  one, eight = (
    in_a_process(n, f"continued({str(tmp_path / name)!r})")
    for n, name in ((1, "one"), (8, "eight"))
  )
  assert (one["devices"], eight["devices"]) == (1, 8)
  assert one["accuracy"][0] == eight["accuracy"][0] and one["accuracy"][1][1] > 50
  np.testing.assert_allclose(one["accuracy"][1], eight["accuracy"][1], atol=1.5)


def compilations(mode: str, folder: str) -> list[int]:
  """Programs compiled while each of four tasks was learned and evaluated."""
  import jax

  count, seen = 0, []

  def listen(event, seconds, **_):
    nonlocal count
    count += event == "/jax/core/compile/backend_compile_duration"

  def show(event):
    if event["event"] == "evaluation":
      seen.append(count)

  jax.monitoring.register_event_duration_secs_listener(listen)
  experiment.run(digits("halrp", order="0,1,2,3", parallel=mode, epochs=3), folder, show)
  return [b - a for a, b in itertools.pairwise([0, *seen])]


@pytest.mark.parametrize("mode", MODES)
def test_later_tasks_compile_nothing(mode, tmp_path):
  first, second, third, fourth = in_a_process(4, f"compilations({mode!r}, {str(tmp_path)!r})")
  assert first and second and (third, fourth) == (0, 0)


def at_once(folder: str) -> dict:
  """Four runs as one program."""
  cells = sweep.cells({"halrp": digits("halrp")}, "", "0,1,2,3")
  rows = sweep.run(cells, folder, lambda rows: None, lambda: False, True)
  return {"accuracy": [row["accuracy"] for row in rows]}


@SLOW
def test_runs_at_once_are_shared_out_over_devices(tmp_path):
  one, four = (in_a_process(n, f"at_once({str(tmp_path / str(n))!r})") for n in (1, 4))
  np.testing.assert_allclose(one["accuracy"], four["accuracy"], atol=1.5)
  assert len(set(four["accuracy"])) > 1


def test_what_needs_the_whole_batch_refuses_pmap():
  with pytest.raises(UserError, match="parallel = 'pmap'.*prd.*set parallel=sharded"):
    resolve(digits("prd", parallel="pmap"))


def test_one_device_is_left_alone():
  layout = parallel.make_layout("auto")
  assert layout.axis_name is None
  tree = {"x": np.zeros(3)}
  assert layout.shard(tree) is tree and layout.replicate(tree) is tree
