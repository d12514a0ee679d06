"""Several devices give what one gives. In processes of their own: XLA counts devices once."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from halrp_jax import experiment, models, parallel, train
from halrp_jax.types import Inputs, Split, Store, Task

from .conftest import ROOT
from .test_networks_and_methods import SMALL


def in_a_process(num_devices: int, call: str):
  """What a function of this module returns where there are so many devices, through JSON."""
  flags = f"--xla_force_host_platform_device_count={num_devices}"
  code = f"import json; from tests import test_parallel as t; print(json.dumps(t.{call}))"
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ
    | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def trained(network: str) -> dict:
  """Losses of three epochs of 22 images in batches of 8, and norms of what was learned."""
  import jax

  config = experiment.make_config(
    "stl", benchmark="digits", network=network, epochs=3, batch_size=8, protocol={}
  )
  config = experiment.resolve(config)
  rng = np.random.default_rng(0)
  image = jax.numpy.asarray(rng.integers(0, 256, (30, 32, 32, 3), np.uint8))

  def split(*rows):
    index = np.arange(*rows, dtype=np.int32)
    return Split(image, jax.numpy.asarray(index), jax.numpy.asarray(index % 3))

  inputs = Inputs(np.full(3, 0.5, np.float32), np.full(3, 0.3, np.float32), None)
  task = Task(0, "a", ("a", "b", "c"), inputs, split(22), split(22, 26), split(26, 30))
  model = models.make(network, 3).clone(**SMALL[network])
  fit = train.make_fit(config, lambda task: 1.0, *train.plain_network(model))
  params, stats = train.initialize(model, jax.random.key(0), (32, 32, 3))
  losses = []
  store = Store("fit", lambda e: losses.append(e["loss"]) if e["event"] == "epoch" else None)
  params, stats = fit(params, stats, {"l2": 0.0}, task, jax.random.key(1), 3, store)
  leaves = jax.tree.leaves(params)
  return {
    "losses": losses,
    "norm": float(sum((x**2).sum() for x in leaves)),
    "devices": max(len(x.sharding.device_set) for x in leaves),
  }


def learned(method: str, folder: str) -> dict:
  """A short run on digits."""
  config = experiment.make_config(
    method, benchmark="digits", order="0,1", network="mlp", epochs=2, batch_size=64, protocol={}
  )
  record = experiment.run(config, folder)
  return {k: record[k] for k in ("accuracy", "ranks")}


@pytest.mark.parametrize("network", ["lenet", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_many_devices_train_as_one_does(network):
  """The last batch of an epoch has 6 images: no multiple of 4."""
  one, four = (in_a_process(n, f"trained({network!r})") for n in (1, 4))
  assert (one["devices"], four["devices"]) == (1, 4)
  np.testing.assert_allclose(one["losses"], four["losses"], rtol=2e-3)
  np.testing.assert_allclose(one["losses"][0], four["losses"][0], rtol=1e-4)
  np.testing.assert_allclose(one["norm"], four["norm"], rtol=1e-3)


@pytest.mark.parametrize("method", ["halrp", "ewc", "wsn", "gpm"])
def test_runs_on_many_devices_have_the_same_ranks_and_accuracies(method, tmp_path):
  runs = [in_a_process(n, f"learned({method!r}, {str(tmp_path / str(n))!r})") for n in (1, 4)]
  assert runs[0]["ranks"] == runs[1]["ranks"]
  for a, b in zip(*(r["accuracy"] for r in runs), strict=True):
    np.testing.assert_allclose(*([x for x in row if x is not None] for row in (a, b)), atol=1.5)


def test_one_device_is_left_alone():
  config = experiment.make_config("stl", benchmark="digits", protocol={})
  assert parallel.num_devices(config) == 1
  tree = {"x": np.zeros(3)}
  assert parallel.make_spread(config)(tree) is tree
