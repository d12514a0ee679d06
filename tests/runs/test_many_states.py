"""States of many tasks: what is written for each, what is read again, and what memory holds."""

import json
import mmap
import shutil
import time

import jax
import numpy as np
import pytest

from halrp_jax import arguments
from halrp_jax.config import resolve
from halrp_jax.methods.stl import TaskState
from halrp_jax.runs import checkpoint, spill, states, workdir
from halrp_jax.types import State, UserError

from ..conftest import ROOT


def opened(folder, strict=False):
  now = {"tasks": [], "flags": {}, "machine": {}}
  config = resolve(arguments.load_config(f"{ROOT}/configs/digits.py:stl")).to_dict()
  return workdir.opened(str(folder), config, False, strict, lambda: False, now)


def task_state(t):
  return TaskState({"head": np.full((3, 2), t, np.float32)}, {}, np.int32(2))


def row(t):
  return {"t": t, "evaluated": [t], "accuracy": [float(t)], "increment": t / 10}


def learn(folder, start, stop, state, changes_shared=False):
  """Saves the states of a run that leaves old tasks as they are; returns the last one."""
  with opened(folder) as run:
    restored = run.restore_state()
    assert (restored or (0,))[0] == start
    rows = restored[2] if restored else []
    state = restored[1] if restored else state
    for t in range(start, stop):
      shared = {"kernels": np.full((2, 2), t + 1.0, np.float32)} if changes_shared else {}
      state, rows = state.append(task_state(t), **shared), [*rows, row(t)]
      run.save_state(t + 1, state, rows)
      state = run.spill(state)
  return state


@pytest.fixture(scope="module")
def of_70(tmp_path_factory):
  """A run of 70 tasks, resumed after 40."""
  folder = tmp_path_factory.mktemp("many")
  learn(folder, 0, 40, State({"kernels": np.ones((2, 2), np.float32)}, ()))
  return folder, learn(folder, 40, 70, None)


def about(folder, position):
  return json.loads(
    (folder / f"checkpoints/state-{position:04d}/about.json").read_text(encoding="utf-8")
  )


def check(state, count):
  expected = State({"kernels": np.ones((2, 2))}, tuple(map(task_state, range(count))))
  jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_a_state_has_what_is_new_and_every_32nd_is_whole(of_70):
  folder, state = of_70
  check(state, 70)
  for position in (69, 70):
    said, new = about(folder, position), range(65, position)
    assert said["whole"] == 65 and [r["t"] for r in said["rows"]] == [*new]
    assert list(said["items"]) == [f"task{t}" for t in new]
  whole = about(folder, 65)
  assert len(whole["items"]) == 66 and "whole" not in whole and len(whole["rows"]) == 1
  assert [name[:7] for name in whole["row_items"]] == ["rows00-", "rows01-"]
  # the two newest states, and the whole one that they build on
  found = states.find_states(folder / "checkpoints")
  assert [states.position(p) for p in found] == [70, 69, 65]


def test_what_is_read_is_what_was_saved(of_70):
  folder, _ = of_70
  state, results = states.newest_state(str(folder))
  check(state, 70)
  assert [r["increment"] for r in results["rows"]] == [t / 10 for t in range(70)]
  accuracy = np.array(results["accuracy"], float)
  assert accuracy.shape == (70, 70) and np.isnan(accuracy[3, 4:]).all()
  np.testing.assert_array_equal(accuracy[69], np.arange(70))
  items, same, _ = states.inspect(str(folder))
  check(same, 70)
  assert not any(item["problem"] or item["strays"] for item in items)


@pytest.mark.parametrize("changes_shared", [False, True])
def test_a_damaged_state_costs_one_task(changes_shared, tmp_path):
  """Also where every task changes what they share, so that older parts are deleted."""
  learn(tmp_path, 0, 40, State({"kernels": np.ones((2, 2), np.float32)}, ()), changes_shared)
  (tmp_path / "checkpoints/state-0040/about.json").write_text("{}", encoding="utf-8")
  with opened(tmp_path, strict=True) as run, pytest.raises(UserError, match="state-0040"):
    run.restore_state()
  with opened(tmp_path) as run, pytest.warns(UserWarning, match="state-0040.*after state-0039"):
    position, state, rows = run.restore_state()
    assert position == len(rows) == 39
    assert state.shared["kernels"][0, 0] == (39 if changes_shared else 1)
    run.save_state(40, state.append(task_state(39)), [*rows, row(39)])
  with opened(tmp_path) as run:
    position, state, _ = run.restore_state()
    assert position == 40 and state.tasks[39].params["head"][0, 0] == 39


@pytest.mark.parametrize("name", ["state-0065", "rows01-*"])
def test_without_what_a_state_builds_on_it_is_damaged(name, of_70, tmp_path):
  folder = tmp_path / "copy"
  shutil.copytree(of_70[0], folder)
  (item,) = (folder / "checkpoints").glob(name)
  shutil.rmtree(item)
  with pytest.raises(checkpoint.Damaged, match=f"{item.name}: missing"):
    states.outline(folder / "checkpoints/state-0070")
  items, state, _ = states.inspect(str(folder))
  problems = {found["name"]: found["problem"] for found in items if found["problem"]}
  assert state is None and problems.keys() >= {"state-0069", "state-0070"}


