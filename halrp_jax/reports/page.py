"""Makes one self-contained HTML page of tables and figures. The template is page.html."""

import base64
import io
import json
import pathlib

import jinja2

from halrp_jax.reports import records, tables
from halrp_jax.reports.figures import Picture
from halrp_jax.reports.records import Skipped
from halrp_jax.reports.tables import Coverage, Row, Table

_ENVIRONMENT = jinja2.Environment(
  loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
  autoescape=True,  # names of folders, classes and methods are the user's and may hold markup
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
  lstrip_blocks=True,
  keep_trailing_newline=True,
)


def page(
  title: str,
  found: list[Table],
  covered: list[Coverage],
  rows: list[Row],
  pictures: list[Picture],
  skipped: list[Skipped],
) -> str:
  """Returns the page as HTML.

  Args:
    title: title of the page.
    found: the paper's tables with our numbers.
    covered: how much of the paper's figures was run.
    rows: one row for each group of runs, from `tables.overview`.
    pictures: the figures to embed.
    skipped: the files that were left out.
  """
  runs = [run for row in rows for run in row.group.runs]
  anchors = {id(row.group): f"group-{i + 1}" for i, row in enumerate(rows)}
  return _ENVIRONMENT.get_template("page.html").render(
    title=title,
    found=found,
    covered=covered,
    rows=rows,
    pictures=pictures,
    skipped=skipped,
    runs=runs,
    notes=records.notes([row.group for row in rows]),
    overview=list(tables.OVERVIEW),
    index_of={run.path: i + 1 for i, run in enumerate(runs)},
    anchor=lambda group: anchors[id(group)],
    head_of=tables.head,
    command=tables.command,
    short_data=records.short_data,
    config_of=lambda record: json.dumps(record["config"], indent=1, sort_keys=True),
    base64_of=lambda picture: base64.b64encode(svg(picture)).decode(),
  )


def svg(picture: Picture) -> bytes:
  """Returns a figure as the content of an SVG file. Equal figures give equal bytes."""
  stream = io.BytesIO()
  picture.figure.savefig(stream, format="svg", metadata={"Date": None})
  return stream.getvalue()
