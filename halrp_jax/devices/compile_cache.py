"""XLA's compiled programs kept from one start of a program to the next."""

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

_STILL_WRITING = 60.0  # seconds after which nobody is any more
_ZSTANDARD = b"\x28\xb5\x2f\xfd"


def use(folder: str) -> pathlib.Path | None:
  """Keeps compiled programs in a folder that is the user's own.

  A program in it is run as it is, hence nobody else may be able to write there; and it fits one
  kind of processor alone, hence a folder for each below it. JAX's own JAX_COMPILATION_CACHE_DIR
  goes first. Delete the folder at any time.

  Args:
    folder: "" for halrp_jax in $XDG_CACHE_HOME or ~/.cache, "off" for none, or a folder.

  Returns:
    The folder in use; None if there is none.

  Raises:
    UserError: if a folder was named and can't be used. The default is then left alone silently.
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
    with contextlib.suppress(OSError):  # one that can be read alone is of use, too
      _drop_damaged(path)
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
  status = path.stat()
  if status.st_uid != os.getuid():
    raise OSError(f"{path} belongs to another user")
  if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
    raise OSError(f"{path} can be written by others")


def _drop_damaged(path: pathlib.Path) -> None:
  """Deletes what a process was killed while writing, of the entries since the last look.

  JAX writes them in place and never again, so it would warn and compile at every start.
  """
  look = path / ".looked"
  since = look.stat().st_mtime if look.exists() else 0.0
  for entry in path.glob("*-cache"):
    with contextlib.suppress(FileNotFoundError):  # another process may do the same
      written = entry.stat().st_mtime
      if since - _STILL_WRITING <= written < time.time() - _STILL_WRITING and _is_cut(entry):
        entry.unlink()
  look.touch()


def _is_cut(entry: pathlib.Path) -> bool:
  """Of entries that zlib compressed, as JAX does unless zstandard is installed."""
  data = entry.read_bytes()
  if data.startswith(_ZSTANDARD):
    return False
  try:
    return not zlib.decompress(data)
  except zlib.error:
    return True


def _processor() -> str:
  """A name for processors that can run the same program."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
  except OSError:
    flags = platform.processor()
  return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:12]
