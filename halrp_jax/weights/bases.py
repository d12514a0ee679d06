"""Orthonormal bases of what layers see, grown task by task (GPM, BMKP). numpy, on the host.

The rows x of a layer [n, d] span what its kernel, a matrix [d, J], must answer to; a basis M [d, k]
holds the directions that carry a share of their energy |x|^2.
"""

import numpy as np


def grow(basis: np.ndarray, moment: np.ndarray, energy: float, first: bool) -> np.ndarray:
  """Adds the leading directions that a basis lacks to carry a share of the energy.

  Args:
    basis: M [d, k], orthonormal columns.
    moment: x' x [d, d], or the rows x [n, d] themselves where n < d (`of_rows`).
    energy: share in [0, 1] that the new basis is to carry.
    first: the first task's rule: the directions *before* the share is reached (GPM's program).

  Returns:
    [d, k'], k <= k' <= d; the first k columns are those of `basis`.

  Reference: G. Saha et al., "Gradient projection memory for continual learning", 2021, Eq. 4 to 9.
  """
  squares, directions, total = _spectrum(basis, np.asarray(moment, np.float64))
  if total <= 0:
    return basis
  carried = 1 - squares.sum() / total + np.concatenate([[0], np.cumsum(squares) / total])
  # carried[i]: share of the energy with i more directions
  num_more = np.sum(carried[1:] < energy) if first else np.sum(carried[:-1] < energy)
  num_more = min(num_more, basis.shape[0] - basis.shape[1])
  more = directions[:, :num_more].astype(np.float32)
  return np.concatenate([basis, more], 1)


def _spectrum(basis, moment):
  """Squared singular values, descending, and directions of what `basis` leaves; total energy."""
  known = np.asarray(basis, np.float64)
  if moment.shape[0] == moment.shape[1] == len(known):
    left = moment - known @ (known.T @ moment)
    left -= (left @ known) @ known.T
    values, vectors = np.linalg.eigh((left + left.T) / 2)
    return np.maximum(values[::-1], 0), vectors[:, ::-1], np.trace(moment)
  left = moment - (moment @ known) @ known.T
  _, values, vectors = np.linalg.svd(left, full_matrices=False)
  return values**2, vectors.T, np.sum(moment**2)


def of_rows(rows: np.ndarray) -> np.ndarray:
  """Rows x [n, d] -> what `grow` takes: the smaller of x and x' x."""
  rows = np.asarray(rows, np.float64)
  return rows if rows.shape[0] < rows.shape[1] else rows.T @ rows


def grow_padded(
  basis: np.ndarray, count: int, moment: np.ndarray, energy: float, first: bool, least: int = 32
) -> tuple[np.ndarray, int]:
  """`grow` of the first `count` columns of a padded basis. -> `padded` basis, its new count"""
  grown = grow(np.asarray(basis)[:, :count], moment, energy, first)
  return padded(grown, least), grown.shape[1]


def padded(basis: np.ndarray, least: int = 32) -> np.ndarray:
  """Zero columns up to a power of two (at most d), so that few widths are ever compiled."""
  d, k = basis.shape
  width = min(d, max(least, 1 << max(k - 1, 0).bit_length()))
  return np.pad(basis, ((0, 0), (0, width - k)))
