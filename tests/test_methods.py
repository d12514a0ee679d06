"""The contract that every method keeps, on three tasks of real digits."""

import jax
import numpy as np
import pytest

from halrp_jax import experiment, metrics, train
from halrp_jax.types import Benchmark, Store

NUM_TASKS = 3
QUIET = Store("test", lambda event: None)
# methods that forget nothing, and what switches off the only source of forgetting they may have
NO_FORGETTING = {"halrp": {"method.prune": "none"}, "stl": {}, "bn": {}, "be": {}}


# methods whose first task is learned as alone
SAME_FIRST_TASK = ("halrp", "stl", "bn", "be", "l2", "ewc")


def learn(config) -> tuple[list, Benchmark, object]:
  """Learns the first tasks; returns the state after each, the benchmark, the method."""
  config = experiment.resolve(config)
  benchmark, _, method = experiment.build(config)
  state = method.init(jax.random.key(0), benchmark)
  states = []
  for group in method.groups(NUM_TASKS):
    tasks = tuple(benchmark.tasks[t] for t in group)
    state, _ = method.learn(state, tasks, jax.random.key(group[-1]), QUIET)
    states.append(state)
  return states, benchmark, method


@pytest.fixture(scope="module")
def learned():
  """Runs are shared by the tests of this file: (method) -> states, benchmark, method."""
  cache = {}

  def get(name, config):
    if name not in cache:
      cache[name] = learn(config)
    return cache[name]

  return get


def logits(method, state, benchmark, t):
  task = benchmark.tasks[t]
  image, _ = train.load_batch(task.test, task.inputs, np.arange(100))
  return np.asarray(method.predict(state, t, image))


def test_every_task_is_learned(learned, method_name, digits_config):
  states, benchmark, method = learned(
    method_name, digits_config(method_name, **NO_FORGETTING.get(method_name, {}))
  )
  assert len(states[-1].tasks) == NUM_TASKS
  for t in range(NUM_TASKS):
    label = np.asarray(benchmark.tasks[t].test.label[:100])
    least = 0.6 if method_name in NO_FORGETTING or t == NUM_TASKS - 1 else 0.3  # chance: 0.1
    assert np.mean(logits(method, states[-1], benchmark, t).argmax(-1) == label) > least


@pytest.mark.parametrize("method_name", NO_FORGETTING)
def test_nothing_is_forgotten_to_the_bit(learned, method_name, digits_config):
  states, benchmark, method = learned(
    method_name, digits_config(method_name, **NO_FORGETTING.get(method_name, {}))
  )
  for t in range(NUM_TASKS):
    before = logits(method, states[t], benchmark, t)
    np.testing.assert_array_equal(logits(method, states[-1], benchmark, t), before)


@pytest.mark.parametrize("method_name", NO_FORGETTING)
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


def test_all_tasks_have_the_same_shapes(learned, method_name, digits_config):
  """So that nothing recompiles as tasks come."""
  states, _, _ = learned(
    method_name, digits_config(method_name, **NO_FORGETTING.get(method_name, {}))
  )
  first, *others = (jax.tree.map(lambda x: (x.shape, x.dtype), task) for task in states[-1].tasks)
  assert all(other == first for other in others)


def test_sizes_are_ordered_and_start_at_the_base(learned, method_name, digits_config):
  states, _, method = learned(
    method_name, digits_config(method_name, **NO_FORGETTING.get(method_name, {}))
  )
  sizes = [method.size(state) for state in states]
  assert sizes[0].paper == sizes[0].base and sizes[0].increment == 0
  for a, b in zip(sizes, sizes[1:], strict=False):
    assert b.dense >= a.dense
  for s in sizes:
    assert s.base <= s.nonzero <= s.dense and s.training_only >= 0 and s.mask_bits >= 0


@pytest.mark.parametrize("method_name", SAME_FIRST_TASK)
def test_the_first_task_is_that_of_single_task_learning(learned, method_name, digits_config):
  states, benchmark, method = learned(
    method_name, digits_config(method_name, **NO_FORGETTING.get(method_name, {}))
  )
  stl_states, _, stl = learned("stl", digits_config("stl"))
  np.testing.assert_allclose(
    logits(method, states[0], benchmark, 0), logits(stl, stl_states[0], benchmark, 0), atol=1e-4
  )


