import io
import json
import re

import pytest

from halrp_jax import methods
from halrp_jax.commands import compare, terminal
from halrp_jax.runs import experiment
from halrp_jax.types import UserError


@pytest.fixture(scope="module")
def record():
  return {
    "schema": 1,
    "method": "halrp",
    "benchmark": "digits",
    "order": "1",
    "seed": 0,
    "partial": False,
    "task_ids": [1, 0],
    "accuracy": [[90.0, None], [80.0, 70.0]],
    "average_accuracy": 75.0,
    "bwt": -10.0,
    "forgetting": 5.0,
    "increment": [0.0, 0.123],
    "size": [{"nonzero": 1000}, {"nonzero": 1234}],
    "seconds": [{"train": 1.0}, {"train": 2.5}],
    "peak_memory_bytes": 300 * 2**20,
  }


EVENT = {
  "event": "evaluation",
  "t": 1,
  "num_tasks": 2,
  "task": "permutation 0",
  "task_id": 0,
  "accuracy": [80.0, 70.0],
  "ranks": {"fc1": 3, "fc2": 12},
  "increment": 0.123,
  "seconds": {"compile": 1.0, "train": 2.0},
}


def test_a_task_line_has_accuracy_ranks_growth_and_seconds():
  line = terminal.task_line(EVENT)
  for part in ("task 2/2", "70.00 %", "75.00 %", "fc1:3 fc2:12", "+12.3 %", "3.0 s"):
    assert part in line


def test_the_ranks_of_many_layers_are_summed_up():
  ranks = {f"block{i}": i % 4 for i in range(20)}
  assert "| ranks of 20 layers: 0 to 3, 30 together |" in terminal.task_line(
    EVENT | {"ranks": ranks}
  )


def test_of_many_tasks_the_ends_of_the_matrix_are_shown():
  def lines(count):
    accuracy = [[float(t) if t <= s else None for t in range(count)] for s in range(count)]
    return terminal.matrix_text({"task_ids": [*range(count)], "accuracy": accuracy}).splitlines()

  assert len(lines(20)) == 21 and "..." not in "".join(lines(20))
  shown = lines(1000)
  assert len(shown) == 12 and len({len(line) for line in shown} - {3}) == 1
  assert shown[0].split()[3:] == [
    "1",
    "2",
    "3",
    "4",
    "5",
    "...",
    "996",
    "997",
    "998",
    "999",
    "1000",
  ]
  assert shown[6] == "..."
  assert shown[-1].split()[-1] == "999.00" and shown[-2].split()[-1] == "."


def test_plain_lines_where_there_is_no_terminal():
  stream = io.StringIO()
  with terminal.live_display(stream) as show:
    show({"event": "epoch", "phase": "a", "epoch": 1, "epochs": 2})
    show(EVENT)
  assert stream.getvalue() == terminal.task_line(EVENT) + "\n"


def test_a_progress_bar_on_a_terminal():
  stream = io.StringIO()
  stream.isatty = lambda: True
  with terminal.live_display(stream) as show:
    event = {"event": "epoch", "phase": "task00/base", "epoch": 1, "epochs": 2}
    show(event | {"loss": 1.0, "train_accuracy": 50.0})
    show(EVENT)
  assert terminal.task_line(EVENT) in stream.getvalue()


@pytest.mark.parametrize("name", ["[red]a", "[/x]", ":smile:", "[link=http://x]y[/link]"])
def test_markup_in_names_is_shown_as_it_is(name):
  stream = io.StringIO()
  stream.isatty = lambda: True
  with terminal.live_display(stream) as show:
    show(EVENT | {"task": name})
  assert f"({name}, id" in stream.getvalue()
  row = {"name": name, "method": "a", "state": "failed", "done": 0, "total": 0, "error": name}
  stream.truncate(0)
  with terminal.live_sweep(stream) as show:
    show([row | {"accuracy": None, "seconds": 0.0}])
  assert stream.getvalue().count(name) >= 2


def test_the_summary_has_what_the_user_looks_for(record):
  text = terminal.record_text(record, "runs/x")
  assert re.search(r"ACC +75.00 %", text) and re.search(r"BWT +-10.00", text)
  assert re.search(r"increment +0.123", text) and "runs/x/record.json" in text
  assert re.search(r"task +2 +80.00 +70.00", text) and re.search(r"task +1 +90.00 +\.", text)
  assert "PARTIAL" in terminal.record_text(record | {"partial": True}, "x")


def test_compare_maps_tasks_to_their_ids(record, tmp_path, capsys):
  for name in "ab":
    (tmp_path / name).mkdir()
    (tmp_path / name / "record.json").write_text(json.dumps(record))
  assert compare.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
  out = capsys.readouterr().out
  assert re.search(r"task id 0 % +70.00 +70.00", out)
  assert re.search(r"task id 1 % +80.00 +80.00", out)


def test_compare_refuses_what_is_no_run(tmp_path):
  with pytest.raises(UserError, match="record.json: not found"):
    compare.main([str(tmp_path)])
  (tmp_path / "record.json").write_text("{")
  with pytest.raises(UserError, match="can't be read"):
    compare.main([str(tmp_path)])
  with pytest.raises(UserError, match="arguments are required: RUN; for example: .* compare runs/"):
    compare.main([])


def test_help_names_every_key():
  text = terminal.help_text("usage", "flags", methods.METHODS)
  for name in ("protocol.shuffle", "method.alpha [halrp]", "train_fraction"):
    assert name in text


def test_the_plan_of_a_run(digits_config):
  plan = experiment.plan(digits_config())
  text = terminal.plan_text(plan)
  assert plan["parameters"] == 85_002 and "85,002" in text
  assert re.search(r"fc1 +16,640  perturbed", text) and re.search(r"head +2,570\n", text)
  # 10 tasks x 2 epochs x 17 batches of 64 out of 1038 images
  assert plan["steps"] == 340 and "train 1038, valid 259, test 500" in text
  assert "method.variant = 'published'" in text
