r"""Writes a table of the paper as LaTeX, split into parts that fit the text width of an article.

A cell has two lines: our number, and below it the paper's number in brackets with the difference.
Letters refer to notes below the table, which say why numbers can't be compared. The LaTeX package
xcolor is needed.
"""

from halrp_jax.reports.paper import Column
from halrp_jax.reports.tables import METRICS, Cell, Table

TEXT_WIDTH = 345.0  # points: \textwidth of the class article at 10 points, its smallest
_COLUMN_SEP = 3.0  # points on each side of a column
MOST_ROWS = 22  # rows of two lines that fit on a page
# (characters, upper bound of their width in points) in cmr8, the font of \footnotesize. _LOWER is
# the bound of all other lower-case letters, _OTHER that of all other characters.
_WIDTHS = (("MW", 8.8), ("mw%", 7.2), (".,;: ", 3.0), ("()[]-", 3.5), ("0123456789", 4.4))
_LOWER, _OTHER = 4.9, 7.2
_SPECIAL = {
  **{c: rf"\{c}" for c in "%_&#${}"},
  "\\": r"\textbackslash{}",
  "~": r"\textasciitilde{}",
  "^": r"\textasciicircum{}",
  "<": r"\textless{}",
  ">": r"\textgreater{}",
  "|": r"\textbar{}",
  "±": r"$\pm$",
}


def to_latex(table: Table) -> str:
  r"""Returns a table as LaTeX: one \begin{table} ... \end{table} with a caption per part."""
  labels = list(table.rows)
  pages = [labels[i : i + MOST_ROWS] for i in range(0, len(labels), MOST_ROWS)]
  parts = [(rows, columns) for columns in split(table) for rows in pages]
  made = (_part(table, *part, i, len(parts)) for i, part in enumerate(parts))
  return "% needs xcolor\n" + "\n".join(made)


def split(table: Table) -> list[list[int]]:
  """Returns the indices of the columns of each part.

  A part has as many columns as fit. Columns under one head are in the same part where possible.
  """
  parts: list[list[int]] = []
  free = 0.0
  for group in _groups(table.target.columns):
    need = width(table, group) - _label_width(table)
    fits = need <= TEXT_WIDTH - _label_width(table)
    for columns in [group] if fits else [[j] for j in group]:
      need = width(table, columns) - _label_width(table)
      if not parts or need > free:
        parts.append([])
        free = TEXT_WIDTH - _label_width(table)
      parts[-1] += columns
      free -= need
  return parts


def width(table: Table, columns: list[int]) -> float:
  """Returns an upper bound of the width in points of a part with the given columns."""
  total = _label_width(table)
  for group in _groups(table.target.columns):
    if here := [j for j in group if j in columns]:
      head = max(map(_text_width, _lines(table.target.columns[here[0]].head)))
      total += max(sum(_column_width(table, j) for j in here), head + 2 * _COLUMN_SEP)
  return total


def escape(text: str) -> str:
  """Returns a text with LaTeX's special characters escaped."""
  return "".join(_SPECIAL.get(c, c) for c in text)


# --- layout ---------------------------------------------------------------------------


def _groups(columns: tuple[Column, ...]) -> list[list[int]]:
  """Returns the indices of neighbouring columns with the same head, group by group."""
  groups: list[list[int]] = []
  for j, column in enumerate(columns):
    if groups and columns[groups[-1][-1]].head == column.head:
      groups[-1].append(j)
    else:
      groups.append([j])
  return groups


def _lines(text: str) -> list[str]:
  """Splits a column header into two lines at its first comma or bracket."""
  for mark in (", ", " ("):
    if mark in text:
      first, _, second = text.partition(mark)
      return [first + mark.rstrip(), second] if mark == ", " else [first, f"({second}"]
  return [text]


def _name(column: Column) -> list[str]:
  """Returns the name and the unit of a column's metric, a line each."""
  name, unit, _ = METRICS[column.metric]
  return [name, f"({unit})"]


def _column_width(table: Table, j: int) -> float:
  """Returns an upper bound of the width of column j in points."""
  texts = [line for cells in table.rows.values() for line in _texts(cells[j])]
  return max(map(_text_width, [*texts, *_name(table.target.columns[j])])) + 2 * _COLUMN_SEP


