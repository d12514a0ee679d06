"""Two processes that learn one run: as one does, and none waits for one that is in trouble."""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from halrp_jax import arguments
from halrp_jax.devices import processes
from halrp_jax.runs import experiment
from halrp_jax.types import UserError

from ..conftest import ROOT
from ..data.test_custom import draw

KEYS = ("--config.order=0,1", "--config.epochs=2", "--config.checkpoint.every_seconds=0.")
SHORT = (f"--config={ROOT}/configs/digits.py:stl", *KEYS)
HALRP = (
  f"--config={ROOT}/configs/digits.py",
  *KEYS,
  "--config.epochs=8",
  "--config.method.warmup_epochs=2",
)
FLAGS = {"stl": SHORT, "halrp": HALRP}
SLOW = pytest.mark.slow


@pytest.fixture
def launch():
  with started() as start:
    yield start


@contextlib.contextmanager
def started():
  """(workdir, *keys, own=(of process 0, of process 1)) -> both; none outlives the block.

  With slurm=True JAX reads which process is which from the environment."""
  running = []

  def start(workdir, *keys, own=((), ()), slurm=False):
    with socket.create_server(("localhost", 0)) as free:
      port = free.getsockname()[1]
    for i in range(2):
      env, place = {}, (f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={i}")
      if slurm:
        job = str(port % 4096)  # jax makes the port 61440 + job
        env = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
        env |= {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
        place = ("--coordinator=auto",)
      running.append(main(f"--workdir={workdir}", *keys, *own[i], *place, env=env))
    return running[-2:]

  try:
    yield start
  finally:
    for process in running:
      process.kill()
      process.communicate()


def main(*keys, env) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-m", "halrp_jax.main", *map(str, keys)],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
  )


def ends(pair, seconds=120) -> list[tuple[int, str, str]]:
  """(exit code, stdout, stderr) of each, which must not take longer."""
  outputs = [process.communicate(timeout=seconds) for process in pair]
  return [(p.returncode, *texts) for p, texts in zip(pair, outputs, strict=True)]


def succeed(pair) -> str:
  """What process 0 shows; the other shows nothing."""
  (code, shown, error), (other, nothing, _) = ends(pair)
  assert (code, other) == (0, 0), error
  assert [line for line in nothing.splitlines() if not line.startswith("[Gloo]")] == []
  return shown


def record(folder) -> dict:
  return json.loads((folder / "record.json").read_text())


def events(folder, kind: str) -> list[dict]:
  path = folder / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  return [e for e in map(json.loads, lines) if e["event"] == kind]


def wait_for(folder, kind: str, count: int) -> None:
  end = time.monotonic() + 120
  while len(events(folder, kind)) < count:
    assert time.monotonic() < end, f"no {kind} in {folder}"
    time.sleep(0.02)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
  """(method, mode) -> folder of the run in two processes that Slurm started, and what they showed.

  The flag for XLA that deterministic=true sets must be there before JAX asks Slurm.
  """

  @functools.cache
  def learn(method, mode):
    folder = tmp_path_factory.mktemp(mode)
    keys = (f"--config.parallel={mode}", "--config.deterministic=true")
    with started() as start:
      return folder, succeed(start(folder, *FLAGS[method], *keys, slurm=True))

  return learn


@pytest.mark.parametrize(
  ("method", "mode"),
  [
    ("stl", "sharded"),
    pytest.param("halrp", "sharded", marks=SLOW),
    pytest.param("halrp", "pmap", marks=SLOW),
  ],
)
def test_two_processes_learn_as_one(method, mode, together, tmp_path):
  folder, shown = together(method, mode)
  assert "ACC" in shown
  config = arguments.parse_config(["main", *FLAGS[method]], {}, {}).config
  got, want = record(folder), experiment.run(config, str(tmp_path))
  assert got["ranks"] == want["ranks"] and got["device"].startswith("2 x")
  np.testing.assert_allclose(got["average_accuracy"], want["average_accuracy"], atol=1.5)
  losses = [[e["loss"] for e in events(f, "epoch")] for f in (folder, tmp_path)]
  np.testing.assert_allclose(*losses, rtol=2e-3)
  np.testing.assert_allclose(*(x[:2] for x in losses), rtol=1e-5)  # before rounding adds up


@SLOW
@pytest.mark.parametrize("mode", ["sharded", "pmap"])
def test_images_in_host_memory_give_the_same_bits(mode, together, launch, tmp_path):
  keys = (f"--config.parallel={mode}", "--config.deterministic=true")
  succeed(launch(tmp_path, *HALRP, *keys, "--config.data.residence=host"))
  on_device = record(together("halrp", mode)[0])
  assert record(tmp_path)["state_hash"] == on_device["state_hash"]
  assert record(tmp_path)["accuracy"] == on_device["accuracy"]


def test_a_finished_run_is_shown_by_process_0(together, launch):
  assert "is finished already" in succeed(launch(together("stl", "sharded")[0], *SHORT))


@SLOW
@pytest.mark.parametrize("victim", [1, 0])
def test_if_one_is_killed_the_other_ends_and_both_go_on(victim, tmp_path, launch, together):
  """Inside the second task; started again they end with the bits of a run nobody disturbed.

  That one was started by Slurm, these by arguments: which process is which means the same.
  """
  pair = launch(tmp_path, *HALRP)
  wait_for(tmp_path, "epoch", 12)  # the second of six of fine-tuning
  start = time.monotonic()
  pair[victim].kill()
  code, _, error = ends(pair, 60)[1 - victim]
  assert code not in (0, 1, 2) and time.monotonic() - start < 60
  assert "another one has ended" in error or "another task died" in error
  assert not (tmp_path / "record.json").exists()
  succeed(launch(tmp_path, *HALRP))
  whole = together("halrp", "sharded")[0]
  assert record(tmp_path)["state_hash"] == record(whole)["state_hash"]
  assert record(tmp_path)["accuracy"] == record(whole)["accuracy"]
  assert len(events(tmp_path, "epoch")) == len(events(whole, "epoch")) == 16


def test_a_signal_to_one_stops_both(tmp_path, launch):
  pair = launch(tmp_path, *SHORT, "--config.epochs=100000")
  wait_for(tmp_path, "epoch", 2)
  pair[1].send_signal(signal.SIGTERM)
  for code, _, error in ends(pair, 60):
    assert code == 75 and "the same command resumes" in error
  assert not (tmp_path / "record.json").exists()


@pytest.mark.parametrize(
  "own, said",
  [
    (((), ("--config.seed=3",)), "process 1 has other config than process 0"),
    (((), ("--overwrite",)), "process 1 has other config than process 0"),
    ((("--config.parallel=none",),) * 2, "2 processes would do the same work: set parallel=auto"),
    # one that has no images ends both: test_images_that_one_lacks_end_both
    pytest.param((("--config.benchmark=cifar100_split",),) * 2, "data_dir", marks=SLOW),
  ],
)
def test_they_must_mean_the_same_run(own, said, tmp_path, launch):
  for code, _, error in ends(launch(tmp_path / "run", *SHORT, own=own)):
    assert code == 2 and said in error and "Traceback" not in error
  assert not (tmp_path / "run").exists()


def test_images_that_one_lacks_end_both(tmp_path, launch):
  """Every host reads its own copy."""
  for host in ("same", "other"):
    for kind in "ab":
      for i in range(4):
        draw(tmp_path / host / "task" / kind / f"{i}.png", seed=i + 100 * (host == "other"))
  own = [(f"--config.data_dir={tmp_path / name}",) for name in ("same", "other", "none")]
  keys = (*KEYS, "--config=configs/custom.py:stl", "--config.order=0")
  for wrong, said in ((own[1], "process 1 has other images"), (own[2], f"{tmp_path / 'none'}")):
    for code, _, error in ends(launch(tmp_path / "run", *keys, own=(own[0], wrong))):
      assert code == 2 and said in error and "Traceback" not in error
  assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_ends_both(tmp_path, launch):
  """Process 0 alone looks at it."""
  (tmp_path / "config.json").write_text("{}")
  results = ends(launch(tmp_path, *SHORT))
  for code, _, error in results:
    assert code == 2 and "holds a run of another config" in error


@pytest.mark.parametrize(
  "place, said",
  [
    (("", "2", ""), "belong to --coordinator"),
    (("host", "2", "0"), "HOST:PORT of process 0, or auto"),
    (("host:1", "", "0"), "--num_processes=: expected a whole number"),
    (("host:1", "2", "2"), "--process_id=2: expected a whole number from 0 to 2 - 1"),
    (("auto", "2", ""), "finds --num_processes and --process_id itself"),
    (("localhost:99999", "2", "0"), "HOST:PORT of process 0, or auto"),
  ],
)
def test_a_place_that_is_none_is_refused(place, said):
  with pytest.raises(UserError, match=said):
    processes.start(*place)


def test_a_port_in_use_is_refused():
  with socket.create_server(("", 0)) as taken:
    place = (f"localhost:{taken.getsockname()[1]}", "2", "0")
    with pytest.raises(UserError, match="can't listen there"):
      processes.start(*place)


def test_a_process_0_that_does_not_come_is_missed(monkeypatch):
  monkeypatch.setattr(processes, "_CONNECT_SECONDS", 0)
  with pytest.raises(UserError, match="process 1 of 2 found no process 0 there"):
    processes.start("localhost:9", "2", "1")


def test_one_process_alone_does_everything_itself():
  numbers = np.arange(3, dtype=np.int32)
  assert processes.run_on_leader(lambda: "x") == processes.run_on_all(lambda: "x") == "x"
  assert processes.any_process(True) and not processes.any_process(False)
  assert processes.total(numbers) is numbers
  assert processes.run_to_end(lambda: 75) == 75
  with pytest.raises(ZeroDivisionError):
    processes.run_to_end(lambda: 1 // 0)
