"""The key `deterministic`: a GPU's flag, in place before XLA starts, from the command line on."""

import os
import subprocess
import sys

import jax
import pytest

from halrp_jax.devices import determinism
from halrp_jax.runs import experiment
from halrp_jax.types import UserError

from ..conftest import ROOT

ALL = f"{determinism.FLAG}=true"

# Stands for the run: at its place XLA has not started; then it starts, which refuses unknown flags.
PROGRAM = """
import os, sys, jax
from halrp_jax import main
from halrp_jax.runs import experiment
from halrp_jax.types import UserError

def build(config):
  jax.config.update("jax_cpu_get_local_topology_timeout_minutes", 3)  # refused once XLA runs
  assert jax.config.jax_num_cpu_devices == -1
  jax.devices()
  raise UserError(f"flags {os.environ.get('XLA_FLAGS')}")

experiment.build = build
sys.exit(main.main(["main", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(
  ("key", "before", "after"),
  [
    ("true", "--xla_force_host_platform_device_count=2", "{before} " + ALL),
    ("false", "--xla_force_host_platform_device_count=2", "{before}"),
  ],
)
def test_the_flag_reaches_xla_before_it_starts(tmp_path, key, before, after):
  result = subprocess.run(
    [
      *(sys.executable, "-c", PROGRAM, f"--config={ROOT}/configs/digits.py"),
      *(f"--workdir={tmp_path}", f"--config.deterministic={key}"),
    ],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": before},
    timeout=120,
  )
  assert result.stderr == f"error: flags {after.format(before=before)}\n"


def test_too_late_is_one_clear_line(digits_config, tmp_path, monkeypatch):
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  jax.devices()
  with pytest.raises(UserError, match="comes too late"):
    experiment.run(digits_config(deterministic=True), str(tmp_path / "run"))
  assert "XLA_FLAGS" not in os.environ and not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [ALL, determinism.FLAG, f"--xla_dump_to=x {determinism.FLAG}=1"])
def test_who_set_the_flag_before_the_start_is_never_late(given, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", given)
  jax.devices()
  determinism.require()
  assert os.environ["XLA_FLAGS"] == given


@pytest.mark.parametrize(
  ("given", "says"),
  [(f"{determinism.FLAG}=false", "remove that flag"), ("/etc/xla_flags", "names a file")],
)
def test_flags_that_contradict_are_refused(given, says, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", given)
  with pytest.raises(UserError, match=says):
    determinism.require()
  assert os.environ["XLA_FLAGS"] == given
