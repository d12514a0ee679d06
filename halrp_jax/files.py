"""Files that are written whole or not at all, and JSON that is read or refused in one line."""

import json
import os
import pathlib

from halrp_jax.types import UserError


def write_json(path: pathlib.Path, content) -> None:
  """Writes JSON, whole or not at all."""
  write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes UTF-8, whole or not at all. Bytes of a path that are no text are escaped."""
  temporary = path.with_name(path.name + ".tmp")
  with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as stream:
    stream.write(text)
    stream.flush()
    os.fsync(stream.fileno())
  temporary.replace(path)


def read_json(path: pathlib.Path, missing: str) -> dict:
  """Reads a JSON object.

  Raises:
    UserError: `missing` if there is no such file; else what is wrong with it.
  """
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (FileNotFoundError, NotADirectoryError) as e:
    raise UserError(missing) from e
  except (OSError, ValueError, RecursionError) as e:
    raise UserError(f"{path}: can't be read ({e})") from e
  if not isinstance(content, dict):
    raise UserError(f"{path}: is not what was written")
  return content
