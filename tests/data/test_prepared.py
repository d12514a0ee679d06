"""What TFDS has prepared is read without TensorFlow."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from halrp_jax import data
from halrp_jax.config import resolve
from halrp_jax.data import prepared
from halrp_jax.types import UserError

from . import originals

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def config_of(benchmark, **data_keys):
  config = originals.config_of(benchmark, "")
  values = config.to_dict()
  values["data"] |= {"source": "tfds"} | data_keys
  return resolve(values)


@pytest.fixture
def mocked():
  with tfds.testing.mock_data(num_examples=400):
    yield


def test_importing_us_imports_neither(tmp_path):
  code = (
    "import sys, halrp_jax.main; "
    "assert not {'tensorflow', 'tensorflow_datasets'} & sys.modules.keys()"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
  ("benchmark", "num_tasks", "names"),
  [("pmnist20", 20, "0123456789"), ("pmnist", 10, "0123456789")],
)
def test_mnist(mocked, benchmark, num_tasks, names):
  benchmark = data.load(config_of(benchmark))
  assert len(benchmark.tasks) == num_tasks and benchmark.partial
  assert benchmark.tasks[0].class_names == tuple(names)
  assert len(benchmark.tasks[0].train.index) == len(benchmark.tasks[0].test.index) == 400


def test_sets_of_images_with_one_label(mocked):
  for name, shape in (
    ("cifar10", (32, 32, 3)),
    ("svhn", (32, 32, 3)),
    ("fashion_mnist", (28, 28, 1)),
  ):
    found = prepared.labelled("", name, shape)
    assert found.image.shape == (800, *shape) and found.num_train == 400
    assert len(found.class_names) == 10 and found.label.max() < 10
  with pytest.raises(UserError, match="TFDS set mnist: images are .28, 28, 1., expected"):
    prepared.labelled("", "mnist", (32, 32, 3))


def test_cifar100_has_two_kinds_of_labels(mocked):
  found, coarse, names = prepared.cifar100("")
  assert len(found.class_names) == 100 and len(names) == 20 and len(coarse) == 800


def test_any_set_as_own_data(mocked):
  benchmark = data.load(config_of("custom", tasks="mnist, cifar10", image_size=16))
  assert [t.name for t in benchmark.tasks] == ["mnist", "cifar10"]
  assert benchmark.image_shape == (16, 16, 3)
  with pytest.raises(UserError, match="data.tasks is empty"):
    data.load(config_of("custom"))


def test_what_is_not_prepared_says_how(monkeypatch, tmp_path):
  monkeypatch.setattr(prepared.importlib.util, "find_spec", lambda name: None)  # no TensorFlow
  with pytest.raises(UserError, match=r"mnist is not prepared in .*TensorFlow.*\[tfds\]"):
    prepared.labelled(str(tmp_path), "mnist", (28, 28, 1))
  assert not list(tmp_path.iterdir())


def test_a_set_that_tfds_does_not_know():
  with pytest.raises(UserError, match="TFDS has no set 'no_such_set'"):
    prepared.any_images("", "no_such_set", 32)


def test_a_set_without_labels(mocked):
  with pytest.raises(UserError, match="TFDS set div2k: has no feature 'image'; choose a set with"):
    prepared.any_images("", "div2k", 32)


def test_a_set_that_can_not_be_read(monkeypatch, tmp_path):
  def fail(self, split):
    raise ValueError(f"Unknown split {split!r}. Should be one of ['train']")

  monkeypatch.setattr(tfds.core.DatasetBuilder, "as_data_source", fail)
  (tmp_path / "mnist" / "3.0.1").mkdir(parents=True)
  with pytest.raises(UserError, match="TFDS set mnist, split train: can't be read .Unknown split"):
    prepared.labelled(str(tmp_path), "mnist", (28, 28, 1))


def test_images_are_those_of_the_source(mocked):
  (source,) = [tfds.builder("mnist").as_data_source(split="train")]
  found = prepared.labelled("", "mnist", (28, 28, 1))
  np.testing.assert_array_equal(found.image[3], source[3]["image"])
  assert found.label[3] == source[3]["label"]
