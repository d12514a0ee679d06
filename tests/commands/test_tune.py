"""tune: a grid on the validation images, to which the test images make no difference."""

import json

import numpy as np
import pytest

from halrp_jax import data
from halrp_jax.commands import tune
from halrp_jax.runs import experiment
from halrp_jax.types import UserError

from ..conftest import ROOT

CONFIG = f"--config={ROOT}/configs/digits.py:ewc"
QUICK = f"--config={ROOT}/configs/digits.py:l2"
SHORT = ("--config.epochs=1", "--config.order=3,1")


def test_a_grid_is_run_and_told(tmp_path, capsys):
  argv = [QUICK, "--grid=method.strength=0,1e3;seed=0,1", f"--workdir={tmp_path}", *SHORT]
  assert tune.main(argv) == 0
  table = json.loads((tmp_path / "tune.json").read_text())
  assert len(table) == 4 and "method.strength=1e3,seed=1" in table
  best = [r["average_accuracy"] for r in table.values()]
  assert best == sorted(best, reverse=True)
  assert "valid. ACC %" in capsys.readouterr().out
  config = json.loads((tmp_path / "method.strength=0,seed=0" / "config.json").read_text())
  assert config["protocol"]["evaluate_on"] == "validation" and config["train_fraction"] == 0.25
  before = (tmp_path / "method.strength=0,seed=0" / "record.json").stat().st_mtime_ns
  assert tune.main(argv) == 0  # finished cells are not run again
  assert (tmp_path / "method.strength=0,seed=0" / "record.json").stat().st_mtime_ns == before


def test_the_test_images_are_nowhere_in_it(tmp_path, monkeypatch):
  """Other test images and labels, the same bits."""
  load = data.load

  def noisy(config):
    benchmark = load(config)
    rng = np.random.default_rng(0)
    tasks = []
    for task in benchmark.tasks:
      image = np.array(task.test.image)
      rows = np.asarray(task.test.index)
      image[rows] = rng.integers(0, 256, image[rows].shape)
      splits = {k: getattr(task, k)._replace(image=image) for k in ("train", "valid", "test")}
      splits["test"] = splits["test"]._replace(label=np.zeros_like(task.test.label))
      tasks.append(task._replace(**splits))
    return benchmark._replace(tasks=tuple(tasks))

  def result(name):
    argv = [QUICK, "--grid=method.strength=10", f"--workdir={tmp_path / name}", *SHORT]
    assert tune.main(argv) == 0
    record = json.loads((tmp_path / name / "method.strength=10" / "record.json").read_text())
    return record["state_hash"], record["accuracy"], record["validation_accuracy"]

  want = result("real")
  monkeypatch.setattr(experiment.data, "load", noisy)
  assert result("noise") == want


@pytest.mark.parametrize(
  ("grid", "says"),
  [
    ("method.strengt=1", "did you mean method.strength"),
    ("method.strength=-1,1", "method.strength must be a number >= 0"),
    ("method.strength", "is not KEY=VALUE"),
    ("method.strength=1,,2", "is not KEY=VALUE"),
    ("method.fisher=sampled", "method.fisher must be one of"),
  ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(grid, says, tmp_path):
  with pytest.raises(UserError, match=says):
    tune.main([CONFIG, f"--grid={grid}", f"--workdir={tmp_path / 'run'}", *SHORT])
  assert not (tmp_path / "run").exists()


def test_what_is_missing_is_named(tmp_path):
  with pytest.raises(UserError, match="arguments are required: --grid; for example: python"):
    tune.main([CONFIG, f"--workdir={tmp_path}"])


def test_no_validation_images_no_tuning(tmp_path):
  with pytest.raises(UserError, match="has no validation images"):
    tune.main(
      [CONFIG, "--grid=seed=0", f"--workdir={tmp_path}", "--config.protocol.validation_fraction=0"]
    )


def test_the_grid_sets_the_fraction_of_the_training_images(tmp_path):
  argv = [CONFIG, "--grid=train_fraction=0.5,1", f"--workdir={tmp_path}", *SHORT]
  assert tune.main(argv) == 0
  configs = [json.loads(path.read_text()) for path in tmp_path.glob("*/config.json")]
  assert sorted(config["train_fraction"] for config in configs) == [0.5, 1.0]
