"""Real processes where something is missing, full or not allowed: one line, or no harm."""

import os
import socket
import subprocess
import sys
from importlib import metadata

import pytest

from halrp_jax import main
from halrp_jax.runs import experiment

from .conftest import ROOT
from .runs.test_workdir import same


def arguments(workdir, *more, config="digits.py:stl"):
  short = [f"--workdir={workdir}", "--config.epochs=2", "--config.train_fraction=0.3"]
  short = [*short, "--config.order=0,1"] if "digits" in config else short[:1]
  return [f"--config={ROOT}/configs/{config}", *short, *more]


def run(workdir, *more, config="digits.py:stl", env=None, before=""):
  """Runs a program of its own; `before`: Python that it runs first, in place of a forked hook."""
  program = ["-m", "halrp_jax.main"]
  if before:
    program = [
      "-c",
      f"import os, sys; {before}; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])",
    ] + program
  return subprocess.run(
    [sys.executable, *program, *arguments(workdir, *more, config=config)],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=env,
    timeout=120,
  )


def run_here(workdir, *more, **how):
  return main.main(["main", *arguments(workdir, *more, **how)])


def assert_one_line(result, *says):
  assert result.returncode == 2, result.stderr
  assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
  for text in says:
    assert text in result.stderr


# Permissions hold for the program that is started, also if it is root's: without CAP_DAC_OVERRIDE
# and CAP_DAC_READ_SEARCH, by prctl(PR_CAPBSET_DROP).
HELD_BACK = (
  "import ctypes; drop = ctypes.CDLL(None).prctl; "
  "assert os.getuid() or drop(24, 1) == drop(24, 2) == 0"
)
NO_LARGE_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))"


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tmp_path):
  """RLIMIT_FSIZE stands for the disk: no file may grow beyond 40 kB, so no model is saved."""
  result = run(tmp_path / "run", "--compile_cache=off", before=NO_LARGE_FILES)
  assert_one_line(result, "checkpoints: a checkpoint can't be written", "File too large")
  items = list((tmp_path / "run" / "checkpoints").iterdir())
  assert not [p for p in items if p.name.startswith(".writing")]
  assert run_here(tmp_path / "run") == run_here(tmp_path / "whole") == 0
  assert same(tmp_path / "run", tmp_path / "whole")


def test_a_workdir_that_can_not_be_written(tmp_path):
  workdir = tmp_path / "run"
  workdir.mkdir(mode=0o555)
  assert_one_line(run(workdir, before=HELD_BACK), f"--workdir={workdir}", "Permission denied")
  assert not list(workdir.iterdir())


def test_a_data_dir_that_can_not_be_written_is_no_harm(tmp_path):
  data = tmp_path / "data"
  make_custom(data)
  for path in (*data.rglob("*"), data):
    path.chmod(0o555 if path.is_dir() else 0o444)
  before = sorted(data.rglob("*"))
  result = run(
    tmp_path / "run",
    f"--config.data_dir={data}",
    "--config.network=mlp",
    "--config.epochs=1",
    config="custom.py:stl",
    before=HELD_BACK,
  )
  assert result.returncode == 0, result.stderr
  assert sorted(data.rglob("*")) == before


def test_spaces_and_unicode_in_every_path(tmp_path, capsys):
  data, workdir = tmp_path / "meine Daten 数据", tmp_path / "läuft schön"
  make_custom(data)
  more = (f"--config.data_dir={data}", "--config.network=mlp", "--config.epochs=1")
  for expected in ("ACC", "finished already"):
    assert run_here(workdir, *more, config="custom.py:stl") == 0
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
  "missing", ["HOME", pytest.param("XDG_CACHE_HOME", marks=pytest.mark.slow)]
)
def test_without_a_home(tmp_path, missing):
  env = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
  if missing == "XDG_CACHE_HOME":
    env["HOME"] = "/nonexistent"
  else:
    env["XDG_CACHE_HOME"] = str(tmp_path / "cache")
  assert run(tmp_path / "run", env=env).returncode == 0


def test_without_a_network(digits_config, tmp_path, monkeypatch):
  def refuse(*args):
    raise AssertionError("a connection was tried")

  monkeypatch.setattr(socket.socket, "connect", refuse)
  monkeypatch.setattr(socket, "getaddrinfo", refuse)
  record = experiment.run(digits_config("stl", epochs=1, order="0,1"), str(tmp_path))
  assert len(record["accuracy"]) == 2


def make_custom(folder):
  """Two tasks of two classes with twenty images each."""
  import numpy as np
  from PIL import Image

  rng = np.random.default_rng(0)
  for task in ("erste Aufgabe", "zweite"):
    for c in ("Äpfel", "Birnen"):
      place = folder / task / c
      place.mkdir(parents=True)
      for i in range(20):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(place / f"{i}.png")


def test_a_record_says_null_for_what_is_not_installed(digits_config, tmp_path, monkeypatch):
  """A copy of the tree runs where nobody has installed it."""
  known = metadata.version

  def version(name):
    if name in ("halrp-jax", "scipy"):
      raise metadata.PackageNotFoundError(name)
    return known(name)

  monkeypatch.setattr(metadata, "version", version)
  record = experiment.run(digits_config("stl", epochs=1, order="0,1"), str(tmp_path))
  assert record["versions"]["halrp_jax"] is record["versions"]["scipy"] is None
  assert record["versions"]["numpy"] == known("numpy")
