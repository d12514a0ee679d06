"""Decoded images on the disk, memory-mapped: the second start takes seconds.

  KEY.npy     uint8 [N, H, W, C]
  KEY.json    SHA-256 of the array's bytes, written last

The key has the hash of the source's contents in it, so that other files make another entry, also
those of equal size and date, and moved ones make none. To compute it, the files (of a folder the
images, or the archive) are read at every start, but not decoded. Delete the folder at any time.
"""

import hashlib
import os
import pathlib
import re
from collections.abc import Callable

import numpy as np

from halrp_jax import files
from halrp_jax.data import sources
from halrp_jax.types import UserError


def folder(setting: str) -> pathlib.Path | None:
  """Returns the folder that the config key `data.cache` means; None: keep nothing."""
  if setting == "off":
    return None
  if setting:
    return sources.path_of("data.cache", setting)
  root = files.cache_folder()
  return None if root is None else root / "data"


def images(
  setting: str, key: str, shape: tuple[int, ...], decode: Callable[[np.ndarray], None]
) -> np.ndarray:
  """The array that `decode` fills, from the cache if it is there.

  Args:
    setting: the config key `data.cache`.
    key: name of the entry: what was decoded, how, and the hash of its source.
    shape: of the array, uint8.
    decode: fills the array it is given.

  Raises:
    UserError: if a folder was named and can't be written.
  """
  place = folder(setting)
  if place is not None:
    whole = hashlib.sha256(os.fsencode(f"{key} {shape}")).hexdigest()
    name = f"{re.sub(r'[^A-Za-z0-9._-]', '_', key[:40])}-{whole[:24]}"  # a key may hold a path
    try:
      place.mkdir(parents=True, exist_ok=True)
      found = _load(place / f"{name}.npy", shape)
      return _fill(place / f"{name}.npy", shape, decode) if found is None else found
    except OSError as e:
      if setting:
        raise UserError(
          f"data.cache={setting}: {e.strerror or e}; name a folder that can be written and has "
          "room, or off"
        ) from e
  image = np.empty(shape, np.uint8)
  decode(image)
  return image


def _load(path: pathlib.Path, shape) -> np.ndarray | None:
  try:
    sums = files.load_json(path.with_suffix(".json"))
    image = np.lib.format.open_memmap(path, mode="r")
    if image.shape == tuple(shape) and image.dtype == np.uint8 and sums["sha256"] == digest(image):
      return image
  except Exception:  # what is damaged makes json and numpy raise almost anything
    pass
  return None


def _fill(path: pathlib.Path, shape, decode) -> np.ndarray:
  files.delete_left_behind(path.parent)
  with files.replacing(path) as temporary:
    image = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=tuple(shape))
    with open(temporary, "r+b") as stream:  # a full disk is an error here, a crash later
      os.posix_fallocate(stream.fileno(), 0, temporary.stat().st_size)
    decode(image)
    image.flush()
  files.write_json(path.with_suffix(".json"), {"sha256": digest(image)})
  return np.lib.format.open_memmap(path, mode="r")


def digest(image: np.ndarray) -> str:
  """SHA-256 of an array's bytes."""
  return hashlib.sha256(np.ascontiguousarray(image)).hexdigest()
