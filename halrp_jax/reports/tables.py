"""Compares groups of runs with the paper's tables and writes tables as CSV and Markdown.

latex.py writes them as LaTeX. In all forms `Cell` turns the numbers into text, so that they agree.
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
from halrp_jax.types import Json

METRICS = {  # name -> (column header, unit, decimals)
  "accuracy": ("ACC", "%", 2),
  "mopd": ("MOPD", "points", 2),
  "aopd": ("AOPD", "points", 2),
  "increment": ("Size", "growth", 3),
}
NOT_RUN = "not run"


class Cell(NamedTuple):
  """One cell of a table: our number beside the paper's."""

  row: str  # the paper's label of the row
  column: Column
  ours: Number | None
  paper: Number | None
  group: Group | None  # the runs from which `ours` is computed
  variant: str = ""  # of the runs' setting: one of `records.VARIANTS`

  @property
  def runs(self) -> tuple[Run, ...]:
    """Returns the runs from which our number is computed."""
    return self.group.runs if self.group else ()

  @property
  def label(self) -> str:
    """Returns the label of the row, with the variant."""
    return _label(self.row, self.variant)

  @property
  def flags(self) -> tuple[str, ...]:
    """Returns the reasons why our number can't be compared with the paper's."""
    if not self.group:
      return ()
    full = self.column.fraction or 1.0
    flags = ["partial data"] if self.group.partial else []
    if self.group.fraction != full:
      flags.append(f"at {100 * self.group.fraction:g} % of the images")
    return tuple(flags)

  @property
  def difference(self) -> float | None:
    """Returns our number minus the paper's, both rounded as they are printed."""
    if not self.ours or not self.paper:
      return None
    decimals = METRICS[self.column.metric][2]
    return round(round(self.ours.value, decimals) - round(self.paper.value, decimals), decimals)

  def text(self, number: Number | None) -> str:
    """Returns a number with its error, such as "67.32 ± 0.10"; "" for None."""
    if number is None:
      return ""
    mean = self.write(number.value)
    return mean if number.error is None else f"{mean} ± {self.write(number.error)}"

  def write(self, x: float | None, sign: str = "") -> str:
    """Returns a value with the decimals of the column's metric; sign="+" adds a plus sign."""
    return "" if x is None else f"{x:{sign}z.{METRICS[self.column.metric][2]}f}"

  @property
  def ours_text(self) -> str:
    """Returns our number as text, or why there is none."""
    if self.group and not self.ours:
      return "needs two orders"
    return self.text(self.ours) or NOT_RUN

  @property
  def count(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride] (not tuple.count)
    """Returns how many runs our number is computed from; "" if there are none."""
    return count(self.group) if self.group else ""


def count(group: Group) -> str:
  """Returns the number of runs of a group as orders x seeds, such as "5 x 1"."""
  orders, runs = group.num_orders, len(group.runs)
  return f"{orders} x {runs // orders}" if runs % orders == 0 else f"{runs} in {orders} orders"


class Table(NamedTuple):
  """A table of the paper with our numbers."""

  target: Target
  rows: dict[str, tuple[Cell, ...]]  # `Cell.label` -> a cell for each of target.columns

  @property
  def cells(self) -> Iterable[Cell]:
    """Returns all cells, row by row."""
    return (cell for row in self.rows.values() for cell in row)

  @property
  def runs(self) -> tuple[Run, ...]:
    """Returns the runs from which the table's numbers are computed, each once."""
    return tuple({run.path: run for cell in self.cells for run in cell.runs}.values())


def build(target: Target, groups: list[Group], catalogue: Catalogue) -> Table:
  """Builds a table of the paper from groups of runs.

  Rows of variants of a setting are added where such runs exist.
  """
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
  """Returns the label of a row with its variant."""
  return f"{row}, {variant}" if variant else row


def _cell(
  target: Target,
  row: str,
  argument: str,
  column: Column,
  groups: list[Group],
  catalogue: Catalogue,
  variant: str,
) -> Cell:
  """Builds a cell. `argument`: the row's text after the colon of a config file."""
  setting = paper.Setting(column.config, argument, 1.0)
  fraction = None if catalogue.any_share else column.fraction
  group = find(catalogue.expected(setting), fraction, groups, variant)
  ours = records.number(group, column.metric) if group else None
  return Cell(row, column, ours, paper.number(target, row, column), group, variant)


