"""The report: every form of a table says the same, the page needs nothing else, docs are fresh."""

import configparser
import csv
import functools
import html
import io
import itertools
import json
import re
import shutil

import pytest

from halrp_jax.commands import report
from halrp_jax.reports import figures, page, paper, publish, records, tables
from halrp_jax.runs import reproduce
from halrp_jax.types import UserError

from ..conftest import ROOT

RECORDS = ROOT / "docs" / "records"
CONFIGS = str(ROOT / "configs")
CATALOGUE = reproduce.catalogue(CONFIGS)
SPLIT_5 = "CIFAR100-Split, 5 %"
COMMAND = "python -m halrp_jax report --runs=docs/records --out=OUT --docs=docs"


@functools.cache
def collected():
  """What all records of the docs give; reading them takes seconds."""
  return publish.collect(str(RECORDS), CATALOGUE, list(paper.TARGETS.values()))


@pytest.fixture(scope="module")
def published():
  return collected()


@pytest.fixture(scope="module")
def some(tmp_path_factory):
  """A few records, one of them made partial, and one that is no good."""
  folder = tmp_path_factory.mktemp("some")
  for order in "ABC":
    shutil.copy(RECORDS / f"split05_{order}_batch.json", folder / f"{order}.json")
  stl = json.loads((RECORDS / "split100_A_stl_batch.json").read_text())
  (folder / "stl.json").write_text(json.dumps(stl | {"partial": True}))
  (folder / "foreign <b>.json").write_text("{}")
  return folder


@pytest.fixture(scope="module")
def written(some, tmp_path_factory):
  out = tmp_path_factory.mktemp("out")
  assert report.main([f"--runs={some}", f"--out={out}", f"--configs={CONFIGS}"]) == 0
  return out


# --- tables ---------------------------------------------------------------------------


def cell(published, name, row, head, metric="accuracy"):
  (table,) = [t for t in published.tables if t.target.name == name]
  (found,) = [c for c in table.rows[row] if c.column.head == head and c.column.metric == metric]
  return found


def test_a_cell_is_made_of_the_runs_of_its_setting_alone(published):
  label = f"HALRP, {records.TEST_BATCH}"
  found = cell(published, "table 2", label, "CIFAR100-Split, 5 %")
  assert all(run.record["config"]["method"]["batch_norm"] == "batch" for run in found.runs)
  alone = cell(published, "table 2", "HALRP", "CIFAR100-Split, 5 %")
  assert all(run.record["config"]["method"]["batch_norm"] == "population" for run in alone.runs)
  orders = {run.record["order"] for run in found.runs}
  assert orders == set("ABCDE") and found.count.startswith("5 x ")
  assert found.difference == pytest.approx(round(found.ours.value, 2) - 45.09)
  assert all(run.record["config"]["train_fraction"] == 0.05 for run in found.runs)


def test_what_was_not_run_says_so(published):
  found = cell(published, "table 4", "IRU", "CIFAR100-20 (MLP)")
  if not found.runs:
    assert found.ours_text == "not run"
  assert found.text(found.paper) == "65.90 ± 2.16"


def test_every_figure_of_the_paper_has_its_command_and_status(published):
  names = [t.name for t in paper.TARGETS.values() if not t.is_table]
  assert [c.target.name for c in published.coverage] == names
  by_name = {c.target.name: c for c in published.coverage}
  assert by_name["figure 4"].total == 30 and by_name["figure 5"].total == 16 * 4
  assert by_name["figure 5"].run >= 2  # HALRP at 5 %, STL at 100 %
  nothing = tables.coverage(paper.TARGETS["figure 7"], [], CATALOGUE)
  assert (nothing.text, nothing.total) == ("not run", 32)
  command = tables.command(paper.TARGETS["figure 3a"])
  assert "reproduce --figure=3a --budget=full" in command


def made(value, theirs, metric="accuracy", fraction=1.0, column_fraction=1.0, partial=False):
  run = records.Run("r", {"task_ids": [0]})
  group = records.Group("stl", "b", "n", fraction, partial, {}, (run,))
  column = paper.Column("H", metric, "c", column_fraction)
  ours = None if value is None else records.Number(value, None)
  return tables.Cell("R", column, ours, records.Number(theirs, 0.1), group)