@pytest.fixture(scope="module")
def record(tmp_path_factory):
  """Whole runs, shared: (config, copy) -> record.json of one of several equal runs."""
  cache = {}

  def get(config, copy=0):
    key = (config.method.name, config.seed, copy)
    if key not in cache:
      cache[key] = experiment.run(config, str(tmp_path_factory.mktemp("run")))
    return cache[key]

  return get


def test_runs_repeat_to_the_bit(record, digits_config, method_name):
  a, b = (record(digits_config(method_name), copy) for copy in (0, 1))
  timing = ("seconds", "peak_memory_bytes", "date")
  assert {k: v for k, v in a.items() if k not in timing} == {
    k: v for k, v in b.items() if k not in timing
  }
  assert a["state_hash"] == b["state_hash"]


# networks that a method trains, each with its own two traces: a full batch and the last one
NUM_FITS = {"halrp": 2, "stl": 1, "bn": 2, "be": 2, "l2": 1, "ewc": 1}


def test_nothing_is_traced_again_as_tasks_come(digits_config, method_name, tmp_path):
  """At most two traces per phase in ten tasks, whatever their ranks; none after the second task but
  that of pruning, where growth first passes its bound."""
  traced, task = [], [None]

  def listen(event, seconds, fun_name="", **_):
    if event == "/jax/core/compile/jaxpr_trace_duration":
      traced.append((task[0], fun_name))

  def show(event):
    if event["event"] == "task":
      task[0] = event["t"]

  jax.clear_caches()
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    run = experiment.run(digits_config(method_name, loop="scan"), str(tmp_path), show)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert len(run["accuracy"]) == 10
  fits = [name for _, name in traced if name == "many_steps"]
  assert 0 < len(fits) <= 2 * NUM_FITS[method_name]
  assert {name for t, name in traced if t is not None and t > 1} <= {"prune", "_where"}


def test_another_seed_is_another_run(record, digits_config, method_name):
  a, b = (record(digits_config(method_name, seed=s)) for s in (0, 1))
  assert a["state_hash"] != b["state_hash"] and a["split_hash"] != b["split_hash"]


def test_the_record_holds_together(record, digits_config, method_name):
  run = record(digits_config(method_name))
  matrix = np.array(run["accuracy"], float)
  assert matrix.shape == (10, 10)
  assert np.isnan(matrix[np.triu_indices(10, 1)]).all()
  assert np.isfinite(matrix[-1]).all() and (matrix[-1] >= 0).all() and (matrix[-1] <= 100).all()
  assert run["average_accuracy"] == pytest.approx(metrics.average_accuracy(matrix))
  assert run["bwt"] == pytest.approx(metrics.bwt(matrix))
  assert sorted(run["task_ids"]) == list(range(10))
  for key in ("ranks", "size", "increment", "seconds"):
    assert len(run[key]) == 10, key
  assert run["config"]["method"]["name"] == method_name == run["method"]


def test_tasks_with_different_numbers_of_classes(method_name, digits_config):
  """Digits 0-9, 0-4 and 0-2: one head width inside, each task's own width outside."""
  config = experiment.resolve(digits_config(method_name, epochs=3))
  benchmark, model, _ = experiment.build(config)
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
  for t, task in enumerate(tasks):
    state, _ = method.learn(state, (task,), jax.random.key(t), QUIET)
    sizes.append(method.size(state))
  for t, task in enumerate(tasks):
    assert logits_of(method, state, task, t).shape == (50, task.num_classes)
  parameters = 64 * 256 + 256 + 256 * 256 + 256
  assert sizes[0].base == sizes[0].paper == parameters + 257 * 5  # the head at its own width


def logits_of(method, state, task, t):
  image, _ = train.load_batch(task.test, task.inputs, np.arange(50))
  return method.predict(state, t, image)