def find(
  setting: Json | None, fraction: float | None, groups: list[Group], variant: str = ""
) -> Group | None:
  """Returns the group of a setting, or of a variant of the setting.

  Args:
    setting: the setting; None: there is none, and the result is None.
    fraction: fraction of the training images; None: the largest one that was run.
    groups: all groups.
    variant: one of `records.VARIANTS`.

  Returns:
    If several groups match, one on complete data rather than on partial data. None if none matches.
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
  """How many settings of a figure of the paper were run."""

  target: Target
  run: int  # settings that were run
  flagged: int  # those of `run` that used only a fraction of the training images or partial data
  total: int  # all settings of the figure

  @property
  def text(self) -> str:
    """Returns the counts as a sentence."""
    if not self.run:
      return NOT_RUN
    less = f" ({self.flagged} of them on less data)" if self.flagged else ""
    return f"{self.run} of {self.total} settings run{less}"


def coverage(target: Target, groups: list[Group], catalogue: Catalogue) -> Coverage:
  """Counts the settings of a figure of the paper that were run."""
  cells = list(build(target._replace(columns=_per_config(target)), groups, catalogue).cells)
  settings = {(cell.row, cell.column) for cell in cells}
  run = {(cell.row, cell.column): cell for cell in reversed(cells) if cell.group}
  return Coverage(target, len(run), sum(bool(cell.flags) for cell in run.values()), len(settings))


def _per_config(target: Target) -> tuple[Column, ...]:
  """Returns one column per config and fraction of the training images, for all metrics."""
  return tuple(
    {(c.config, c.fraction): c._replace(metric="accuracy") for c in target.columns}.values()
  )


def command(target: Target) -> str:
  """Returns the command that runs everything a table or figure needs."""
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
  """Returns a table as CSV, one line per cell. `ours` is empty in cells that were not run."""
  stream = io.StringIO()
  writer = csv.writer(stream, lineterminator="\n")
  writer.writerow(_FIELDS)
  for cell in table.cells:
    ours, our_error = cell.ours or (None, None)
    theirs, their_error = cell.paper or (None, None)
    head, unit, _ = METRICS[cell.column.metric]
    writer.writerow(
      [
        *(table.target.name, cell.label, cell.column.head, head, unit),
        *(cell.write(ours), cell.write(our_error)),
        *((cell.group.num_orders, len(cell.runs)) if cell.group else ("", "")),
        *(cell.write(theirs), cell.write(their_error), cell.write(cell.difference, "+")),
        *("; ".join(cell.flags), plain_cell(" ".join(run.path for run in cell.runs))),
      ]
    )
  return stream.getvalue()


def short(cell: Cell) -> str:
  """Returns a cell on one line: our number with the count of runs, the paper's, the difference."""
  ours = cell.ours_text + (f" (n {cell.count})" if cell.ours else "")
  parts = [ours, *cell.flags]
  if cell.paper:
    parts.append(f"paper {cell.text(cell.paper)}")
  if cell.difference is not None:
    parts.append(f"difference {cell.write(cell.difference, '+')}")
  return "; ".join(parts)


def head(column: Column) -> str:
  """Returns a column header with its metric and unit."""
  name, unit, _ = METRICS[column.metric]
  return f"{column.head}, {name} ({unit})"


def markdown(text: object) -> str:
  """Returns str(text) with Markdown's special characters escaped, on one line for a table."""
  return re.sub(r"[\\|<`*\[\]]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(str(text).split()))


def plain_cell(text: str) -> str:
  """Returns a name for a CSV file; a name that looks like a formula gets a quote in front."""
  return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def to_markdown(table: Table) -> str:
  """Returns a table as Markdown."""
  lines = [f"| | {' | '.join(head(c) for c in table.target.columns)} |"]
  lines.append("|---" * (len(table.target.columns) + 1) + "|")
  for label, cells in table.rows.items():
    lines.append(f"| {label} | {' | '.join(short(c) for c in cells)} |")
  return "\n".join(lines) + "\n"


# --- everything that was run ----------------------------------------------------------


class Row(NamedTuple):
  """A group of runs as texts, a row of the overview."""

  label: str  # name of the method
  where: str  # benchmark and network
  share: str  # fraction of the training images, and whether the data are partial
  difference: str  # the keys that differ from the benchmark's config file
  count: str  # pyright: ignore[reportIncompatibleMethodOverride] (not tuple.count); orders x seeds
  numbers: tuple[str, ...]  # one for each metric of OVERVIEW
  group: Group


OVERVIEW = {  # column header -> (metric, decimals)
  "ACC (%)": ("accuracy", 2),
  "BWT (points)": ("bwt", 2),
  "MOPD (points)": ("mopd", 2),
  "AOPD (points)": ("aopd", 2),
  "growth": ("increment", 3),
  "time (s)": ("seconds", 0),
}


def overview(groups: list[Group], catalogue: Catalogue) -> list[Row]:
  """Returns a row for each group, also for those that are in no table of the paper."""
  rows = [_overview_row(group, catalogue) for group in groups]
  times = collections.Counter(_distinction(row) for row in rows)
  return [
    row._replace(where=f"{row.where}; {_data(row.group)}") if times[_distinction(row)] > 1 else row
    for row in rows
  ]


def _distinction(row: Row) -> tuple[str, ...]:
  """Returns the texts that distinguish a row from others, except for the data."""
  return row.label, row.where, row.share, row.difference


def _data(group: Group) -> str:
  """Returns the names of the first tasks and the first digits of the data's hash."""
  record = group.runs[0].record
  names = sorted(map(str, record.get("task_names", ())))
  more = ", ..." if len(names) > 3 else ""
  return f"{', '.join(names[:3])}{more}; data {records.short_data(record)}"


def _overview_row(group: Group, catalogue: Catalogue) -> Row:
  """Returns the row of a group."""
  numbers: list[str] = []
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
  """Returns the keys in which a group differs from its benchmark's config file, as text."""
  standard = catalogue.standard(group.benchmark, group.network, group.method)
  if standard is None:
    return "no config file of this benchmark and network"
  if (variant := records.variant(group.setting, standard)) is not None:
    return variant
  named = f"method.batch_norm = {group.setting.get('method.batch_norm')}"
  found = records.differences(group.setting, standard)
  kind = records.statistics(group.setting)
  return ", ".join(kind if kind and line == named else line for line in found)
