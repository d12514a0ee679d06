"""Writes and reads pytrees on disk, with hashes that are verified. Nothing else imports Orbax.

An *item* is one pytree in a folder of its own, written once:

  NAME/arrays/        the arrays, written by Orbax
  NAME/about.json     structure of the pytree, and whatever the caller adds
  NAME/manifest.json  size and SHA-256 of every other file; written last

An item is written under a temporary name and renamed when it is complete. Orbax restores a file
with a flipped bit without an error, so nothing is read before the manifest is verified. Files that
the manifest does not name are ignored, since file managers, synchronisation and NFS leave their own
files in any folder. Nothing is pickled.
"""

import errno
import hashlib
import json
import logging
import os
import pathlib
import re
import resource
import shutil
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from halrp_jax import files, packing
from halrp_jax.runs import spill
from halrp_jax.types import Params, brief

_Result = TypeVar("_Result")

_ARRAYS, _ABOUT, _MANIFEST = "arrays", "about.json", "manifest.json"
_TEMPORARY, _REPLACED = ".writing-", ".replaced-"
_UNREADABLE = (  # the errors that reading a damaged or forged item can raise
  OSError,
  KeyError,
  TypeError,
  ValueError,
  AttributeError,
  ImportError,
  MemoryError,
  RecursionError,
)


class Damaged(Exception):
  """An item is damaged or was changed; the message names the file and what is wrong with it."""


def fingerprint(tree: Params) -> str:
  """Returns the SHA-256 of the paths, dtypes, shapes and bytes of all leaves, in hexadecimal.

  Pytrees with equal fingerprints have equal leaves. A task state is hashed as the dict that older
  versions stored, so that fingerprints in existing folders stay valid.
  """
  digest = hashlib.sha256()
  tree = jax.tree.map(lambda x: x._asdict() if _is_task(x) else x, tree, is_leaf=_is_task)
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    x = np.asarray(leaf)
    digest.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}".encode())
    digest.update(np.ascontiguousarray(x).tobytes())
    spill.release(leaf)
  return digest.hexdigest()


def _is_task(x: object) -> bool:
  """Tells whether something is the `TaskState` of a method."""
  return isinstance(x, tuple) and {"stats", "num_classes"} <= set(getattr(x, "_fields", ()))


def save(folder: pathlib.Path, packed: packing.Packed, about: dict) -> None:
  """Writes an item, which replaces an older one of the same name only when it is complete.

  Args:
    folder: the item's folder; its parent must exist.
    packed: result of `packing.pack`.
    about: more entries of about.json, as JSON types.

  Raises:
    OSError: if the disk is full or can't be written; an older item is then unchanged.
  """
  temporary = _unused_path(folder.with_name(_TEMPORARY + folder.name))
  structure, arrays = packed
  try:
    temporary.mkdir()
    named = {str(i): x for i, x in enumerate(arrays) if x.size}  # Orbax refuses empty arrays
    if named:
      _require_space(temporary, sum(x.nbytes for x in arrays))
      _orbax(lambda checkpointer: checkpointer.save(temporary.resolve() / _ARRAYS, named))
    leaves = [[list(x.shape), str(x.dtype)] for x in arrays]
    _write(temporary / _ABOUT, about | {"structure": structure, "leaves": leaves})
    _write(temporary / _MANIFEST, _manifest(temporary))
    _replace(temporary, folder)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise


def load(folder: pathlib.Path) -> tuple[Params, dict]:
  """Verifies and reads an item.

  Returns:
    The pytree, its arrays as numpy arrays, and the contents of about.json.

  Raises:
    Damaged: if a file is missing or was changed.
    FileNotFoundError: if there is no such item.
    OSError: if the system can't read a file at the moment, which does not mean that it is damaged.
  """
  about = verify(folder)
  try:
    blank = {str(i): np.zeros(*x) for i, x in enumerate(about["leaves"])}
    arrays = {name: x for name, x in blank.items() if not x.size}
    if full := {name: x for name, x in blank.items() if x.size}:
      arrays |= _orbax(lambda c: c.restore(folder.resolve() / _ARRAYS, item=full))
    for name, x in blank.items():
      if arrays[name].shape != x.shape or arrays[name].dtype != x.dtype:
        raise Damaged(f"{folder}: array {name} has another shape or dtype than about.json says")
    return packing.unpack(about["structure"], [arrays[name] for name in blank]), about
  except _UNREADABLE as e:
    if getattr(e, "errno", None):  # the system's: no permission, no memory, a disk that is offline
      raise
    raise Damaged(f"{folder}: can't be read ({type(e).__name__}: {e})") from e


def save_plain(folder: pathlib.Path, tree: dict) -> None:
  """Writes nested dicts of arrays as an ordinary Orbax checkpoint, and replaces an older one."""
  temporary = _unused_path(folder.with_name(_TEMPORARY + folder.name))
  try:
    _orbax(lambda checkpointer: checkpointer.save(temporary.resolve(), tree))
    _replace(temporary, folder)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def load_plain(folder: pathlib.Path) -> dict:
  """Reads an ordinary Orbax checkpoint as nested dicts of numpy arrays.

  Raises:
    Damaged: if it can't be read.
  """
  try:
    # As numpy arrays, whatever devices they were on when they were saved.
    with _checkpointer() as checkpointer:
      found = checkpointer.metadata(folder.resolve()).item_metadata.tree
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), found)
    tree = _orbax(lambda c: c.restore(folder.resolve(), restore_args=args))
    return jax.tree.map(np.asarray, tree)
  except Exception as e:  # Orbax and tensorstore raise almost anything for damaged files
    raise Damaged(f"{folder}: can't be read ({brief(e)})") from e


