"""Prints finished runs side by side.

python -m halrp_jax compare RUN RUN ...
"""

import pathlib

from halrp_jax import arguments, files
from halrp_jax.commands import terminal


def main(argv: list[str]) -> int:
  """Prints the records of the run folders named."""
  parser = arguments.parser("compare", __doc__, "runs/digits-halrp runs/digits-stl")
  parser.add_argument(
    "runs", metavar="RUN", nargs="+", type=arguments.filled, help="the folder of a run"
  )
  names = parser.parse_args(argv).runs
  print(terminal.compare_text({name: _read(name) for name in names}))
  return 0


def _read(name: str) -> dict:
  path = pathlib.Path(name) / "record.json"
  missing = f"{path}: not found; give the --workdir of a finished run"
  return files.read_json(path, missing, remedy="run it again")