@pytest.mark.parametrize(
  ("found", "status", "note"),
  [
    (made(69.0, 70.0), "reproduced", ""),
    (made(68.99, 70.0), "off", ""),
    (made(0.244, 0.234, "increment"), "reproduced", ""),
    (made(0.245, 0.234, "increment"), "off", ""),
    (made(69.0, 70.0, fraction=0.25), "reduced", "Not comparable: at 25 % of the images."),
    (
      made(69.0, 70.0, column_fraction=None, fraction=0.25),
      "reduced",
      "Not comparable: at 25 % of the images.",
    ),
    (made(69.0, 70.0, partial=True), "reduced", "Not comparable: partial data."),
    (made(69.0, 70.0)._replace(paper=None), "unpublished", ""),
  ],
)
def test_the_status_of_a_cell(found, status, note):
  assert publish.status(found) == status and publish.note(found, {}) == note


def test_a_reason_is_told_only_where_a_number_is_off():
  reasons = {"R": {"H": "The weather."}}
  assert publish.note(made(60.0, 70.0), reasons) == "The weather."
  assert publish.note(made(70.0, 70.0), reasons) == ""


def test_a_reason_of_a_variant_goes_before_that_of_the_row():
  found = made(60.0, 70.0)._replace(variant=records.RUNNING)
  reasons = {"R": {"H": "The weather."}, f"R, {records.RUNNING}": {"H": "Few steps."}}
  assert publish.note(found, reasons) == "Few steps."
  assert publish.note(found._replace(variant=""), reasons) == "The weather."


def section(text, name):
  """The lines of a section of the document."""
  return text.split(f"## {name.capitalize()}: ")[1].split("\n## ")[0].splitlines()


def test_a_note_is_written_once_and_its_number_leads_to_it(published):
  text = publish.document(published, {"table 2": {"APD": {"CIFAR100-Split, 5 %": "Why."}}}, COMMAND)
  lines = section(text, "table 2")
  notes = [line for line in lines if re.match(r"\d+\. ", line)]
  assert notes == ["1. Why."]
  noted = [line for line in lines if line.endswith("| off | 1 |")]
  assert len(noted) >= 2 and all(re.match(r"\| APD\b.*CIFAR100-Split, 5 %", x) for x in noted)


def test_what_was_run_is_a_matrix(published):
  """It has every row and column of the table, and as many orders as its numbers come from."""
  text = publish.document(published, {}, COMMAND)
  for table in published.tables:
    lines = section(text, table.target.name)
    if not any(cell.group for cell in table.cells):
      assert lines[-1] == "No setting of this table was run."
      continue
    rows = lines[lines.index("Orders that were run:") + 2 :]
    heads, _, *rows = [[x.strip() for x in line.strip("|").split("|")] for line in rows]
    rows = rows[: len(table.target.rows)]
    assert [row[0] for row in rows] == list(table.target.rows)
    assert heads[1:] == list(dict.fromkeys(c.head for c in table.target.columns))
    run = {(c.row, c.column.head, c.variant): c.group.num_orders for c in table.cells if c.group}
    for row in rows:
      for head, shown in zip(heads[1:], row[1:], strict=True):
        counts = [n for (label, h, _), n in run.items() if (label, h) == (row[0], head)]
        assert sorted(map(int, re.findall(r"\d+", shown))) == sorted(counts)


def test_whole_data_go_before_partial_ones():
  whole, partial = (made(1.0, 1.0, partial=p).group for p in (False, True))
  assert tables.find({}, None, [partial, whole]) is whole
  assert tables.find({}, 1.0, [partial]) is partial
  assert tables.find(None, None, [whole]) is None


# --- the same in every form -----------------------------------------------------------


