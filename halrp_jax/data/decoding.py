"""Decoding of many photographs at once, by threads, or by processes of Grain (extra [images]).

Pillow decodes and resizes without holding Python's global lock, so that threads keep all cores
busy. Every image is written to its row as soon as it is decoded; none is kept in memory.
"""

import contextlib
import functools
import os
import pathlib
import warnings
from collections.abc import Iterator, Sequence
from concurrent import futures

import numpy as np

from halrp_jax.data import formats
from halrp_jax.types import Framing, UserError, UserErrors

_CHUNK = 32  # number of images that a thread decodes before it takes others
_WHOLE = Framing()
_Decoded = tuple[np.ndarray, int, str]  # image, conversions, "" or the line of an error


def photos(
  paths: Sequence[pathlib.Path],
  shape: tuple[int, int, int],
  out: np.ndarray,
  done: np.ndarray,
  num_processes: int,
  framing: Framing = _WHOLE,
) -> None:
  """Decodes photographs as `formats.read_photo` does.

  Args:
    paths: the files.
    shape: shape [H, W, C] to which images are converted.
    out: gets the images, uint8 [N, H, W, C].
    done: gets the conversions of each image as bits, for `formats.conversions`. uint8 [N]
    num_processes: the config key `data.decode_processes`.
    framing: how they are resized and cropped.

  Raises:
    UserErrors: after all files were tried, with a line for each that can't be read.
    UserError: if there are to be processes, and Grain is not installed.
  """
  lines = _by_processes if num_processes else _by_threads
  if wrong := list(lines(paths, shape, out, done, num_processes, framing)):
    raise UserErrors(wrong)


def _by_threads(paths, shape, out, done, num_processes, framing) -> Iterator[str]:
  """Decodes with a thread for each core; yields a line for each file that can't be read."""

  def decode_some(start: int) -> list[str]:
    rows = range(start, min(start + _CHUNK, len(paths)))
    lines = []
    for i in rows:
      image, done[i], line = _decode(str(paths[i]), shape, framing)
      if line:
        lines.append(line)
      else:
        out[i] = image
    return lines

  # The reader silences warnings, too, but threads that do so one over another leave it on.
  with warnings.catch_warnings(), futures.ThreadPoolExecutor(_num_cores(), "photos") as pool:
    warnings.simplefilter("ignore")
    for lines in pool.map(decode_some, range(0, len(paths), _CHUNK)):
      yield from lines


def _by_processes(paths, shape, out, done, num_processes, framing) -> Iterator[str]:
  """Decodes with processes of Grain; yields a line for each file that can't be read."""
  try:
    import grain  # pyright: ignore[reportMissingImports] (an extra)
  except ImportError as e:
    raise UserError(
      f"data.decode_processes={num_processes} needs Grain: pip install 'halrp-jax[images]', or set "
      "data.decode_processes=0 for threads"
    ) from e
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain's processes inherit absl's flags and refuse unparsed ones
  source = grain.MapDataset.source([str(path) for path in paths])
  decoded = source.map(functools.partial(_decode, shape=shape, framing=framing)).to_iter_dataset()
  options = grain.MultiprocessingOptions(num_workers=num_processes)
  with contextlib.closing(iter(decoded.mp_prefetch(options))) as results:
    for i, (image, bits, line) in enumerate(results):
      if line:
        yield line
      else:
        out[i], done[i] = image, bits


def _decode(path: str, shape: tuple[int, int, int], framing: Framing) -> _Decoded:
  """Decodes one photograph; errors are returned, since a process can't raise those of others."""
  try:
    return *formats.read_photo(pathlib.Path(path), shape, framing), ""
  except UserError as e:
    return np.zeros(0, np.uint8), 0, str(e)


def _num_cores() -> int:
  """Returns the number of cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
