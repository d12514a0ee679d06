"""What a verb can't do without is said in one line, with a command line that works."""

import pytest

from halrp_jax import __main__ as verbs
from halrp_jax.commands import COMMANDS


@pytest.mark.parametrize(
  ("verb", "missing"),
  [
    ("compare", "RUN"),
    ("sweep", "--config, --workdir"),
    ("report", "--runs, --out"),
    ("reproduce", "--data_dir, --workdir"),
    ("tune", "--config, --grid, --workdir"),
    ("extend", "--workdir, --data, --out"),
    ("predict", "--workdir, --images, --out"),
    ("export", "--workdir, --out"),
    ("check_data", "--config"),
  ],
)
def test_what_is_missing_is_named_with_an_example(capsys, verb, missing):
  assert verbs.main(["halrp_jax", verb]) == 2
  out, err = capsys.readouterr()
  expected = f"error: {verb}: the following arguments are required: {missing}; for example: "
  assert not out and err.startswith(f"{expected}python -m halrp_jax {verb} ")
  assert err.count("\n") == 1


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_needs_nothing(capsys, verb):
  try:
    code = verbs.main(["halrp_jax", verb, "--help"])
  except SystemExit as e:  # argparse's way out
    code = e.code
  out, err = capsys.readouterr()
  assert code == 0 and f"{verb} " in out and not err


def test_an_empty_value_is_no_value(capsys):
  assert verbs.main(["halrp_jax", "sweep", "--config=configs/digits.py", "--workdir="]) == 2
  assert "sweep: the following arguments are required: --workdir; " in capsys.readouterr().err
  assert verbs.main(["halrp_jax", "export", "--workdir=", "--out=x"]) == 2
  assert "export: argument --workdir: a value is missing; " in capsys.readouterr().err
