"""Pytrees on disk that can be trusted: the only module that knows Orbax.

An *item* is one pytree in a folder of its own, written once:

  NAME/arrays/        what Orbax writes
  NAME/about.json     structure of the pytree, and whatever the caller adds
  NAME/manifest.json  size and SHA-256 of every other file; written last

It is written under another name and renamed when it is whole. Orbax restores a flipped byte without
a word, so nothing is read before the manifest verifies. A file that the manifest does not name is
no damage: file managers, synchronisation and NFS leave files everywhere. No pickle anywhere.
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

import jax
import numpy as np
import orbax.checkpoint as ocp

from halrp_jax import files, packing
from halrp_jax.types import Params, brief

_ARRAYS, _ABOUT, _MANIFEST = "arrays", "about.json", "manifest.json"
_TEMPORARY, _REPLACED = ".writing-", ".replaced-"
_UNREADABLE = (  # what a forged item can raise
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
  """An item that can't be trusted; the text names the file and what is wrong with it."""


def fingerprint(tree: Params) -> str:
  """Returns SHA-256 over the paths, shapes and bytes of all leaves: equal hashes, equal pytrees.

  The state of a task counts as the dict that older versions kept, so that hashes stay the same.
  """
  digest = hashlib.sha256()
  tree = jax.tree.map(lambda x: x._asdict() if _is_task(x) else x, tree, is_leaf=_is_task)
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    x = np.asarray(leaf)
    digest.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}".encode())
    digest.update(np.ascontiguousarray(x).tobytes())
  return digest.hexdigest()


def _is_task(x) -> bool:
  """Whether something is the `TaskState` of a method."""
  return isinstance(x, tuple) and {"stats", "num_classes"} <= set(getattr(x, "_fields", ()))


def save(folder: pathlib.Path, packed: packing.Packed, about: dict) -> None:
  """Writes an item; an older one of that name is replaced when the new one is whole.

  Args:
    folder: the item's folder; its parent must be there.
    packed: from `packing.pack`.
    about: anything JSON can hold.

  Raises:
    OSError: if the disk is full or can't be written; what was there before is unchanged.
  """
  temporary = _emptied(folder.with_name(_TEMPORARY + folder.name))
  structure, arrays = packed
  try:
    temporary.mkdir()
    named = {str(i): x for i, x in enumerate(arrays) if x.size}  # Orbax refuses empty arrays
    if named:
      _require_room(temporary, sum(x.nbytes for x in arrays))
      _orbax(lambda checkpointer: checkpointer.save(temporary.resolve() / _ARRAYS, named))
    leaves = [[list(x.shape), str(x.dtype)] for x in arrays]
    _write(temporary / _ABOUT, about | {"structure": structure, "leaves": leaves})
    _write(temporary / _MANIFEST, _manifest(temporary))
    _replace(temporary, folder)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise


def load(folder: pathlib.Path) -> tuple[Params, dict]:
  """Reads an item that is whole. -> pytree with numpy arrays, about

  Raises:
    Damaged: if a file is missing or was changed. FileNotFoundError: no such item. OSError: if a
      file can't be read now, which says nothing about what is in it.
  """
  about = verify(folder)
  try:
    blank = {str(i): np.zeros(*x) for i, x in enumerate(about["leaves"])}
    arrays = {name: x for name, x in blank.items() if not x.size}
    if full := {name: x for name, x in blank.items() if x.size}:
      arrays |= _orbax(lambda c: c.restore(folder.resolve() / _ARRAYS, item=full))
    for name, x in blank.items():
      if arrays[name].shape != x.shape or arrays[name].dtype != x.dtype:
        raise Damaged(f"{folder}: array {name} is not the one that was written")
    return packing.unpack(about["structure"], [arrays[name] for name in blank]), about
  except _UNREADABLE as e:
    if getattr(e, "errno", None):  # the system's: no access, no memory, a disk that is away
      raise
    raise Damaged(f"{folder}: can't be read ({type(e).__name__}: {e})") from e


def save_plain(folder: pathlib.Path, tree: dict) -> None:
  """Writes nested dicts of arrays as Orbax does for everybody; an older one is replaced."""
  temporary = _emptied(folder.with_name(_TEMPORARY + folder.name))
  try:
    _orbax(lambda checkpointer: checkpointer.save(temporary.resolve(), tree))
    _replace(temporary, folder)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def load_plain(folder: pathlib.Path) -> dict:
  """Reads what Orbax wrote: nested dicts of numpy arrays.

  Raises:
    Damaged: if it can't be read.
  """
  try:
    # as numpy arrays, wherever they were when they were saved
    with _checkpointer() as checkpointer:
      found = checkpointer.metadata(folder.resolve()).item_metadata.tree
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), found)
    tree = _orbax(lambda c: c.restore(folder.resolve(), restore_args=args))
    return jax.tree.map(np.asarray, tree)
  except Exception as e:  # what is damaged makes Orbax and tensorstore raise almost anything
    raise Damaged(f"{folder}: can't be read ({brief(e)})") from e


