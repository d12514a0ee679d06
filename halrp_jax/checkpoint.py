"""Pytrees on disk that can be trusted: the only module that knows Orbax.

An *item* is one pytree in a folder of its own, written once:

  NAME/arrays/        what Orbax writes
  NAME/about.json     structure of the pytree, and whatever the caller adds
  NAME/manifest.json  size and SHA-256 of every other file; written last

It is written under another name and renamed when it is whole. Orbax restores a flipped byte without
a word, so nothing is read before the manifest verifies. No pickle anywhere.
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

from halrp_jax import packing
from halrp_jax.types import Params, brief

_ARRAYS, _ABOUT, _MANIFEST = "arrays", "about.json", "manifest.json"
_TEMPORARY = ".writing-"
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
  """SHA-256 over the paths, shapes and bytes of all leaves: equal hashes, equal pytrees."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    x = np.asarray(leaf)
    digest.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}".encode())
    digest.update(np.ascontiguousarray(x).tobytes())
  return digest.hexdigest()


def save(folder: pathlib.Path, packed: packing.Packed, about: dict) -> None:
  """Writes an item; an older one of that name is replaced when the new one is whole.

  Args:
    folder: the item's folder; its parent must be there.
    packed: from `packing.pack`.
    about: anything JSON can hold.

  Raises:
    OSError: if the disk is full or can't be written; what was there before is unchanged.
  """
  temporary = folder.with_name(_TEMPORARY + folder.name)
  shutil.rmtree(temporary, ignore_errors=True)
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
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise


def load(folder: pathlib.Path) -> tuple[Params, dict]:
  """Reads an item that is whole. -> pytree with numpy arrays, about

  Raises:
    Damaged: if a file is missing or was changed. FileNotFoundError: no such item.
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
    raise Damaged(f"{folder}: can't be read ({type(e).__name__}: {e})") from e


def save_plain(folder: pathlib.Path, tree: dict) -> None:
  """Writes nested dicts of arrays as Orbax does for everybody; an older one is replaced."""
  temporary = folder.with_name(_TEMPORARY + folder.name)
  shutil.rmtree(temporary, ignore_errors=True)
  try:
    _orbax(lambda checkpointer: checkpointer.save(temporary.resolve(), tree))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
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
  """Checks every file of an item against its manifest; returns what `about` holds.

  Raises:
    Damaged: names the first file that is missing, extra or changed. FileNotFoundError: no item.
  """
  if not folder.is_dir():
    raise FileNotFoundError(folder)
  manifest = _read(folder / _MANIFEST)
  found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
  for name in sorted(manifest.keys() | (found - {_MANIFEST})):
    if name not in found:
      raise Damaged(f"{folder / name}: missing")
    if name not in manifest:
      raise Damaged(f"{folder / name}: is not in the manifest")
    if _entry(folder / name) != manifest[name]:
      raise Damaged(f"{folder / name}: was changed after it was written")
  about = _read(folder / _ABOUT)
  if not {"leaves", "structure"} <= about.keys():
    raise Damaged(f"{folder / _ABOUT}: is not what was written")
  return about


def sweep(folder: pathlib.Path, keep: set[str]) -> None:
  """Deletes the items that are not in `keep`, and what an interrupted `save` left behind."""
  for path in folder.iterdir():
    if path.name not in keep:
      shutil.rmtree(path, ignore_errors=True)


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
  return {
    p.relative_to(folder).as_posix(): _entry(p)
    for p in sorted(folder.rglob("*"))
    if p.is_file() and p != folder / _MANIFEST
  }


def _entry(path: pathlib.Path) -> list:
  with open(path, "rb") as stream:
    return [path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()]


def _write(path: pathlib.Path, content) -> None:
  with open(path, "w") as stream:
    json.dump(content, stream)
    stream.flush()
    os.fsync(stream.fileno())


def _read(path: pathlib.Path) -> dict:
  try:
    content = json.loads(path.read_text())
  except FileNotFoundError as e:
    raise Damaged(f"{path}: missing") from e
  except (OSError, ValueError, RecursionError) as e:
    raise Damaged(f"{path}: can't be read ({e})") from e
  if not isinstance(content, dict):
    raise Damaged(f"{path}: is not what was written")
  return content
