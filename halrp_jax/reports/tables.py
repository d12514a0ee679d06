"""Groups of runs against the paper's tables; the same table as CSV and Markdown (LaTeX: latex.py).

Every number of every form is written by `Cell`, so that they agree.
"""

import collections
import csv
import io
import re
from collections.abc import Iterable
from typing import NamedTuple

from halrp_jax.reports import paper, records
from halrp_jax.reports.paper import Catalogue, Column, Target
from halrp_jax.reports.records import Group, Number, Run

METRICS = {  # name -> head, unit, decimals
  "accuracy": ("ACC", "%", 2),
  "mopd": ("MOPD", "points", 2),
  "aopd": ("AOPD", "points", 2),
  "increment": ("Size", "growth", 3),
}
NOT_RUN = "not run"


class Cell(NamedTuple):
  row: str  # as the paper calls it
  column: Column
  ours: Number | None
  paper: Number | None
  group: Group | None  # the runs behind `ours`
  variant: str = ""  # of the runs: one of `records.VARIANTS`

  @property
  def runs(self) -> tuple[Run, ...]:
    return self.group.runs if self.group else ()

  @property
  def label(self) -> str:
    return _label(self.row, self.variant)

  @property
  def flags(self) -> tuple[str, ...]:
    """Why it can't be compared with the paper's."""
    if not self.group:
      return ()
    wanted = self.column.fraction or 1.0
    flags = ["partial data"] if self.group.partial else []
    if self.group.fraction != wanted:
      flags.append(f"at {100 * self.group.fraction:g} % of the images")
    return tuple(flags)

  @property
  def difference(self) -> float | None:
    """Of the numbers as they are written."""
    if not self.ours or not self.paper:
      return None
    decimals = METRICS[self.column.metric][2]
    return round(round(self.ours.value, decimals) - round(self.paper.value, decimals), decimals)

  def text(self, number: Number | None) -> str:
    """67.32 ± 0.10"""
    if number is None:
      return ""
    mean = self.write(number.value)
    return mean if number.error is None else f"{mean} ± {self.write(number.error)}"

  def write(self, x: float | None, sign: str = "") -> str:
    return "" if x is None else f"{x:{sign}z.{METRICS[self.column.metric][2]}f}"

  @property
  def ours_text(self) -> str:
    if self.group and not self.ours:
      return "needs two orders"
    return self.text(self.ours) or NOT_RUN

  @property
  def count(self) -> str:
    return count(self.group) if self.group else ""


def count(group: Group) -> str:
  """5 x 1: orders x seeds."""
  orders, runs = group.num_orders, len(group.runs)
  return f"{orders} x {runs // orders}" if runs % orders == 0 else f"{runs} in {orders} orders"


class Table(NamedTuple):
  target: Target
  rows: dict[str, tuple[Cell, ...]]  # `Cell.label` -> cells as target.columns

  @property
  def cells(self) -> Iterable[Cell]:
    return (cell for row in self.rows.values() for cell in row)

  @property
  def runs(self) -> tuple[Run, ...]:
    """Behind any of its numbers, each once."""
    return tuple({run.place: run for cell in self.cells for run in cell.runs}.values())


def build(target: Target, groups: list[Group], catalogue: Catalogue) -> Table:
  """Returns a table of the paper from groups of runs."""
  rows = {}
  for row, argument in target.rows.items():
    for variant in records.VARIANTS:
      cells = tuple(
        _cell(target, row, argument, column, groups, catalogue, variant)
        for column in target.columns
      )
      if not variant or any(cell.group for cell in cells):
        rows[_label(row, variant)] = cells
  return Table(target, rows)


def _label(row: str, variant: str) -> str:
  return f"{row}, {variant}" if variant else row


def _cell(target, row, argument, column, groups, catalogue, variant) -> Cell:
  setting = paper.Setting(column.config, argument, 1.0)
  fraction = None if catalogue.any_share else column.fraction
  group = find(catalogue.wanted(setting), fraction, groups, variant)
  ours = group and records.number(group, column.metric)
  return Cell(row, column, ours, paper.number(target, row, column), group, variant)


def find(
  setting: dict | None, fraction: float | None, groups: list[Group], variant: str = ""
) -> Group | None:
  """Returns the group of a setting, or of a variant of it.

  Whole data come before partial; the largest share of the images if none is asked for.
  """
  if setting is None:
    return None
  found = [
    g
    for g in groups
    if (fraction is None or g.fraction == fraction)
    and records.variant(g.setting, setting) == variant
  ]
  return max(found, key=lambda g: (not g.partial, g.fraction, len(g.runs)), default=None)


class Coverage(NamedTuple):
  """How much of a figure of the paper was run."""

  target: Target
  run: int  # settings of it
  flagged: int  # of these: on a part of the images or of the data
  total: int

  @property
  def text(self) -> str:
    if not self.run:
      return NOT_RUN
    less = f" ({self.flagged} of them on less data)" if self.flagged else ""
    return f"{self.run} of {self.total} settings run{less}"


def coverage(target: Target, groups: list[Group], catalogue: Catalogue) -> Coverage:
  """Returns how much of a figure of the paper was run."""
  cells = list(build(target._replace(columns=_per_config(target)), groups, catalogue).cells)
  settings = {(cell.row, cell.column) for cell in cells}
  run = {(cell.row, cell.column): cell for cell in reversed(cells) if cell.group}
  return Coverage(target, len(run), sum(bool(cell.flags) for cell in run.values()), len(settings))


