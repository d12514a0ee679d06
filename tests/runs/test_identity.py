"""Runs that would go on, or be put together, on something else than they began with."""

import contextlib
import json
import shutil
import sys

import jax
import numpy as np
import pytest

from halrp_jax.commands import terminal
from halrp_jax.config import make_config, resolve
from halrp_jax.deploy import saved
from halrp_jax.runs import experiment, identity, standing, sweep
from halrp_jax.types import JAX_FLAGS, STANDING, UserError

from ..conftest import interrupt


def write(folder, task, seed=0):
  folder.mkdir(exist_ok=True)
  x = np.random.default_rng(seed).integers(0, 256, (40, 8, 8), np.uint8)
  np.savez(folder / f"{task}.npz", image=x, label=np.arange(40) % 2)


def config_of(folder, **overrides):
  """A config for a folder of the user's tasks."""
  config = make_config(
    "stl",
    benchmark="custom",
    data_dir=str(folder),
    order="natural",
    network="mlp",
    epochs=1,
    protocol={},
  )
  with config.unlocked():
    config.update_from_flattened_dict(overrides)
  return config


def write_tasks(folder):
  for i, task in enumerate("abc"):
    write(folder / "mine", task, i)


@pytest.fixture
def mine(tmp_path):
  """A folder of three tasks, and a config for it."""
  write_tasks(tmp_path)
  return lambda folder="mine", **overrides: config_of(tmp_path / folder, **overrides)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
  """Made once: a run on these tasks that was stopped in its second one, and the same uninterrupted.

  -> folder, record of the uninterrupted run
  """
  folder = tmp_path_factory.mktemp("originals")
  write_tasks(folder)
  interrupt(config_of(folder / "mine"), folder / "run", 1)
  return folder, experiment.run(config_of(folder / "mine"), str(folder / "whole"))


@pytest.fixture
def begun(originals, mine, tmp_path):
  """A copy of the stopped run, in the folder "run" beside its tasks."""
  shutil.copytree(originals[0] / "run", tmp_path / "run")
  return mine


@pytest.fixture(scope="module")
def begun_digits(tmp_path_factory):
  """Makes, once, a run on digits that was stopped after its first task: (config) -> folder"""
  cache = []

  def get(config):
    if not cache:
      cache.append(tmp_path_factory.mktemp("digits"))
      interrupt(config, cache[0], 1)
    return cache[0]

  return get


def run(config, folder, **how):
  """The record, and the lines that were said."""
  said = []

  def show(event):
    if event["event"] == "standing":
      said.extend(event["said"])

  return experiment.run(config, str(folder), show, **how), said


def bits(record):
  return record["accuracy"], record["state_hash"], record["split_hash"]


FLAGS = {
  "jax_enable_x64": True,
  "jax_default_prng_impl": "rbg",
  "jax_threefry_partitionable": False,
  "jax_default_matmul_precision": "highest",
}


@contextlib.contextmanager
def flag(name):
  usual = JAX_FLAGS[name]
  jax.config.update(name, FLAGS[name])
  try:
    yield f"{name} = {FLAGS[name]!r} .was {usual!r}."
  finally:
    jax.config.update(name, usual)


# --- going on -------------------------------------------------------------------------


def test_a_run_does_not_go_on_with_other_images(begun, tmp_path):
  """Neither of a task that is learned nor of one that may have begun."""
  for i, task in enumerate("abc"):
    write(tmp_path / "mine", task, 7)
    says = rf"task '{task}' \(id {i}\) has other images or labels in data_dir=.*mine; resume with"
    with pytest.raises(UserError, match=says):
      run(begun(), tmp_path / "run")
    if task != "c":
      write(tmp_path / "mine", task, i)
  record, _ = run(begun(), tmp_path / "run", overwrite=True)
  assert bits(record) == bits(run(begun(), tmp_path / "new")[0])


def test_data_may_move(begun, originals, tmp_path):
  (tmp_path / "mine").rename(tmp_path / "moved")
  record, said = run(begun("moved"), tmp_path / "run")
  assert said == [] and bits(record) == bits(originals[1])


def test_a_task_more_is_refused(begun, tmp_path):
  write(tmp_path / "mine", "d")
  with pytest.raises(UserError, match="there are 4 tasks in data_dir=.* .were 3."):
    run(begun(), tmp_path / "run")


def test_a_run_does_not_go_on_with_other_jax_flags(digits_config, begun_digits, tmp_path):
  config = digits_config("stl", order="0,1", epochs=1)
  shutil.copytree(begun_digits(config), tmp_path / "run")
  for name in FLAGS:
    with flag(name) as says, pytest.raises(UserError, match=f"a run with other inputs: {says}"):
      run(config, tmp_path / "run")
  assert run(config, tmp_path / "run")[1] == []


def test_nothing_learned_is_nothing_lost(mine, tmp_path):
  """A folder whose run ended before its first checkpoint takes whatever comes."""
  interrupt(mine(), tmp_path / "run", 0)
  shutil.rmtree(tmp_path / "run" / "checkpoints")
  (tmp_path / "run" / "checkpoints").mkdir()
  write(tmp_path / "mine", "a", 7)
  record, _ = run(mine(), tmp_path / "run")
  assert bits(record) == bits(run(mine(), tmp_path / "new")[0])


