"""Runs that are learned at once are the runs one after another."""

import json
import threading

import jax
import numpy as np
import pytest

from halrp_jax.config import make_config, with_keys
from halrp_jax.devices import replicas
from halrp_jax.runs import sweep
from halrp_jax.types import Stopped


def cells_of(config):
  return [
    sweep.Cell(f"{order[0]}_{seed}", with_keys(config, order=order, seed=seed))
    for order in ("0,1", "1,0")
    for seed in (0, 1)
  ]


def run(cells, folder, vectorize, stop_asked=lambda: False):
  return sweep.run(cells, str(folder), lambda rows: None, stop_asked, vectorize)


def losses(folder, cell):
  lines = (folder / cell.name / "metrics.jsonl").read_text().splitlines()
  events = [json.loads(line) for line in lines]
  return [e["loss"] for e in events if e["event"] == "epoch"]


@pytest.fixture(scope="module")
def apart_and_joint(tmp_path_factory):
  """-> cells, folder of the runs apart, of the runs at once, how often which function is traced."""
  config = make_config(
    "halrp", benchmark="digits", network="mlp", epochs=2, batch_size=64, protocol={}
  )
  cells, traces = cells_of(config), {}

  def listen(event, seconds, **about):
    if event == "/jax/core/compile/jaxpr_trace_duration":
      traces[about["fun_name"]] = traces.get(about["fun_name"], 0) + 1

  apart, joint = (tmp_path_factory.mktemp(name) for name in ("apart", "joint"))
  run(cells, apart, False)
  jax.monitoring.register_event_duration_secs_listener(listen)
  run(cells, joint, True)
  jax.monitoring.unregister_event_duration_listener(listen)
  return cells, apart, joint, traces


def test_ranks_losses_and_accuracies_are_those_of_each_alone(apart_and_joint):
  cells, apart, joint, _ = apart_and_joint
  assert len({cell.name for cell in cells}) == 4
  seen = set()
  for cell in cells:
    a, b = (json.loads((d / cell.name / "record.json").read_text()) for d in (apart, joint))
    assert a["ranks"] == b["ranks"] and a["task_ids"] == b["task_ids"]
    np.testing.assert_allclose(losses(apart, cell), losses(joint, cell), rtol=1e-3)
    assert abs(a["average_accuracy"] - b["average_accuracy"]) < 1
    assert b["config"]["parallel"] == "replicas"
    seen.add(tuple(losses(joint, cell)))
  assert len(seen) == 4


def test_four_runs_are_two_programs_for_each_phase(apart_and_joint):
  """The first task, warm-up (the same network) and fine-tuning; full batches and the last one."""
  traces = apart_and_joint[3]
  found = {name: n for name, n in traces.items() if "steps" in name}
  assert found and sum(found.values()) <= 4, traces


def test_runs_at_once_that_are_stopped_go_on_later(digits_config, tmp_path):
  cells = cells_of(digits_config("stl"))
  asked = iter([False] * 30)
  with pytest.raises(Stopped):
    run(cells, tmp_path, True, lambda: next(asked, True))
  assert not list(tmp_path.glob("*/record.json"))
  assert {row["state"] for row in run(cells, tmp_path, True)} == {"done"}
  assert {row["state"] for row in run(cells, tmp_path, True)} == {"kept"}


def test_a_run_that_fails_leaves_the_others(digits_config, tmp_path):
  cells = cells_of(digits_config("stl"))
  place = tmp_path / cells[1].name
  place.mkdir()
  (place / "record.json").write_text("{}")  # no run of ours: refused
  states = [row["state"] for row in run(cells, tmp_path, True)]
  assert states == ["done", "failed", "done", "done"]


def test_a_gang_does_equal_work_at_once_and_each_gets_its_own():
  calls = []

  def double(arguments):
    calls.append(sorted(arguments))
    return [ValueError(x) if x == 3 else 2 * x for (x,) in arguments]

  def negate(arguments):
    return [-x for (x,) in arguments]

  results, lock = {}, threading.Lock()

  def job(i, gang):
    rounds = []
    for fn in (double, double, negate if i < 2 else double)[: 1 if i == 0 else 3]:
      try:
        rounds.append(gang.gather(fn, (i,)))
      except ValueError as e:
        rounds.append(str(e))
    with lock:
      results[i] = rounds

  replicas.run_all([lambda gang, i=i: job(i, gang) for i in range(4)])
  assert results == {0: [0], 1: [2, 2, -1], 2: [4, 4, 4], 3: ["3", "3", "3"]}
  assert calls == [[(0,), (1,), (2,), (3,)], [(1,), (2,), (3,)], [(2,), (3,)]]


def test_work_that_fails_fails_for_all_of_it():
  def broken(arguments):
    raise OSError("disk")

  errors = []

  def job(gang):
    try:
      gang.gather(broken, ())
    except OSError as e:
      errors.append(e)

  replicas.run_all([job, job])
  assert len(errors) == 2
