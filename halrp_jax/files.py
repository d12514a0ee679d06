"""Writes files completely or not at all, reads JSON with clear errors, finds the cache folder."""

import contextlib
import json
import os
import pathlib
import secrets
import time
from collections.abc import Iterator

import platformdirs

from halrp_jax.types import Json, UserError

_TEMPORARY = ".halrp-tmp"  # suffix of files that are being written
_DAY = 24 * 3600.0  # seconds


# --- writing --------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the path of a temporary file that becomes `path` when the block ends.

  If the block raises, the temporary file is deleted and the old file at `path` stays. If several
  processes write the same path at once, the last one wins. A device or a pipe, such as /dev/stdout,
  is written directly.

  Raises:
    OSError: if the file can't be written; the error names `path`, not the temporary file.
  """
  if path.exists() and not path.is_file():
    yield path
    return
  # random, because processes in different containers can have the same id and share a folder
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
  """Writes bytes to a file, completely or not at all."""
  with replacing(path) as temporary:
    temporary.write_bytes(content)


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes text as UTF-8, completely or not at all. Undecodable bytes of paths are escaped."""
  write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: pathlib.Path, content: object) -> None:
  """Writes an object as JSON, completely or not at all.

  Raises:
    ValueError: if it holds NaN or infinite numbers.
    OSError: if the file can't be written.
  """
  write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def delete_left_behind(folder: pathlib.Path) -> None:
  """Deletes temporary files older than a day in a folder, which killed processes have left."""
  for old in folder.glob(f".*{_TEMPORARY}"):
    with contextlib.suppress(OSError):  # another process may delete it first
      if old.stat().st_mtime < time.time() - _DAY:
        old.unlink()


# --- reading --------------------------------------------------------------------------


def load_json(path: pathlib.Path) -> Json:
  """Returns the JSON object in a file.

  Raises:
    OSError: if the file can't be read.
    ValueError: if it does not hold a JSON object.
  """
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except RecursionError as e:
    raise ValueError("nested too deeply") from e
  if not isinstance(content, dict):
    raise ValueError("not a JSON object")
  return content


def read_json(path: pathlib.Path, missing: str = "", remedy: str = "") -> Json:
  """Returns the JSON object in a file.

  Args:
    path: the file.
    missing: the error message if there is no such file; "": the message of an unreadable file.
    remedy: what the user can do about an unreadable file, appended to the message.

  Raises:
    UserError: if the file can't be read or does not hold a JSON object.
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
  """Returns the user's cache folder for halrp_jax, which may not exist yet.

  On Linux it is halrp_jax in $XDG_CACHE_HOME or ~/.cache. A user without a home folder has none:
  then the result is None.
  """
  try:
    path = platformdirs.user_cache_path("halrp_jax", appauthor=False)
  except RuntimeError:
    return None
  return path if path.is_absolute() else None  # older platformdirs do not expand ~