def verify(folder: pathlib.Path) -> dict:
  """Checks every file that an item's manifest names, and returns the contents of about.json.

  Raises:
    Damaged: names the first file that is missing or was changed.
    FileNotFoundError: if there is no such item.
    OSError: if the system can't read a file at the moment.
  """
  if not folder.is_dir():
    raise FileNotFoundError(folder)
  manifest = _read(folder / _MANIFEST)
  for name in filter(_is_written, sorted({_ABOUT, *manifest})):
    if not (folder / name).is_file():
      raise Damaged(f"{folder / name}: missing")
    if _entry(folder / name) != manifest.get(name):
      raise Damaged(f"{folder / name}: was changed after it was written")
  about = _read(folder / _ABOUT)
  if not {"leaves", "structure"} <= about.keys():
    raise Damaged(f"{folder / _ABOUT}: was changed or damaged (no leaves or structure)")
  return about


def strays(folder: pathlib.Path) -> list[str]:
  """Returns the names of the files in an item's folder that `save` has not written."""
  try:
    known = {_MANIFEST, *_read(folder / _MANIFEST)}
  except Damaged:
    known = {_MANIFEST}
  found = (p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if not p.is_dir())
  return [name for name in found if name not in known]


def delete_items(folder: pathlib.Path, names: set[str]) -> None:
  """Deletes the named items, and the temporary folders that interrupted calls of `save` left."""
  for path in folder.iterdir():
    if path.name in names or path.name.startswith((_TEMPORARY, _REPLACED)):
      shutil.rmtree(path, ignore_errors=True)


def free_name(path: pathlib.Path) -> pathlib.Path:
  """Returns `path`, or the first of path-2, path-3, ... that does not exist."""
  found, n = path, 1
  while os.path.lexists(found):
    n += 1
    found = path.with_name(f"{path.name}-{n}")
  return found


def _unused_path(path: pathlib.Path) -> pathlib.Path:
  """Deletes a folder and returns its path, or a free one if NFS won't delete an open file."""
  shutil.rmtree(path, ignore_errors=True)
  return free_name(path)


def _replace(new: pathlib.Path, folder: pathlib.Path) -> None:
  """Renames `new` to `folder`; an older folder is moved away first, and deleted if possible."""
  old = _unused_path(folder.with_name(_REPLACED + folder.name))
  if os.path.lexists(folder):
    folder.rename(old)
  try:
    new.rename(folder)
  except OSError:
    if os.path.lexists(old):
      old.rename(folder)
    raise
  shutil.rmtree(old, ignore_errors=True)


def _orbax(fn: Callable[[ocp.Checkpointer], _Result]) -> _Result:
  """Returns fn(checkpointer); every error becomes an OSError, which the caller reports."""
  checkpointer, logger = _checkpointer(), logging.getLogger("absl")
  logger.addFilter(_is_below_error)  # Orbax also logs a traceback of every error that it raises
  try:
    return fn(checkpointer)
  except OSError:
    raise
  except Exception as e:  # tensorstore wraps the system's errors in errors of its own
    if code := re.search(r"os_error_code='(\d+)'", str(e)):
      raise OSError(int(code[1]), os.strerror(int(code[1]))) from e
    raise OSError(f"{type(e).__name__}: {' '.join(str(e).split())[:300]}") from e
  finally:
    logger.removeFilter(_is_below_error)
    checkpointer.close()


def _checkpointer() -> ocp.Checkpointer:
  """Returns a checkpointer for this process only: by default Orbax waits for all processes."""
  me = jax.process_index()
  only_this = ocp.options.MultiprocessingOptions(
    primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"halrp_jax-{me}"
  )
  handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=only_this)
  return ocp.Checkpointer(handler, multiprocessing_options=only_this)


def _require_space(folder: pathlib.Path, size: int) -> None:
  """Raises OSError if there is no room for `size` bytes.

  It is checked in advance because tensorstore prints messages of its own when a write fails.
  """
  if shutil.disk_usage(folder).free < size:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
  most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
  if most != resource.RLIM_INFINITY and most < size:
    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(folder))


def _is_below_error(record: logging.LogRecord) -> bool:
  """Passes log records below the level ERROR."""
  return record.levelno < logging.ERROR


def _manifest(folder: pathlib.Path) -> dict:
  """Returns size and SHA-256 of every file of an item, by its path within the item."""
  found = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
  return {name: _entry(p) for name, p in found.items() if name != _MANIFEST and _is_written(name)}


def _is_written(name: str) -> bool:
  """Tells whether a file may be one of `save`, not one that a file manager leaves in folders."""
  last = name.rpartition("/")[2]
  return not last.startswith(".") and last.lower() not in ("thumbs.db", "desktop.ini")


def _entry(path: pathlib.Path) -> list:
  """Returns size in bytes and SHA-256 of a file."""
  with open(path, "rb") as stream:
    return [path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()]


def _write(path: pathlib.Path, content: dict) -> None:
  """Writes JSON and waits until it is on the disk."""
  with open(path, "w", encoding="utf-8") as stream:
    json.dump(content, stream)
    stream.flush()
    os.fsync(stream.fileno())


def _read(path: pathlib.Path) -> dict:
  """Reads a JSON object; raises Damaged if the file is missing or is not one."""
  try:
    return files.load_json(path)
  except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
    raise Damaged(f"{path}: missing") from e
  except ValueError as e:
    raise Damaged(f"{path}: can't be read ({e})") from e
