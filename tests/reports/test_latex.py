"""The tables in LaTeX fit the page: by a bound that is tested always, and by pdflatex itself."""

import re
import shutil
import subprocess

import pytest

from halrp_jax.reports import latex, paper, records, tables

from .test_publish import collected

TARGETS = [target for target in paper.TARGETS.values() if target.is_table]
NASTY = r"50 % of a_b & c#d $e$ {f} \g ~h ^i <j> |k| ± l"
ARTICLE = r"\documentclass{article}\usepackage{xcolor}\begin{document}%s\end{document}"


@pytest.fixture(scope="module")
def published():
  return collected().tables


def full(target):
  """A table in which every cell has all that a cell can have."""
  run = records.Run("r", {"task_ids": [0]})
  group = records.Group("stl", "b", "n", 0.05, True, {}, (run,))

  def cell(label, column):
    return tables.Cell(
      label, column, records.Number(88.88, 0.88), records.Number(77.77, 0.77), group
    )

  rows = {label: tuple(cell(label, c) for c in target.columns) for label in target.rows}
  return tables.Table(target, rows)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.slug)
def test_no_part_of_a_table_is_wider_than_the_text(published, target):
  for table in (full(target), *(t for t in published if t.target == target)):
    parts = latex.split(table)
    assert sum(parts, []) == list(range(len(target.columns)))  # each column once, in their order
    for part in parts:
      assert latex.width(table, part) <= latex.TEXT_WIDTH, part


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.slug)
def test_parts_are_no_more_than_needed(published, target):
  (table,) = [t for t in published if t.target == target]
  parts = latex.split(table)
  for a, b in zip(parts, parts[1:], strict=False):
    head = [j for j in b if target.columns[j].head == target.columns[b[0]].head]
    assert latex.width(table, a + head) > latex.TEXT_WIDTH


def test_characters_that_mean_something_to_latex():
  text = latex.escape(NASTY)
  bare = text.replace(r"$\pm$", "").replace("{}", "")
  for c in "%_&#${}":
    assert not re.findall(rf"(?<!\\){re.escape(c)}", bare), c
  assert r"\textbackslash{}g" in text and r"\textless{}j\textgreater{}" in text


def compiled(folder, text):
  """Log and text of the PDF that pdflatex makes of the body of an article."""
  if not shutil.which("pdflatex"):
    pytest.skip("no pdflatex here")
  (folder / "a.tex").write_text(ARTICLE % text, encoding="utf-8")
  command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "a.tex"]
  done = subprocess.run(command, cwd=folder, capture_output=True, encoding="latin-1")
  assert done.returncode == 0, done.stdout[-2000:]
  return done.stdout


def test_pdflatex_finds_no_part_too_wide_or_too_high(published, tmp_path):
  for table in [*published, *map(full, TARGETS)]:
    log = compiled(tmp_path, latex.to_latex(table))
    assert "Overfull" not in log and "too large" not in log, table.target.name


def test_the_bound_is_one(published, tmp_path):
  """The real width of every part against the bound."""
  for table in [*published, *map(full, TARGETS)]:
    text = latex.to_latex(table)
    bodies = re.findall(r"\\begin\{tabular\}.*?\\end\{tabular\}", text, re.S)
    measure = r"\footnotesize\tabcolsep3pt\newbox\b" + "".join(
      rf"\setbox\b\hbox{{{body}}}\typeout{{is \the\wd\b}}" for body in bodies
    )
    found = [float(x) for x in re.findall(r"is ([\d.]+)pt", compiled(tmp_path, measure))]
    pages = -(-len(table.rows) // latex.MOST_ROWS)
    bounds = [latex.width(table, part) for part in latex.split(table) for _ in range(pages)]
    assert len(found) == len(bounds)
    for real, bound in zip(found, bounds, strict=True):
      assert real <= bound, (table.target.name, real, bound)


def test_pdflatex_shows_every_character(tmp_path):
  compiled(tmp_path, latex.escape(NASTY) + latex.escape(' "m"'))
