"""Records on disk: what is read, what is named and left out, what the numbers of a group are."""

import copy
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from halrp_jax import models
from halrp_jax.config import setting_of
from halrp_jax.reports import records
from halrp_jax.types import JAX_FLAGS, SCHEMA

from ..conftest import ROOT

SOURCE = ROOT / "docs" / "records" / "split05_A_batch.json"


@pytest.fixture
def make():
  """Builds a record of three tasks: (final accuracies as trained, task_ids, **changes)."""
  whole = json.loads(SOURCE.read_text())

  def build(final=(50.0, 60.0, 70.0), task_ids=(0, 1, 2), config=(), **changes):
    record = copy.deepcopy(whole)
    diagonal = [[90.0, None, None], [80.0, 80.0, None], list(final)]
    record |= {"task_ids": list(task_ids), "accuracy": diagonal, "increment": [0.0, 0.1, 0.2]}
    record |= {"seconds": [{"train": 1.0}] * 3} | changes
    record["config"] |= dict(config)
    return record | {"setting": setting_of(record["config"])}

  return build


def put(folder: pathlib.Path, record) -> None:
  folder.mkdir(parents=True)
  (folder / "record.json").write_text(json.dumps(record))


# --- reading --------------------------------------------------------------------------


def test_what_is_no_good_record_is_named_and_left_out(make, tmp_path):
  put(tmp_path / "good", make())
  put(tmp_path / "deep" / "er" / "good", make())
  put(tmp_path / "schema", make(schema=2))
  put(tmp_path / "matrix", make(accuracy=[[1.0]]))
  put(tmp_path / "hole", make(final=(50.0, None, 70.0)))
  put(tmp_path / "percent", make(final=(50.0, 101.0, 70.0)))
  put(tmp_path / "ids", make(task_ids=(0, 1, 1)))
  put(tmp_path / "growth", make(increment=[0.0, 0.1, float("nan")]))
  put(tmp_path / "keys", {"schema": SCHEMA, "accuracy": []})
  put(tmp_path / "other", make(method="stl"))
  put(tmp_path / "cut", make())
  text = (tmp_path / "cut" / "record.json").read_text()
  (tmp_path / "cut" / "record.json").write_text(text[: len(text) // 2])
  (tmp_path / "foreign.json").write_text("[1, 2, 3]")
  (tmp_path / "unfinished").mkdir()
  (tmp_path / "unfinished" / "config.json").write_text("{}")
  put(tmp_path / "good" / "checkpoints" / "hidden", make())
  runs, skipped = records.read(str(tmp_path))
  assert [run.path for run in runs] == ["deep/er/good", "good"]
  said = {s.path: s.reason for s in skipped}
  assert said.keys() == {
    *("schema", "matrix", "hole", "percent", "ids", "growth", "keys", "other", "cut"),
    *("foreign.json", "unfinished"),
  }
  assert "has schema 2, expected 1" in said["schema"]
  assert "can't be read" in said["cut"] and "not finished" in said["unfinished"]
  assert said["foreign.json"] == "is not a record of a run"
  assert "(1, 1), expected (3, 3)" in said["matrix"] and "of another method" in said["other"]
  for name in ("hole", "percent", "ids", "growth", "keys"):
    assert said[name].startswith("damaged: "), name


def test_all_published_records_are_read():
  runs, skipped = records.read(str(SOURCE.parent))
  assert len(runs) == len(list(SOURCE.parent.glob("*.json"))) and not skipped
  for run in runs:
    assert run.record["setting"] == setting_of(run.record["config"]), run.path


def test_a_record_of_an_older_version_gets_its_setting_from_its_config(make, tmp_path):
  older = make()
  setting = older.pop("setting")
  put(tmp_path / "older", older)
  assert records.read(str(tmp_path)) == (
    [],
    [records.Skipped("older", "was written by a version that stored no setting")],
  )
  (run,), skipped = records.read(str(tmp_path), setting_of)
  assert run.record["setting"] == setting and not skipped


def test_reports_are_drawn_without_jax():
  code = "import sys, halrp_jax.reports.publish; print({'jax', 'orbax', 'flax'} & set(sys.modules))"
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8"
  )
  assert done.stdout == "set()\n"


# --- grouping -------------------------------------------------------------------------


def run(record, place="a"):
  return records.Run(place, record)


def test_a_setting_is_everything_but_order_and_seed(make):
  a = run(make(config={"order": "B", "seed": 3, "data_dir": "/x"}, seed=3, order="B"), "a")
  b = run(make(task_ids=(2, 1, 0)), "b")
  c = run(make(config={"batch_size": 64}), "c")
  d = run(make(config={"train_fraction": 0.5}), "d")
  e = run(make(partial=True), "e")
  groups, skipped = records.group([a, b, c, d, e])
  assert sorted(len(g.runs) for g in groups) == [1, 1, 1, 2] and not skipped
  assert records.differences(
    *[setting_of(x.record["config"]) for x in (c, a)],
  ) == ["batch_size = 64"]


def test_whole_numbers_are_one_value_however_they_are_written(make):
  a, b = (make(seed=i, config={"learning_rate": rate}) for i, rate in enumerate((1, 1.0)))
  groups, _ = records.group([run(a, "a"), run(b, "b")])
  assert [len(g.runs) for g in groups] == [2]


def test_a_newer_run_takes_the_place_of_the_same_older_one(make):
  old = run(make(final=(1.0, 1.0, 1.0), date="2026-01-01T00:00:00+00:00"), "old")
  new = run(make(date="2026-02-01T00:00:00+00:00"), "new")
  (group,), skipped = records.group([new, old])
  assert [r.path for r in group.runs] == ["new"]
  assert skipped == [
    records.Skipped("old", "new is a newer run of the same setting, data, order and seed")
  ]


def standing_of(hashes, **flags):
  tasks = [{"id": i, "name": "t", "data": x, "split": f"{x} drawn"} for i, x in enumerate(hashes)]
  usual = JAX_FLAGS | flags
  return {"standing": {"tasks": tasks, "flags": usual, "machine": {}, "changes": []}}


def groups_of(*found):
  groups, skipped = records.group([run(r, str(i)) for i, r in enumerate(found)])
  return sorted([r.path for r in g.runs] for g in groups), skipped


def test_runs_on_other_data_are_never_averaged(make):
  """Not of several seeds, and of equal seeds neither takes the other's place."""
  for seed in (0, 1):
    one, other = make(**standing_of("abc")), make(seed=seed, **standing_of("abd"))
    assert groups_of(one, other) == ([["0"], ["1"]], [])
  again = make(seed=1, split_hash="another draw", **standing_of("abc"))
  assert groups_of(one, again) == ([["0", "1"]], [])
  assert groups_of(one, make(seed=1)) == ([["0"], ["1"]], [])  # whose data are not known


def test_runs_with_other_jax_flags_are_never_averaged(make):
  one, other = (make(seed=s, **standing_of("abc", jax_enable_x64=bool(s))) for s in (0, 1))
  groups, _ = records.group([run(one), run(other)])
  assert [records.differences(g.setting, groups[0].setting) for g in groups[1:]] in (
    [["jax_enable_x64 = True"]],
    [["jax_enable_x64 = None"]],
  )


def test_older_records_are_told_apart_by_names_and_by_the_splits_of_equal_seeds(make):
  names = [{"task_names": list(x)} for x in (["cats", "dogs", "cows"], ["cars", "ships", "bikes"])]
  assert groups_of(make(**names[0]), make(seed=1, **names[1]))[0] == [["0"], ["1"]]
  assert groups_of(make(**names[0]), make(seed=1, split_hash="b", **names[0]))[0] == [["0", "1"]]
  assert groups_of(make(split_hash="a"), make(split_hash="b")) == ([["0"], ["1"]], [])
  found = [make(split_hash="a"), make(split_hash="b"), make(seed=1, split_hash="c")]
  assert groups_of(*found)[0] == [["0"], ["1"], ["2"]]  # nothing says where the last belongs


def test_what_a_report_takes_for_granted_is_said(make):
  older, newer = make(), make(seed=1, versions={"jax": "9"}, **standing_of("abc"))
  groups, _ = records.group([run(older), run(newer), run(make(seed=2, **standing_of("abc")))])
  unknown, mixed = records.notes(groups)
  assert unknown.startswith("1 of 3 runs were made by versions that recorded no hash of the data")
  assert mixed.startswith("In 1 of 2 groups the runs were made with several versions or machines")
  assert records.notes([g for g in groups if len(g.runs) == 0]) == []


@pytest.mark.parametrize(
  "wrong", [5, {}, {"tasks": 3}, {"tasks": [{"id": 0}]}, {"tasks": [], "flags": 1}]
)
def test_a_damaged_standing_is_named(make, wrong):
  assert (
    records.problem(make(standing=wrong)) == "damaged: standing does not have the expected fields"
  )


def test_keys_that_a_record_is_too_old_for_count_as_what_was_done_then(make):
  record = make()
  young = copy.deepcopy(record["config"])
  young["method"].pop("batch_norm", None)
  young["protocol"].pop("augment", None)
  young["protocol"].pop("fraction_per_class", None)
  setting = setting_of(young)
  assert setting["method.batch_norm"] == "running"  # "own" of that time, on a LeNet
  assert setting["protocol.augment"] == "none"
  assert setting["protocol.fraction_per_class"] is False  # not the default of today


def test_what_differs_in_statistics_alone_is_a_variant_with_a_name(make):
  standard = setting_of(make()["config"]) | {"network": "lenet"}
  standard |= {"method.batch_norm": "population", "method.prune_scope": "new"}

  def name(**changes):
    changes = {k.replace("__", "."): v for k, v in changes.items()}
    return records.variant(standard | changes, standard)

  assert name() == ""
  assert name(method__batch_norm="batch") == records.TEST_BATCH
  assert name(method__batch_norm="batch", method__prune_scope="all") == records.TEST_BATCH
  assert name(method__batch_norm="own") == records.RUNNING
  assert name(method__prune_scope="all") == records.RETROSPECTIVE
  assert name(method__batch_norm="batch", epochs=7) is None
  for network in models.NETWORKS:
    own = models.make(network, 3, "own")
    expected = "" if not hasattr(own, "running") else records.TEST_BATCH
    expected = records.RUNNING if getattr(own, "running", False) else expected
    assert records.statistics({"network": network, "method.batch_norm": "own"}) == expected


# --- numbers --------------------------------------------------------------------------


def group_of(*found):
  (group,), _ = records.group([run(r, str(i)) for i, r in enumerate(found)])
  return group


def test_mean_and_standard_error(make):
  group = group_of(make(final=(10.0, 20.0, 30.0)), make(final=(20.0, 30.0, 40.0), seed=1))
  value, error = records.number(group, "accuracy")
  assert (value, error) == (25.0, pytest.approx(5.0))  # deviation sqrt(50), over sqrt(2)
  assert records.number(group, "increment") == (pytest.approx(0.2), 0.0)
  assert records.number(group, "seconds").value == 3.0
  one = group_of(make(final=(10.0, 20.0, 30.0)))
  assert records.number(one, "accuracy") == (20.0, None)
  # 10 - 90 and 20 - 80; the last task doesn't count
  assert records.number(one, "bwt").value == pytest.approx(-70.0)


def test_order_metrics_compare_original_tasks(make):
  forwards = make(final=(50.0, 60.0, 70.0))
  backwards = make(final=(71.0, 55.0, 48.0), task_ids=(2, 1, 0), order="B")
  group = group_of(forwards, backwards)
  np.testing.assert_array_equal(
    sorted(map(tuple, records.by_order(group))), [(48, 55, 71), (50, 60, 70)]
  )
  assert records.number(group, "mopd").value == 5.0
  assert records.number(group, "aopd").value == pytest.approx((2 + 5 + 1) / 3)


def test_seeds_are_averaged_before_orders_are_compared(make):
  group = group_of(
    make(final=(40.0, 60.0, 70.0)),
    make(final=(60.0, 60.0, 70.0), seed=1),
    make(final=(52.0, 60.0, 70.0), task_ids=(0, 2, 1), order="B"),
  )
  # task 0: 50 and 52, task 1: 60 and 70, task 2: 70 and 60
  assert records.number(group, "mopd").value == 10.0
  assert records.number(group, "aopd").value == pytest.approx(22 / 3)


def test_one_order_with_many_seeds_has_no_order_metrics(make):
  group = group_of(make(), make(seed=1), make(seed=2))
  assert records.number(group, "mopd") is None and records.number(group, "aopd") is None


def test_tasks_that_are_missing_leave_gaps_in_the_ids(make):
  group = group_of(
    make(final=(1.0, 2.0, 3.0), task_ids=(4, 0, 2), partial=True),
    make(final=(1.0, 2.0, 3.0), task_ids=(0, 2, 4), partial=True),
  )
  # by id 0, 2, 4: 2 3 1 and 1 2 3
  assert records.number(group, "mopd").value == 2.0


def test_joint_training_has_no_backward_transfer(make):
  record = make()
  record["accuracy"][0] = record["accuracy"][1] = [None] * 3
  assert records.number(group_of(record), "bwt") is None
  assert records.number(group_of(record), "accuracy").value == 60.0