def verify(folder: pathlib.Path) -> dict:
  """Checks every file that an item's manifest names; returns what `about` holds.

  Raises:
    Damaged: names the first file that is missing or changed. FileNotFoundError and OSError: as
      `load`.
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
    raise Damaged(f"{folder / _ABOUT}: is not what was written")
  return about


def strays(folder: pathlib.Path) -> list[str]:
  """Returns the names of the files in an item's folder that `save` has not written."""
  try:
    known = {_MANIFEST, *_read(folder / _MANIFEST)}
  except Damaged:
    known = {_MANIFEST}
  found = (p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if not p.is_dir())
  return [name for name in found if name not in known]


def sweep(folder: pathlib.Path, names: set[str]) -> None:
  """Deletes the items named, and what an interrupted `save` left behind; nothing else."""
  for path in folder.iterdir():
    if path.name in names or path.name.startswith((_TEMPORARY, _REPLACED)):
      shutil.rmtree(path, ignore_errors=True)


def free_name(path: pathlib.Path) -> pathlib.Path:
  """Returns `path`, or the first of path-2, path-3, ... where nothing is yet."""
  found, n = path, 1
  while os.path.lexists(found):
    n += 1
    found = path.with_name(f"{path.name}-{n}")
  return found


def _emptied(path: pathlib.Path) -> pathlib.Path:
  """Deletes a folder; returns a free name where it can't be, as with a file open on NFS."""
  shutil.rmtree(path, ignore_errors=True)
  return free_name(path)


def _replace(new: pathlib.Path, folder: pathlib.Path) -> None:
  """Renames `new` to `folder`, whatever is there and even if it can't be deleted."""
  old = _emptied(folder.with_name(_REPLACED + folder.name))
  if os.path.lexists(folder):
    folder.rename(old)
  try:
    new.rename(folder)
  except OSError:
    if os.path.lexists(old):
      old.rename(folder)
    raise
  shutil.rmtree(old, ignore_errors=True)


def _orbax(fn):
  """fn(checkpointer); whatever goes wrong is an OSError, told once and by the caller."""
  checkpointer, logger = _checkpointer(), logging.getLogger("absl")
  logger.addFilter(_is_no_error)  # Orbax logs tracebacks of what it raises
  try:
    return fn(checkpointer)
  except OSError:
    raise
  except Exception as e:  # tensorstore wraps what the disk says in errors of its own
    if code := re.search(r"os_error_code='(\d+)'", str(e)):
      raise OSError(int(code[1]), os.strerror(int(code[1]))) from e
    raise OSError(f"{type(e).__name__}: {' '.join(str(e).split())[:300]}") from e
  finally:
    logger.removeFilter(_is_no_error)
    checkpointer.close()


def _checkpointer() -> ocp.Checkpointer:
  """For the process that calls alone: by default Orbax waits for all of them (`processes`)."""
  me = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(
    primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"halrp_jax-{me}"
  )
  handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
  return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _require_room(folder: pathlib.Path, size: int) -> None:
  """Looks before it leaps: tensorstore prints more than an error when a write fails."""
  if shutil.disk_usage(folder).free < size:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
  most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
  if most != resource.RLIM_INFINITY and most < size:
    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(folder))


def _is_no_error(record: logging.LogRecord) -> bool:
  return record.levelno < logging.ERROR


def _manifest(folder: pathlib.Path) -> dict:
  found = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
  return {name: _entry(p) for name, p in found.items() if name != _MANIFEST and _is_written(name)}


def _is_written(name: str) -> bool:
  """Whether `save` may have written a file: no name of its or of Orbax's is a file manager's."""
  last = name.rpartition("/")[2]
  return not last.startswith(".") and last.lower() not in ("thumbs.db", "desktop.ini")


def _entry(path: pathlib.Path) -> list:
  with open(path, "rb") as stream:
    return [path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()]


def _write(path: pathlib.Path, content) -> None:
  with open(path, "w", encoding="utf-8") as stream:
    json.dump(content, stream)
    stream.flush()
    os.fsync(stream.fileno())


def _read(path: pathlib.Path) -> dict:
  try:
    return files.load_json(path)
  except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
    raise Damaged(f"{path}: missing") from e
  except ValueError as e:
    raise Damaged(f"{path}: can't be read ({e})") from e