def cells_of_latex(text):
  """The cells of all parts, row by row."""
  rows = {}
  for part in text.split(r"\begin{tabular}")[1:]:
    found = []
    for line in filter(None, part.split(r"\hline")[2].splitlines()):
      label, *cells = (x.strip() for x in line.partition(r"\\")[0].split("&"))
      if label in records.VARIANTS and cells:  # the paper's, below
        above, ours = found.pop()
        label, cells = (above, label), [f"{a} {b}" for a, b in zip(ours, cells, strict=True)]
      found.append((label, cells))
    for label, cells in found:
      rows.setdefault(label if isinstance(label, tuple) else (label, ""), []).extend(cells)
  return [cell for row in rows.values() for cell in row]


def test_page_csv_markdown_and_latex_agree(written):
  page = html.unescape((written / "index.html").read_text())
  page = page[page.index('id="tables"') : page.index('id="runs"')]
  for path in sorted((written / "tables").glob("*.csv")):
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    target = paper.TARGETS[rows[0]["table"]]
    labels = {row["row"] for row in rows}  # the paper's, and variants of them that were run
    assert labels >= set(target.rows) and len(rows) == len(labels) * len(target.columns)
    in_page = page[page.index(f"<h3>{rows[0]['table'].capitalize()}:") :].split("</table>")[0]
    from_page = re.findall(r"<td class=\"number\">(.*?)</td>", in_page, re.S)
    markdown = path.with_suffix(".md").read_text().splitlines()[2:]
    from_markdown = [c for line in markdown for c in line.strip("| ").split(" | ")[1:]]
    from_latex = cells_of_latex(path.with_suffix(".tex").read_text(encoding="utf-8"))
    assert len(rows) == len(from_page) == len(from_markdown) == len(from_latex)
    for row, *forms in zip(rows, from_page, from_markdown, from_latex, strict=True):
      wanted = [row[k] for k in ("ours", "standard_error", "paper", "paper_standard_error")]
      wanted = sorted(filter(None, [*wanted, row["difference"]]))
      decimals = 3 if row["metric"] == "Size" else 2
      pattern = rf"(?<![\d.])[-+]?\d+\.\d{{{decimals}}}(?!\d)"
      for form in forms:
        assert sorted(re.findall(pattern, re.sub(r"<[^>]*>", " ", form))) == wanted, (row, form)


def test_names_are_shown_as_they_are_in_every_form(published):
  name = "=a|b <i> _x_ [red]`c`"
  assert tables.markdown(name) == r"=a\|b \<i> \_x\_ \[red\]\`c\`"
  assert tables.plain_cell(name) == "'" + name and tables.plain_cell("a=b") == "a=b"
  row = published.rows[0]
  run = records.Run(name, row.group.runs[0].record | {"seed": "<b>1"})
  row = row._replace(group=row.group._replace(runs=(run,)))
  made = published._replace(
    tables=[], rows=[row], skipped=[records.Skipped(name, "x|y")], pictures=[]
  )
  text = publish.document(made, {}, COMMAND)
  assert text.count(tables.markdown(name)) == 2 and r"x\|y" in text
  shown = page.page("<title>", *made)
  assert "<i>" not in shown and "<b>1" not in shown and html.escape(name) in shown


def test_every_text_of_the_page_is_escaped(published):
  """Also titles, a table's row, a status, names and captions of pictures."""
  bad = "</td><script>'\"&"
  (table, *_), (line, *_), (picture, *_) = published.tables, published.coverage, published.pictures
  cells = next(cells for cells in table.rows.values() if any(c.ours for c in cells))
  table = table._replace(rows={bad: cells})
  made = published._replace(
    tables=[table],
    coverage=[line._replace(target=line.target._replace(title=bad))],
    pictures=[picture._replace(name=bad, caption=bad)],
    skipped=[],
  )
  shown = page.page(bad, *made)
  assert "<script" not in shown and shown.count("&lt;/td&gt;&lt;script&gt;&#39;&#34;&amp;") == 7
  assert (
    "<p>Nothing.</p>" in shown
    and "\n<p>No table of the paper contains these runs.</p>" not in shown
  )