def _label_width(table: Table) -> float:
  """Returns an upper bound of the width of the column of row labels in points."""
  texts = [text for cells in table.rows.values() for text in (cells[0].row, cells[0].variant)]
  return max(map(_text_width, texts)) + 2 * _COLUMN_SEP


def _text_width(text: str) -> float:
  """Returns an upper bound of the width of a text in points."""
  return sum(map(_char_width, text))


def _char_width(c: str) -> float:
  """Returns an upper bound of the width of a character in points."""
  found = next((width for chars, width in _WIDTHS if c in chars), None)
  return found or (_LOWER if "a" <= c <= "z" else _OTHER)


# --- text -----------------------------------------------------------------------------


def _notes(cell: Cell) -> list[str]:
  """Returns the notes below the table that a cell refers to."""
  return [*([cell.ours_text] if cell.group and not cell.ours else []), *cell.flags]


def _texts(cell: Cell) -> list[str]:
  """Returns the two lines of a cell as plain text, with a letter for each note: for its width."""
  ours = "-" if cell.group and not cell.ours else cell.ours_text
  theirs = [cell.text(cell.paper)] if cell.paper else []
  theirs += [cell.write(cell.difference, "+")] if cell.difference is not None else []
  marks = ",".join("a" for _ in _notes(cell))
  return [ours + marks, f"({'; '.join(theirs)})" if theirs else ""]


def _cell(cell: Cell, marks: dict[str, str]) -> list[str]:
  """Returns the two lines of a cell as LaTeX.

  Args:
    cell: the cell.
    marks: {note: letter} of the table, to which this function adds the cell's notes.
  """
  ours = "-" if cell.group and not cell.ours else cell.ours_text
  letters = sorted(marks.setdefault(n, chr(ord("a") + len(marks))) for n in _notes(cell))
  mark = rf"\textsuperscript{{{','.join(letters)}}}" if letters else ""
  theirs = [escape(cell.text(cell.paper))] if cell.paper else []
  theirs += [f"${cell.write(cell.difference, '+')}$"] if cell.difference is not None else []
  lines = [escape(ours) + mark, f"({'; '.join(theirs)})" if theirs else ""]
  return [rf"\textcolor{{red}}{{{x}}}" if x and cell.flags else x for x in lines]


def _rows(label: str, cells: list[list[str]], below: str = "") -> list[str]:
  """Returns the LaTeX lines of a row: two, or one if the second would be empty.

  Args:
    label: label of the row, beside the first line.
    cells: the two lines of each cell.
    below: text beside the second line.
  """
  first, second = (" & ".join(cell[i] for cell in cells) for i in range(2))
  if not below and not any(cell[1] for cell in cells):
    return [rf"{label} & {first} \\[2pt]"]
  return [rf"{label} & {first} \\", rf"{below} & {second} \\[2pt]"]


def _part(table: Table, labels: list[str], part: list[int], i: int, count: int) -> str:
  """Returns part i of `count` parts of a table as LaTeX, with some of its rows and columns."""
  columns = table.target.columns
  marks: dict[str, str] = {}
  heads = []
  for group in _groups(columns):
    if here := [j for j in group if j in part]:
      texts = map(escape, [*_lines(columns[here[0]].head), ""][:2])
      heads.append([rf"\multicolumn{{{len(here)}}}{{c}}{{{text}}}" for text in texts])
  rows = [
    _rows(escape(cells[0].row), [_cell(cells[j], marks) for j in part], escape(cells[0].variant))
    for cells in (table.rows[label] for label in labels)
  ]
  where = f", part {i + 1} of {count}" if count > 1 else ""
  notes = "; ".join(rf"\textsuperscript{{{mark}}} {escape(text)}" for text, mark in marks.items())
  lines = [
    r"\begin{table}[htbp]",
    r"\centering\footnotesize",
    rf"\setlength{{\tabcolsep}}{{{_COLUMN_SEP:g}pt}}",
    rf"\caption{{{escape(table.target.title)}{where}: our number above (the paper's; difference)}}",
    rf"\begin{{tabular}}{{l{'c' * len(part)}}}",
    r"\hline",
    *_rows("", heads),
    *_rows("", [[escape(line) for line in _name(columns[j])] for j in part]),
    r"\hline",
    *(line for row in rows for line in row),
    r"\hline",
    r"\end{tabular}",
    *([rf"\par\smallskip {notes}"] if notes else []),
    r"\end{table}",
  ]
  return "\n".join(lines) + "\n"
