"""Prints finished runs side by side.

  python -m halrp_jax compare RUN RUN ...
  python -m halrp_jax compare runs/digits-halrp runs/digits-stl

RUN is the folder of a finished run. Prints a column per run: method, benchmark, accuracies,
forgetting, growth, number of parameters and seconds.
"""

import pathlib

from halrp_jax import arguments, files
from halrp_jax.commands import terminal


def main(argv: list[str]) -> int:
  """Prints the records of the runs."""
  parser = arguments.parser("compare", __doc__, "runs/digits-halrp runs/digits-stl")
  parser.add_argument(
    "runs", metavar="RUN", nargs="+", type=arguments.filled, help="folder of a finished run"
  )
  names = parser.parse_args(argv).runs
  print(terminal.compare_text({name: _read(name) for name in names}))
  return 0


def _read(name: str) -> dict:
  """Reads the record of a run."""
  path = pathlib.Path(name) / "record.json"
  missing = f"{path}: not found; give the --workdir of a finished run"
  return files.read_json(path, missing, remedy="run it again")
