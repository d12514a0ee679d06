"""The rule by which benchmarks/compare.py fails; scripts whose numbers the documents have."""

import json
import os
import subprocess
import sys

import pytest

from .conftest import ROOT


@pytest.mark.parametrize(
  ("new", "expected"),
  [
    ([1.2, 1.2, 1.2, 1.2, 0.9], ["lenet-stl"]),  # four of five
    ([1.2, 1.2, 1.2, 0.9, 0.9], []),
    ([1.09, 1.09, 1.09, 1.09, 1.09], []),
  ],
)
def test_a_step_is_slower_by_a_tenth_in_four_of_five_rounds(new, expected, monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  import compare

  base = {"step": [1.0] * 5, "compile": [1.0, 1.0]}
  found = {"lenet-stl": {"base": base, "new": {"step": new, "compile": [9.0, 9.0]}}}
  assert compare.slower(found) == expected


def run(*command):
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  arguments = [sys.executable, *command]
  done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("network", ["vit_s16", "efficientnet_lite0"])
def test_a_step_of_halrp_takes_fewer_operations_and_less_memory_for_the_optimizer(network):
  out = run("benchmarks/pretrained_step.py", "--smoke", f"--networks={network}", "--rounds=1")
  head, *rows = [line.split() for line in out.splitlines()]
  names = head[1:]  # a row's own name has several words
  full, own = (dict(zip(names, map(float, r[-len(names) :]), strict=True)) for r in rows)
  assert full["ratio"] == full["gflop_ratio"] == 1 and full["ms"] > 0 and own["ms"] > 0
  assert own["gflop_ratio"] < 0.9 and own["optimizer"] < full["optimizer"] / 5
  assert own["arguments"] < full["arguments"] / 2
  for row in (full, own):
    assert row["arguments"] + row["temporary"] <= row["peak"] + 0.02


@pytest.mark.slow
def test_a_base_is_learned_on_exported_without_it_and_read_again(tmp_path):
  """At ViT-Ti's size; docs/pretrained.md has what 86 million parameters take."""
  more = ("--network=vit_ti16,num_blocks=2", "--size=32", "--rank=2", "--images=5")
  out = run("benchmarks/large_base.py", f"--workdir={tmp_path / 'run'}", *more)
  found = json.loads(out.splitlines()[-1])
  assert found["logits_same_bits"] and found["difference_to_first_task"] > 0.1
  assert found["ranks"] == [2] and len(found["losses"]) == 10
  assert found["losses"][-1] < found["losses"][0]
  assert found["share_of_base"] < 0.05 and found["bytes_task"] > 10_000
