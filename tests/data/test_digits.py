"""The digits of scikit-learn, read without it."""

import gzip
import importlib.metadata

import numpy as np
import pytest
from sklearn.datasets import load_digits

from halrp_jax.data import digits
from halrp_jax.types import UserError


def test_they_are_those_of_scikit_learn():
  rows, want = digits._read_rows(), load_digits()
  np.testing.assert_array_equal(rows[:, :-1], want.data)
  np.testing.assert_array_equal(rows[:, -1], want.target)
  assert [str(n) for n in want.target_names] == list("0123456789")


@pytest.mark.parametrize(
  "contents", [None, gzip.compress(b"1,2\n" * 99, mtime=0)[:-9], b"1,2\n3,4\n"]
)
def test_a_broken_installation_is_one_line(tmp_path, monkeypatch, contents):
  class Gone:
    def locate_file(self, path):
      return tmp_path / path.rpartition("/")[2].removesuffix(".gz" * (contents == b"1,2\n3,4\n"))

  if contents:
    Gone().locate_file("digits.csv.gz").write_bytes(contents)

  monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Gone())
  with pytest.raises(UserError, match="digits of scikit-learn can't be read .*install it again"):
    digits._read_rows()
