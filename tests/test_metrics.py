import numpy as np
import pytest

from halrp_jax import metrics

NAN = np.nan
# learned in the order 0, 1, 2
A = np.array([[90.0, NAN, NAN], [80.0, 70.0, NAN], [85.0, 60.0, 50.0]])


def test_average_accuracy_is_the_mean_of_the_last_row():
  assert metrics.average_accuracy(A) == pytest.approx(65.0)


def test_bwt_leaves_out_the_last_task():
  assert metrics.bwt(A) == pytest.approx(((85 - 90) + (60 - 70)) / 2)


def test_forgetting_of_the_code_counts_all_tasks():
  assert metrics.forgetting(A) == pytest.approx((5 + 10 + 0) / 3)
  # BWT = -F T / (T - 1), spec e
  assert metrics.bwt(A) == pytest.approx(-metrics.forgetting(A) * 3 / 2)


def test_bwt_is_none_for_one_task_and_for_joint_training():
  assert metrics.bwt(np.array([[90.0]])) is None
  joint = np.array([[NAN, NAN], [80.0, 70.0]])
  assert metrics.bwt(joint) is None
  assert metrics.forgetting(joint) is None
  assert metrics.average_accuracy(joint) == 75


def test_order_metrics_map_back_to_original_ids():
  first = metrics.by_task_id([10, 20, 30], [0, 1, 2])
  second = metrics.by_task_id([33, 14, 20], [2, 0, 1])  # tasks 2, 0, 1 trained in this order
  np.testing.assert_array_equal(second, [14, 20, 33])
  np.testing.assert_array_equal(metrics.opd([first, second]), [4, 0, 3])
  assert metrics.mopd([first, second]) == 4
  assert metrics.aopd([first, second]) == pytest.approx(7 / 3)


def test_order_metrics_refuse_one_order():
  with pytest.raises(ValueError, match="two orders"):
    metrics.mopd([[1.0, 2.0]])


def test_by_task_id_refuses_what_is_no_permutation():
  with pytest.raises(ValueError, match="permutation"):
    metrics.by_task_id([1.0, 2.0], [0, 0])


@pytest.mark.parametrize("shape", [(2, 3), (0, 0), (4,)])
def test_a_matrix_must_be_square(shape):
  with pytest.raises(ValueError, match=r"\[T, T\]"):
    metrics.average_accuracy(np.zeros(shape))
