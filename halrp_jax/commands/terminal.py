"""Turns events, records and plans into the text that a terminal shows."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from halrp_jax import keys
from halrp_jax.reports.records import short_data
from halrp_jax.types import one_line

# --- during a run ---------------------------------------------------------------------


@contextlib.contextmanager
def live_display(stream: TextIO | None) -> Iterator[Callable[[dict], None]]:
  """Yields a function that shows the events of a run.

  Args:
    stream: on a terminal a progress bar is drawn, elsewhere lines are printed; None: nothing is
      shown.
  """
  if stream is None:
    yield lambda event: None
    return
  if not stream.isatty():
    yield lambda event: _print_event(stream, event)
    return
  columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
  with Progress(*columns, console=_console(stream), transient=True) as progress:
    bar = progress.add_task("starting", total=None)

    def show(event):
      if event["event"] == "epoch":
        text = (
          f"{event['phase']} epoch {event['epoch']}/{event['epochs']} loss {event['loss']:.3f} "
          f"train {event['train_accuracy']:.1f} %"
        )
        progress.update(bar, description=text, total=event["epochs"], completed=event["epoch"])
      elif event["event"] == "progress":
        done = event["epoch"] - 1 + event["step"] / event["steps"]
        progress.update(bar, total=event["epochs"], completed=done)
      elif event["event"] == "evaluation":
        progress.console.print(task_line(event), soft_wrap=True)
      elif event["event"] == "note":
        progress.console.print(event["note"], soft_wrap=True)
      elif event["event"] == "standing":
        for line in event["said"]:
          progress.console.print(f"note: {line}", soft_wrap=True)
      elif event["event"] == "finished":
        progress.console.print("this run is finished already; --overwrite starts anew")

    yield show


def _console(stream: TextIO) -> Console:
  """Returns a terminal that prints names as they are, also those with [red] or :smile: in them."""
  return Console(file=stream, markup=False, emoji=False, highlight=False)


def _print_event(stream: TextIO, event: dict) -> None:
  """Prints the events that are shown without a terminal."""
  if event["event"] == "evaluation":
    print(task_line(event), file=stream, flush=True)
  elif event["event"] == "note":
    print(event["note"], file=stream, flush=True)
  elif event["event"] == "standing":
    for line in event["said"]:
      print(f"note: {line}", file=stream, flush=True)
  elif event["event"] == "finished":
    print("this run is finished already; --overwrite starts anew", file=stream)


def task_line(event: dict) -> str:
  """Returns the line that is shown when a task is finished; `event`: of the kind "evaluation"."""
  row = event["accuracy"]
  ranks, name = event["ranks"], one_line(event["task"])
  parts = [
    f"task {event['t'] + 1}/{event['num_tasks']} ({name}, id {event['task_id']})",
    f"accuracy {row[-1]:.2f} %",
    f"mean of {len(row)}: {sum(row) / len(row):.2f} %",
    f"growth {100 * event['increment']:+.1f} %",
    f"{sum(event['seconds'].values()):.1f} s",
  ]
  if ranks:
    each = " ".join(f"{name}:{k}" for name, k in ranks.items())
    low, high = min(ranks.values()), max(ranks.values())
    many = f"of {len(ranks)} layers: {low} to {high}, {sum(ranks.values())} together"
    parts.insert(3, "ranks " + (each if len(ranks) <= 8 else many))
  return " | ".join(parts)


# --- during a sweep -------------------------------------------------------------------

_ENDED = ("done", "kept", "failed", "at work elsewhere")
_SHOWN = 12  # cells of a sweep that a terminal shows at once


@contextlib.contextmanager
def live_sweep(stream: TextIO | None) -> Iterator[Callable[[list[dict]], None]]:
  """Yields a function that shows the rows of `sweep.run`.

  Args:
    stream: on a terminal a table is drawn, elsewhere a line is printed for every cell that has
      begun or ended; None: nothing is shown.
  """
  if stream is None:
    yield lambda rows: None
    return
  if stream.isatty():
    with Live(console=_console(stream), refresh_per_second=4) as live:
      yield lambda rows: live.update(_sweep_table(rows))
    return
  shown = {}  # name of a cell -> the state that was printed last

  def show(rows):
    for row in rows:
      if shown.get(row["name"], "waiting") != row["state"]:
        shown[row["name"]] = row["state"]
        print(_sweep_line(row, rows), file=stream, flush=True)

  yield show


def _sweep_line(row: dict, rows: list[dict]) -> str:
  """Returns the line of a cell that has begun or ended."""
  ended = sum(r["state"] in _ENDED for r in rows)
  parts = [f"[{ended}/{len(rows)}] {row['name']} {row['state']}"]
  if row["state"] in ("done", "kept"):
    parts.append(f"ACC {row['accuracy']:.2f} %")
  if row["state"] == "done":
    parts.append(f"{row['seconds']:.0f} s")
  parts += [text for text in (row["error"], row.get("note")) if text]
  if row["state"] in _ENDED and (left := remaining_seconds(rows)):
    parts.append(f"about {duration(left)} to go")
  return " | ".join(parts)


def _sweep_table(rows: list[dict]) -> RichTable:
  """Draws the cells around the one that is running, those that failed, and totals."""
  left = remaining_seconds(rows)
  ended = sum(r["state"] in _ENDED for r in rows)
  to_go = "" if left is None else f", about {duration(left)} to go"
  table = RichTable(caption=f"{ended} of {len(rows)} cells ended{to_go}", caption_justify="left")
  for name in ("cell", "state", "tasks", "ACC %", "time"):
    table.add_column(name, justify="left" if name in ("cell", "state") else "right")
  first = max(0, min(ended - _SHOWN // 2, len(rows) - _SHOWN))
  shown = rows[first : first + _SHOWN]
  shown += [r for r in rows if r["state"] == "failed" and r not in shown]
  for row in shown:
    tasks = f"{row['done']}/{row['total']}" if row["total"] else ""
    accuracy = _number(row["accuracy"]) if row["state"] in _ENDED else ""
    seconds = duration(row["seconds"]) if row["seconds"] else ""
    table.add_row(row["name"], row["error"] or row["state"], tasks, accuracy, seconds)
  return table


def remaining_seconds(rows: list[dict]) -> float | None:
  """Estimates the seconds until all cells have ended, from the cells of the same method so far.

  Returns None if no cell has run yet.
  """
  known: dict[str, list[float]] = {}
  for row in rows:
    if row["state"] == "done":
      known.setdefault(row["method"], []).append(row["seconds"])
    elif row["state"] == "running" and row["done"]:
      whole = row["seconds"] * row["total"] / row["done"]
      known.setdefault(row["method"], []).append(whole)
  if not known:
    return None
  means = {method: sum(s) / len(s) for method, s in known.items()}
  other = sum(means.values()) / len(means)
  left = 0.0
  for row in rows:
    if row["state"] in ("waiting", "running"):
      left += max(means.get(row["method"], other) - row["seconds"], 0.0)
  return left


def sweep_text(rows: list[dict]) -> str:
  """Returns what is printed at the end of a sweep: failures, and the number of cells by state."""
  states = {s: [r for r in rows if r["state"] == s] for s in _ENDED}
  lines = [f"FAILED {r['name']}: {r['error']}" for r in states["failed"]]
  always = _ENDED[:3]
  counts = [f"{len(found)} {s}" for s, found in states.items() if found or s in always]
  return "\n".join([*lines, ", ".join(counts)])


def duration(seconds: float) -> str:
  """Formats seconds as "8 s", "12 min" or "3.4 h"."""
  if seconds < 100:
    return f"{seconds:.0f} s"
  return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# --- after a run ----------------------------------------------------------------------


def matrix_text(record: dict) -> str:
  """Formats the accuracies: rows are tasks just learned, columns are tasks tested on.

  Of more than 20 tasks the first five and the last five are shown.
  """
  accuracy, num_tasks = record["accuracy"], len(record["task_ids"])
  parts = [range(num_tasks)] if num_tasks <= 20 else [range(5), range(num_tasks - 5, num_tasks)]

  def line(start: str, cell: Callable[[int], str]) -> str:
    return start + "    ...".join("".join(map(cell, part)) for part in parts)

  def row(s: int) -> str:
    cells = accuracy[s]
    return line(f"task {s + 1:>5}", lambda i: _cell(cells[i]))

  header = line("after \\ on", lambda i: f"{i + 1:>7}")
  blocks = ["\n".join(map(row, part)) for part in parts]
  return header + "\n" + "\n...\n".join(blocks)


def _cell(accuracy: float | None) -> str:
  """Formats an accuracy of the matrix; "." if there is none."""
  return "      ." if accuracy is None else f"{accuracy:7.2f}"


def _number(x: float | None, unit: str = "") -> str:
  """Formats a number with two decimals; "-" if there is none."""
  return "-" if x is None else f"{x:.2f}{unit}"


def record_text(record: dict, workdir: str) -> str:
  """Returns what is printed at the end of a run."""
  seconds = [sum(s.values()) for s in record["seconds"]]
  return "\n".join(
    [
      "",
      f"{record['method']} on {record['benchmark']}, order {record['order']}, seed {record['seed']}"
      + (" (PARTIAL DATA)" if record["partial"] else ""),
      matrix_text(record),
      f"ACC        {_number(record['average_accuracy'], ' %')}"
      + (f" ({kind})" if (kind := record.get("statistics")) == "test-batch statistics" else ""),
      f"BWT        {_number(record['bwt'])}",
      f"increment  {record['increment'][-1]:.3f}",
      f"seconds    {sum(seconds):.1f}",
      f"memory     {record['peak_memory_bytes'] / 2**20:.0f} MiB at most",
      f"files      {workdir}/record.json, metrics.jsonl, config.json",
    ]
  )


def _statistics(record: dict) -> str:
  """Returns a short name of the statistics that BatchNorm evaluated with."""
  name = record.get("statistics", "-")
  return "training images" if "training images" in name else name.removesuffix(" statistics")


def compare_text(records: dict[str, dict]) -> str:
  """Formats records side by side, a column for each.

  Args:
    records: name of the run -> record.
  """
  rows = [
    ("", list(records)),
    ("method", [r["method"] for r in records.values()]),
    ("benchmark", [r["benchmark"] for r in records.values()]),
    ("data", [short_data(r) for r in records.values()]),
    ("order, seed", [f"{r['order']}, {r['seed']}" for r in records.values()]),
    ("ACC %", [_number(r["average_accuracy"]) for r in records.values()]),
    ("BatchNorm", [_statistics(r) for r in records.values()]),
    ("BWT", [_number(r["bwt"]) for r in records.values()]),
    ("forgetting", [_number(r["forgetting"]) for r in records.values()]),
    ("increment", [f"{r['increment'][-1]:.3f}" for r in records.values()]),
    ("parameters", [f"{r['size'][-1]['nonzero']:,}" for r in records.values()]),
    ("seconds", [f"{sum(sum(s.values()) for s in r['seconds']):.1f}" for r in records.values()]),
  ]
  for i in sorted({i for r in records.values() for i in r["task_ids"]}):
    cells = []
    for r in records.values():
      by_id = dict(zip(r["task_ids"], r["accuracy"][-1], strict=True))
      cells.append(_number(by_id.get(i)))
    rows.append((f"task id {i} %", cells))
  width = max(len(c) for _, cells in rows for c in cells) + 2
  return "\n".join(f"{name:<14}" + "".join(f"{c:>{width}}" for c in cells) for name, cells in rows)


def tune_text(results: dict[str, dict]) -> str:
  """Formats the results of `tune`.

  Args:
    results: name of the cell -> average_accuracy, bwt, seconds; the best first.
  """
  width = max(map(len, results)) + 2
  lines = [f"{'cell':<{width}}{'valid. ACC %':>12}{'BWT':>9}{'seconds':>10}"]
  for name, r in results.items():
    accuracy = "diverged" if r["average_accuracy"] is None else _number(r["average_accuracy"])
    seconds = _number(r["seconds"])
    lines.append(f"{name:<{width}}{accuracy:>12}{_number(r['bwt']):>9}{seconds:>10}")
  return "\n".join(lines)


# --- before a run ---------------------------------------------------------------------


def plan_text(plan: dict) -> str:
  """Returns what --dry_run prints; `plan` is from `experiment.plan`."""
  lines = ["config"]
  lines += [f"  {k} = {v!r}" for k, v in plan["config"].items()]
  lines.append(f"tasks of {plan['benchmark']} in the order of training")
  if plan["missing"]:
    lines.append(f"  (sizes of the protocol; {plan['missing']})")
  for t, task in enumerate(plan["tasks"]):
    classes = ", ".join(task.get("class_names", ())) or f"{task['num_classes']} classes"
    lines.append(
      f"  {t + 1}: id {task['id']} {task['name']}: train {task['train']}, valid {task['valid']}, "
      f"test {task['test']}; {classes}"
    )
  lines.append(f"network {plan['config']['network']}, input {plan['image_shape']}")
  for name, count, perturbed in plan["layers"]:
    lines.append(f"  {name:<24}{count:>12,}{'  perturbed' if perturbed else ''}")
  lines.append(f"  {'total':<24}{plan['parameters']:>12,}")
  lines.append(f"planned optimizer steps: {plan['steps']:,}")
  return "\n".join(lines)


def list_text(benchmarks: dict, networks: dict, methods: dict) -> str:
  """Returns what --list prints: names, each with the first line of its docstring."""
  sections = {
    "benchmarks": {name: family.summary for name, family in benchmarks.items()},
    "networks": {name: make.__doc__ for name, make in networks.items()},
    "methods": {name: module.__doc__ for name, module in methods.items()},
  }
  width = max(len(name) for docs in sections.values() for name in docs) + 2
  lines = []
  for title, docs in sections.items():
    lines.append(title)
    for name, doc in docs.items():
      summary, *_ = (doc or "").strip().splitlines() or [""]
      summary = summary.removeprefix("Returns the ")  # of a function that makes a network
      lines.append(f"  {name:<{width}}{summary}".rstrip())
  return "\n".join(lines)


def help_text(usage: str, flag_help: str, methods: dict) -> str:
  """Returns what `halrp_jax.main --help` prints: usage, flags and all config keys."""
  lines = [usage, "Flags:", flag_help, "", "Config keys (--config.KEY=VALUE):"]
  known = keys.keys_of()
  for name, method in methods.items():
    known |= {f"method.{k} [{name}]": v for k, v in keys.spec(method.Config).items()}
  for name, key in known.items():
    default = "as the variant" if key.default is None else repr(key.default)
    lines.append(f"  {name} = {default} ({key.expected}): {key.meaning}")
  return "\n".join(lines)


def verb_help_text(usage: str | None, flags: dict[str, str]) -> str:
  """Returns what --help prints of a verb that takes a config.

  Args:
    usage: docstring of the verb's module.
    flags: name -> help.
  """
  flags = {"config": "FILE.py, FILE.py:METHOD or FILE.py:METHOD,KEY=VALUE,..."} | flags
  flags["config.KEY"] = "value of a config key; `python -m halrp_jax.main --help` lists the keys"
  width = max(map(len, flags)) + 2
  lines = [f"  --{name:<{width}}{text}" for name, text in flags.items()]
  return "\n".join([usage or "", "Flags:", *lines])
