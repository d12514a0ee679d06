"""Accuracy matrix -> numbers of the field. numpy only, percent in, percentage points out.

`A[s, i]` is the test accuracy on the i-th task of the sequence after learning s tasks more than
one (rows and columns 0..T-1, NaN above the diagonal). Sources: HALRP paper Sect. 5.2, GPM.
"""

import numpy as np


def average_accuracy(accuracy: np.ndarray) -> float:
  """ACC: mean over the tasks after the last one was learned. [T, T] -> percent."""
  return float(np.mean(_square(accuracy)[-1]))


def bwt(accuracy: np.ndarray) -> float | None:
  """Backward transfer: mean over i < T-1 of A[T-1, i] - A[i, i]; negative means forgetting.

  None with a single task, and where the diagonal was never measured (joint training).
  """
  a = _square(accuracy)
  change = (a[-1] - np.diag(a))[:-1]
  return float(np.mean(change)) if change.size and np.isfinite(change).all() else None


def forgetting(accuracy: np.ndarray) -> float | None:
  """The authors' code: mean over ALL T tasks of A[i, i] - A[T-1, i] (the last one counts 0)."""
  a = _square(accuracy)
  loss = np.diag(a) - a[-1]
  return float(np.mean(loss)) if np.isfinite(loss).all() else None


def by_task_id(final: np.ndarray, task_ids: list[int]) -> np.ndarray:
  """Final accuracies in the order of training [T] -> in the order of the original ids [T]."""
  final = np.asarray(final, float)
  if sorted(task_ids) != list(range(len(final))):
    raise ValueError(f"task_ids must be a permutation of 0..{len(final) - 1}, got {task_ids}")
  out = np.empty(len(final))
  out[np.asarray(task_ids)] = final
  return out


def opd(final_by_order: np.ndarray) -> np.ndarray:
  """Order-normalised performance disparity per task: max - min over orders.

  Args:
    final_by_order: [num_orders, T] final accuracies, columns by ORIGINAL task id (`by_task_id`),
      each averaged over seeds.

  Returns:
    [T] percentage points.

  Raises:
    ValueError: with fewer than two orders, where a disparity over orders has no meaning.
  """
  p = np.asarray(final_by_order, float)
  if p.ndim != 2 or len(p) < 2:
    raise ValueError(f"order metrics need at least two orders [num_orders, T], got shape {p.shape}")
  return p.max(0) - p.min(0)


def mopd(final_by_order: np.ndarray) -> float:
  """Largest disparity over the tasks (`opd`)."""
  return float(opd(final_by_order).max())


def aopd(final_by_order: np.ndarray) -> float:
  """Mean disparity over the tasks (`opd`)."""
  return float(opd(final_by_order).mean())


def _square(accuracy: np.ndarray) -> np.ndarray:
  a = np.asarray(accuracy, float)
  if a.ndim != 2 or a.shape[0] != a.shape[1] or not a.size:
    raise ValueError(f"an accuracy matrix is [T, T] with T >= 1, got shape {a.shape}")
  return a
