"""What the extras tfds, bench (PyTorch, timm) and hub add. `make test-all` installs them."""

import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from halrp_jax.data import prepared

from .conftest import ROOT
from .runs import test_framing
from .runs.test_convert import CASES

pytestmark = pytest.mark.extra


def needs(package: str):
  missing = importlib.util.find_spec(package) is None
  return pytest.mark.skipif(missing, reason=f"{package} is not installed: make test-all")


@needs("tensorflow")
def test_tensorflow_prepares_a_set_that_is_then_read(tmp_path):
  """In a process of its own: TensorFlow warns, takes over signals, and its builders register."""
  code = f"""
import numpy as np
import tensorflow_datasets as tfds
from halrp_jax.data import prepared


class OwnPictures(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {{
      "image": tfds.features.Image(shape=(6, 5, 3)),
      "label": tfds.features.ClassLabel(names=["cat", "dog", "owl"]),
    }}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {{"train": self._generate_examples(7), "test": self._generate_examples(4)}}

  def _generate_examples(self, count):
    for i in range(count):
      yield i, {{"image": np.full((6, 5, 3), i, np.uint8), "label": i % 3}}


found = prepared.labelled({str(tmp_path)!r}, "own_pictures", (6, 5, 3))
np.savez({str(tmp_path / "found.npz")!r}, image=found.image, label=found.label)
print(found.num_train, *found.class_names)
"""
  script = tmp_path / "script.py"  # TFDS asks for the file of a builder
  script.write_text(code)
  done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == "7 cat dog owl"
  found = np.load(tmp_path / "found.npz")
  assert found["image"].shape == (11, 6, 5, 3)
  assert sorted(found["image"][:7, 0, 0, 0]) == list(range(7))  # TFDS shuffles what it writes
  np.testing.assert_array_equal(found["label"], found["image"][:, 0, 0, 0] % 3)
  assert list((tmp_path / "own_pictures").rglob("*.array_record*"))
  assert prepared.__name__ not in done.stderr


@needs("torch")
@pytest.mark.parametrize("network", ["lenet", "wide_lenet", "alexnet", "resnet18", "mlp"])
def test_the_networks_in_pytorch_are_as_large_as_ours(network, monkeypatch):
  import jax

  from halrp_jax import models
  from halrp_jax.training import networks

  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  import torch_networks

  shape = (32, 32, 3)
  ours = jax.eval_shape(
    lambda: networks.initialize(models.make(network, 10), jax.random.key(0), shape)[0]
  )
  theirs = getattr(torch_networks, network)(3, 10)
  sizes = [int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(ours)]
  assert sum(sizes) == sum(p.numel() for p in theirs.parameters())


@needs("torch")
def test_the_benchmark_times_pytorch_beside_ours():
  command = [sys.executable, "benchmarks/throughput.py", "--networks=mlp", "--torch"]
  command += ["--rounds=1", "--repeats=1"]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  steps = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("mlp ")]
  assert steps == ["STL", "HALRP", "plain", "torch"]


@needs("huggingface_hub")
def test_a_base_comes_from_the_hub_at_a_revision(tmp_path):
  """From a server of this machine that answers as the Hub does, in a process of its own."""
  contents, commit = b"a file of parameters", "0" * 40

  class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
      known = self.path == f"/org/name/resolve/{commit}/base.safetensors"
      self.send_response(200 if known else 404)
      headers = {"ETag": '"12345"', "X-Repo-Commit": commit, "Content-Length": len(contents)}
      for name, value in headers.items() if known else {"Content-Length": 0}.items():
        self.send_header(name, str(value))
      self.end_headers()

    def do_GET(self):
      self.do_HEAD()
      self.wfile.write(contents)

    def log_message(self, *args):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
      "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
      "HF_HOME": str(tmp_path),
      "HF_HUB_DISABLE_XET": "1",
    }
    found = []
    for revision in (commit, "1" * 40):
      code = f"""
from halrp_jax.runs import remote
from halrp_jax.types import UserError
try:
  print(remote.local_path("base", "hf://org/name/base.safetensors@{revision}").read_text())
except UserError as e:
  print(e)
"""
      arguments = [sys.executable, "-c", code]
      done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
      assert done.returncode == 0, done.stderr
      found.append(done.stdout.strip())
    server.shutdown()
  assert found[0] == contents.decode()
  assert "could not be downloaded" in found[1]


@needs("timm")
def test_the_stored_logits_are_timms():
  code = "import json, timm_logits; print(json.dumps(timm_logits.compute('vit')))"
  environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
  arguments = [sys.executable, "-c", code]
  done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  found, stored = json.loads(done.stdout.strip().splitlines()[-1]), CASES["vit"]
  np.testing.assert_allclose(found.pop("logits"), stored["logits"], atol=1e-5)
  assert found == {k: v for k, v in stored.items() if k != "logits"}


@needs("timm")
@needs("torchvision")
@pytest.mark.parametrize("name", ["vit", "torchvision_v2"])
def test_the_stored_photographs_are_timms(name):
  code = f"import json, timm_photographs as t; print(json.dumps(t.compute({name!r})))"
  environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
  arguments = [sys.executable, "-c", code]
  done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  found, stored = json.loads(done.stdout.strip().splitlines()[-1]), test_framing.CASES[name]
  np.testing.assert_allclose(found["input"], stored["input"], atol=0.02)
  assert found["crop"] == stored["crop"] and found["source"] == stored["source"]
