"""compare RUN RUN ...: finished runs side by side."""

import json
import pathlib

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
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as e:
    raise UserError(f"{path}: not found; give the --workdir of a finished run") from e
  except (OSError, ValueError) as e:
    raise UserError(f"{path}: can't be read ({e}); run it again") from e
