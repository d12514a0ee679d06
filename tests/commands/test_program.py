"""Real processes whose output nobody reads, whose platform is missing, whose terminal is ASCII."""

import os
import signal
import subprocess
import sys

import jax
import pytest

from halrp_jax.commands import program, terminal
from halrp_jax.devices import faults
from halrp_jax.runs import experiment, sweep
from halrp_jax.types import one_line

from ..conftest import ROOT
from ..test_environment import make_custom
from .test_terminal import EVENT

DIGITS = f"--config={ROOT}/configs/digits.py:stl"
SHORT = ["--config.epochs=1", "--config.train_fraction=0.1", "--config.order=0,1"]
RUN = [sys.executable, "-m", "halrp_jax.main", DIGITS, *SHORT]
CLOSED = 128 + signal.SIGPIPE


def call(command, env=None, **how):
  how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
  env = os.environ | (env or {})
  return subprocess.run(command, cwd=ROOT, encoding="utf-8", env=env, timeout=120, **how)


def read_by_nobody() -> int:
  """A pipe that was closed at its other end."""
  reading, writing = os.pipe()
  os.close(reading)
  return writing


@pytest.mark.parametrize(
  "arguments",
  [
    ["halrp_jax.main", DIGITS, *SHORT, "--workdir={}/run"],
    ["halrp_jax.main", "--list"],
    ["halrp_jax", "sweep", DIGITS, *SHORT, "--orders=0,1", "--workdir={}/sweep"],
    ["halrp_jax", "check_data", DIGITS, "--sheet={}/sheet.png"],
  ],
)
def test_a_closed_pipe_ends_a_program_silently(arguments, tmp_path):
  command = [sys.executable, "-m", *(a.format(tmp_path) for a in arguments)]
  writing = read_by_nobody()
  done = call(command, stdout=writing)
  assert (done.returncode, done.stderr) == (CLOSED, "")
  both = call(command, stdout=writing, stderr=writing)
  os.close(writing)
  assert both.returncode == CLOSED
  assert not list(tmp_path.rglob("error.txt"))  # it is no cell's fault
  if "--list" not in arguments and "check_data" not in arguments:
    done = call(command)  # goes on
    assert done.returncode == 0, done.stderr


def test_without_any_output(tmp_path):
  for arguments in (["halrp_jax.main"], ["halrp_jax", "sweep"]):
    command = [sys.executable, "-m", *arguments, DIGITS, *SHORT, f"--workdir={tmp_path}/x"]
    done = call(["bash", "-c", 'exec "$@" >&- 2>&-', "bash", *command])
    assert done.returncode == 0 and not done.stderr


def test_an_output_that_is_full_is_not_the_folders_fault(tmp_path):
  with open("/dev/full", "wb", buffering=0) as full:
    try:
      full.write(b"x")
      pytest.skip("/dev/full takes what is written here")
    except OSError:
      pass
    done = call([*RUN, f"--workdir={tmp_path}/run"], stdout=full)
  assert done.returncode == 2
  assert done.stderr == "error: input or output: No space left on device\n"


@pytest.mark.parametrize("platform", ["cuda", "tpu", "cuad", "rocm,cpu"])
@pytest.mark.parametrize("verb", ["main", "sweep"])
def test_a_platform_that_is_missing_is_one_line(platform, verb, tmp_path):
  if verb == "sweep" and platform != "cuda":
    pytest.skip("one is enough")
  command = [sys.executable, "-m", f"halrp_jax{'.main' if verb == 'main' else ''}"]
  command += ["sweep"] * (verb == "sweep") + [DIGITS, *SHORT, f"--workdir={tmp_path}/run"]
  done = call([sys.executable, "-O", *command[1:]], {"JAX_PLATFORMS": platform})
  if done.returncode == 0:
    pytest.skip(f"there is {platform} here")
  assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
  assert done.stderr.startswith(f"error: JAX_PLATFORMS={platform}: jax finds no such device")
  assert "can be used here: cpu" in done.stderr


def test_doctor_tells_of_a_missing_platform():
  done = call([sys.executable, "-m", "halrp_jax", "doctor"], {"JAX_PLATFORMS": "cuda"})
  if "all is well" in done.stdout:
    pytest.skip("there is a GPU here")
  assert done.returncode == 1 and "WRONG  devices: JAX_PLATFORMS=cuda: jax finds" in done.stdout


