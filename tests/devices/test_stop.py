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


def start(folder, *more):
  command = [sys.executable, "-m", "halrp_jax.main", f"--config={ROOT}/configs/digits.py"]
  arguments = ["--config.epochs=4", "--config.train_fraction=0.5", f"--workdir={folder}"]
  return subprocess.Popen(
    [*command, "--config.checkpoint.every_seconds=0", *arguments, *more],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_for_events(folder, n, process):
  path = folder / "metrics.jsonl"
  while process.poll() is None:
    if path.exists() and len(path.read_bytes().splitlines()) >= n:
      return
    time.sleep(0.01)


def killed_and_finished(folder, kills, seed):
  """Kills a run at random moments and lets it end. -> kills that hit a run at work"""
  rng, hits = random.Random(seed), 0
  for _ in range(kills):
    process = start(folder)
    path = folder / "metrics.jsonl"
    wait_for_events(
      folder, len(path.read_bytes().splitlines()) + 1 if path.exists() else 1, process
    )
    time.sleep(rng.uniform(0, 0.4))
    process.kill()
    process.communicate()
    hits += process.returncode == -signal.SIGKILL
  process = start(folder)
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


def test_killed_runs_end_with_the_same_bits(whole_process, tmp_path):
  assert killed_and_finished(tmp_path, kills=3, seed=0) >= 1
  assert same(whole_process, tmp_path)


@pytest.mark.slow
def test_thirty_kills(whole_process, tmp_path):
  hits, rounds = 0, 0
  while hits < 30:
    rounds += 1
    hits += killed_and_finished(tmp_path / str(rounds), kills=6, seed=rounds)
    assert same(whole_process, tmp_path / str(rounds))
  print(f"kills survived: {hits} in {rounds} runs")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_soon_with_its_own_exit_code(whole_process, number, tmp_path):
  process = start(tmp_path)
  wait_for_events(tmp_path, 3, process)
  begin = time.monotonic()
  process.send_signal(number)
  _, err = process.communicate()
  assert process.returncode == stop.EXIT_CODE and time.monotonic() - begin < 30
  assert "Traceback" not in err and "the same command resumes" in err
  process = start(tmp_path)
  process.communicate()
  assert process.returncode == 0 and same(whole_process, tmp_path)
