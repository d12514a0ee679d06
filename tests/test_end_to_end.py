"""What a user types, in a process of its own."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from .conftest import FOR_SPEED, ROOT


def command(*arguments, as_users=False):
  """Calls a command; `as_users`: compiled as it is for users, which takes longer."""
  env = {k: v for k, v in os.environ.items() if not (as_users and k in FOR_SPEED)}
  return subprocess.run(
    [sys.executable, "-m", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=900,
    env=env | {"JAX_PLATFORMS": "cpu"},
  )


@pytest.mark.parametrize("method", ["halrp", pytest.param("stl", marks=pytest.mark.slow)])
def test_digits(tmp_path, method):
  workdir = tmp_path / "run"
  done = command(
    "halrp_jax.main",
    f"--config=configs/digits.py:{method}",
    f"--workdir={workdir}",
    "--config.epochs=10",
    as_users=True,
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert sum(line.startswith("task ") and "accuracy" in line for line in lines) == 10
  record = json.loads((workdir / "record.json").read_text())
  assert record["average_accuracy"] > 88
  assert f"ACC        {record['average_accuracy']:.2f} %" in done.stdout
  config = json.loads((workdir / "config.json").read_text())
  assert config == record["config"]
  events = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert sum(e["event"] == "epoch" for e in events) == 100
  evaluations = [e for e in events if e["event"] == "evaluation"]
  assert [len(e["accuracy"]) for e in evaluations] == list(range(1, 11))
  if method == "stl":
    assert record["bwt"] == 0 and record["increment"][-1] == pytest.approx(9)
  else:
    assert 0 < record["increment"][-1] < 1 and record["ranks"][0] is None
  done = command("halrp_jax", "compare", str(workdir))
  assert done.returncode == 0 and f"{record['average_accuracy']:.2f}" in done.stdout


@pytest.mark.slow
def test_real_cifar100_through_the_command_line(tmp_path, real_data):
  workdir = tmp_path / "run"
  done = command(
    "halrp_jax.main",
    "--config=configs/cifar100_superclass.py",
    f"--config.data_dir={real_data}",
    f"--workdir={workdir}",
    "--config.order=15,12,5,9",
    "--config.seed=3",
    "--config.train_fraction=0.05",
    "--config.epochs=2",
  )
  assert done.returncode == 0, done.stderr
  record = json.loads((workdir / "record.json").read_text())
  assert record["task_ids"] == [15, 12, 5, 9] and record["partial"] and record["seed"] == 3
  assert record["size"][0]["base"] == 2_993_115
  matrix = np.array(record["accuracy"], float)
  assert matrix.shape == (4, 4) and record["average_accuracy"] > 20  # chance, of five classes


def test_a_mistake_leaves_no_traceback(tmp_path):
  """tests/test_main.py has all of them, in its own process."""
  done = command("halrp_jax.main", "--config=configs/digits.py:nobody", f"--workdir={tmp_path}/x")
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