@pytest.mark.parametrize(
  ("error", "says"),
  [
    (
      jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 16 bytes.\n\nBFC"),
      "out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 16 bytes. BFC); end other pro",
    ),
    (
      jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_DEVICE_UNAVAILABLE: all CUDA-capable"),
      "another program uses it: wait",
    ),
    (
      jax.errors.JaxRuntimeError("FAILED_PRECONDITION: DNN library initialization failed."),
      "another program uses it: wait",
    ),
    (MemoryError("Unable to allocate 7 TiB"), "no memory left (Unable to allocate 7 TiB); end"),
    (PermissionError(13, "Permission denied", "/data/x.png"), "/data/x.png: Permission denied"),
  ],
)
def test_what_the_machine_is_the_cause_of_is_one_line(error, says, capsys):
  def fails():
    raise error

  assert program.run(fails) == 2
  err = capsys.readouterr().err
  assert says in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("x"), jax.errors.JaxRuntimeError("INVALID_ARGUMENT")])
def test_a_fault_of_ours_is_not_hidden(error):
  def fails():
    raise error

  with pytest.raises(type(error)):
    program.run(fails)
  assert faults.explain(error) is None


def test_a_key_that_interrupts_is_no_traceback(capsys):
  def interrupted():
    raise KeyboardInterrupt

  assert program.run(interrupted) == 130
  assert capsys.readouterr().err == "stopped\n"


def test_out_of_memory_is_told_as_the_cells_error(digits_config, tmp_path, monkeypatch):
  def fails(config, *_, **__):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

  monkeypatch.setattr(experiment, "run", fails)
  cells = sweep.cells({"stl": digits_config("stl")}, "0", "")
  (row,) = sweep.run(cells, str(tmp_path), lambda rows: None, lambda: False)
  assert row["state"] == "failed" and "end other programs that use the device" in row["error"]


ASCII = [
  {"PYTHONIOENCODING": "ascii"},
  {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
  {"LANG": "C"},
]


@pytest.mark.parametrize("env", ASCII)
def test_an_ascii_terminal_and_names_that_are_not(env, tmp_path):
  data = tmp_path / "data"
  make_custom(data)
  (data / "erste Aufgabe").rename(data / "Größe 数据")
  keys = [f"--config.data_dir={data}", "--config.network=mlp", "--config.epochs=1"]
  custom = [f"--config={ROOT}/configs/custom.py:stl", *keys]
  run, out = tmp_path / "run", tmp_path / "report"
  if "PYTHONUTF8" in env:
    done = call([sys.executable, "-m", "halrp_jax.main", *custom, f"--workdir={tmp_path}/ü"], env)
    assert done.returncode == 2 and "its name can't be decoded in this locale" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "ü").exists()
  for command in (
    ["halrp_jax.main", *custom, "--dry_run"],
    ["halrp_jax.main", *custom, f"--workdir={run}"],
    ["halrp_jax", "check_data", *custom, f"--sheet={tmp_path}/ß.png"],
    ["halrp_jax", "compare", str(run)],
    ["halrp_jax", "report", f"--runs={tmp_path}", f"--out={out}", f"--configs={ROOT}/configs"],
    ["halrp_jax", "export", f"--workdir={run}", f"--out={tmp_path}/x", "--merge"],
    ["halrp_jax", "doctor", f"--workdir={run}"],
  ):
    done = call([sys.executable, "-m", *command], env)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
  assert "Standard" in (out / "index.html").read_text(encoding="utf-8").title()
  assert "±" in (out / "tables" / "table2.md").read_text(encoding="utf-8")


def test_without_docstrings(tmp_path):
  done = call([sys.executable, "-OO", "-m", "halrp_jax", "--help"])
  assert done.returncode == 0 and "export" in done.stdout
  done = call([sys.executable, "-OO", "-m", "halrp_jax.main", "--help"])
  assert done.returncode == 0 and "--workdir" in done.stdout and "None" not in done.stdout[:9]
  assert call([sys.executable, "-O", *RUN[1:], f"--workdir={tmp_path}/x"]).returncode == 0


def test_what_a_terminal_would_obey_is_shown():
  assert one_line("a\x1b[31m\n b\udcff ü") == "a\\x1b[31m b\\udcff ü"
  assert "(a\\x1b[0m, id" in terminal.task_line(EVENT | {"task": "a\x1b[0m"})
