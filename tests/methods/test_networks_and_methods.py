"""Every network takes two tasks of every method, a few steps each."""

import functools

import jax
import numpy as np
import pytest

from halrp_jax import methods, models
from halrp_jax.config import make_config, resolve
from halrp_jax.training import batches, networks
from halrp_jax.types import Benchmark, Inputs, Split, Task
from halrp_jax.weights import taps, trees

from .test_methods import NO_FORGETTING, QUIET

COLOURS = {"wide_lenet": 1}
# small, since what is tested is how methods and layers fit together
SMALL = {
  "alexnet": {"channels": (4, 5, 6), "hidden": (16, 12)},
  "resnet18": {"width": 4, "stage_sizes": (1, 1)},  # either kind of shortcut
  "mlp": {"hidden": (16, 12)},
  "efficientnet_lite0": {"stages": ((16, 1, 1, 3, 1), (24, 2, 2, 5, 3))},
  "resnet50": {"stage_sizes": (1, 1)},
} | dict.fromkeys(
  ("lenet", "wide_lenet", "saha_lenet", "saha_lenet_without_lrn"),
  {"channels": (4, 5), "hidden": (16, 12)},
)
SMALL |= dict.fromkeys(
  ("vit_ti16", "vit_s16", "vit_b16"), {"features": 24, "num_blocks": 2, "num_heads": 3}
)


@pytest.fixture(scope="module")
def benchmark_of():
  """(channels) -> two tasks of three classes, 24 random images of 32 x 32 each."""

  def make(channels):
    rng = np.random.default_rng(0)
    image = jax.numpy.asarray(rng.integers(0, 256, (48, 32, 32, channels), np.uint8))
    inputs = Inputs(np.full(channels, 0.5, np.float32), np.full(channels, 0.3, np.float32), None)

    def split(rows):
      index = np.asarray(rows, np.int32)
      return Split(image, jax.numpy.asarray(index), jax.numpy.asarray(index % 3))

    tasks = []
    for t in range(2):
      train, valid, test = (split(np.arange(*r) + 24 * t) for r in ((0, 16), (16, 19), (19, 24)))
      tasks.append(Task(t, f"task {t}", ("a", "b", "c"), inputs, train, valid, test))
    return Benchmark("random", tuple(tasks), "", False)

  return make


# Pairs that differ in the network, or in what a method does with a layer; the others are slow.
FAST = {
  "alexnet": {"stl"},
  "resnet18": {"halrp"},
  "lenet": {"iru"},
  "wide_lenet": {"stl"},
  "saha_lenet": {"gpm"},
  "saha_lenet_without_lrn": {"wsn"},
}
OF_GPM_AND_WSN = ("gpm", "halrp", "stl", "wsn")  # the methods on the networks of GPM and WSN
PAIRS = [
  pytest.param(network, method, marks=[pytest.mark.slow] * (method not in fast))
  for network, fast in FAST.items()
  for method in (OF_GPM_AND_WSN if network.startswith("saha") else sorted(methods.METHODS))
]


@pytest.mark.parametrize(("network", "method_name"), PAIRS)
def test_two_tasks_are_learned(network, method_name, benchmark_of):
  benchmark = benchmark_of(COLOURS.get(network, 3))
  config = make_config(
    method_name,
    protocol={},
    every_method={"l2": 1e-4},
    methods_={
      "halrp": {"svd": "randomized", "svd_rank": 8, "upper_rank": 8, "prune": "none"},
      "clr": {"bn_scope": "task"},
      "ewc": {"fisher_samples": 5},
      "gpm": {"samples": 3},
      "prd": {"epochs": 2},
      "ibpwf": {"fine_tune_epochs": 1},
    },
    network=network,
    # the wide LeNet is the LeNet again but for its sizes
    precision="bfloat16" if network == "wide_lenet" else "float32",
    epochs=2,
    batch_size=8,
  )
  config = resolve(config)
  model = models.of_config(config, 3).clone(**SMALL[network])
  method = methods.make(config, model, benchmark)
  state = method.init(jax.random.key(0), benchmark)
  first = None

  @functools.partial(jax.jit, static_argnums=1)
  def predict(state, t, image):
    tasks = tuple(task._replace(num_classes=np.int32(3)) for task in state.tasks)
    return method.predict(state._replace(tasks=tasks), t, image)

  def logits(t, num_images=5):
    task = benchmark.tasks[t]
    image, _ = batches.load_batch(task.test, task.inputs, np.arange(num_images))
    return np.asarray(predict(state, t, image))

  for group in method.groups(2):
    tasks = tuple(benchmark.tasks[t] for t in group)
    before = state
    state, _ = method.learn(state, tasks, jax.random.key(group[0]), QUIET)
    first = logits(0) if first is None else first
  got = [logits(t) for t in range(2)]
  assert all(x.shape == (5, 3) and x.dtype == np.float32 and np.isfinite(x).all() for x in got)
  alone, tolerance = logits(1, 1), 5e-2 if network == "wide_lenet" else 1e-5
  np.testing.assert_allclose(alone, got[1][:1], atol=tolerance, rtol=tolerance)
  if method_name in NO_FORGETTING:
    np.testing.assert_array_equal(got[0], first)
  assert method.size(state).base > 0 and before is not state


def test_layers_with_kernels_are_known_to_every_method():
  """`taps.layer_inputs` times the kernels is `taps.layer_outputs`, strides
  and shortcuts included."""
  image = jax.numpy.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), np.float32)
  for network in ("lenet", "alexnet", "resnet18"):
    model = models.make(network, 3, "batch").clone(**SMALL[network])
    params, _ = jax.jit(lambda key, m=model: networks.initialize(m, key, image.shape[1:]))(
      jax.random.key(0)
    )
    kernels, _ = trees.split(params)

    def taps_of(params, model=model, names=tuple(kernels)):
      both = (taps.layer_inputs, taps.layer_outputs)
      return [f(model, names, {"params": params}, image) for f in both]

    rows, outputs = jax.jit(taps_of)(params)
    assert {n: x.shape[-1] for n, x in rows.items()} == {
      n: w.size // w.shape[-1] for n, w in kernels.items()
    }
    for name, w in kernels.items():
      want = np.asarray(rows[name]) @ np.asarray(w).reshape(-1, w.shape[-1])
      np.testing.assert_allclose(outputs[name], want, rtol=1e-4, atol=1e-4)
