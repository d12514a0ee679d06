"""The loop over tasks: what is evaluated."""

import pytest

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

  monkeypatch.setattr(experiment, "_unchanged", lambda *args: {})
  again = experiment.run(config, str(tmp_path / "all"))
  assert record["accuracy"] == again["accuracy"]
