"""The code of the documents runs: the guide on small random images, the examples of the README."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from halrp_jax import __main__ as verbs
from halrp_jax import main

from .conftest import ROOT
from .data.test_data import write_small_cifar
from .runs.test_convert import CASES, drawn

GUIDE = (ROOT / "docs" / "guide.md").read_text()
QUICK = (
  "--config.network=mlp --config.train_fraction=0.5 --config.epochs=2 --config.allow_partial=True"
)


def blocks(text=GUIDE):
  return re.findall(r"^```(sh|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


# of section 6, on a smaller network
QUICK_PHOTOS = "--config.network=vit_ti16,num_blocks=2 --config.epochs=2 --config.base"


def write_photos(folder):
  """Writes 64 images for the walk of section 6, and the base that its tasks start from."""
  rng = np.random.default_rng(0)
  for i in range(64):
    task, c = divmod(i % 10, 2)
    path = folder / "photos" / f"task{task}" / "abc"[c]
    path.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 200, (80, 70, 3), np.uint8) + np.uint8(50 * c)
    Image.fromarray(pixels).save(path / f"{i}.jpg")
  shapes = CASES["vit"]["arrays"]
  arrays = {n: drawn(n, tuple(s)) for n, s in shapes.items()}
  two = {n: x for n, x in arrays.items() if not re.match(r"blocks\.([2-9]|1\d)\.", n)}
  safetensors.numpy.save_file(two, folder / "base.safetensors")


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
  write_photos(tmp_path)
  monkeypatch.setenv("DATA", str(tmp_path))
  monkeypatch.setenv("PHOTOS", str(tmp_path / "photos"))
  monkeypatch.setenv("BASE", str(tmp_path / "base.safetensors"))
  names = {}
  for kind, text in blocks():
    if kind == "sh":
      text = text.replace("--config.train_fraction=0.05", QUICK)
      run_in_shell(text.replace("--config.network=efficientnet_lite0 --config.base", QUICK_PHOTOS))
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
