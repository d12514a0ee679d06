"""reproduce: what the paper has is all here, the budgets, the ablations' configs, a small run."""

import re

import pytest

from halrp_jax import arguments, data, keys, methods
from halrp_jax.commands import reproduce as command
from halrp_jax.config import resolve
from halrp_jax.reports import paper
from halrp_jax.runs import estimate, experiment, reproduce
from halrp_jax.types import UserError

from ..conftest import ROOT

CONFIGS = str(ROOT / "configs")


def cells(name, budget, **keys):
  return reproduce.cells(CONFIGS, paper.TARGETS[name], budget, **keys)


# --- the paper's numbers --------------------------------------------------------------


def test_no_number_of_the_paper_is_left_out():
  """Every number in paper.json is in a cell of a table."""
  there = sum(
    len(metrics)
    for table in paper.numbers().values()
    for heads in table.values()
    for metrics in heads.values()
  )
  found = [
    paper.number(t, row, column)
    for t in paper.TARGETS.values()
    if t.is_table
    for row in t.rows
    for column in t.columns
  ]
  assert sum(x is not None for x in found) == there > 450
  assert all(0 < x.value <= 100 for x in found if x)


@pytest.mark.parametrize(
  ("name", "row", "head", "metric", "number"),
  [
    ("table 2", "HALRP", "CIFAR100-Split, 100 %", "accuracy", (67.92, 0.17)),
    ("table 2", "PRD", "CIFAR100-SuperClass, 5 %", "accuracy", (33.34, 0.48)),
    ("table 3b", "STL", "ResNet18", "mopd", (0.67, None)),
    ("table 3d", "GPM", "40-split, ResNet18", "aopd", (38.8, None)),
    ("table 5", "HALRP", "CIFAR100-Split, 100 %", "aopd", (2.56, None)),
    ("table 6", "Random LRP", "CIFAR100-Split", "increment", (0.235, None)),
    ("table 7", "IBPWF", "Five-dataset", "accuracy", (84.62, 0.36)),
  ],
)
def test_numbers_stand_in_their_cells(name, row, head, metric, number):
  target = paper.TARGETS[name]
  (column,) = [c for c in target.columns if (c.head, c.metric) == (head, metric)]
  assert paper.number(target, row, column) == number


def test_all_sixteen_systems_have_a_row():
  assert len(paper.SYSTEMS) == 16 and methods.METHODS.keys() == set(paper.LABELS)
  for name in ("table 2", "table 3a", "table 5"):
    assert paper.TARGETS[name].rows == paper.SYSTEMS


# --- cells ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", paper.TARGETS)
def test_every_cell_of_every_budget_is_a_good_config(name):
  for budget in paper.BUDGETS:
    found, absent = cells(name, budget)
    assert found and len({c.name for c in found}) == len(found)
    assert not set(absent) & methods.METHODS.keys()
    for config in {str(c.config.method) + c.config.benchmark: c.config for c in found}.values():
      data.planned(resolve(config))


def test_small_budgets():
  found, _ = cells("table 2", "small")
  configs = [c.config for c in found]
  assert {c.train_fraction for c in configs} == {0.05}
  assert {c.order for c in configs} == set("ABC") and {c.seed for c in configs} == {0}
  assert len(found) == 2 * 3 * len({c.method.name for c in configs})
  found, _ = cells("table 6", "small")
  assert len(found) == 10 and {c.config.order for c in found} == {"A"}
  assert {c.config.train_fraction for c in found} == {0.25}
  found, _ = cells("figure 3a", "small")
  assert {c.config.method.name for c in found} == {"halrp", "apd"}
  assert {c.config.benchmark for c in found} == {"cifar100_superclass"}


def test_the_full_budget_is_the_papers_protocol():
  found, _ = cells("table 3a", "full", only=("halrp",))
  assert {(c.config.order, c.config.seed) for c in found} == {
    (str(order), seed) for order in range(5) for seed in range(5)
  }
  assert {c.config.train_fraction for c in found} == {1.0}
  fractions = {c.config.train_fraction for c in cells("table 2", "full", only=("stl",))[0]}
  assert fractions == {0.05, 0.25, 0.5, 1.0}


def test_tables_2_and_5_share_their_runs():
  first, second = ({c.name for c in cells(f"table {n}", "small")[0]} for n in (2, 5))
  assert first == second


def test_a_smoke_run_is_short_and_keeps_its_warm_up():
  found, _ = cells("table 3d", "smoke", only=("halrp",))
  assert all(c.config.epochs == 5 and c.config.method.warmup_epochs == 4 for c in found)
  assert all(c.config.train_fraction == 0.01 for c in found)


# --- the ablations' configs -----------------------------------------------------------


def changed(file, setting, base):
  """Keys in which an ablation's config differs from the one it is made of."""
  a, b = (
    keys.flat(arguments.load_config(f"{CONFIGS}/{name}.py", argument).to_dict())
    for name, argument in ((file, setting), (base, "halrp"))
  )
  return {k: a[k] for k in a if a[k] != b[k]}


@pytest.mark.parametrize(
  ("file", "setting", "keys"),
  [
    ("ablation_table6", "alpha0.9_warmup1", {}),
    ("ablation_table6", "alpha0.60_warmup1", {"method.alpha": 0.6}),
    ("ablation_table6", "alpha0.9_warmup4", {"method.warmup_epochs": 4}),
    ("ablation_table6", "lrp", {"method.rank_rule": "lrp"}),
    ("ablation_table6", "random_lrp", {"method.rank_rule": "random"}),
    ("ablation_lambda_split", "1e-3_5e-4", {"method.l1": 1e-3, "method.l2": 5e-4}),
    ("ablation_lambda_superclass", "0_1e-4", {"method.l1": 0.0}),
  ],
)
def test_an_ablation_changes_what_it_says_alone(file, setting, keys):
  base = "cifar100_superclass" if "superclass" in file else "cifar100_split"
  assert changed(file, setting, base) == keys


