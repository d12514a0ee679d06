"""Writes a report of all finished runs below a folder: tables, figures and a page.

  python -m halrp_jax report --runs=runs --out=report
  python -m halrp_jax report --runs=docs/records --out=report --docs=docs

Writes OUT/index.html (one file that needs no internet connection), OUT/tables/ (the paper's tables
with the results of these runs beside the published ones, as CSV, Markdown and LaTeX) and
OUT/figures/ (SVG and PNG). A run counts for a table if its config is that of a file in configs/,
whatever its order and seed. All other runs are listed in the overview, with the keys that differ.
Files that can't be used are named and left out.

With --docs, reproduction.md and its figures are written into that folder too. The explanations for
results that differ from the paper are read from the file reasons.json there.
"""

from halrp_jax import arguments
from halrp_jax.reports import paper, publish, records
from halrp_jax.runs import reproduce


def main(argv: list[str]) -> int:
  """Writes the report, and prints which files were left out."""
  parser = arguments.parser("report", __doc__, "--runs=runs --out=report")
  parser.add_argument(
    "--runs", required=True, type=arguments.filled, help="folder of runs, or of their record files"
  )
  parser.add_argument("--out", required=True, type=arguments.filled, help="folder for the report")
  parser.add_argument(
    "--docs", default="", help="folder for reproduction.md; default: it is not written"
  )
  parser.add_argument(
    "--configs",
    default="",
    help="folder of the config files; default: configs in the current folder, or the installed one",
  )
  options = parser.parse_args(argv)
  catalogue = reproduce.catalogue(reproduce.configs_folder(options.configs))
  report = publish.collect(options.runs, catalogue, list(paper.TARGETS.values()))
  publish.write(report, options.out, f"halrp_jax: runs below {options.runs}")
  if options.docs:
    command = f"python -m halrp_jax report --runs={options.runs} --out=OUT --docs={options.docs}"
    publish.write_document(report, options.docs, command)
    print(f"{options.docs}/{publish.DOCUMENT}")
  for line in records.notes([row.group for row in report.rows]):
    print(f"note: {line}")
  for skipped in report.skipped:
    print(f"left out  {skipped.path}: {skipped.reason}")
  runs = sum(len(row.group.runs) for row in report.rows)
  print(f"{runs} runs; {options.out}/{publish.PAGE}")
  return 0
