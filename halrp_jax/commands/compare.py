"""compare RUN RUN ...: finished runs side by side."""

import pathlib

from halrp_jax import files
from halrp_jax.commands import terminal
from halrp_jax.types import UserError


def main(arguments: list[str]) -> int:
  """Prints the records of the run folders named."""
  if not arguments:
    raise UserError("compare: name one or more run folders")
  print(terminal.compare_text({name: _read(name) for name in arguments}))
  return 0


def _read(name: str) -> dict:
  path = pathlib.Path(name) / "record.json"
  missing = f"{path}: not found; give the --workdir of a finished run"
  return files.read_json(path, missing, remedy="run it again")