def _per_config(target: Target) -> tuple[Column, ...]:
  """One column per config and share of the images, whatever is drawn of it."""
  return tuple(
    {(c.config, c.fraction): c._replace(metric="accuracy") for c in target.columns}.values()
  )


def command(target: Target) -> str:
  kind, name = target.name.split()
  return (
    f"python -m halrp_jax reproduce --{kind}={name} --budget=full --data_dir=DIR --workdir=RUNS"
  )


# --- forms ----------------------------------------------------------------------------

_FIELDS = (
  *("table", "row", "column", "metric", "unit", "ours", "standard_error", "orders", "runs"),
  *("paper", "paper_standard_error", "difference", "flags", "records"),
)


def to_csv(table: Table) -> str:
  """A line per cell, those that were not run with nothing in `ours`."""
  stream = io.StringIO()
  writer = csv.writer(stream, lineterminator="\n")
  writer.writerow(_FIELDS)
  for cell in table.cells:
    ours, theirs = cell.ours or Number(None, None), cell.paper or Number(None, None)
    head, unit, _ = METRICS[cell.column.metric]
    writer.writerow(
      [
        *(table.target.name, cell.label, cell.column.head, head, unit),
        *(cell.write(ours.value), cell.write(ours.error)),
        *((cell.group.num_orders, len(cell.runs)) if cell.group else ("", "")),
        *(cell.write(theirs.value), cell.write(theirs.error), cell.write(cell.difference, "+")),
        *("; ".join(cell.flags), plain_cell(" ".join(run.place for run in cell.runs))),
      ]
    )
  return stream.getvalue()


def short(cell: Cell) -> str:
  """One cell on one line: ours, n; the paper's, the difference."""
  ours = cell.ours_text + (f" (n {cell.count})" if cell.ours else "")
  parts = [ours, *cell.flags]
  if cell.paper:
    parts.append(f"paper {cell.text(cell.paper)}")
  if cell.difference is not None:
    parts.append(f"difference {cell.write(cell.difference, '+')}")
  return "; ".join(parts)


def head(column: Column) -> str:
  name, unit, _ = METRICS[column.metric]
  return f"{column.head}, {name} ({unit})"


def markdown(text) -> str:
  """Returns a text whose characters Markdown shows as they are, also in a table."""
  return re.sub(r"[\\|<`*\[\]]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(str(text).split()))


def plain_cell(text: str) -> str:
  """Returns a name for a CSV file: one that a spreadsheet would compute begins with a quote."""
  return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def to_markdown(table: Table) -> str:
  lines = [f"| | {' | '.join(head(c) for c in table.target.columns)} |"]
  lines.append("|---" * (len(table.target.columns) + 1) + "|")
  for label, cells in table.rows.items():
    lines.append(f"| {label} | {' | '.join(short(c) for c in cells)} |")
  return "\n".join(lines) + "\n"


# --- everything that was run ----------------------------------------------------------


class Row(NamedTuple):
  """One group in plain texts, for the overview."""

  label: str
  where: str  # benchmark and network
  share: str  # of the images; also if the data are partial
  difference: str  # from the config of the benchmark
  count: str
  numbers: tuple[str, ...]  # as OVERVIEW
  group: Group


OVERVIEW = {
  "ACC (%)": ("accuracy", 2),
  "BWT (points)": ("bwt", 2),
  "MOPD (points)": ("mopd", 2),
  "AOPD (points)": ("aopd", 2),
  "growth": ("increment", 3),
  "time (s)": ("seconds", 0),
}


def overview(groups: list[Group], catalogue: Catalogue) -> list[Row]:
  """Every group, also those that no table of the paper has."""
  rows = [_overview_row(group, catalogue) for group in groups]
  alike = collections.Counter(_texts(row) for row in rows)
  return [
    row._replace(where=f"{row.where}; {_data(row.group)}") if alike[_texts(row)] > 1 else row
    for row in rows
  ]


def _texts(row: Row) -> tuple[str, ...]:
  """Returns what tells a row from the others, but for its data."""
  return row.label, row.where, row.share, row.difference


def _data(group: Group) -> str:
  """Returns names of the first tasks, and digits that stand for their data where they are known."""
  record = group.runs[0].record
  names = sorted(map(str, record.get("task_names", ())))
  more = ", ..." if len(names) > 3 else ""
  return f"{', '.join(names[:3])}{more}; data {records.short_data(record)}"


def _overview_row(group: Group, catalogue: Catalogue) -> Row:
  numbers = []
  for metric, decimals in OVERVIEW.values():
    found = records.number(group, metric)
    text = "-" if found is None else f"{found.value:z.{decimals}f}"
    numbers.append(
      text if not found or found.error is None else f"{text} ± {found.error:z.{decimals}f}"
    )
  share = f"{100 * group.fraction:g} %" + (", partial data" if group.partial else "")
  where = f"{group.benchmark}, {group.network}"
  label = paper.LABELS.get(group.method, group.method)
  other = difference(group, catalogue)
  return Row(label, where, share, other, count(group), tuple(numbers), group)


def difference(group: Group, catalogue: Catalogue) -> str:
  """The keys in which a group differs from the config of its benchmark."""
  standard = catalogue.standard(group.benchmark, group.network, group.method)
  if standard is None:
    return "no config of that benchmark and network"
  if (variant := records.variant(group.setting, standard)) is not None:
    return variant
  named = f"method.batch_norm = {group.setting.get('method.batch_norm')}"
  found = records.differences(group.setting, standard)
  kind = records.statistics(group.setting)
  return ", ".join(kind if kind and line == named else line for line in found)
