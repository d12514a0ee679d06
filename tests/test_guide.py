"""docs/guide.md: every block runs, top to bottom, on small random images."""

import os
import re
import subprocess
import sys

from .conftest import ROOT
from .data.test_data import write_small_cifar

GUIDE = (ROOT / "docs" / "guide.md").read_text()
QUICK = (
  "--config.network=mlp --config.train_fraction=0.5 --config.epochs=2 --config.allow_partial=True"
)


def blocks():
  return re.findall(r"^```(sh|python)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


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
