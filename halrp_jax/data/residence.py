"""Where the images of a benchmark stay while a run trains: on the device, in memory or on disk.

Images on the device are one `jax.Array`. In host memory and on disk they are a numpy array, of
which each step gets its batch (training/batches.py); on disk the array is a memory map of a file in
the cache of decoded images.
"""

import contextlib
import os
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np

from halrp_jax.data import cache
from halrp_jax.keys import Config
from halrp_jax.types import Array, UserError

# Of data.residence=auto: the largest fraction of the device's memory that images may take to stay
# there, and of the machine's memory to stay in host memory.
_OF_DEVICE, _OF_MACHINE = 1 / 4, 1 / 2
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_CHUNK = 2**26  # bytes that are copied in one step


def of(config: Config, num_bytes: int) -> str:
  """Returns where images of this size stay: "device", "host" or "disk".

  Args:
    config: has `data.residence` and `data.cache`.
    num_bytes: size of all images as they are stored.
  """
  if config.data.residence != "auto":
    return config.data.residence
  machine = _machine_memory()
  if num_bytes <= _OF_DEVICE * _device_memory(machine):
    return "device"
  has_room = num_bytes <= _OF_MACHINE * machine or cache.folder(config.data.cache) is None
  return "host" if has_room else "disk"


def place(config: Config, images: Array) -> tuple[Array, tuple[str, ...]]:
  """Puts the images of a benchmark where they stay.

  Args:
    config: has `data.residence` and `data.cache`.
    images: uint8 [N, H, W, C]

  Returns:
    A `jax.Array` if they stay on the device, else a numpy array; and a line for the user if
    data.residence=auto does not leave them on the device.

  Raises:
    UserError: if they are to stay on disk and no file can be written.
  """
  image = np.asarray(images)
  where, notes = of(config, image.nbytes), ()
  if where == "device":
    return jax.device_put(image), notes
  if where == "disk":
    image = _on_disk(config, [image], image.shape)
    # of auto: without a folder that can be written, they stay in memory
    where = "disk" if is_mapped(image) else "host"
  elif is_mapped(image):
    image = np.array(image)
  if config.data.residence == "auto":
    place = {"host": "in host memory", "disk": "on disk"}[where]
    notes = (f"the images take {image.nbytes / 1e9:,.1f} GB: they stay {place} (data.residence)",)
  return image.view(np.ndarray), notes


def joined(config: Config, sets: Sequence[np.ndarray]) -> np.ndarray:
  """Concatenates images of one size; if they are to stay on disk, into a file of the cache.

  Args:
    config: has `data.residence` and `data.cache`.
    sets: arrays uint8 [N_i, H, W, C_i] with one or more channels. A single channel is repeated if
      another array has several.

  Returns:
    uint8 [N, H, W, C]

  Raises:
    UserError: as `place`.
  """
  channels = max(x.shape[3] for x in sets)
  shape = (sum(map(len, sets)), *sets[0].shape[1:3], channels)
  if of(config, int(np.prod(shape, dtype=object))) == "disk":
    return _on_disk(config, sets, shape)
  if len(sets) == 1 and sets[0].shape == shape:
    return np.ascontiguousarray(sets[0])
  image = np.empty(shape, np.uint8)
  _copy(sets, image)
  return image


def is_mapped(image: np.ndarray) -> bool:
  """Returns whether an array is a memory map of a file, or a part of one."""
  base: object = image
  while isinstance(base, np.ndarray):
    if isinstance(base, np.memmap):
      return True
    base = base.base
  return False


def _on_disk(config: Config, sets: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
  """Returns arrays of images as one memory map; writes an entry of the cache unless they are it."""
  if len(sets) == 1 and is_mapped(sets[0]) and sets[0].shape == shape:
    return sets[0]
  if cache.folder(config.data.cache) is None and config.data.residence == "disk":
    raise UserError(
      "data.residence=disk keeps the images in the cache of decoded images, but there is none: set "
      "data.cache to a folder, or data.residence=host"
    )
  key = f"images-{'-'.join(cache.digest(x) for x in sets)}"
  image = cache.images(config.data.cache, key, shape, lambda out: _copy(sets, out))
  if config.data.residence == "disk" and not is_mapped(image):
    raise UserError(
      "data.residence=disk: the default folder of the cache can't be written; set data.cache to a "
      "folder that can be written and has enough space, or data.residence=host"
    )
  return image


def _copy(sets: Sequence[np.ndarray], out: np.ndarray) -> None:
  """Copies arrays of images one after another into `out`, a part at a time."""
  row, step = 0, max(1, _CHUNK // max(1, int(np.prod(out.shape[1:]))))
  for x in sets:
    for start in range(0, len(x), step):
      part = x[start : start + step]
      out[row : row + len(part)] = part
      row += len(part)


# --- memory ---------------------------------------------------------------------------


def _device_memory(machine: int) -> int:
  """Returns the memory of a device in bytes: on the CPU, and if it is not known, the machine's."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("bytes_limit") or machine


def _machine_memory() -> int:
  """Returns the memory in bytes that this process may use: the machine's, or its cgroup's limit."""
  if not hasattr(os, "sysconf"):  # Windows
    return sys.maxsize
  most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  for path in _LIMITS:
    with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
      most = min(most, int(pathlib.Path(path).read_text(encoding="ascii")))
  return most