def test_a_state_that_builds_on_a_later_one_is_damaged(of_70, tmp_path):
  folder = tmp_path / "copy"
  shutil.copytree(of_70[0], folder)
  item = folder / "checkpoints/state-0069"
  for later in (69, 70):
    checkpoint.save(item, ([], []), about(folder, 69) | {"whole": later})
    with pytest.raises(checkpoint.Damaged, match="state-0069: was changed or damaged"):
      states.outline(item)


def test_what_is_complete_stays_while_parts_can_not_be_written(tmp_path, monkeypatch):
  """The items of states are small: they are written when there is no room for what they name."""
  learn(tmp_path, 0, 4, State({"kernels": np.ones((2, 2), np.float32)}, ()), changes_shared=True)
  save = checkpoint.save

  def slow_and_full(folder, packed, about):
    time.sleep(0.05)
    if packed[1]:
      raise OSError(28, "No space left on device")
    save(folder, packed, about)

  with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
    patch.setattr(workdir.checkpoint, "save", slow_and_full)
    learn(tmp_path, 4, 12, None, changes_shared=True)
  with opened(tmp_path) as run, pytest.warns(UserWarning, match="resumes after state-0004"):
    position, state, _ = run.restore_state()
  assert position == 4 and state.shared["kernels"][0, 0] == 4


def test_states_of_older_versions_were_whole(of_70, tmp_path):
  folder = tmp_path / "copy"
  shutil.copytree(of_70[0], folder)
  newest = folder / "checkpoints/state-0070"
  found = states.outline(newest)
  accuracy = states.results(found.rows)["accuracy"]
  rows = [{k: v for k, v in r.items() if k == "increment"} for r in found.rows]
  older = {"items": [*found.items.values()], "results": {"rows": rows, "accuracy": accuracy}}
  checkpoint.save(newest, ([], []), older | {"events": found.events})
  again = states.outline(newest)
  assert again.items == found.items and states.results(again.rows)["accuracy"] == accuracy
  assert [r["increment"] for r in again.rows] == [r["increment"] for r in found.rows]
  state = learn(folder, 70, 72, None)
  check(state, 72)
  assert about(folder, 72)["whole"] == about(folder, 71)["whole"] == 70


def test_old_tasks_are_maps_of_a_file(of_70):
  _, state = of_70
  spilled = [t for t, task in enumerate(state.tasks) if spill.is_spilled(task)]
  # those that the last call has seen unchanged; the first task and the newest are in memory
  assert spilled == [*range(1, 70 - workdir._IN_MEMORY)]


def test_tasks_that_change_stay_in_memory(tmp_path):
  state, rows = State({}, tuple(map(task_state, range(40)))), [row(t) for t in range(40)]
  with opened(tmp_path) as run:
    for position in (40, 41):
      run.save_state(position, state, rows)
      assert not any(map(spill.is_spilled, run.spill(state).tasks[1:]))
      state = jax.tree.map(np.copy, state)  # a method that trains all tasks
    run.save_state(42, state, rows)
    run.save_state(43, state, rows)
    assert spill.is_spilled(run.spill(state).tasks[5])


def test_spilled_arrays_are_the_same_and_can_not_be_written(tmp_path):
  make = spill.make_spill(tmp_path)
  rng = np.random.default_rng(0)
  trees = [
    {
      "a": rng.normal(size=(n, 5)).astype(np.float32),
      "b": jax.numpy.ones((3,), jax.numpy.bfloat16),
      "empty": np.zeros((0, 4), np.int32),
      "scalar": np.int32(n),
      "padded": np.pad(rng.normal(size=(6, 2)), ((0, 0), (0, 5))),
      "zeros": np.zeros((2, 3, 4)),
    }
    for n in (1, 100, 5_000_000, 7)  # the third is larger than a chunk
  ]
  trees.insert(2, np.ones(70_000_001, bool))
  found = [make(tree) for tree in trees]
  for tree, stored in zip(trees, found, strict=True):
    jax.tree.map(np.testing.assert_array_equal, stored, tree)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), stored) == jax.tree.map(
      lambda x: (x.shape, x.dtype), tree
    )
  assert all(x.flags.aligned for x in jax.tree.leaves(found))
  doubled = jax.jit(lambda tree: jax.tree.map(lambda x: x + x, tree))
  jax.tree.map(np.testing.assert_array_equal, doubled(found[0]), doubled(trees[0]))
  with pytest.raises(ValueError, match="read-only"):
    found[0]["a"][0] = 1
  assert not list(tmp_path.iterdir()), "the file has no name"
  before = checkpoint.fingerprint(found)
  for x in jax.tree.leaves(found):
    assert not x.size or isinstance(x.base, mmap.mmap)  # so that memory can be freed
    spill.release(x)
  assert checkpoint.fingerprint(found) == before == checkpoint.fingerprint(trees)


def test_without_room_for_the_file_old_tasks_stay_in_memory(of_70, tmp_path, monkeypatch):
  folder = tmp_path / "copy"
  shutil.copytree(of_70[0], folder)

  def full(*args):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(spill.os, "pwrite", full)
  with opened(folder) as run, pytest.warns(UserWarning, match="stay in memory.*No space") as said:
    _, state, _ = run.restore_state()
  assert len(said) == 1 and not any(map(spill.is_spilled, state.tasks))
  check(state, 70)
