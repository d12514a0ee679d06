"""The command line, in-process: every mistake is one line and exit code 2."""

import json

import pytest

from halrp_jax import __main__ as verbs
from halrp_jax import commands, data, main, methods, models
from halrp_jax.commands import COMMANDS

from .conftest import ROOT

DIGITS = f"--config={ROOT}/configs/digits.py"
CIFAR = f"--config={ROOT}/configs/cifar100_split.py"


def run(capsys, *arguments):
  code = main.main(["main", *arguments])
  out, err = capsys.readouterr()
  return code, out, err


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    ([], "--config is missing"),
    ([DIGITS], "--workdir, the folder for the results, is missing"),
    ([f"{DIGITS}:halpr"], "unknown method 'halpr' (did you mean halrp?)"),
    (["--config=configs/nowhere.py"], "nowhere.py"),
    ([f"--config={ROOT}/README.md"], "README.md: "),
    ([DIGITS, "--workdir=x", "--config.epoch=3"], "--config.epoch is not a config key"),
    ([DIGITS, "--workdir=x", "--config.protocol.shufle=0"], "did you mean protocol.shuffle?"),
    ([f"{DIGITS}:stl", "--config.method.alpha=0.5"], "--config.method.alpha is not a config key"),
    ([DIGITS, "--workdir=x", "--config.epochs=many"], "epochs must be a whole number"),
    ([DIGITS, "--workdir=x", "--config.epochs"], "epochs must be a whole number"),
    (
      [DIGITS, "--workdir=x", "--config.order=F"],
      "order must be one of 0, 1, 2, 3, 4, natural, or",
    ),
    ([DIGITS, "--workdir=x", "--config.order=0,10"], "order must be"),
    ([DIGITS, "--workdir=x", "--config.method.name=nobody"], "method.name"),
    ([DIGITS, "--wrkdir=x"], "wrkdir"),
    ([DIGITS, "--workdir=x", "extra"], "'extra' is not a flag"),
    ([CIFAR, "--workdir=x"], "data_dir is not set"),
    ([CIFAR, "--workdir=x", "--config.data_dir=/nowhere"], "data_dir=/nowhere: found neither"),
    ([DIGITS, "--workdir=/proc/x"], "--workdir=/proc/x"),
    ([DIGITS, "--config.method.variant=mine", "--dry_run"], "method.variant must be one of"),
  ],
)
def test_mistakes(capsys, tmp_path, monkeypatch, arguments, says):
  monkeypatch.chdir(tmp_path)
  code, out, err = run(capsys, *arguments)
  assert code == 2 and not out
  assert err.startswith("error: ") and err.count("\n") == 1 and says in err
  assert not list(tmp_path.iterdir())  # nothing is left behind


def test_list_works_without_a_config(capsys):
  code, out, _ = run(capsys, "--list")
  assert code == 0
  for name in ("cifar100_split", "cifar100_superclass", "digits", "lenet", "mlp", "halrp", "stl"):
    assert f"  {name} " in out


def test_list_says_something_else_of_every_name(capsys):
  """With python -OO there are no docstrings, hence nothing to say."""
  lines = [line for line in run(capsys, "--list")[1].splitlines() if line.startswith("  ")]
  said = [line[2:].partition(" ")[2].strip() for line in lines]
  assert len(said) == len(set(said)) == len({*data.BENCHMARKS, *models.NETWORKS, *methods.METHODS})
  assert all(len(text) > 20 for text in said) and not any("partial(" in text for text in said)


def test_help(capsys):
  code, out, _ = run(capsys, "--help")
  assert code == 0 and "--workdir" in out and "method.alpha [halrp]" in out


def test_flags_stand_in_any_order(capsys):
  code, out, _ = run(capsys, "--config.epochs=3", "--dry_run", f"{DIGITS}:stl", "--config.seed=4")
  assert code == 0 and "epochs = 3" in out and "seed = 4" in out


def test_dry_run_resolves_the_overrides_and_trains_nothing(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  code, out, _ = run(
    capsys, DIGITS, "--dry_run", "--config.method.variant=code", "--config.protocol.shuffle=false"
  )
  assert code == 0 and not list(tmp_path.iterdir())
  assert "method.importance = 'mean'" in out and "protocol.shuffle = False" in out


def test_a_run_is_not_overwritten_unasked(capsys, tmp_path):
  short = [f"{DIGITS}:stl", f"--workdir={tmp_path}/run", "--config.epochs=1", "--config.order=0,1"]
  assert run(capsys, *short)[0] == 0
  before = (tmp_path / "run" / "record.json").read_text()
  code, out, _ = run(capsys, *short)
  assert code == 0 and "finished already" in out
  code, _, err = run(capsys, *short, "--config.seed=1")
  assert code == 2 and "seed = 1 (was 0)" in err and "--overwrite" in err
  assert (tmp_path / "run" / "record.json").read_text() == before
  assert run(capsys, *short, "--overwrite", "--config.seed=1")[0] == 0
  assert json.loads((tmp_path / "run" / "record.json").read_text())["seed"] == 1


def test_verbs(capsys):
  assert verbs.main(["halrp_jax", "nothing"]) == 2
  assert "unknown verb 'nothing'; known: compare" in capsys.readouterr().err
  for arguments in ([], ["-h"], ["--help"]):
    assert verbs.main(["halrp_jax", *arguments]) == 0
    assert f"  compare     {COMMANDS['compare']}\n" in capsys.readouterr().out
  assert verbs.main(["halrp_jax", "--version"]) == run(capsys, "--version")[0] == 0


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_list_of_verbs_says_what_their_modules_say(verb):
  assert commands.load(verb).__doc__.splitlines()[0] == COMMANDS[verb]


def test_every_module_of_commands_is_listed():
  names = {p.stem for p in (ROOT / "halrp_jax" / "commands").glob("*.py")}
  assert names - {"__init__", "program", "terminal"} == COMMANDS.keys()


def test_a_loss_that_is_no_number_has_its_own_exit_code(capsys, tmp_path):
  code, _, err = run(
    capsys, f"{DIGITS}:stl", f"--workdir={tmp_path}/run", "--config.learning_rate=1e30"
  )
  assert code == 1 and err.count("\n") == 1 and "task00/train, epoch" in err