def test_an_empty_report_is_a_page():
  shown = page.page("none", [], [], [], [], [])
  assert (
    "<p>No table of the paper contains these runs.</p>" in shown
    and "<p>0 runs of 0 settings; 0 files" in shown
  )


def test_what_the_package_reads_is_installed_with_it():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg", encoding="utf-8")
  named = {
    ROOT.joinpath(*package.split("."), name.strip())
    for package, names in setup["options.package_data"].items()
    for name in names.split(",")
  }
  files = {p for p in (ROOT / "halrp_jax").rglob("*") if p.is_file() and p.suffix != ".pyc"}
  assert {p for p in files if p.suffix != ".py"} == named


def test_partial_data_are_red(written):
  page = (written / "index.html").read_text()
  stl = json.loads((RECORDS / "split100_A_stl_batch.json").read_text())
  number = f"{stl['average_accuracy']:.2f}"
  assert (
    f"<b class=flag>{number}</b>" in page and '<small class="flag">partial data</small>' in page
  )
  assert '<td class="number flag">100 %, partial data</td>' in page
  assert rf"\textcolor{{red}}{{{number}" in (written / "tables" / "table2.tex").read_text()
  assert "partial data" in (written / "tables" / "table2.csv").read_text()


def test_the_page_needs_nothing_else_and_says_where_numbers_are_from(written):
  page = (written / "index.html").read_text()
  assert not re.findall(r'(?:src|href)="(?!#|data:)', page) and "<script" not in page
  assert "@import" not in page and "url(" not in page
  targets = set(re.findall(r'id="([^"]+)"', page))
  assert set(re.findall(r'href="#([^"]+)"', page)) <= targets
  assert "foreign &lt;b&gt;.json</b>: is not a record of a run" in page
  record = json.loads((RECORDS / "split05_A_batch.json").read_text())
  for part in ("A.json", "jax 0.10.2", record["device"], record["date"], "prune_bound"):
    assert part in page


def test_every_kind_of_figure_has_labels_with_units(written):
  svg = {p.name: p.read_text() for p in (written / "figures").glob("*.svg")}
  kinds = ("matrices", "growth", "tradeoff", "by-task", "forgetting-by-order", "ranks")
  for kind in kinds:
    assert any(name.startswith(f"{kind}-cifar100-split-lenet-5") for name in svg), kind
  assert len(svg) == len(list((written / "figures").glob("*.png")))


def _texts(figure):
  axes = [t for a in figure.axes for t in (a.get_xlabel(), a.get_ylabel())]
  return [t for t in axes if t]


def test_figures_of_a_whole_study():
  """Times, memory and the lambda grid come from runs that have them."""
  record = json.loads((RECORDS / "split05_A_batch.json").read_text())
  runs = []
  for l1 in (0.0, 1e-4):
    for l2 in (1e-4, 5e-4):
      for order, ids in (("A", list(range(10))), ("B", list(range(9, -1, -1)))):
        method = record["config"]["method"] | {"l1": l1, "l2": l2}
        changes = {"config": record["config"] | {"method": method}, "task_ids": ids}
        changes["setting"] = record["setting"] | {"method.l1": l1, "method.l2": l2}
        changes |= {"order": order, "memory_bytes": [2**30] * 10}
        runs.append(records.Run(f"{l1}{l2}{order}", record | changes))
  stl = json.loads((RECORDS / "split05_A_stl.json").read_text())
  runs.append(records.Run("stl", stl | {"device": record["device"]}))
  groups, _ = records.group(runs)
  pictures = {p.name: p for p in figures.draw(groups, CATALOGUE)}
  (surface,) = [p for n, p in pictures.items() if n.startswith("lambda-")]
  titles = [a.get_title() for a in surface.figure.axes]
  assert titles[:3] == ["ACC (%)", "MOPD (points)", "AOPD (points)"]
  memory = pictures["memory-cifar100-split-lenet-5"].figure.axes[0]
  assert memory.get_ylabel() == "peak memory (GiB)" and len(memory.lines) == 1
  assert list(memory.lines[0].get_ydata()) == [1.0] * 10
  time = pictures["time-cifar100-split-lenet-5"].figure.axes[0]
  assert len(time.lines) == 2 and time.lines[0].get_ydata()[0] == pytest.approx(1.0)
  for picture in pictures.values():
    assert len(_texts(picture.figure)) >= 2, picture.name


