"""Writes the report of a folder of runs: page, tables, figures, and docs/reproduction.md."""

import json
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import matplotlib

from halrp_jax.reports import figures, latex, page, paper, records, tables
from halrp_jax.reports.figures import Picture
from halrp_jax.reports.records import Group, Skipped
from halrp_jax.reports.tables import Cell, Coverage, Row, Table
from halrp_jax.types import UserError

PAGE, DOCUMENT, REASONS = "index.html", "reproduction.md", "reasons.json"
_PNG_DPI = 90

# paper's table -> row label (`Cell.label`, or the paper's row for all its variants) -> column
# header -> reason for the difference, as full sentences
Reasons = dict[str, dict[str, dict[str, str]]]

# abbreviations of `records.VARIANTS` in the tables of orders
_LETTERS = {
  "": "P",
  records.TEST_BATCH: "T",
  records.RUNNING: "R",
  records.RETROSPECTIVE: "RP",
}

_INTRODUCTION = f"""\
The paper's numbers are means over five orders with five seeds each. Ours are mean ± standard error
over n = orders x seeds, and the difference is ours minus the paper's. A run counts for a table if
its config is that of its file in `configs/`, whatever its order and seed; all other runs are listed
below the tables. The reasons in the notes are written by hand in `{REASONS}`.

| status | meaning |
|---|---|
| reproduced | at most 1 point from the paper's number (growth: 0.01) |
| off | further away; the note says why, and without a note it is not explained |
| reduced | run on a fraction of the training images or on partial data, so not compared |
| unpublished | the paper has no such number |

Rows whose label has no suffix evaluate BatchNorm with population statistics, the default
([batch_norm.md](batch_norm.md)). "{records.TEST_BATCH.capitalize()}", "{records.RUNNING}" and
"{records.RETROSPECTIVE}" (`method.prune_scope=all`) name other settings. The last table of each
section gives the number of orders that were run: P with population statistics; T with test-batch
and R with running statistics, whatever the pruning; RP with population statistics and retrospective
pruning; - is not run.
"""


class Report(NamedTuple):
  """All that was found below a folder of runs."""

  tables: list[Table]
  coverage: list[Coverage]  # of the paper's figures
  rows: list[Row]
  pictures: list[Picture]
  skipped: list[Skipped]


def collect(
  runs: str, catalogue: paper.Catalogue, targets: list[paper.Target], only: bool = False
) -> Report:
  """Reads all records below a folder and compares them with the paper.

  Args:
    runs: the folder.
    catalogue: the settings of the paper, with which those of the records are compared.
    targets: the tables and figures of the paper to report.
    only: True leaves out runs that belong to no target.

  Returns:
    The report: tables, coverage of the paper's figures, overview, figures, and files left out.

  Raises:
    UserError: if the folder is missing or holds no record that can be used.
  """
  if not pathlib.Path(runs).is_dir():
    raise UserError(f"{runs}: no such folder; give the folder of runs")
  found, skipped = records.read(runs, catalogue.setting_of)
  groups, older = records.group(found)
  if only:
    groups = _of_targets(groups, targets, catalogue)
  if not groups:
    named = "; ".join(f"{s.path} {s.reason}" for s in skipped[:3])
    named = f" ({named})" if named else ""
    raise UserError(f"{runs}: no usable record{named}; finish a run first")
  return Report(
    [tables.build(t, groups, catalogue) for t in targets if t.is_table],
    [tables.coverage(t, groups, catalogue) for t in targets if not t.is_table],
    tables.overview(groups, catalogue),
    figures.draw(groups, catalogue),
    skipped + older,
  )


def _of_targets(
  groups: list[Group], targets: list[paper.Target], catalogue: paper.Catalogue
) -> list[Group]:
  """Returns the groups whose setting is that of a cell of the targets, or a variant of it."""
  expected = [
    catalogue.expected(setting) for target in targets for setting in paper.settings(target, "full")
  ]
  return [
    g
    for g in groups
    if any(e is not None and records.variant(g.setting, e) is not None for e in expected)
  ]


# --- files ----------------------------------------------------------------------------


