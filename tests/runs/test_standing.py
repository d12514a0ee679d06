"""What a run stands on: what of it is refused, what is said."""

import copy

import jax
import pytest

from halrp_jax import data
from halrp_jax.config import resolve
from halrp_jax.reports import records
from halrp_jax.runs import standing
from halrp_jax.types import JAX_FLAGS


@pytest.fixture
def now():
  tasks = [{"id": i, "name": f"t{i}", "data": f"d{i}", "split": f"s{i}"} for i in range(5)]
  return {
    "tasks": tasks,
    "split_hash": "whole",
    "input_shape": [8, 8, 1],
    "num_classes": 10,
    "flags": standing.flags(),
    "machine": {"platform": "cpu", "jax": "1", "cores": 4},
  }


def change(now, how):
  """The standing before, by a path of keys and a value."""
  before = copy.deepcopy(now)
  *path, last, value = how
  place = before
  for key in path:
    place = place[key]
  place[last] = value
  return before


@pytest.mark.parametrize(
  ("how", "says"),
  [
    (("tasks", 1, "data", "x"), "task 't1' (id 1) has other images or labels in data_dir=D"),
    (("tasks", 1, "split", "x"), "task 't1' (id 1) has other splits of the same images in"),
    (("tasks", []), "there are 5 tasks in data_dir=D (were 0)"),
    (("input_shape", [8, 8, 3]), "input_shape = [8, 8, 1] (was [8, 8, 3])"),
    (("num_classes", 9), "num_classes = 10 (was 9)"),
    (("flags", "jax_enable_x64", True), "jax_enable_x64 = False (was True)"),
    (("flags", "jax_default_matmul_precision", "high"), "precision = None (was 'high')"),
  ],
)
def test_what_changes_numbers_is_refused_by_name(now, how, says):
  (line,), said = standing.compare(change(now, how), now, "data_dir=D")
  assert says in line and said == []


@pytest.mark.parametrize(
  ("how", "says"),
  [
    (("machine", "platform", "gpu"), "platform = 'cpu' (was 'gpu')"),
    (("machine", "jax", "2"), "jax = '1' (was '2')"),
    (("machine", "cores", 2), "cores = 4 (was 2)"),
  ],
)
def test_what_changes_the_rounding_is_said(now, how, says):
  assert standing.compare(change(now, how), now) == ([], [says])


@pytest.mark.parametrize(
  "how", [("tasks", 0, "name", "renamed"), ("split_hash", "older"), ("changes", ["x"])]
)
def test_what_changes_nothing_is_not_compared(now, how):
  assert standing.compare(change(now, how), now) == ([], [])


def test_many_tasks_are_one_line(now):
  before = copy.deepcopy(now)
  for task in before["tasks"]:
    task["data"] += "x"
  (line,), _ = standing.compare(before, now)
  assert (
    line == "tasks 't0' (id 0), 't1' (id 1), 't2' (id 2) and 2 more have other images or labels"
  )


def test_what_was_not_written_is_not_compared(now):
  assert standing.compare({}, now) == ([], [])
  assert standing.compare({"split_hash": "whole"}, now) == ([], [])
  (line,), _ = standing.compare({"split_hash": "other"}, now)
  assert line == "other images, labels or splits (split hash whole, was other)"
  unknown = copy.deepcopy(now)
  unknown["tasks"][0] |= {"data": "", "split": ""}  # of a run that was extended
  assert standing.compare(unknown, now) == standing.compare(now, unknown) == ([], [])


def test_flags_are_those_of_jax_by_default():
  """A JAX whose defaults are others would make all older records unusual."""
  assert standing.flags() == JAX_FLAGS
  with jax.enable_x64(True):
    assert standing.flags() == JAX_FLAGS | {"jax_enable_x64": True}
  assert records.unusual_flags({"standing": {"flags": {"jax_enable_x64": True}}}) == {
    "jax_enable_x64": True
  }


def test_all_of_a_benchmark_is_known(digits_config):
  found = standing.of(data.read(resolve(digits_config("stl", order="2,0"))))
  assert [(t["id"], t["name"]) for t in found["tasks"]] == [
    (2, "permutation 2"),
    (0, "permutation 0"),
  ]
  assert len({x for t in found["tasks"] for x in (t["data"], t["split"])}) == 4
  assert found["input_shape"] == [8, 8, 1] and found["num_classes"] == 10
  assert {"platform", "cores", "processor", "jax", "XLA_FLAGS"} <= standing.machine().keys()
