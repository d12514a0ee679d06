"""The code of the documents runs: the guide on small random images, the examples of the README."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from halrp_jax import __main__ as verbs
from halrp_jax import main

from .conftest import ROOT
from .data.test_data import write_small_cifar

GUIDE = (ROOT / "docs" / "guide.md").read_text()
QUICK = (
  "--config.network=mlp --config.train_fraction=0.5 --config.epochs=2 --config.allow_partial=True"
)


def blocks(text=GUIDE):
  return re.findall(r"^```(sh|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


# in place of the interpreter: the command line as bash passes it, for a call in this process
WRITE_ARGUMENTS = """python() { printf '%s\\0' "$@" >>arguments; printf '\\0' >>arguments; }\n"""


def run_in_shell(text):
  """Runs a block of shell commands, `python -m ...` each, in this process."""
  subprocess.run(["bash", "-ec", WRITE_ARGUMENTS + text], check=True)
  with open("arguments", encoding="utf-8") as stream:
    lines = stream.read().split("\0\0")[:-1]
  os.remove("arguments")
  for line in lines:
    m, module, *arguments = line.split("\0")
    call = {"halrp_jax": verbs.main, "halrp_jax.main": main.main}[module]
    # check_data and predict say with 1 that something is worth a look
    assert m == "-m" and call([module, *arguments]) == 0, text


@pytest.mark.slow
def test_every_block_runs(tmp_path, monkeypatch):
  write_small_cifar(tmp_path, per_class=50)
  configs = tmp_path / "configs"
  configs.symlink_to(ROOT / "configs")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("DATA", str(tmp_path))
  names = {}
  for kind, text in blocks():
    if kind == "sh":
      run_in_shell(text.replace("--config.train_fraction=0.05", QUICK))
    elif text.startswith("# in another process"):
      subprocess.run([sys.executable, "-c", text], check=True)
    else:
      exec(compile(text, "guide.md", "exec"), names)
  assert len(blocks()) > 10


def test_no_output_is_missing():
  assert "OUTPUT" not in GUIDE


@pytest.mark.parametrize("document", ["README.md", "docs/index.md"])
def test_the_example_runs(document):
  """It says that the perturbed network still is the base, and that merging it gives parameters."""
  text = (ROOT / document).read_text(encoding="utf-8")
  (example,) = [code for kind, code in blocks(text) if kind == "python"]
  names = {}
  exec(compile(example, document, "exec"), names)
  network, x = names["network"], names["x"]
  base = network.apply(names["base"], x)
  np.testing.assert_allclose(names["logits"], base, atol=1e-5)
  np.testing.assert_allclose(network.apply({"params": names["params"]}, x), base, atol=1e-5)
