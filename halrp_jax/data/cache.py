"""A cache of decoded images on disk, so that the second start of a run takes seconds.

An entry consists of two files:

  KEY.npy     the images, uint8 [N, H, W, C], memory-mapped when they are read
  KEY.json    SHA-256 of the array's bytes, written last

The key contains a hash of the contents of the original files. Files with other contents, even of
the same size and date, get another entry; files that are moved keep theirs. To compute the hash,
every start reads the files (the archive, or the images of a folder) without decoding them. The
folder of the cache can be deleted at any time.
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
  """Returns the folder of the cache, or None if nothing is to be stored.

  Args:
    setting: the config key `data.cache`: a path, "off", or "" for a folder in the user's cache.
  """
  if setting == "off":
    return None
  if setting:
    return sources.path_of("data.cache", setting)
  root = files.cache_folder()
  return None if root is None else root / "data"


def images(
  setting: str, key: str, shape: tuple[int, ...], decode: Callable[[np.ndarray], None]
) -> np.ndarray:
  """Returns decoded images from the cache, or decodes them and stores them there.

  Args:
    setting: the config key `data.cache`.
    key: name of the entry: what is decoded, in which way, and the hash of the original files.
    shape: shape of the array. [N, H, W, C]
    decode: function that fills the uint8 array that it is given.

  Returns:
    A uint8 array of that shape.

  Raises:
    UserError: if `setting` names a folder that can't be used. If the default folder can't be used,
      the images are decoded and not stored.
  """
  path = folder(setting)
  if path is not None:
    whole = hashlib.sha256(os.fsencode(f"{key} {shape}")).hexdigest()
    name = f"{re.sub(r'[^A-Za-z0-9._-]', '_', key[:40])}-{whole[:24]}"  # a key may hold a path
    try:
      path.mkdir(parents=True, exist_ok=True)
      found = _load(path / f"{name}.npy", shape)
      return _decode_into(path / f"{name}.npy", shape, decode) if found is None else found
    except OSError as e:
      if setting:
        raise UserError(
          f"data.cache={setting}: {e.strerror or e}; name a folder that can be written and has "
          "enough space, or off"
        ) from e
  image = np.empty(shape, np.uint8)
  decode(image)
  return image


def _load(path: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray | None:
  """Returns the array of an entry; None if it does not exist, is damaged or has another shape."""
  try:
    sums = files.load_json(path.with_suffix(".json"))
    image = np.lib.format.open_memmap(path, mode="r")
    if image.shape == tuple(shape) and image.dtype == np.uint8 and sums["sha256"] == digest(image):
      return image
  except Exception:  # json and numpy may raise anything when they read a damaged file
    pass
  return None


def _decode_into(
  path: pathlib.Path, shape: tuple[int, ...], decode: Callable[[np.ndarray], None]
) -> np.ndarray:
  """Decodes images into a new entry and returns its array."""
  files.delete_left_behind(path.parent)
  with files.replacing(path) as temporary:
    image = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=tuple(shape))
    # On a full disk this raises an error; writing to the memory map would crash the process.
    with open(temporary, "r+b") as stream:
      os.posix_fallocate(stream.fileno(), 0, temporary.stat().st_size)
    decode(image)
    image.flush()
  files.write_json(path.with_suffix(".json"), {"sha256": digest(image)})
  return np.lib.format.open_memmap(path, mode="r")


def digest(image: np.ndarray) -> str:
  """Returns the SHA-256 of an array's bytes, in hexadecimal digits."""
  return hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()
