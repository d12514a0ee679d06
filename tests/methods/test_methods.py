"""The contract that every method keeps, on three tasks of real digits."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from halrp_jax import methods, metrics, models
from halrp_jax.config import resolve
from halrp_jax.runs import experiment
from halrp_jax.training import batches, first_task, fit
from halrp_jax.types import Benchmark, Store

from ..conftest import building_anew

NUM_TASKS = 3
LONG = {"apd", "ibpwf", "iru"}  # slow but in their own files
QUIET = Store("test", lambda event: None)
# methods that forget nothing, and what switches off the only source of forgetting they may have, or
# what one needs to learn anything at all
NO_FORGETTING = {
  "halrp": {"method.prune": "none"},
  "stl": {},
  "bn": {},
  "be": {},
  "wsn": {},
  "clr": {"method.bn_scope": "task"},
  "apdfix": {},
  "bmkp": {},
  "iru": {"epochs": 6, "learning_rate": 1e-2, "method.factors": 4},
  "ibpwf": {"epochs": 6, "learning_rate": 1e-2},
}
FROZEN_BASE = (
  "halrp",
  "stl",
  "bn",
  "be",
  "clr",
  "apdfix",
)  # what tasks share never moves, to the bit

# methods whose heads have no bias
NO_HEAD_BIAS = ("prd",)
# methods without a penalty beside their objective
NO_PENALTY = ("prd", "wsn")

# methods whose first task is learned as alone
SAME_FIRST_TASK = ("halrp", "bn", "be", "l2", "ewc", "gpm", "apdfix", "inflora", "sdlora")
# least accuracy on tasks that were not the last: methods that forget, or that can hardly learn
# anything on a frozen network without BatchNorm (chance is 0.1)
LEAST = {"l2": 0.3, "ewc": 0.3, "clr": 0.3, "wsn": 0.5, "ibpwf": 0.3}
NO_BASE = ("iru", "ibpwf", "bmkp")  # what is kept of a network may be smaller than the network


def slow_but(*fast):
  """Parametrises a test over all methods, of which all but a few representatives are slow."""
  marks = {m: [pytest.mark.slow] * (m not in fast) for m in sorted(methods.METHODS)}
  assert marks.keys() >= set(fast)
  return pytest.mark.parametrize("method_name", [pytest.param(m, marks=marks[m]) for m in marks])


def learn(config) -> tuple[list, Benchmark, object]:
  """Learns the first tasks; returns the state after each, the benchmark, the method."""
  config = resolve(config)
  benchmark, _, method, _ = experiment.build(config)
  state = method.init(jax.random.key(0), benchmark)
  states = []
  for group in method.groups(NUM_TASKS):
    tasks = tuple(benchmark.tasks[t] for t in group)
    state, _ = method.learn(state, tasks, jax.random.key(group[-1]), QUIET)
    states.append(state)
  return states, benchmark, method


EVERY_SHORT = slow_but(*methods.METHODS.keys() - LONG)


@pytest.fixture(scope="module")
def phases():
  """Filled by `learned`: method -> the penalty of each phase, the values at its start."""
  return {}


@pytest.fixture(scope="module")
def learned(phases):
  """Runs are shared by the tests of this file: (method) -> states, benchmark, method."""
  cache = {}

  def get(name, config):
    if name not in cache:
      with building_anew(), pytest.MonkeyPatch.context() as patch:
        phases[name] = watch_phases(patch)
        cache[name] = learn(config)
    return cache[name]

  return get


def watch_phases(patch):
  """Returns a list to which each phase of training adds its penalty, parameters and `frozen`."""
  made, seen = fit.make_fit, []

  def watching(setup, apply_fn, penalty_fn, **kwargs):
    train = made(setup, apply_fn, penalty_fn, **kwargs)

    def watched(params, stats, frozen, *args, **kwargs):
      start = jax.tree.map(lambda x: x.copy() if hasattr(x, "copy") else x, (params, frozen))
      seen.append((penalty_fn, *start))  # copied, since training may overwrite them
      return train(params, stats, frozen, *args, **kwargs)

    return watched

  for module in (fit, first_task, *vars(methods).values()):
    if hasattr(module, "make_fit"):
      patch.setattr(module, "make_fit", watching)
  return seen


def logits(method, state, benchmark, t, num_images=100):
  task = benchmark.tasks[t]
  image, _ = batches.load_batch(task.test, task.inputs, np.arange(num_images))
  return np.asarray(method.predict(state, t, image))


@EVERY_SHORT
def test_every_task_is_learned(learned, method_name, digits_config):
  states, benchmark, method = learned(
    method_name, digits_config(method_name, **NO_FORGETTING.get(method_name, {}))
  )
  assert len(states[-1].tasks) == NUM_TASKS
  for t in range(NUM_TASKS):
    label = np.asarray(benchmark.tasks[t].test.label[:100])
    least = LEAST.get(method_name, 0.6)
    assert np.mean(logits(method, states[-1], benchmark, t).argmax(-1) == label) > least


@pytest.mark.parametrize(
  "method_name",
  [pytest.param(m, marks=[pytest.mark.slow] * (m in LONG)) for m in NO_FORGETTING],
)
def test_nothing_is_forgotten_to_the_bit(learned, method_name, digits_config):
  states, benchmark, method = learned(
    method_name, digits_config(method_name, **NO_FORGETTING.get(method_name, {}))
  )
  for t in range(NUM_TASKS):
    before = logits(method, states[t], benchmark, t)
    np.testing.assert_array_equal(logits(method, states[-1], benchmark, t), before)


@pytest.mark.parametrize("method_name", FROZEN_BASE)
def test_shared_and_earlier_leaves_do_not_move(learned, method_name, digits_config):
  states, _, _ = learned(
    method_name, digits_config(method_name, **NO_FORGETTING.get(method_name, {}))
  )
  first, last = states[0], states[-1]
  for a, b in (
    (first.shared, last.shared),
    (states[1].tasks, last.tasks[: len(states[1].tasks)]),
  ):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# methods whose tasks are predicted by no plain network
NOT_MERGED = ("clr", "prd")


@EVERY_SHORT
def test_a_merged_network_predicts_what_the_task_does(learned, method_name, digits_config):
  states, benchmark, method = learned(
    method_name, digits_config(method_name, **NO_FORGETTING.get(method_name, {}))
  )
  assert (method.network is None) == (method_name in NOT_MERGED)
  if method.network is None:  # exported as a program, for any number of images
    (b,) = jax.export.symbolic_shape("b")
    image = jax.ShapeDtypeStruct((b, 8, 8, 1), np.float32)
    program = jax.export.export(jax.jit(lambda x: method.predict(states[-1], 1, x)))(image)
    task = benchmark.tasks[1]
    x, _ = batches.load_batch(task.test, task.inputs, np.arange(100))
    want = logits(method, states[-1], benchmark, 1)
    np.testing.assert_allclose(program.call(x), want, atol=1e-5)
    return
  model = models.make("mlp", benchmark.max_classes)
  for t in range(NUM_TASKS):
    params, stats = method.network(method.served(states[-1]), states[-1].tasks[t])
    task = benchmark.tasks[t]
    image, _ = batches.load_batch(task.test, task.inputs, np.arange(100))
    got = model.apply({"params": params, "batch_stats": stats}, image)
    np.testing.assert_allclose(got, logits(method, states[-1], benchmark, t), atol=1e-4)


@EVERY_SHORT
def test_all_tasks_have_the_same_shapes(learned, method_name, digits_config):
  """So that nothing recompiles as tasks come."""
  states, _, _ = learned(
    method_name, digits_config(method_name, **NO_FORGETTING.get(method_name, {}))
  )
  first, *others = (jax.tree.map(lambda x: (x.shape, x.dtype), task) for task in states[-1].tasks)
  assert all(other == first for other in others)


# what a task adds to the 85,002 parameters of the network, in numbers the paper counts, and what is
# kept for training alone after three tasks, on the multi-layer perceptron of 64-256-256-10 with
# 81,920 weights and 512 biases in its features; heads have 2,570
HEAD, FEATURES = 2570, 82432
PROTOTYPES, PROJECTION = 2560, 257 * 512 + 513 * 512 + 513 * 128
SIZES = {
  "stl": (0, 85002, 0),
  "mtl": (2 * HEAD, None, 0),
  "l2": (0, HEAD, FEATURES + 1),
  "ewc": (0, HEAD, 2 * FEATURES),
  "bn": (0, HEAD, 0),
  "be": (0, 64 + 256 + 256 + 256 + HEAD, 0),
  "clr": (0, HEAD, 0),
  "apdfix": (0, None, 0),
  "apd": (None, None, 3 * 4 * 81920),  # its first task has a tau already
  "iru": (64 * (320 + 512) + 2 * 64 + HEAD + 512 - 85002, None, 0),
  "ibpwf": (None, None, None),  # as many as it finds: tests/methods/test_ibpwf.py
  "wsn": (81920 // 32, 81920 // 32 + HEAD, 81920 + 81920 // 32),
  "bmkp": (None, None, FEATURES),
  "prd": (PROJECTION, PROTOTYPES, PROJECTION + FEATURES + 3 * PROTOTYPES),
}


@EVERY_SHORT
def test_sizes_are_those_of_the_table(learned, method_name, digits_config):
  states, _, method = learned(
    method_name, digits_config(method_name, **NO_FORGETTING.get(method_name, {}))
  )
  sizes = [method.size(state) for state in states]
  for a, b in zip(sizes, sizes[1:], strict=False):
    assert b.dense >= a.dense and b.paper >= a.paper
  for s in sizes:
    assert s.base == FEATURES + (PROTOTYPES if method_name in NO_HEAD_BIAS else HEAD)
    assert s.base <= s.dense or method_name in NO_BASE
    assert 0 <= s.nonzero <= s.dense and s.training_only >= 0 and s.mask_bits >= 0
  first, per_task, training_only = SIZES.get(method_name, (0, None, None))
  assert first is None or sizes[0].paper == sizes[0].base + first
  if per_task is not None:
    growth = [b.paper - a.paper for a, b in zip(sizes, sizes[1:], strict=False)]
    assert growth == [per_task] * (NUM_TASKS - 1)
  if training_only is not None:
    assert sizes[-1].training_only == training_only


@pytest.mark.parametrize("method_name", SAME_FIRST_TASK)
def test_the_first_task_is_that_of_single_task_learning(learned, method_name, digits_config):
  states, benchmark, method = learned(
    method_name, digits_config(method_name, **NO_FORGETTING.get(method_name, {}))
  )
  stl_states, _, stl = learned("stl", digits_config("stl"))
  got, want = logits(method, states[0], benchmark, 0), logits(stl, stl_states[0], benchmark, 0)
  np.testing.assert_array_equal(got, want)


@EVERY_SHORT
def test_penalties_have_the_slope_of_finite_differences(
  learned, phases, method_name, digits_config
):
  """Along random directions, where each phase starts and with what it holds fixed."""
  learned(method_name, digits_config(method_name, **NO_FORGETTING.get(method_name, {})))
  slopes = [_slopes(*phase, seed) for seed, phase in enumerate(phases[method_name])]
  assert slopes
  for exact, estimated in slopes:
    assert estimated == pytest.approx(exact, rel=2e-2, abs=1e-5)
  assert any(exact for exact, _ in slopes) == (method_name not in NO_PENALTY)


def _slopes(penalty_fn, params, frozen, seed):
  """Returns the exact slope and the estimate, in double precision, as shares of the penalty."""
  rng = np.random.default_rng(seed)

  def random(scale):
    return jax.tree.map(lambda x: scale * rng.normal(size=x.shape), params)

  def double(x):
    types = ((np.floating, np.float64), (np.signedinteger, np.int64))
    for narrow, wide in types:  # slices want integers of the width of Python's
      if jax.numpy.issubdtype(jax.numpy.result_type(x), narrow):
        return np.asarray(x, wide)
    return x

  point = jax.tree.map(lambda x, noise: double(x) + noise, params, random(0.05))
  with jax.enable_x64(True):
    frozen = jax.tree.map(double, frozen)
    ends, value, exact = _ends_and_slope(penalty_fn, point, random(1e-6), frozen)
    scale = max(abs(float(value)), 1e-12)
    return float(exact) / scale, float(ends[0] - ends[1]) / 2 / scale


@functools.partial(jax.jit, static_argnums=0)
def _ends_and_slope(penalty_fn, point, step, frozen):
  def fn(params):
    return penalty_fn(params, frozen) + 0.0

  ends = [fn(jax.tree.map(lambda x, d, s=s: x + s * d, point, step)) for s in (1, -1)]
  return ends, *jax.jvp(fn, (point,), (step,))


SHORT = {"train_fraction": 0.1, "loop": "scan"}
WHOLE_RUNS = slow_but("halrp", "mtl")


@pytest.fixture(scope="module")
def record(tmp_path_factory):
  """Whole runs, shared: (config, copy) -> record.json of one of several equal runs, and the
  functions that were traced, (position of the task, name)."""
  cache = {}

  def get(config, copy=0):
    key = (config.method.name, config.seed, copy)
    if key not in cache:
      cache[key] = run_traced(config, str(tmp_path_factory.mktemp("run")))
    return cache[key]

  def run_traced(config, folder):
    traced, task = [], [None]

    def listen(event, seconds, fun_name="", **_):
      if event == "/jax/core/compile/jaxpr_trace_duration":
        traced.append((task[0], fun_name))

    def show(event):
      if event["event"] == "task":
        task[0] = event["t"]

    methods._make.cache_clear()
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
      return experiment.run(config, folder, show), traced
    finally:
      jax.monitoring.unregister_event_duration_listener(listen)

  return get


@slow_but("halrp")
def test_runs_repeat_to_the_bit(record, digits_config, method_name):
  (a, _), (b, _) = (record(digits_config(method_name, **SHORT), copy) for copy in (0, 1))
  timing = ("seconds", "memory_bytes", "peak_memory_bytes", "date")
  assert {k: v for k, v in a.items() if k not in timing} == {
    k: v for k, v in b.items() if k not in timing
  }
  assert a["state_hash"] == b["state_hash"]


# networks that a method trains, each with its own two traces: a full batch and the last one
NUM_FITS = {"halrp": 2, "bn": 2, "be": 2, "clr": 2, "apdfix": 2, "bmkp": 3, "iru": 2, "ibpwf": 2}
NUM_FITS |= {"inflora": 2, "sdlora": 2}
NUM_FITS |= {"gpm": 6, "apd": 6}  # one per width of its bases, of the stack of earlier tasks
# after the second task: HALRP's pruning, where growth first passes its bound; GPM's bases and
# APD's stack widen
# InfLoRA's bases widen too, but only their conversion from numpy is compiled
LATE = {"halrp": {"prune", "_where"}, "gpm": None, "apd": None, "inflora": {"stage"}}


@WHOLE_RUNS
def test_nothing_is_traced_again_as_tasks_come(record, digits_config, method_name):
  """At most two traces per phase in ten tasks, whatever their ranks; none after the second task but
  those of `LATE`."""
  run, traced = record(digits_config(method_name, **SHORT))
  assert len(run["accuracy"]) == 10
  fits = [name for _, name in traced if name == "many_steps"]
  assert 0 < len(fits) <= 2 * NUM_FITS.get(method_name, 1)
  late = LATE.get(method_name, set())
  assert (
    late is None
    or {n for t, n in traced if t is not None and t > 1} <= late
    or (
      method_name == "mtl"  # all its tasks are one
    )
  )


@slow_but("stl")
def test_another_seed_is_another_run(record, digits_config, method_name):
  (a, _), (b, _) = (record(digits_config(method_name, seed=s, **SHORT)) for s in (0, 1))
  assert a["state_hash"] != b["state_hash"] and a["split_hash"] != b["split_hash"]


@WHOLE_RUNS
def test_the_record_holds_together(record, digits_config, method_name):
  run, _ = record(digits_config(method_name, **SHORT))
  matrix = np.array(run["accuracy"], float)
  assert matrix.shape == (10, 10)
  assert np.isnan(matrix[np.triu_indices(10, 1)]).all()
  assert np.isfinite(matrix[-1]).all() and (matrix[-1] >= 0).all() and (matrix[-1] <= 100).all()
  assert run["average_accuracy"] == pytest.approx(metrics.average_accuracy(matrix))
  assert run["bwt"] == (None if method_name == "mtl" else pytest.approx(metrics.bwt(matrix)))
  assert sorted(run["task_ids"]) == list(range(10))
  num_groups = 1 if method_name == "mtl" else 10
  assert np.isfinite(matrix).any(1).sum() == num_groups
  for key in ("ranks", "size", "increment", "seconds"):
    assert len(run[key]) == num_groups, key
  assert run["config"]["method"]["name"] == method_name == run["method"]


@slow_but("halrp", "mtl")
def test_tasks_with_different_numbers_of_classes(method_name, digits_config):
  """Digits 0-9, 0-4 and 0-2: one head width inside, each task's own width outside."""
  config = resolve(digits_config(method_name, train_fraction=0.1))
  benchmark, model, _, _ = experiment.build(config)
  tasks = []
  for task, k in zip(benchmark.tasks, (5, 10, 3), strict=False):

    def cut(split, k=k):
      rows = np.flatnonzero(np.asarray(split.label) < k)
      return split._replace(index=split.index[rows], label=split.label[rows])

    tasks.append(
      task._replace(
        class_names=task.class_names[:k],
        train=cut(task.train),
        valid=cut(task.valid),
        test=cut(task.test),
      )
    )
  benchmark = benchmark._replace(tasks=tuple(tasks))
  method = experiment.methods.make(config, model, benchmark)
  state = method.init(jax.random.key(0), benchmark)
  sizes = []
  for group in method.groups(len(tasks)):
    state, _ = method.learn(state, tuple(tasks[t] for t in group), jax.random.key(group[-1]), QUIET)
    sizes.append(method.size(state))
  for t, task in enumerate(tasks):
    assert logits_of(method, state, task, t).shape == (50, task.num_classes)
  parameters = 64 * 256 + 256 + 256 * 256 + 256
  num_in = 256 + (method_name not in NO_HEAD_BIAS)
  assert sizes[0].base == parameters + num_in * 5  # the head at its own width


def logits_of(method, state, task, t):
  image, _ = batches.load_batch(task.test, task.inputs, np.arange(50))
  return method.predict(state, t, image)


def test_runs_that_differ_in_seed_and_order_share_their_method(digits_config):
  def built(**keys):
    return experiment.build(resolve(digits_config("stl", **keys)))[2]

  first = built(order="0,1")
  assert built(order="1,0", seed=7) is first
  assert built(order="0,1", epochs=3) is not first


class Listed(nn.Module):
  """A network with a field that has no hash."""

  widths: list
  num_classes: int = 10

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(nn.Dense(self.widths[0], name="fc")(x.reshape(len(x), -1)))
    return nn.Dense(self.num_classes, name="head")(x)


def test_a_network_without_a_hash_is_learned(digits_config):
  config = resolve(digits_config("stl", epochs=1))
  benchmark, *_ = experiment.build(config)
  method = methods.make(config, Listed([8]), benchmark)
  state, _ = method.learn(
    method.init(jax.random.key(0), benchmark), benchmark.tasks[:1], jax.random.key(1), QUIET
  )
  assert state.tasks[0].params["fc"]["kernel"].shape == (64, 8)
