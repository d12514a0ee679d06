"""The code of the documents runs: the guide on small random images, the examples of the README."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from .conftest import ROOT
from .data.test_data import write_small_cifar

GUIDE = (ROOT / "docs" / "guide.md").read_text()
QUICK = (
  "--config.network=mlp --config.train_fraction=0.5 --config.epochs=2 --config.allow_partial=True"
)


def blocks(text=GUIDE):
  return re.findall(r"^```(sh|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_every_block_runs(tmp_path, monkeypatch):
  write_small_cifar(tmp_path, per_class=50)
  configs = tmp_path / "configs"
  configs.symlink_to(ROOT / "configs")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("DATA", str(tmp_path))
  path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
  names = {}
  for kind, text in blocks():
    if kind == "python" and not text.startswith("# in another process"):
      exec(compile(text, "guide.md", "exec"), names)
      continue
    text = text.replace("--config.train_fraction=0.05", QUICK)
    line = [sys.executable, "-c", text] if kind == "python" else ["bash", "-ec", text]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"PATH": path})
    # check_data and predict say with 1 that something is worth a look
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
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
