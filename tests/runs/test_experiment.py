"""The loop over tasks: what is evaluated."""

import pytest

from halrp_jax.methods import METHODS
from halrp_jax.runs import experiment


@pytest.mark.parametrize(
  ("method_name", "overrides", "evaluated"),
  [
    ("halrp", {}, [1, 1, 1]),  # a task never changes again
    # every task but the first is pruned again whenever one is learned
    ("halrp", {"method.prune_scope": "all", "method.prune_bound": 0.01}, [1, 1, 2]),
    ("l2", {}, [1, 2, 3]),  # the weights of all tasks change
  ],
)
def test_only_tasks_whose_arrays_have_changed_are_evaluated_again(
  method_name, overrides, evaluated, digits_config, tmp_path, monkeypatch
):
  counts = []

  def evaluate(predict_fn, tasks, split, batch_size):
    counts.append((split, len(tasks)))
    return real(predict_fn, tasks, split, batch_size)

  real = experiment.evaluate
  monkeypatch.setattr(experiment, "evaluate", evaluate)
  config = digits_config(method_name, order="3,1,2", **overrides)
  record = experiment.run(config, str(tmp_path / "counted"))
  assert [n for split, n in counts if split == "test"] == evaluated

  again = experiment.run(
    digits_config(method_name, order="3,1,2", evaluation="all", **overrides), str(tmp_path / "all")
  )
  assert record["accuracy"] == again["accuracy"]
  assert [len(positions) for positions in record["evaluated"]] == evaluated
  assert again["evaluated"] == [[0], [0, 1], [0, 1, 2]]


# methods that leave old tasks, and all that these share, as they are
KEPT = {"apdfix", "be", "bn", "clr", "halrp", "stl"}
SHARED = {"network": "lenet", "data.image_size": 16, "method.bn_scope": "shared"}  # BatchNorm


@pytest.mark.parametrize(
  ("method_name", "keys"),
  [
    *(
      pytest.param(n, {}, marks=[pytest.mark.slow] * (n not in ("gpm", "wsn", "be")), id=n)
      for n in METHODS
    ),
    pytest.param("clr", SHARED, marks=pytest.mark.slow, id="clr-shared"),
  ],
)
def test_what_is_carried_over_is_what_an_evaluation_of_all_finds(
  method_name, keys, digits_config, tmp_path
):
  records = []
  for evaluation in ("changed", "all"):
    config = digits_config(method_name, order="3,1,2", evaluation=evaluation, **keys)
    records.append(experiment.run(config, str(tmp_path / evaluation)))
  changed, every = records
  assert changed["accuracy"] == every["accuracy"]
  assert changed["state_hash"] == every["state_hash"]
  kept = changed["evaluated"] == [[0], [1], [2]]
  assert kept == (method_name in KEPT and not keys)