def write(report: Report, out: str, title: str) -> None:
  """Writes index.html, tables/*.csv, *.md, *.tex and figures/*.svg, *.png.

  Args:
    report: what to write.
    out: the folder; it is created if it is missing.
    title: the title of the page.

  Raises:
    UserError: if the folder can't be written.
  """
  folder = pathlib.Path(out)
  with matplotlib.rc_context({"svg.hashsalt": "halrp_jax"}):
    try:
      for name in ("tables", "figures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
      for table in report.tables:
        path = folder / "tables" / table.target.slug
        _write(path.with_suffix(".csv"), tables.to_csv(table))
        _write(path.with_suffix(".md"), tables.to_markdown(table))
        _write(path.with_suffix(".tex"), latex.to_latex(table))
      for picture in report.pictures:
        (folder / "figures" / f"{picture.name}.svg").write_bytes(page.svg(picture))
      _write_pictures(report, folder / "figures")
      text = page.page(title, *report)
      _write(folder / PAGE, text)
    except OSError as e:
      raise UserError(f"--out={out}: {e.strerror or e}; choose a folder that can be written") from e


def _write(path: pathlib.Path, text: str) -> None:
  """Writes a text as UTF-8; bytes of a file name that are no valid text are escaped."""
  path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _write_pictures(report: Report, folder: pathlib.Path) -> None:
  """Writes all figures as PNG files."""
  for picture in report.pictures:
    target = folder / f"{picture.name}.png"
    picture.figure.savefig(target, dpi=_PNG_DPI, metadata={"Software": None})


def write_document(report: Report, docs: str, command: str) -> None:
  """Writes reproduction.md and its figures, which replace all earlier ones.

  Args:
    report: what to write.
    docs: the folder; reasons.json in it says why numbers differ from the paper's.
    command: the command that the document names as its source.

  Raises:
    UserError: if the folder can't be written or reasons.json can't be read.
  """
  folder = pathlib.Path(docs)
  try:
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    _write(folder / DOCUMENT, document(report, read_reasons(docs), command))
    for old in (folder / "figures").glob("*.png"):
      old.unlink()
    _write_pictures(report, folder / "figures")
  except OSError as e:
    raise UserError(f"--docs={docs}: {e.strerror or e}; choose a folder that can be written") from e


def read_reasons(docs: str) -> Reasons:
  """Reads why numbers differ from the paper's.

  Args:
    docs: the folder with reasons.json, a file written by hand.

  Returns:
    The reasons; an empty dict if there is no such file.

  Raises:
    UserError: if the file is not JSON or can't be read.
  """
  path = pathlib.Path(docs) / REASONS
  try:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  except (OSError, ValueError) as e:
    raise UserError(f"{path}: can't be read ({e})") from e


# --- the document ---------------------------------------------------------------------


def document(report: Report, reasons: Reasons, command: str) -> str:
  """Returns the text of reproduction.md.

  Args:
    report: what to write.
    reasons: why numbers differ from the paper's (`read_reasons`).
    command: the command that the document names as its source.
  """
  lines = ["# Reproduction", "", f"Generated by `{command}`; do not edit.", "", _INTRODUCTION]
  lines += [f"* {text}" for text in records.notes([row.group for row in report.rows])]
  for table in report.tables:
    lines += _section(table, reasons.get(table.target.name, {}))
  lines += ["", "## All runs", "", _overview(report.rows)]
  lines += ["", "## Figures", "", "| paper | settings run | command |", "|---|---|---|"]
  for c in report.coverage:
    name = f"{c.target.name.capitalize()}: {c.target.title}"
    lines.append(f"| {name} | {c.text} | `{tables.command(c.target)}` |")
  lines += _gallery(report.pictures)
  if report.skipped:
    lines += ["", "## Left out", ""]
    lines += [f"* {tables.markdown(s.path)}: {tables.markdown(s.reason)}" for s in report.skipped]
  return "\n".join(lines).rstrip() + "\n"


def _section(table: Table, reasons: dict[str, dict[str, str]]) -> list[str]:
  """Returns the lines of one table of the paper: numbers, notes, what was run.

  Omits MOPD and AOPD, which need two orders, where only one was run.
  """
  target = table.target
  lines = ["", f"## {target.name.capitalize()}: {target.title}", ""]
  lines += [f"Command: `{tables.command(target)}`", ""]
  if not any(cell.group for cell in table.cells):
    return [*lines, "No setting of this table was run."]
  numbers, notes = _numbers(table, reasons)
  lines += numbers
  if notes:
    lines += ["", "Notes:", "", *(f"{i + 1}. {text}" for i, text in enumerate(notes))]
  lines += ["", "Orders that were run:", "", *_orders(table)]
  if any(cell.group and not cell.ours for cell in table.cells):
    lines += ["", "MOPD and AOPD need two orders; with one they are not listed."]
  return lines


def _numbers(table: Table, reasons: dict[str, dict[str, str]]) -> tuple[list[str], list[str]]:
  """Returns the lines of the table of all numbers, and the notes it refers to, each once."""
  heads = ("row", "column", "paper", "ours", "n", "difference", "status", "note")
  lines, notes = [_line(heads), "|---" * len(heads) + "|"], []
  for cell in table.cells:
    if not cell.ours:
      continue
    word, text = status(cell), note(cell, reasons)
    if text and text not in notes:
      notes.append(text)
    difference = "" if cell.flags else cell.write(cell.difference, "+")
    fields = (cell.label, tables.head(cell.column), cell.text(cell.paper), cell.ours_text)
    fields += (cell.count, difference, word, str(notes.index(text) + 1) if text else "")
    lines.append(_line(field or "-" for field in fields))
  return lines, notes


def status(cell: Cell) -> str:
  """Returns one word on a number of ours: how it compares with the paper's."""
  if cell.difference is None:
    return "unpublished"
  if cell.flags:
    return "reduced"
  return "reproduced" if abs(cell.difference) <= paper.ONE_POINT[cell.column.metric] else "off"


def note(cell: Cell, reasons: dict[str, dict[str, str]]) -> str:
  """Returns the note on a number: why it can't be compared, or why it differs; may be empty.

  Args:
    cell: a cell of a table.
    reasons: row label -> column header -> reason for the difference. An entry for a variant's label
      takes precedence over the paper's row.
  """
  word = status(cell)
  if word == "reduced":
    return f"Not comparable: {', '.join(cell.flags)}."
  rows = (reasons.get(name, {}) for name in (cell.label, cell.row)) if word == "off" else ()
  return next((row[cell.column.head] for row in rows if cell.column.head in row), "")


def _orders(table: Table) -> list[str]:
  """Returns the lines of a matrix: how many orders of each row and column were run."""
  heads = list(dict.fromkeys(column.head for column in table.target.columns))
  found: dict[tuple[str, str], dict[str, str]] = {}  # (row, head) -> variant -> "P5"
  for cell in table.cells:
    if cell.group:
      run = f"{_LETTERS[cell.variant]}{cell.group.num_orders}"
      found.setdefault((cell.row, cell.column.head), {})[cell.variant] = run
  lines = [_line(("row", *heads)), "|---" * (len(heads) + 1) + "|"]
  for row in table.target.rows:
    texts = (" ".join(found.get((row, head), {}).values()) for head in heads)
    lines.append(_line((row, *(text or "-" for text in texts))))
  return lines


def _line(fields: Iterable[str]) -> str:
  """Returns a line of a Markdown table."""
  return f"| {' | '.join(fields)} |"


def _overview(rows: list[Row]) -> str:
  """Returns a Markdown table of every group of runs."""
  heads = ["method", "benchmark, network", "images", "not as in configs/", "n"]
  heads += [*tables.OVERVIEW, "records"]
  lines = [_line(heads), "|---" * len(heads) + "|"]
  for row in rows:
    paths = ", ".join(run.path.removesuffix(".json") for run in row.group.runs)
    cells = (row.label, row.where, row.share, row.difference, row.count, *row.numbers, paths)
    lines.append(_line(map(tables.markdown, cells)))
  return "\n".join(lines)


def _gallery(pictures: list[Picture]) -> list[str]:
  """Returns a table of links to the figures, a row per kind of figure.

  Every caption is "KIND: SETTING" (`figures.draw`).
  """
  if not pictures:
    return []
  links: dict[str, list[str]] = {}
  for picture in pictures:
    kind, _, setting = picture.caption.partition(": ")
    links.setdefault(kind, []).append(
      f"[{tables.markdown(setting or kind)}](figures/{picture.name}.png)"
    )
  lines = ["", "| figure | of |", "|---|---|"]
  return lines + [_line((tables.markdown(kind), ", ".join(x))) for kind, x in links.items()]
