"""Orthonormal bases of the inputs or outputs of layers, grown task by task, for GPM and BMKP.

The rows x [n, d] are what a layer receives or returns for n samples. A basis M [d, k] holds
directions that carry a given share of their energy, the sum of |x|^2. All computation is in numpy
on the host.
"""

import numpy as np


def grow(basis: np.ndarray, moment: np.ndarray, energy: float, first: bool) -> np.ndarray:
  """Adds the leading directions that a basis needs to carry a share of the energy.

  Args:
    basis: M [d, k], orthonormal columns.
    moment: the second moment x' x [d, d], or the rows x [n, d] themselves where n < d
      (`moment_or_rows`).
    energy: share in [0, 1] that the new basis shall carry.
    first: whether to follow the rule of GPM's code for the first task, which leaves out the
      direction that reaches the share.

  Returns:
    [d, k'], k <= k' <= d; the first k columns are those of `basis`.

  Reference: G. Saha et al., "Gradient projection memory for continual learning", 2021, Eq. 4 to 9.
  """
  squares, directions, total = spectrum(basis, np.asarray(moment, np.float64))
  if total <= 0:
    return basis
  # carried[i]: share of the energy with i more directions
  carried = 1 - squares.sum() / total + np.concatenate([[0], np.cumsum(squares) / total])
  num_more = int(np.sum(carried[1:] < energy) if first else np.sum(carried[:-1] < energy))
  num_more = min(num_more, count_directions(squares, total), basis.shape[0] - basis.shape[1])
  more = directions[:, :num_more].astype(np.float32)
  return np.concatenate([basis, more], 1)


def spectrum(basis: np.ndarray, moment: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
  """Decomposes the part of the rows that lies outside a basis.

  Args:
    basis: M [d, k], orthonormal columns.
    moment: the second moment x' x [d, d], or the rows x [n, d] themselves where n < d.

  Returns:
    Squared singular values of that part [m], descending; its directions [d, m]; the energy of the
    whole rows.
  """
  known = np.asarray(basis, np.float64)
  if moment.shape[0] == moment.shape[1] == len(known):
    outside = moment - known @ (known.T @ moment)
    outside -= (outside @ known) @ known.T
    values, vectors = np.linalg.eigh((outside + outside.T) / 2)
    return np.maximum(values[::-1], 0), vectors[:, ::-1], float(np.trace(moment))
  outside = moment - (moment @ known) @ known.T
  _, values, vectors = np.linalg.svd(outside, full_matrices=False)
  return values**2, vectors.T, float(np.sum(moment**2))


def count_directions(squares: np.ndarray, total: float) -> int:
  """Returns how many of the squared singular values are more than rounding errors.

  The directions of the others are arbitrary, and not orthogonal to the basis.

  Args:
    squares: descending. [m]
    total: energy of the whole rows.
  """
  return int(np.sum(squares > 1e-12 * total))


def moment_or_rows(rows: np.ndarray) -> np.ndarray:
  """Returns rows x [n, d] as float64, or their second moment x' x [d, d] where it is smaller."""
  rows = np.asarray(rows, np.float64)
  return rows if rows.shape[0] < rows.shape[1] else rows.T @ rows


def grow_padded(
  basis: np.ndarray, count: int, moment: np.ndarray, energy: float, first: bool, min_width: int = 32
) -> tuple[np.ndarray, int]:
  """Grows a basis whose columns from `count` on are zeros.

  Args:
    basis: M [d, width].
    count: number of columns that are directions.
    moment: see `grow`.
    energy: see `grow`.
    first: see `grow`.
    min_width: see `pad`.

  Returns:
    The new basis, padded by `pad`, and its number of directions.
  """
  grown = grow(np.asarray(basis)[:, :count], moment, energy, first)
  return pad(grown, min_width), grown.shape[1]


def pad(basis: np.ndarray, min_width: int = 32) -> np.ndarray:
  """Appends zero columns up to a power of two, so that few widths are ever compiled.

  Args:
    basis: [d, k]
    min_width: smallest width of the result.

  Returns:
    [d, width], at most d columns wide.
  """
  d, k = basis.shape
  width = min(d, max(min_width, 1 << max(k - 1, 0).bit_length()))
  return np.pad(basis, ((0, 0), (0, width - k)))
