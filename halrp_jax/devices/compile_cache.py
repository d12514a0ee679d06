"""A cache on disk of the programs that XLA compiled, so that the next start need not compile."""

import contextlib
import hashlib
import os
import pathlib
import platform
import stat
import time
import zlib

import jax

from halrp_jax import files
from halrp_jax.types import UserError

_WRITING_SECONDS = 60.0  # nobody is still writing an entry older than this
_ZSTANDARD = b"\x28\xb5\x2f\xfd"  # the first bytes of data compressed with Zstandard


def use(folder: str) -> pathlib.Path | None:
  """Makes JAX store compiled programs in a private folder and reuse them.

  JAX runs a stored program without checking it, so nobody else may be able to write to the folder.
  A program fits one kind of processor only, so each kind gets a folder of its own inside. The
  environment variable JAX_COMPILATION_CACHE_DIR takes precedence. The folder can be deleted at any
  time.

  Args:
    folder: path of the folder; "" for halrp_jax in $XDG_CACHE_HOME or ~/.cache; "off" for none.

  Returns:
    The folder that JAX uses, or None if this function set none.

  Raises:
    UserError: if `folder` names a folder that can't be used. If the default folder can't be used,
      programs are not stored and no error is raised.
  """
  if folder == "off" or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    return None
  try:
    root = pathlib.Path(folder) if folder else files.cache_folder()
    if root is None:
      return None
    path = root / f"xla-{_processor()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_private(path.parent)
    _require_private(path)
    with contextlib.suppress(OSError):  # a folder that can only be read is useful, too
      _delete_truncated(path)
  except OSError as e:
    if folder:
      raise UserError(
        f"--compile_cache={folder}: {e}; name a folder of your own that only you can write, or off"
      ) from e
    return None
  jax.config.update("jax_compilation_cache_dir", str(path))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  return path


def _require_private(path: pathlib.Path) -> None:
  """Raises OSError if the folder belongs to another user or others can write to it."""
  status = path.stat()
  if status.st_uid != os.getuid():
    raise OSError(f"{path} belongs to another user")
  if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
    raise OSError(f"{path} can be written by others")


def _delete_truncated(path: pathlib.Path) -> None:
  """Deletes entries that a killed process left incomplete. Checks each entry once.

  JAX writes an entry in place and never overwrites it. So it would warn about an incomplete one at
  every start and compile the program again.
  """
  marker = path / ".looked"  # its modification time is that of the last check
  since = marker.stat().st_mtime if marker.exists() else 0.0
  for entry in path.glob("*-cache"):
    with contextlib.suppress(FileNotFoundError):  # another process may delete it at the same time
      written = entry.stat().st_mtime
      is_due = since - _WRITING_SECONDS <= written < time.time() - _WRITING_SECONDS
      if is_due and _is_truncated(entry):
        entry.unlink()
  marker.touch()


def _is_truncated(entry: pathlib.Path) -> bool:
  """Returns whether an entry compressed with zlib is incomplete.

  JAX compresses with zlib unless the package zstandard is installed. Entries compressed with
  Zstandard are not checked.
  """
  data = entry.read_bytes()
  if data.startswith(_ZSTANDARD):
    return False
  try:
    return not zlib.decompress(data)
  except zlib.error:
    return True


def _processor() -> str:
  """Returns a name that is the same for all processors that can run the same programs."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
  except OSError:
    flags = platform.processor()
  return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:12]
