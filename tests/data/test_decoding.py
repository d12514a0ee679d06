"""Many photographs at once: by threads, by processes of Grain, and without Grain."""

import importlib.util
import sys
import threading
import warnings

import numpy as np
import pytest

from halrp_jax.data import decoding, formats
from halrp_jax.types import UserError, UserErrors

from . import originals

SHAPE = (12, 10, 3)
BY = [
  0,
  pytest.param(
    2,
    marks=[
      pytest.mark.extra,
      pytest.mark.skipif(importlib.util.find_spec("grain") is None, reason="make test-all"),
    ],
  ),
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
  """70 images of different sizes and formats."""
  folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
  found = []
  for i in range(70):
    kind = ("PNG", "JPEG")[i % 2]
    found.append(folder / f"{i:02}.{kind.lower()}")
    found[-1].write_bytes(originals.picture(rng, (8 + i % 9, 20, 3)[: 3 - i % 3 // 2], kind))
  return found


def arrays(count):
  return np.zeros((count, *SHAPE), np.uint8), np.zeros(count, np.uint8)


@pytest.mark.parametrize("num_processes", BY)
def test_every_image_is_the_one_decoded_alone(num_processes, paths):
  """Each in its row, with its conversions."""
  out, done = arrays(len(paths))
  decoding.photos(paths, SHAPE, out, done, num_processes)
  for path, image, bits in zip(paths, out, done, strict=True):
    want, expected_bits = formats.read_photo(path, SHAPE)
    np.testing.assert_array_equal(image, want)
    assert bits == expected_bits
  assert len(set(done.tolist())) > 1  # grey ones and others


@pytest.mark.parametrize("num_processes", BY)
def test_all_files_are_tried_and_those_that_are_damaged_named_in_order(
  num_processes, paths, tmp_path
):
  wrong = [tmp_path / name for name in ("first.png", "second.jpg", "third.jpg")]
  wrong[0].write_bytes(b"\x89PNG nothing")
  wrong[1].write_bytes(b"")
  mixed = [*paths[:40], wrong[0], *paths[40:], *wrong[1:]]
  out, done = arrays(len(mixed))
  with pytest.raises(UserErrors) as raised:
    decoding.photos(mixed, SHAPE, out, done, num_processes)
  assert [str(path) in line for path, line in zip(wrong, raised.value.lines, strict=True)] == [
    True
  ] * 3
  np.testing.assert_array_equal(out[45], formats.read_photo(paths[44], SHAPE)[0])


def test_threads_leave_warnings_as_they_were(paths, monkeypatch):
  """The reader silences warnings in each thread; that may not stay so afterwards."""
  seen = set()
  read = formats.read_photo

  def watched(path, shape, framing):
    seen.add(threading.get_ident())
    return read(path, shape, framing)

  monkeypatch.setattr(formats, "read_photo", watched)
  monkeypatch.setattr(decoding, "_num_cores", lambda: 4)
  before = list(warnings.filters)
  decoding.photos(paths, SHAPE, *arrays(len(paths)), 0)
  assert warnings.filters == before and threading.get_ident() not in seen


def test_processes_without_grain_are_refused(paths, monkeypatch):
  monkeypatch.setitem(sys.modules, "grain", None)
  with pytest.raises(
    UserError, match=r"decode_processes=3 needs Grain: pip install 'halrp-jax\[im"
  ):
    decoding.photos(paths, SHAPE, *arrays(len(paths)), 3)
