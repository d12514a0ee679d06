"""What the extras tfds (TensorFlow) and bench (PyTorch) add. `make test-all` installs them."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from halrp_jax.data import prepared

from .conftest import ROOT

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
