"""Files that are written whole or not at all, JSON that is read or refused, the cache's folder."""

import contextlib
import json
import os
import pathlib
import secrets
import time
from collections.abc import Iterator

import platformdirs

from halrp_jax.types import UserError

_TEMPORARY = ".halrp-tmp"  # suffix of the files that are being written
_DAY = 24 * 3600.0


# --- writing --------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the path of a temporary file that becomes `path` when the block ends.

  If the block fails, the temporary file is deleted and what was at `path` stays. Several processes
  may write the same path at once: the last one wins. A device or a pipe, such as /dev/stdout, is
  not replaced but written directly.

  Raises:
    OSError: names `path`, not the temporary file.
  """
  if path.exists() and not path.is_file():
    yield path
    return
  # a process id would be the same in many containers that share a folder
  temporary = path.with_name(f".{secrets.token_hex(8)}{_TEMPORARY}")
  try:
    yield temporary
    with open(temporary, "rb") as stream:
      os.fsync(stream.fileno())
    temporary.replace(path)
  except BaseException as e:
    with contextlib.suppress(OSError):
      temporary.unlink()
    if isinstance(e, OSError) and e.filename == str(temporary):
      raise type(e)(e.errno, e.strerror, str(path)) from e
    raise


def write_bytes(path: pathlib.Path, content: bytes) -> None:
  """Writes bytes, whole or not at all."""
  with replacing(path) as temporary:
    temporary.write_bytes(content)


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes UTF-8, whole or not at all. Bytes of a path that are no text are escaped."""
  write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: pathlib.Path, content) -> None:
  """Writes JSON, whole or not at all."""
  write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def delete_left_behind(folder: pathlib.Path) -> None:
  """Deletes temporary files of a folder older than a day, left by killed processes."""
  for old in folder.glob(f".*{_TEMPORARY}"):
    with contextlib.suppress(OSError):  # another process may do the same
      if old.stat().st_mtime < time.time() - _DAY:
        old.unlink()


# --- reading --------------------------------------------------------------------------


def load_json(path: pathlib.Path) -> dict:
  """Returns the JSON object that a file holds.

  Raises:
    OSError: if the file can't be read. ValueError: if it holds something else.
  """
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except RecursionError as e:
    raise ValueError("nested too deeply") from e
  if not isinstance(content, dict):
    raise ValueError("no JSON object")
  return content


def read_json(path: pathlib.Path, missing: str = "", remedy: str = "") -> dict:
  """Returns the JSON object that a file holds.

  Args:
    path: the file.
    missing: the error message if there is no such file; "": as for every file that can't be read.
    remedy: what to do about a file that can't be read.

  Raises:
    UserError: names the file and what is wrong with it.
  """
  try:
    return load_json(path)
  except (OSError, ValueError) as e:
    if missing and isinstance(e, (FileNotFoundError, NotADirectoryError)):
      raise UserError(missing) from e
    why = getattr(e, "strerror", None) or e
    raise UserError(f"{path}: can't be read ({why})" + (f"; {remedy}" if remedy else "")) from e


# --- folders --------------------------------------------------------------------------


def cache_folder() -> pathlib.Path | None:
  """Returns the user's folder for what can be made again; it need not exist.

  On Linux it is halrp_jax in $XDG_CACHE_HOME or ~/.cache. None for a user without a home.
  """
  try:
    path = platformdirs.user_cache_path("halrp_jax", appauthor=False)
  except RuntimeError:
    return None
  return path if path.is_absolute() else None  # older versions of platformdirs leave the ~
