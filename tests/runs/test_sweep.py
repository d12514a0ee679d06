"""sweep: the cells, their shards, failures beside successes, and a second start."""

import fcntl
import io
import json
import signal
import subprocess
import sys

import pytest

from halrp_jax import arguments
from halrp_jax.commands import sweep as command
from halrp_jax.commands import terminal
from halrp_jax.config import with_keys
from halrp_jax.runs import experiment, sweep
from halrp_jax.types import Stopped, UserError

from ..conftest import ROOT
from ..devices.test_stop import wait_for_events

CONFIG = f"--config={ROOT}/configs/digits.py"
SHORT = ("--config.epochs=1", "--config.train_fraction=0.1", "--config.method.l2=0")
TWO = ("--config.order=2,5", "--seeds=0,1")  # cells, of two tasks
RUN = (CONFIG, *SHORT, "--methods=stl")


@pytest.fixture
def digits():
  return arguments.load_config(f"{ROOT}/configs/digits.py", "stl", ["--config.epochs=1"])


def names(cells):
  return [cell.name for cell in cells]


# --- which ----------------------------------------------------------------------------


def test_cells_are_every_config_with_every_order_and_seed(digits):
  cells = sweep.cells({"stl": digits, "other": digits}, "0,natural", "3,5")
  assert names(cells)[:4] == ["stl_0_3", "stl_0_5", "stl_natural_3", "stl_natural_5"]
  assert len(cells) == 8
  config = cells[3].config
  assert (config.order, config.seed, config.epochs) == ("natural", 5, 1)
  assert digits.seed == 0  # the others are copies


def test_all_orders_are_the_papers(digits):
  cells = sweep.cells({"stl": digits}, "all", "")
  assert names(cells) == [f"stl_{order}_0" for order in range(5)]
  with pytest.raises(UserError, match="custom has no list of orders"):
    sweep.cells({"stl": with_keys(digits, benchmark="custom")}, "all", "")


@pytest.mark.parametrize("n", [1, 3, 7])
def test_shards_share_the_cells_out(digits, n):
  cells = sweep.cells({"stl": digits}, "all", "0,1")
  shards = [sweep.shard(cells, f"{i}/{n}") for i in range(n)]
  assert sorted(names(sum(shards, []))) == sorted(names(cells))
  assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("text", ["4/4", "1", "-1/2", "a/b", "0/0"])
def test_a_wrong_shard_is_refused(digits, text):
  with pytest.raises(UserError, match="i from 0 to n - 1"):
    sweep.shard(sweep.cells({"stl": digits}, "", ""), text)


@pytest.mark.parametrize(
  ("argument", "says"),
  [
    ("--methods=stl,sl", "unknown method 'sl'"),
    ("--seeds=0,x", "whole numbers with commas"),
    ("--orders=0,Z", "order must be"),
    ("--config.epochs=0", "epochs must be"),
    ("--config.method.alpha=0.5", "method.alpha is not a config key"),
  ],
)
def test_mistakes_are_found_before_the_first_run(tmp_path, argument, says):
  with pytest.raises(UserError, match=says):
    command.main([*RUN, argument, f"--workdir={tmp_path / 'w'}"])
  assert not (tmp_path / "w").exists()


# --- the runs -------------------------------------------------------------------------


def test_a_failed_cell_is_told_and_the_others_go_on(tmp_path, capsys):
  argv = [*RUN, *TWO, f"--workdir={tmp_path}"]
  (tmp_path / "stl_2,5_0").mkdir()
  (tmp_path / "stl_2,5_0" / "config.json").write_text('{"epochs": 3}')  # another run is there
  assert command.main(argv) == 1
  out = capsys.readouterr().out
  assert "[1/2] stl_2,5_0 failed" in out and "[2/2] stl_2,5_1 done | ACC " in out
  assert "FAILED stl_2,5_0: UserError: --workdir=" in out and "1 done, 0 kept, 1 failed" in out
  assert "Traceback" in (tmp_path / "stl_2,5_0" / "error.txt").read_text()
  record = tmp_path / "stl_2,5_1" / "record.json"
  before = record.stat().st_mtime_ns
  (tmp_path / "stl_2,5_0" / "config.json").unlink()
  assert command.main(argv) == 0  # what is finished is not run again
  assert "1 done, 1 kept, 0 failed" in capsys.readouterr().out
  assert record.stat().st_mtime_ns == before
  assert not (tmp_path / "stl_2,5_0" / "error.txt").exists()
  config = json.loads((tmp_path / "stl_2,5_0" / "config.json").read_text())
  assert config["train_fraction"] == 0.1 and config["method"]["l2"] == 0


