"""Bases that grow: the energy rule against a plain loop, orthonormal columns, both inputs."""

import numpy as np
import pytest

from halrp_jax.weights import bases


def rows_of(seed, n=200, d=12):
  rng = np.random.default_rng(seed)
  return (
    rng.normal(size=(n, d)) * np.exp(-np.arange(d))[None] @ np.linalg.qr(rng.normal(size=(d, d)))[0]
  )


def plain_rule(basis, rows, energy, first):
  """As Saha's program has it, with the rows themselves."""
  left = rows - rows @ basis @ basis.T
  _, s, vt = np.linalg.svd(left, full_matrices=False)
  total = (rows**2).sum()
  if first:
    num = int(np.sum(np.cumsum(s**2) / total < energy))
  else:
    carried, num = 1 - (left**2).sum() / total, 0
    while carried < energy and num < len(s):
      carried += s[num] ** 2 / total
      num += 1
  return np.concatenate([basis, vt[:num].T], 1)


def same_span(a, b):
  np.testing.assert_allclose(a @ a.T, b @ b.T, atol=1e-4)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.9999])
def test_the_energy_rule(energy):
  """Three tasks, the second moment or the rows alone."""
  got = want = np.zeros((12, 0))
  for t in range(3):
    rows = rows_of(t)
    want = plain_rule(want, rows, energy, first=t == 0)
    got = bases.grow(got, rows.T @ rows, energy, first=t == 0)
    assert got.shape == want.shape
    same_span(got, want)
    np.testing.assert_allclose(got.T @ got, np.eye(got.shape[1]), atol=1e-5)


def test_rows_and_second_moment_give_the_same():
  rows = rows_of(0, n=7)
  few = bases.grow(np.zeros((12, 0)), rows, 0.99, first=True)
  many = bases.grow(np.zeros((12, 0)), rows.T @ rows, 0.99, first=True)
  same_span(few, many)
  assert bases.moment_or_rows(rows).shape == (7, 12)
  assert bases.moment_or_rows(rows_of(0)).shape == (12, 12)


def test_what_is_carried_already_adds_nothing():
  rows = rows_of(0)
  basis = bases.grow(np.zeros((12, 0)), rows.T @ rows, 0.99, first=False)
  assert bases.grow(basis, rows.T @ rows, 0.98, first=False).shape == basis.shape
  assert bases.grow(basis, np.zeros((12, 12)), 1.0, first=False).shape == basis.shape
  full = bases.grow(basis, rows.T @ rows, 1.0, first=False)
  assert full.shape[1] <= 12


def test_padding_is_to_powers_of_two():
  widths = [bases.pad(np.ones((300, k))).shape[1] for k in (0, 1, 32, 33, 200, 257, 300)]
  assert widths == [32, 32, 32, 64, 256, 300, 300]
  assert bases.pad(np.ones((10, 3))).shape == (10, 10)
