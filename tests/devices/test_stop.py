"""Real processes, killed or told to stop: they go on to the same bits."""

import random
import signal
import subprocess
import sys
import time

import pytest

from halrp_jax.devices import stop

from ..conftest import ROOT
from ..runs.test_workdir import same


def start(folder, method="stl"):
  config = f"--config={ROOT}/configs/digits.py:{method}"
  command = [sys.executable, "-m", "halrp_jax.main", config]
  arguments = ["--config.epochs=4", "--config.order=0,1,2,3", f"--workdir={folder}"]
  return subprocess.Popen(
    [*command, "--config.checkpoint.every_seconds=0", *arguments],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def count_events(folder) -> int:
  path = folder / "metrics.jsonl"
  return len(path.read_bytes().splitlines()) if path.exists() else 0


def wait_for_events(folder, n, process):
  while process.poll() is None and count_events(folder) < n:
    time.sleep(0.01)


def killed_and_finished(folder, kills, seed, method="stl"):
  """Kills a run at random moments and lets it end. -> kills that hit a run at work"""
  rng, hits = random.Random(seed), 0
  for _ in range(kills):
    process = start(folder, method)
    wait_for_events(folder, count_events(folder) + 1, process)
    time.sleep(rng.uniform(0, 0.4))
    process.kill()
    process.communicate()
    hits += process.returncode == -signal.SIGKILL
  process = start(folder, method)
  _, err = process.communicate()
  assert process.returncode == 0, err
  return hits


@pytest.fixture(scope="module")
def whole_process(tmp_path_factory):
  folder = tmp_path_factory.mktemp("process")
  process = start(folder)
  _, err = process.communicate()
  assert process.returncode == 0, err
  return folder


@pytest.mark.slow
def test_thirty_kills(tmp_path):
  whole, hits, rounds = tmp_path / "whole", 0, 0
  killed_and_finished(whole, 0, 0, "halrp")
  while hits < 30:
    rounds += 1
    hits += killed_and_finished(tmp_path / str(rounds), 6, rounds, "halrp")
    assert same(whole, tmp_path / str(rounds))
  print(f"kills survived: {hits} in {rounds} runs")


def test_killed_and_stopped_runs_end_with_the_same_bits(whole_process, tmp_path):
  """A stopped one ends soon, with an exit code of its own."""
  process = start(tmp_path)
  wait_for_events(tmp_path, 3, process)
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  for number in (signal.SIGTERM, signal.SIGINT):
    process = start(tmp_path)
    wait_for_events(tmp_path, count_events(tmp_path) + 3, process)
    begin = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == stop.EXIT_CODE and time.monotonic() - begin < 30
    assert "Traceback" not in err and "the same command resumes" in err
  process = start(tmp_path)
  process.communicate()
  assert process.returncode == 0 and same(whole_process, tmp_path)
