"""Tables and pictures -> one HTML page that needs nothing else."""

import base64
import html
import io
import json
from collections.abc import Iterable

from halrp_jax.reports import records, tables
from halrp_jax.reports.figures import Picture
from halrp_jax.reports.records import Run, Skipped
from halrp_jax.reports.tables import Cell, Coverage, Row, Table

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 0 auto; max-width: 1280px;
  padding: 1rem 2rem 4rem; }
nav { border-bottom: 1px solid #ccc; padding: .4rem 0; } nav a { margin-right: 1.1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; } h3 { margin: 1.6rem 0 .4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { border: 1px solid #d5d5d5; padding: .25rem .5rem; text-align: left;
  vertical-align: top; }
th { background: #f3f3f3; } td.number { text-align: right; white-space: nowrap; }
td small { color: #666; display: block; } .absent { color: #999; }
.flag, td small.flag { color: #c00000; font-weight: 600; }
figure { margin: 1rem 0 2rem; } figure img { max-width: 100%; height: auto; }
figcaption { color: #444; font-size: 14px; }
details pre { font-size: 12px; background: #f7f7f7; padding: .5rem; overflow-x: auto; }
:target { background: #fff6cc; }
"""


def page(
  title: str,
  found: list[Table],
  covered: list[Coverage],
  rows: list[Row],
  pictures: list[Picture],
  skipped: list[Skipped],
) -> str:
  """The whole page. rows: every group, from `tables.overview`."""
  runs = [run for row in rows for run in row.group.runs]
  number = {run.place: i + 1 for i, run in enumerate(runs)}
  anchor = {id(row.group): f"group-{i + 1}" for i, row in enumerate(rows)}
  parts = [
    f"<h1>{_e(title)}</h1>",
    '<nav><a href="#tables">Tables</a><a href="#runs">All that was run</a>'
    '<a href="#figures">Figures</a><a href="#provenance">Provenance</a>'
    '<a href="#skipped">Left out</a></nav>',
    f"<p>{len(runs)} runs of {len(rows)} settings; {len(skipped)} files left out. Mean ± standard "
    "error over runs, n = orders x seeds. Red: not comparable with the paper.</p>",
    *(f"<p>{_e(line)}</p>" for line in records.notes([row.group for row in rows])),
    '<h2 id="tables">The paper\'s tables</h2>',
    *([_paper_table(table, anchor) for table in found] or ["<p>None has these runs.</p>"]),
    '<h2 id="runs">All that was run</h2>',
    _overview(rows, anchor, number),
    '<h2 id="figures">Figures</h2>',
    _coverage(covered),
    *map(_picture, pictures),
    '<h2 id="provenance">Provenance</h2>',
    *(_provenance(run, number[run.place]) for run in runs),
    '<h2 id="skipped">Left out</h2>',
    _skipped(skipped),
  ]
  body = "\n".join(parts)
  return (
    f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{_e(title)}</title>\n'
    f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n"
  )


def _e(text) -> str:
  return html.escape(str(text))


def _table(heads: Iterable[str], body: Iterable[str]) -> str:
  """heads: texts; body: rows as HTML."""
  row = "".join(f"<th>{_e(h)}</th>" for h in heads)
  rows = "\n".join(body)
  return f'<div class="wide"><table>\n<tr>{row}</tr>\n{rows}\n</table></div>'


# --- tables ---------------------------------------------------------------------------


def _paper_table(table: Table, anchor: dict) -> str:
  rows = (
    f"<tr><th>{_e(label)}</th>{''.join(_cell(c, anchor) for c in cells)}</tr>"
    for label, cells in table.rows.items()
  )
  heads = ["", *map(tables.head, table.target.columns)]
  name = table.target.name.capitalize()
  return f"<h3>{_e(name)}: {_e(table.target.title)}</h3>\n{_table(heads, rows)}"


def _cell(cell: Cell, anchor: dict) -> str:
  theirs = f"<small>paper {_e(cell.text(cell.paper))}</small>" if cell.paper else ""
  if not cell.ours:
    return f'<td class="number"><span class="absent">{_e(cell.ours_text)}</span>{theirs}</td>'
  link = f'<a href="#{anchor[id(cell.group)]}">n {_e(cell.count)}</a>'
  if cell.difference is not None:
    theirs += f"<small>difference {_e(cell.write(cell.difference, '+'))}</small>"
  flags = "".join(f'<small class="flag">{_e(flag)}</small>' for flag in cell.flags)
  ours = f"<b{' class=flag' if flags else ''}>{_e(cell.ours_text)}</b>"
  return f'<td class="number">{ours}<small>{link}</small>{flags}{theirs}</td>'


def _overview(rows: list[Row], anchor: dict, number: dict) -> str:
  heads = ["system", "benchmark, network", "images", "not as in configs/"]
  heads += ["n", *tables.OVERVIEW, "runs"]
  return _table(heads, (_overview_row(row, anchor, number) for row in rows))


def _overview_row(row: Row, anchor: dict, number: dict) -> str:
  links = " ".join(
    f'<a href="#run-{number[run.place]}">{number[run.place]}</a>' for run in row.group.runs
  )
  flag = "" if row.share == "100 %" else " flag"
  texts = "".join(f'<td class="number">{_e(x)}</td>' for x in (row.count, *row.numbers))
  return (
    f'<tr id="{anchor[id(row.group)]}"><th>{_e(row.label)}</th><td>{_e(row.where)}</td>'
    f'<td class="number{flag}">{_e(row.share)}</td><td>{_e(row.difference)}</td>'
    f"{texts}<td>{links}</td></tr>"
  )


# --- the rest -------------------------------------------------------------------------


def _coverage(covered: list[Coverage]) -> str:
  """Which of the paper's figures the pictures below stand for."""
  rows = (
    f"<tr><td>{_e(c.target.name.capitalize())}: {_e(c.target.title)}</td><td>{_e(c.text)}</td>"
    f"<td><code>{_e(tables.command(c.target))}</code></td></tr>"
    for c in covered
  )
  return _table(["the paper's", "status", "command"], rows) if covered else ""


def _picture(picture: Picture) -> str:
  image = base64.b64encode(svg(picture)).decode()
  caption = _e(picture.caption)
  return (
    f'<figure id="{_e(picture.name)}"><img alt="{caption}" '
    f'src="data:image/svg+xml;base64,{image}"><figcaption>{caption}</figcaption></figure>'
  )


def svg(picture: Picture) -> bytes:
  stream = io.BytesIO()
  picture.figure.savefig(stream, format="svg", metadata={"Date": None})
  return stream.getvalue()


def _provenance(run: Run, number: int) -> str:
  record = run.record
  versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
  flag = ' <span class="flag">partial data</span>' if record["partial"] else ""
  changes = "".join(f"; {line}" for line in record.get("standing", {}).get("changes", ()))
  config = json.dumps(record["config"], indent=1, sort_keys=True)
  return (
    f'<details id="run-{number}"><summary>{number}: <b>{_e(run.place)}</b>{flag}, '
    f"{_e(record['method'])} on {_e(record['benchmark'])}, order {_e(record['order'])}, seed "
    f"{_e(record['seed'])}; {_e(record['device'])}; {_e(record['date'])}</summary>"
    f"<p>{_e(versions)}; data {records.short_data(record)}, split hash "
    f"{_e(record['split_hash'][:16])}{_e(changes)}</p>"
    f"<pre>{_e(config)}</pre></details>"
  )


def _skipped(skipped: list[Skipped]) -> str:
  if not skipped:
    return "<p>Nothing.</p>"
  return f"<ul>{''.join(f'<li><b>{_e(s.place)}</b>: {_e(s.reason)}</li>' for s in skipped)}</ul>"
