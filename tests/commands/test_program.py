"""Real processes whose output nobody reads, whose platform is missing, whose terminal is ASCII."""

import os
import signal
import subprocess
import sys

import jax
import pytest

from halrp_jax import __main__ as verbs
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
# Command lines with THEN between them, in one process: -m halrp_jax.main or -m halrp_jax.
SEVERAL = """
import sys
from halrp_jax import __main__ as verbs, main
from halrp_jax.commands import program
from halrp_jax.devices import faults

program.prepare()
words = sys.argv[1:]
while words:
  end = words.index("THEN")
  (_, module, *arguments), words = words[:end], words[end + 1 :]
  if module.startswith("JAX_PLATFORMS="):
    faults.jax.config.update("jax_platforms", module.partition("=")[2])
    faults.jax.extend.backend.clear_backends()
    continue
  code = (main if module == "halrp_jax.main" else verbs).main([module, *arguments])
  print("EXIT", code, flush=True)
"""


def call(command, env=None, **how):
  how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
  env = os.environ | (env or {})
  return subprocess.run(command, cwd=ROOT, encoding="utf-8", env=env, timeout=120, **how)


def call_several(commands, env, *options):
  """Calls command lines one after another in one process; `commands`: what follows python."""
  words = [word for command in commands for word in (*command, "THEN")]
  return call([sys.executable, *options, "-c", SEVERAL, *words], env)


def read_by_nobody() -> int:
  """A pipe that was closed at its other end."""
  reading, writing = os.pipe()
  os.close(reading)
  return writing


def test_a_closed_pipe_ends_a_program_silently(tmp_path):
  """And without any output the same command resumes."""
  command = [*RUN, f"--workdir={tmp_path}/run"]
  writing = read_by_nobody()
  done = call(command, stdout=writing)
  os.close(writing)
  assert (done.returncode, done.stderr) == (CLOSED, "")
  done = call(["bash", "-c", 'exec "$@" >&- 2>&-', "bash", *command])
  assert done.returncode == 0 and not done.stderr
  assert (tmp_path / "run" / "record.json").exists()


def test_a_closed_pipe_is_no_cells_fault(tmp_path, monkeypatch):
  command = ["halrp_jax", "sweep", DIGITS, *SHORT, f"--workdir={tmp_path}"]
  with (
    open(read_by_nobody(), "w", encoding="utf-8") as out,
    open(tmp_path / "err", "w", encoding="utf-8") as err,
    monkeypatch.context() as m,
  ):
    m.setattr(sys, "stdout", out)
    m.setattr(sys, "stderr", err)
    assert verbs.main(command) == CLOSED
  assert (tmp_path / "err").read_text(encoding="utf-8") == ""
  assert not list(tmp_path.rglob("error.txt"))
  with monkeypatch.context() as m:  # goes on, without any output
    m.setattr(sys, "stdout", None)
    m.setattr(sys, "stderr", None)
    assert verbs.main(command) == 0
  assert len(list(tmp_path.rglob("record.json"))) == 1


def test_a_pipe_that_is_closed_for_errors_too():
  writing = read_by_nobody()
  done = call([sys.executable, "-m", "halrp_jax.main", "--list"], stdout=writing, stderr=writing)
  os.close(writing)
  assert done.returncode == CLOSED


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


PLATFORMS = ["cuda", "tpu", "cuad", "rocm,cpu"]


def test_a_platform_that_is_missing_is_one_line(tmp_path):
  """Of a run, of a sweep and of doctor; python -O raises other errors, and learns otherwise."""
  run = [DIGITS, *SHORT, f"--workdir={tmp_path}/run"]
  commands = [["-m", "halrp_jax", "sweep", *run], ["-m", "JAX_PLATFORMS=cuda"]]
  commands += [["-m", "halrp_jax", "doctor"]]
  for platform in PLATFORMS:
    commands += [["-m", f"JAX_PLATFORMS={platform}"], ["-m", "halrp_jax.main", *run]]
  commands += [["-m", "JAX_PLATFORMS=cpu"], ["-m", "halrp_jax.main", *run]]
  done = call_several(commands, {"JAX_PLATFORMS": "cuda"}, "-O")
  exits = [line for line in done.stdout.splitlines() if line.startswith("EXIT")]
  if "EXIT 0" in exits[:-1]:
    pytest.skip(f"one of {PLATFORMS} is here")
  assert done.returncode == 0 and exits == ["EXIT 2", "EXIT 1"] + ["EXIT 2"] * 4 + ["EXIT 0"], (
    done.stderr
  )
  assert "WRONG  devices: JAX_PLATFORMS=cuda: jax finds" in done.stdout
  errors = done.stderr.splitlines()
  assert len(errors) == 1 + len(PLATFORMS), done.stderr
  for platform, error in zip(["cuda", *PLATFORMS], errors, strict=True):
    assert error.startswith(f"error: JAX_PLATFORMS={platform}: jax finds no such device")
    assert "can be used here: cpu" in error


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
  pytest.param({"PYTHONIOENCODING": "ascii"}, marks=pytest.mark.slow),
  # the hardest: arguments, files' names and their texts are ASCII too
  {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
  pytest.param({"LANG": "C"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("env", ASCII)
def test_an_ascii_terminal_and_names_that_are_not(env, tmp_path):
  data = tmp_path / "data"
  make_custom(data)
  (data / "erste Aufgabe").rename(data / "Größe 数据")
  keys = [f"--config.data_dir={data}", "--config.network=mlp", "--config.epochs=1"]
  custom = [f"--config={ROOT}/configs/custom.py:stl", *keys]
  run, out = tmp_path / "run", tmp_path / "report"
  commands = [
    ["halrp_jax.main", *custom, "--dry_run"],
    ["halrp_jax.main", *custom, f"--workdir={run}"],
    ["halrp_jax", "check_data", *custom, f"--sheet={tmp_path}/ß.png"],
    ["halrp_jax", "compare", str(run)],
    ["halrp_jax", "report", f"--runs={tmp_path}", f"--out={out}", f"--configs={ROOT}/configs"],
    ["halrp_jax", "export", f"--workdir={run}", f"--out={tmp_path}/x", "--merge"],
    ["halrp_jax", "doctor", f"--workdir={run}"],
  ]
  if "PYTHONUTF8" in env:
    commands.append(["halrp_jax.main", *custom, f"--workdir={tmp_path}/ü"])
  done = call_several([["-m", *command] for command in commands], env)
  assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
  exits = [line for line in done.stdout.splitlines() if line.startswith("EXIT")]
  assert exits == ["EXIT 0"] * 7 + ["EXIT 2"] * ("PYTHONUTF8" in env), done.stderr
  if "PYTHONUTF8" in env:
    assert "its name can't be decoded in this locale" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "ü").exists()
  assert "Standard" in (out / "index.html").read_text(encoding="utf-8").title()
  assert "±" in (out / "tables" / "table2.md").read_text(encoding="utf-8")


def test_without_docstrings():
  done = call([sys.executable, "-OO", "-m", "halrp_jax", "--help"])
  assert done.returncode == 0 and "export" in done.stdout
  done = call([sys.executable, "-OO", "-m", "halrp_jax.main", "--help"])
  assert done.returncode == 0 and "--workdir" in done.stdout and "None" not in done.stdout[:9]


def test_what_a_terminal_would_obey_is_shown():
  assert one_line("a\x1b[31m\n b\udcff ü") == "a\\x1b[31m b\\udcff ü"
  assert "(a\\x1b[0m, id" in terminal.task_line(EVENT | {"task": "a\x1b[0m"})