@pytest.mark.slow
def test_nothing_is_cut_off_however_many_systems_there_are(published):
  """Legends grow with the systems."""
  many = [p for p in published.pictures if p.name == "by-task-cifar100-split-lenet-5"]
  assert many and len(many[0].figure.legends[0].get_texts()) > 10
  for picture in published.pictures:
    picture.figure.draw_without_rendering()
    for legend in picture.figure.legends:
      box = legend.get_window_extent()
      assert box.y0 >= 0 and box.x1 <= picture.figure.bbox.x1, picture.name


@pytest.mark.parametrize("growth, scale", [(0.2, "linear"), (9.0, "log")])
def test_sizes_have_the_scale_that_shows_them(growth, scale):
  record = json.loads((RECORDS / "split05_A_batch.json").read_text())
  runs = [
    records.Run(name, record | {"increment": [*[0.0] * 9, growth], "method": name})
    for name in ("halrp", "stl")
  ]
  groups, _ = records.group(runs)
  pictures = {p.name: p.figure for p in figures.draw(groups, CATALOGUE)}
  assert pictures["growth-cifar100-split-lenet-5"].axes[0].get_yscale() == scale


# --- mistakes, docs -------------------------------------------------------------------


@pytest.mark.parametrize(
  ("argument", "says"),
  [
    ("--runs=/nowhere", "/nowhere: no such folder; give the folder of runs"),
    ("--runs=", "argument --runs: a value is missing"),
    ("--configs=/nowhere", "no such folder of configs"),
    ("--out=/proc/x", "--out=/proc/x: "),
  ],
)
def test_mistakes(some, tmp_path, argument, says):
  with pytest.raises(UserError, match=says):
    report.main([f"--runs={some}", f"--out={tmp_path}", argument])


def test_a_folder_without_a_good_record(tmp_path):
  (tmp_path / "a.json").write_text("{")
  with pytest.raises(UserError, match="no usable record .a.json can't be read"):
    report.main([f"--runs={tmp_path}", f"--out={tmp_path}"])


def test_the_reproduction_document_is_that_of_the_records(published):
  """`make reproduction` writes it anew."""
  text = publish.document(published, publish.read_reasons(str(ROOT / "docs")), COMMAND)
  assert (ROOT / "docs" / "reproduction.md").read_text() == text
  for name in re.findall(r"\(figures/([^)]+)\)", text):
    assert (ROOT / "docs" / "figures" / name).is_file(), name


def test_reasons_name_cells_that_there_are():
  for name, rows in publish.read_reasons(str(ROOT / "docs")).items():
    heads = {c.head for c in paper.TARGETS[name].columns}
    labels = {
      f"{row}, {variant}" if variant else row
      for row in paper.TARGETS[name].rows
      for variant in records.VARIANTS
    }
    for row, reasons in rows.items():
      assert row in labels and reasons.keys() <= heads
      assert all(text[0].isupper() and text.endswith(".") for text in reasons.values())


# --- the tables of README.md and docs/systems.md ----------------------------------------

STATISTICS = {"population": "", "test batch": records.TEST_BATCH}


def rows_of(document, first):
  """Cells of the table whose head begins with the cells `first`."""
  lines = iter((ROOT / document).read_text(encoding="utf-8").splitlines())
  head = f"| {' | '.join(first)} |"
  next(line for line in lines if line.startswith(head))
  next(lines)  # the line of dashes
  for line in itertools.takewhile(lambda line: line.startswith("|"), lines):
    yield [x.strip() for x in line.replace("**", "").strip("|").split("|")]


def said_and_recorded(row, expected):
  """A row as it is written and as it should be, for an assertion that shows both."""
  return f"| {' | '.join(row)} |", f"| {' | '.join(expected)} |"