@pytest.mark.parametrize(
  ("file", "setting"), [("ablation_table6", "alpha2_warmup1"), ("ablation_lambda_split", "1e-4")]
)
def test_an_unknown_ablation_is_refused(file, setting):
  with pytest.raises(UserError, match=f"after the colon, such as .*, got '{setting}'"):
    arguments.load_config(f"{CONFIGS}/{file}.py", setting)


# --- the command ----------------------------------------------------------------------


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (["--table=9"], "argument --table: invalid choice: '9' (choose from "),
    (["--data_dir=D", "--workdir=W"], "one of the arguments --table --figure is required"),
    (["--table=2", "--figure=4"], "argument --figure: not allowed with argument --table"),
    (["--table=2"], "required: --data_dir, --workdir; for example: python -m halrp_jax reproduce"),
    (["--table=2", "--data_dir=D"], "the following arguments are required: --workdir"),
    (["--table=2", "--data_dir=D", "--workdir="], "argument --workdir: a value is missing"),
    (["--table=2", "--budget=huge"], "invalid choice: 'huge'"),
    (["--table=2", "--data_dir=D", "--workdir=W", "--methods=x"], "table 2 has no x, only stl"),
  ],
)
def test_mistakes(arguments, says, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=re.escape(says)):
    command.main([*arguments, "--compile_cache=off"])
  assert not list(tmp_path.iterdir())


@pytest.fixture
def table_7_of_digits(monkeypatch):
  """Table 7 with the digits in place of P-MNIST, which need no data and little time."""
  columns = tuple(
    paper.Column("P-MNIST", metric, "digits") for metric in ("accuracy", "mopd", "aopd")
  )
  rows = {"IBPWF": "ibpwf", "HALRP": "halrp"}
  monkeypatch.setitem(paper.TARGETS, "table 7", paper.Target("table 7", "Digits", columns, rows))


def test_a_table_is_run_and_reported(tmp_path, capsys, table_7_of_digits):
  """First with a cell that fails: the command fails, and the rest is reported."""
  argv = ["--table=7", "--budget=smoke", "--methods=halrp", "--data_dir=none"]
  argv += [f"--workdir={tmp_path}", f"--configs={CONFIGS}"]
  cell = tmp_path / "smoke" / "digits-1" / "halrp_0_0"
  cell.mkdir(parents=True)
  (cell / "config.json").write_text('{"epochs": 3}')
  assert command.main(argv) == 1
  out = capsys.readouterr().out
  assert "digits-1/halrp_0_0 running" in out and "1 done, 0 kept, 1 failed" in out
  assert (tmp_path / "report-table7-smoke" / "index.html").is_file()
  (cell / "config.json").unlink()
  assert command.main(argv) == 0
  assert "1 done, 1 kept, 0 failed" in capsys.readouterr().out
  folder = tmp_path / "report-table7-smoke"
  rows = (folder / "tables" / "table7.csv").read_text().splitlines()
  halrp = [r for r in rows if r.startswith("table 7,HALRP,P-MNIST,")]
  assert re.search(r",ACC,%,\d+\.\d\d,\d+\.\d\d,2,2,98\.10,0\.03,", halrp[0])
  assert re.search(r",MOPD,points,\d+\.\d\d,,2,2,0\.47,,", halrp[1])
  assert all(
    r.endswith(",at 1 % of the images,digits-1/halrp_0_0 digits-1/halrp_1_0") for r in halrp
  )
  assert "table 7,IBPWF,P-MNIST,ACC,%,,,,,78.12,0.83,,," in rows  # not run
  assert (folder / "index.html").is_file()


# --- --list ---------------------------------------------------------------------------


def test_list_names_every_target_with_its_cells(capsys, monkeypatch):
  monkeypatch.setattr(estimate, "calibrate", lambda config: (0.1, 1.0))
  assert command.main(["--list", "--compile_cache=off"]) == 0
  lines = capsys.readouterr().out.splitlines()
  shown = {line[:10].strip(): line.split() for line in lines[3:]}
  assert shown.keys() == paper.TARGETS.keys()
  # ten cells of ten tasks with 20 epochs of 8 batches out of 1,000 images
  words = shown["table 6"]
  hours = (10 * 16000 * 0.1 / 10 + 10 * 10 * 1.0) / 3600
  assert words[2:5] == ["10", "16,000", f"{hours:.1f}"]


def test_list_is_stopped_between_two_measurements(capsys, monkeypatch):
  asked = []
  monkeypatch.setattr(estimate, "calibrate", lambda config: asked.append(config) or (0.1, 1.0))
  assert command.main(["--list", "--compile_cache=off"], lambda: len(asked) == 2) == 75
  assert len(asked) == 2 and capsys.readouterr().err == "stopped\n"


def test_planned_steps_are_those_of_a_dry_run(digits_config):
  config = digits_config("stl")
  assert estimate.steps(resolve(config)) == (experiment.plan(config)["steps"], 10)


@pytest.mark.parametrize("method", ["stl", "halrp"])
def test_the_calibration_times_real_steps(digits_config, method):
  step, select = estimate.calibrate(resolve(digits_config(method)))
  assert 0 < step < 5 and (select > 0) == (method == "halrp")
