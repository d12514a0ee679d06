"""Wrong configs of every kind: one line that names the key, and nothing left behind."""

import math
import random

import hypothesis
import pytest
from hypothesis import strategies as st
from ml_collections import config_dict

from halrp_jax import keys, main, methods
from halrp_jax.runs import experiment
from halrp_jax.types import UserError

from .conftest import ROOT

NUM_BAD, NUM_COMMANDS = 500, 20

# What people write into configs: slips of type, sign, size and spelling.
SLIPS = st.one_of(
  st.sampled_from([None, True, False, "", " ", "none", "nan", "yes", "1e-3", "0.5", b"bytes"]),
  st.sampled_from(
    [math.nan, math.inf, -math.inf, 0, 0.0, -0.0, -1, -1e-3, 1.5, 2.0, 10**30, 1e300]
  ),
  st.integers(),
  st.floats(),
  st.text(max_size=12),
  st.lists(st.integers(), max_size=3),
  st.dictionaries(st.text(min_size=1, max_size=4), st.integers(), max_size=2),
)
FREE = {"data_dir", "data.cache", "data.tasks"}  # texts that only the data can prove wrong


def keys_of(method):
  known = keys.keys_of(methods.METHODS[method].Config)
  return {k: v for k, v in known.items() if k not in FREE}


def means_a_default(key, value):
  """None leaves a switch to the variant."""
  return value is None and key.default is None


@st.composite
def bad_values(draw):
  """-> method, dotted key, value that the key does not accept"""
  method = draw(st.sampled_from(sorted(methods.METHODS)))
  name = draw(st.sampled_from(sorted(keys_of(method))))
  key = keys_of(method)[name]
  fits = {"benchmark": ["digits"], "network": ["mlp"], "order": [str(s) for s in range(5)]}

  def is_bad(value):
    if name in fits:
      return value not in [*fits[name], "natural", "lenet"]
    return not means_a_default(key, value) and not key.accepts(value)

  return method, name, draw(SLIPS.filter(is_bad))


@st.composite
def misspelt(draw):
  """-> method, key that does not exist, value"""
  method = draw(st.sampled_from(sorted(methods.METHODS)))
  known = keys.keys_of(methods.METHODS[method].Config)
  name = draw(st.sampled_from(sorted(known)))
  at = draw(st.integers(0, len(name.rpartition(".")[2]) - 1)) - len(name.rpartition(".")[2])
  slip = draw(st.sampled_from(["", "x", "_"]))
  wrong = name[:at] + slip + (name[at + 1 :] if at < -1 else "")
  hypothesis.assume(wrong not in known and not wrong.endswith("."))
  hypothesis.assume(wrong.partition(".")[0] not in known or "." not in wrong)
  hypothesis.assume(wrong not in {k.partition(".")[0] for k in known})
  return method, wrong, 1


def spoiled(build, method, name, value):
  """A config with one value put in past the checks of ml_collections."""
  values = build(method).to_dict()
  section, _, key = name.rpartition(".")
  (values[section] if section else values)[key] = value
  return config_dict.ConfigDict(values, convert_dict=False)


def test_bad_configs_are_refused_by_name(digits_config, tmp_path):
  tried, workdir = [], tmp_path / "run"

  @hypothesis.settings(
    max_examples=NUM_BAD,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(case=st.one_of(bad_values(), bad_values(), bad_values(), misspelt()))
  def is_refused(case):
    method, name, value = case
    with pytest.raises(UserError) as e:
      experiment.run(spoiled(digits_config, method, name, value), str(workdir))
    assert name in " ".join(str(e.value).split())
    assert not workdir.exists()
    tried.append(case)

  is_refused()
  assert len(tried) >= NUM_BAD


SPOKEN = {
  "epochs": ["0", "-3", "2.5", "many", "[1]", "nan"],
  "learning_rate": ["0", "-1e-3", "nan", "inf", "fast"],
  "train_fraction": ["0", "1.5", "-0.1", "half"],
  "seed": ["-1", "0.5", "x"],
  "protocol.keep": ["first", "1"],
  "protocol.shuffle": ["maybe", "2"],
  "method.alpha": ["-0.1", "1.01", "nan", "all"],
  "method.warmup_epochs": ["30", "-1", "1.5"],
  "method.prune_bound": ["-1", "some"],
  "checkpoint.every_epochs": ["0", "often"],
  "order": ["F", "0,1", "0,0,1", "''"],
  "network": ["lenets", "7"],
}


def test_the_command_line_refuses_them_too(tmp_path, capsys):
  rng = random.Random(0)
  for key in rng.choices(sorted(SPOKEN), k=NUM_COMMANDS):
    value, workdir = rng.choice(SPOKEN[key]), tmp_path / "run"
    code = main.main(
      [
        "main",
        f"--config={ROOT}/configs/digits.py",
        f"--workdir={workdir}",
        f"--config.{key}={value}",
      ]
    )
    error = capsys.readouterr().err
    assert code == 2, (key, value, error)
    assert error.startswith("error: ") and error.count("\n") == 1 and key in error, error
    assert not workdir.exists(), error