def test_any_error_is_kept_to_its_cell_but_a_stop_is_not(digits, tmp_path, monkeypatch):
  cells = sweep.cells({"stl": digits}, "0,1", "")

  def fails(config, *_, **__):
    raise RuntimeError("RESOURCE_EXHAUSTED\nout of memory")

  monkeypatch.setattr(experiment, "run", fails)
  rows = sweep.run(cells, str(tmp_path), lambda rows: None, lambda: False)
  assert [r["error"] for r in rows] == ["RuntimeError: RESOURCE_EXHAUSTED out of memory"] * 2
  assert sweep.failed(rows)

  def stops(*_, **__):
    raise Stopped

  monkeypatch.setattr(experiment, "run", stops)
  with pytest.raises(Stopped):
    sweep.run(cells, str(tmp_path), lambda rows: None, lambda: True)


def test_a_cell_at_work_elsewhere_is_looked_at_again_and_is_no_failure(tmp_path, capsys):
  argv = [*RUN, *TWO, f"--workdir={tmp_path}"]
  (tmp_path / "stl_2,5_0").mkdir()
  with open(tmp_path / "stl_2,5_0" / "lock", "ab") as other:
    fcntl.flock(other, fcntl.LOCK_EX)
    assert command.main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("stl_2,5_0 at work elsewhere") == 2  # at its turn and at the end
    assert "1 done, 0 kept, 0 failed, 1 at work elsewhere" in out and "FAILED" not in out
  assert command.main(argv) == 0
  assert "1 done, 1 kept, 0 failed" in capsys.readouterr().out


def test_data_that_are_not_there_end_the_sweep(tmp_path):
  cifar = f"--config={ROOT}/configs/cifar100_split.py"
  with pytest.raises(UserError, match="cifar"):
    command.main(
      [cifar, f"--config.data_dir={tmp_path}", "--orders=all", f"--workdir={tmp_path / 'w'}"]
    )


def test_a_sweep_is_stopped_and_goes_on(tmp_path, capsys):
  argv = [CONFIG, "--config.epochs=3", "--config.order=3,1,0", "--methods=stl", "--seeds=0,1"]
  argv.append(f"--workdir={tmp_path}")
  line = [sys.executable, "-m", "halrp_jax", "sweep", *argv]
  process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  wait_for_events(tmp_path / "stl_3,1,0_0", 2, process)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate()
  assert process.returncode == 75 and "the same command resumes" in err
  assert command.main(argv) == 0
  assert "2 done, 0 kept, 0 failed" in capsys.readouterr().out


# --- what is shown --------------------------------------------------------------------


def row(name, state, **more):
  keys = {"name": name, "method": name[0], "state": state, "done": 0, "total": 0, "error": ""}
  return keys | {"accuracy": None, "seconds": 0.0} | more


def test_the_time_left_is_that_of_the_same_method():
  rows = [row("a1", "done", seconds=10), row("a2", "waiting"), row("b1", "done", seconds=100)]
  assert terminal.remaining_seconds(rows) == 10
  rows += [row("b2", "running", seconds=30, done=3, total=6), row("c1", "waiting")]
  # b: mean of 100 and 30 * 6/3; c, of which nothing is known: mean of the others
  assert terminal.remaining_seconds(rows) == pytest.approx(10 + (80 - 30) + (10 + 80) / 2)
  assert terminal.remaining_seconds([row("a1", "waiting")]) is None
  # cells that were finished before tell nothing
  assert terminal.remaining_seconds([row("a1", "kept"), row("a2", "waiting")]) is None


def test_a_table_on_a_terminal():
  stream = io.StringIO()
  stream.isatty = lambda: True
  rows = [row(f"a{i}", "waiting") for i in range(30)]
  rows[0] |= {"state": "failed", "error": "boom"}
  rows[1] |= {"state": "done", "accuracy": 12.345, "seconds": 7.0, "done": 2, "total": 2}
  with terminal.live_sweep(stream) as show:
    show(rows)
  text = stream.getvalue()
  for part in ("boom", "12.35", "2/2", "7 s", "2 of 30 cells ended", "to go"):
    assert part in text