def written_as(found, with_paper):
  """A cell of a paper's table, as the documents write it: 67.68, or 67.68 (67.92)."""
  ours = found.write(found.ours.value) if found.ours else "-"
  return f"{ours} ({found.write(found.paper.value)})" if with_paper and found.ours else ours


def test_the_readme_has_the_results_of_the_records(published):
  label, number = "", 0
  for row in rows_of("README.md", ("method, benchmark, images", "statistics")):
    label = row[0] or label
    system, _, where = label.partition(", ")
    name = ", ".join(x for x in (system, STATISTICS[row[1]]) if x)
    found = [
      cell(published, table, name, where, metric)
      for table, metric in (("table 2", "accuracy"), ("table 5", "mopd"), ("table 5", "aopd"))
    ]
    group = found[0].group
    growth = 100 * records.number(group, "increment").value
    seconds = records.number(group, "seconds").value
    expected = [row[0], row[1], str(group.num_orders)]
    expected += [written_as(c, with_paper=True) for c in found]
    # a run that was paused or shared its device has no seconds worth saying
    expected += [f"+{growth:.1f} %", "-" if row[7] == "-" else f"{seconds:.0f}"]
    said, recorded = said_and_recorded(row, expected)
    assert said == recorded
    number += 1
  assert number > 8


def test_the_documents_have_the_figures_of_the_best_variant(tmp_path):
  for order in "ABCDE":
    shutil.copy(RECORDS / f"split05_{order}_best.json", tmp_path)
  (group,), _ = records.group(records.read(str(tmp_path))[0])
  assert group.num_orders == 5
  accuracy, mopd, aopd, growth = (
    records.number(group, metric).value for metric in ("accuracy", "mopd", "aopd", "increment")
  )
  best = (ROOT / "docs" / "best.md").read_text()
  assert f"| `best` | **{accuracy:.2f}** | {growth:.3f} | 0 | {mopd:.2f} | {aopd:.2f} |" in best
  readme = " ".join((ROOT / "README.md").read_text().split())
  says = f"**{accuracy:.2f}** on CIFAR100-Split at 5 % of the images, with population statistics, "
  assert says + f"MOPD {mopd:.2f}, AOPD {aopd:.2f} and a growth of {100 * growth:.1f} %" in readme


def with_orders(found):
  """45.14 (5), or - where there is no run."""
  return f"{written_as(found, False)} ({found.group.num_orders})" if found.group else "-"


def accuracies(published, system, where):
  """Population, test batch, and the paper's."""
  kinds = [", ".join(x for x in (system, kind) if x) for kind in STATISTICS.values()]
  found = [cell(published, "table 2", kind, where) for kind in kinds]
  theirs = found[0].write(found[0].paper.value) if found[0].paper else "-"
  return [*map(with_orders, found), theirs]


def test_the_readme_has_the_systems_of_the_records(published):
  rows = list(rows_of("README.md", ("method", "reference", "forgets")))
  assert {row[0] for row in rows} == set(paper.SYSTEMS)
  for row in rows:
    mopd = cell(published, "table 5", f"{row[0]}, {records.TEST_BATCH}", SPLIT_5, "mopd")
    expected = [*row[:3], *accuracies(published, row[0], SPLIT_5)]
    expected += [written_as(mopd, False), mopd.write(mopd.paper.value) if mopd.paper else "-"]
    said, recorded = said_and_recorded(row, expected)
    assert said == recorded


def test_the_document_of_the_systems_has_the_accuracies_of_the_records(published):
  rows = list(rows_of("docs/systems.md", ("method", "5 %, population")))
  assert {row[0] for row in rows} == set(paper.SYSTEMS)
  for row in rows:
    expected = [row[0], *accuracies(published, row[0], SPLIT_5)]
    expected += accuracies(published, row[0], "CIFAR100-Split, 100 %")
    said, recorded = said_and_recorded(row, expected)
    assert said == recorded


def test_the_document_of_the_systems_has_every_file():
  rows = list(rows_of("docs/systems.md", ("method", "file")))
  found = {row[0]: row[1].strip("`").removesuffix(".py") for row in rows}
  assert found == paper.SYSTEMS | paper.NEWER
