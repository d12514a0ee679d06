"""The rule by which benchmarks/compare.py fails."""

import pytest

from .conftest import ROOT


@pytest.mark.parametrize(
  ("new", "expected"),
  [
    ([1.2, 1.2, 1.2, 1.2, 0.9], ["lenet-stl"]),  # four of five
    ([1.2, 1.2, 1.2, 0.9, 0.9], []),
    ([1.09, 1.09, 1.09, 1.09, 1.09], []),
  ],
)
def test_a_step_is_slower_by_a_tenth_in_four_of_five_rounds(new, expected, monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  import compare

  base = {"step": [1.0] * 5, "compile": [1.0, 1.0]}
  found = {"lenet-stl": {"base": base, "new": {"step": new, "compile": [9.0, 9.0]}}}
  assert compare.slower(found) == expected