def test_other_versions_and_machines_are_said_and_recorded(
  digits_config, begun_digits, tmp_path, monkeypatch, capsys
):
  config = digits_config("stl", order="0,1", epochs=1)
  shutil.copytree(begun_digits(config), tmp_path / "run")
  here = standing.machine()
  monkeypatch.setattr(standing, "machine", lambda: here | {"jax": "99", "cores": 77})
  record, said = run(config, tmp_path / "run")
  assert said == [f"cores = 77 (was {here['cores']})", f"jax = '99' (was {here['jax']!r})"]
  assert record["standing"]["changes"] == said and record["standing"]["machine"]["cores"] == 77
  assert json.loads((tmp_path / "run" / STANDING).read_text()) == record["standing"]
  with terminal.live_display(sys.stdout) as show:
    show({"event": "standing", "said": said})
  assert "note: cores = 77" in capsys.readouterr().out


def test_a_folder_of_an_older_version_goes_on_and_says_what_it_lacks(begun, originals, tmp_path):
  (tmp_path / "run" / STANDING).unlink()
  shutil.copytree(tmp_path / "run", tmp_path / "other")
  record, said = run(begun(), tmp_path / "run")
  assert len(said) == 1 and "wrote no standing.json: its JAX flags, versions and machine" in said[0]
  assert record["standing"]["changes"] == said
  assert bits(record) == bits(originals[1])
  write(tmp_path / "mine", "a", 7)  # its tasks.json has a hash of all splits
  with pytest.raises(UserError, match=r"other images, labels or splits in data_dir=.* .split hash"):
    run(begun(), tmp_path / "other")


@pytest.mark.parametrize("text", ["", "[]", '{"tasks": 5}', '{"tasks": [{}], "flags": {}}'])
def test_a_damaged_standing_is_one_clear_line(begun, tmp_path, text):
  (tmp_path / "run" / STANDING).write_text(text)
  with pytest.raises(UserError, match="standing.json: .*; --overwrite starts anew"):
    run(begun(), tmp_path / "run")


# --- what is finished -----------------------------------------------------------------


def test_a_sweep_keeps_no_cell_of_other_data(mine, tmp_path):
  cells = sweep.cells({"stl": mine()}, "natural", "0,1")
  states = lambda: [
    (row["state"], row["error"])
    for row in sweep.run(cells, str(tmp_path / "runs"), lambda rows: None, lambda: False)
  ]
  assert states() == [("done", "")] * 2
  assert states() == [("kept", "")] * 2
  write(tmp_path / "mine", "b", 7)
  for state, error in states():
    assert state == "failed" and "task 'b' (id 1) has other images or labels in data_dir" in error


def test_a_finished_run_with_other_flags_is_not_taken_for_the_same(digits_config, tmp_path):
  config = digits_config("stl", order="0,1", epochs=1)
  before, _ = run(config, tmp_path)
  with flag("jax_enable_x64") as says, pytest.raises(UserError, match=says):
    run(config, tmp_path)
  assert run(config, tmp_path) == (before, [])


def test_a_finished_run_stays_when_its_data_are_gone(mine, tmp_path):
  record, _ = run(mine(), tmp_path / "run")
  shutil.rmtree(tmp_path / "mine")
  again, said = run(mine(), tmp_path / "run")
  assert again == record and len(said) == 1 and "its data can't be compared (data_dir=" in said[0]


def test_data_are_read_once_for_all_finished_runs_that_draw_the_same(
  digits_config, tmp_path, monkeypatch
):
  read, count = identity.data.read, []
  monkeypatch.setattr(identity.data, "read", lambda c: count.append(1) or read(c))
  one = identity.shared_read()
  for order in ("0,1", "1,0"):
    for seed in (0, 1):
      found = one(resolve(digits_config("stl", order=order, seed=seed)))
      assert [t["id"] for t in found["tasks"]] == [int(i) for i in order.split(",")]
  one(resolve(digits_config("halrp", epochs=7)))
  assert len(count) == 2


# --- extending ------------------------------------------------------------------------


def test_a_run_is_extended_on_what_it_stands_on(mine, tmp_path):
  interrupt(mine(), tmp_path / "run", 2)
  write(tmp_path, "new", 5)
  old = saved.open_run(str(tmp_path / "run"))

  def extend(out, run=old):
    return saved.extend(run, str(tmp_path / "new.npz"), str(tmp_path / out))

  with flag("jax_enable_x64") as says, pytest.raises(UserError, match=f"run holds a run .*{says}"):
    extend("more")
  assert not (tmp_path / "more").exists()
  record = extend("more")
  tasks = record["standing"]["tasks"]
  before = json.loads((tmp_path / "run" / STANDING).read_text())["tasks"]
  assert tasks[:2] == before[:2] and tasks[2]["name"] == "new" and tasks[2]["split"]
  assert extend("more") == record
  write(tmp_path, "new", 6)
  with pytest.raises(UserError, match=r"task 'new' \(id 3\) has other images or labels in --data="):
    extend("more")
  write(tmp_path, "new", 5)
  state = old.state._replace(tasks=old.state.tasks[:1] * 2)
  with pytest.raises(UserError, match="the run to be extended has another state"):
    extend("more", old._replace(state=state))


def test_a_config_without_the_keys_of_later_versions_opens(digits_config, tmp_path):
  now = resolve(digits_config("halrp")).to_dict()
  older = {k: v for k, v in now.items() if not k.startswith("base")}
  older["method"] = {k: v for k, v in now["method"].items() if k not in ("scales", "private")}
  older["data"] = now["data"] | {"image_size": 32}  # it had no effect but for custom
  (tmp_path / "config.json").write_text(json.dumps(older))
  assert resolve(identity.read_config(str(tmp_path))).to_dict() == now
  identity.check_config(tmp_path, now)
