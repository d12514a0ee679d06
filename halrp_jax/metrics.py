"""Computes the metrics of continual learning from accuracy matrices.

Everywhere, A[s, i] is the test accuracy in percent on the i-th task of the sequence after the tasks
0..s have been learned: rows and columns 0..T-1, NaN above the diagonal. Differences of accuracies
are in percentage points. Sources: ACC, OPD, MOPD and AOPD as in Sect. 5.2 of the HALRP paper, BWT
as in the GPM paper (arXiv 2103.09762).
"""

import numpy as np


def average_accuracy(accuracy: np.ndarray) -> float:
  """Returns ACC: the mean accuracy over all tasks after the last one has been learned, in percent.

  Args:
    accuracy: accuracy matrix [T, T].
  """
  return float(np.mean(_square(accuracy)[-1]))


def bwt(accuracy: np.ndarray) -> float | None:
  """Returns the backward transfer: the mean over i < T-1 of A[T-1, i] - A[i, i].

  Negative values mean forgetting.

  Args:
    accuracy: accuracy matrix [T, T].

  Returns:
    Percentage points. None for a single task, and if the diagonal was not measured, as in joint
    training.
  """
  a = _square(accuracy)
  change = (a[-1] - np.diag(a))[:-1]
  return float(np.mean(change)) if change.size and np.isfinite(change).all() else None


def forgetting(accuracy: np.ndarray) -> float | None:
  """Returns the forgetting as the authors' code computes it: the mean of A[i, i] - A[T-1, i].

  The mean is over all T tasks; the last task contributes 0.

  Args:
    accuracy: accuracy matrix [T, T].

  Returns:
    Percentage points; None if the diagonal was not measured.
  """
  a = _square(accuracy)
  loss = np.diag(a) - a[-1]
  return float(np.mean(loss)) if np.isfinite(loss).all() else None


def by_task_id(final: np.ndarray, task_ids: list[int]) -> np.ndarray:
  """Reorders final accuracies from the order of training to the order of the task ids.

  Args:
    final: accuracies [T] in the order of training.
    task_ids: ids of the tasks in the order of training, a permutation of 0..T-1.

  Returns:
    Accuracies [T], that of task k at index k.

  Raises:
    ValueError: if `task_ids` is not a permutation.
  """
  final = np.asarray(final, float)
  if sorted(task_ids) != list(range(len(final))):
    raise ValueError(f"task_ids must be a permutation of 0..{len(final) - 1}, got {task_ids}")
  out = np.empty(len(final))
  out[np.asarray(task_ids)] = final
  return out


def opd(final_by_order: np.ndarray) -> np.ndarray:
  """Returns the order-normalised performance disparity (OPD) of each task.

  It is the largest minus the smallest final accuracy of the task over the task orders.

  Args:
    final_by_order: final accuracies [num_orders, T], the columns by task id (`by_task_id`), each
      value averaged over seeds.

  Returns:
    Percentage points [T].

  Raises:
    ValueError: if there are fewer than two orders.
  """
  p = np.asarray(final_by_order, float)
  if p.ndim != 2 or len(p) < 2:
    raise ValueError(
      f"order metrics need [num_orders, T] with at least two orders, got shape {p.shape}"
    )
  return p.max(0) - p.min(0)


def mopd(final_by_order: np.ndarray) -> float:
  """Returns MOPD: the largest OPD of all tasks, in percentage points (see `opd`)."""
  return float(opd(final_by_order).max())


def aopd(final_by_order: np.ndarray) -> float:
  """Returns AOPD: the mean OPD over all tasks, in percentage points (see `opd`)."""
  return float(opd(final_by_order).mean())


def _square(accuracy: np.ndarray) -> np.ndarray:
  """Returns an accuracy matrix as floats; raises ValueError if it is not square."""
  a = np.asarray(accuracy, float)
  if a.ndim != 2 or a.shape[0] != a.shape[1] or not a.size:
    raise ValueError(f"expected an accuracy matrix [T, T] with T >= 1, got shape {a.shape}")
  return a
