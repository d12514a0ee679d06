import pytest

from halrp_jax import keys, methods
from halrp_jax.config import resolve
from halrp_jax.runs import experiment
from halrp_jax.types import UserError

from .conftest import ROOT


@pytest.mark.parametrize(
  ("overrides", "named"),
  [
    ({"epochs": 0}, "epochs must be a whole number >= 1, got 0"),
    ({"epochs": 2.5}, "epochs"),
    ({"epochs": True}, "epochs"),
    ({"learning_rate": float("nan")}, "learning_rate"),
    ({"learning_rate": float("inf")}, "learning_rate"),
    ({"learning_rate": 0.0}, "learning_rate must be a number > 0"),
    ({"train_fraction": 1.5}, "train_fraction"),
    ({"train_fraction": 0}, "train_fraction"),
    ({"batch_size": "many"}, "batch_size"),
    ({"seed": -1}, "seed"),
    ({"protocol.shuffle": 1}, "protocol.shuffle must be true or false"),
    ({"protocol.keep": "first"}, "protocol.keep must be one of last, best"),
    ({"protocol.validation_fraction": 0.95}, "protocol.validation_fraction"),
    ({"method.alpha": -0.1}, "method.alpha"),
    ({"method.variant": "mine"}, "method.variant must be one of"),
    ({"method.prune_bound": "some"}, "method.prune_bound must be a number >= 0, or none"),
    ({"method.prune": "all"}, "method.prune must be one of none, absolute"),
    ({"method.warmup_epochs": 2}, "method.warmup_epochs = 2 must be less than epochs = 2"),
    ({"protocol.validation_fraction": 0}, "method.importance_split = 'valid' needs"),
    ({"method.rank_rule": "flat", "method.upper_rank": 0}, "method.rank_rule = 'flat' needs"),
    ({"method.rank_rule": "random", "method.sigma": "kept"}, "method.sigma=folded"),
    (
      {"network": "lenets"},
      "got 'lenets' (did you mean lenet?)",
    ),
    ({"benchmark": "cifar"}, "benchmark must be one of"),
    ({"parallel": "tpu"}, "parallel must be one of auto, none, sharded, pmap, replicas"),
  ],
)
def test_a_bad_value_is_refused_by_name(digits_config, overrides, named):
  with pytest.raises(UserError) as e:
    resolve(digits_config(**overrides))
  assert named in str(e.value)


def test_an_epoch_without_a_batch_is_refused(digits_config):
  config = digits_config(**{"batch_size": 2000, "protocol.last_batch": "drop"})
  with pytest.raises(UserError, match="batch_size = 2000 .* no batch out of 1038 images"):
    experiment.build(resolve(config))


def test_all_errors_are_listed_at_once(digits_config):
  with pytest.raises(UserError, match="(?s)epochs.*batch_size.*method.alpha"):
    resolve(digits_config(**{"epochs": -1, "batch_size": 0, "method.alpha": "x"}))


def test_an_unknown_method_names_the_nearest(digits_config):
  with pytest.raises(UserError, match=r"unknown method 'halpr' \(did you mean halrp\?\)"):
    digits_config("halpr")


@pytest.mark.parametrize("variant", ["code", "paper", "published"])
def test_a_variant_sets_every_switch_and_each_can_be_set_alone(digits_config, variant):
  config = resolve(digits_config(**{"method.variant": variant}))
  own = keys.spec(methods.METHODS["halrp"].Config)
  switches = [k for k, key in own.items() if key.default is None]
  assert set(switches) == set(methods.METHODS["halrp"].VARIANTS[variant])
  for k in switches:
    assert getattr(config.method, k) == methods.METHODS["halrp"].VARIANTS[variant][k]
  changed = resolve(digits_config(**{"method.variant": variant, "method.importance": "mean"}))
  assert changed.method.importance == "mean" and changed.method.prune == config.method.prune


def test_published_is_code_with_the_squared_norm_and_tasks_that_stay_as_they_were_learned():
  variants = methods.METHODS["halrp"].VARIANTS
  assert variants["published"] == variants["code"] | {"importance": "sum", "prune_scope": "new"}


@pytest.mark.parametrize("bound", ["none", 0, 0.2])
def test_prune_bound_is_a_number_or_none(digits_config, bound):
  assert resolve(digits_config(**{"method.prune_bound": bound}))


def test_every_key_accepts_its_default():
  for method in methods.METHODS.values():
    for name, key in keys.keys_of(method.Config).items():
      assert key.default is None or key.accepts(key.default), name


def test_the_table_in_the_docs_is_the_one_in_the_code():
  text = (ROOT / "docs" / "configuration.md").read_text()
  assert keys.table(keys.keys_of()) in text
  for name, method in methods.METHODS.items():
    own = {f"method.{k}": v for k, v in keys.spec(method.Config).items()}
    assert f"## {name}\n\n{keys.table(own)}" in text
