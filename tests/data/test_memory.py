"""100,000 images, learned by a process that may have 2 GiB of memory of its own.

The limit is RLIMIT_DATA: private memory that can be written, mapped or not. Pages of a file's
memory map are not counted, since the system can take them away at any time.
"""

import json
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halrp_jax import data, methods
from halrp_jax.config import make_config, resolve
from halrp_jax.data import residence
from halrp_jax.runs import checkpoint
from halrp_jax.training import evaluate
from halrp_jax.types import Benchmark, Inputs, Split, Store, Task

from ..conftest import ROOT

pytestmark = pytest.mark.slow
LIMIT = 2 * 2**30
NUM_IMAGES = 100_000


class Small(nn.Module):
  """A network whose activations are small, also for 224 x 224 pixels."""

  num_classes: int

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(nn.Conv(8, (7, 7), strides=7, name="conv")(x))
    return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


def in_a_small_process(call: str):
  """Returns what a function of this module returns in a process with the limit, by JSON."""
  code = (
    f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({LIMIT}, {LIMIT}));"
    f"import json; import tests.data.test_memory as t; print(json.dumps(t.{call}))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


def config_of(**keys):
  """STL, one epoch in batches of 16, images of 224 x 224 pixels."""
  config = make_config(
    "stl", epochs=1, batch_size=16, parallel="none", allow_partial=True, protocol={}
  )
  with config.unlocked():
    config.update_from_flattened_dict({"data.image_size": 224} | keys)
  return resolve(config)


def learned(config, benchmark, task):
  """Learns a task; -> steps, hash of the state, accuracies."""
  steps = []

  def log(event):
    if event["event"] == "progress":
      steps.append(event["step"])

  method = methods.make(config, Small(task.num_classes), benchmark._replace(tasks=(task,)))
  state, _ = method.learn(method.init(None, benchmark), (task,), jax.random.key(0), Store("a", log))
  accuracies = [
    evaluate.evaluate(lambda i, image: method.predict(state, i, image), [task], split, 16)[0]
    for split in ("train", "valid", "test")
  ]
  return {"steps": max(steps), "hash": checkpoint.fingerprint(state), "accuracies": accuracies}


def subset(task: Task) -> Task:
  """The task with no images but its own, on the device."""
  splits = [task.train, task.valid, task.test]
  rows = np.unique(np.concatenate([np.asarray(s.index) for s in splits]))
  image = jnp.asarray(np.array(task.train.image[rows]))
  assert image.nbytes < LIMIT / 4
  own = [
    Split(image, jnp.asarray(np.searchsorted(rows, s.index), jnp.int32), s.label) for s in splits
  ]
  return task._replace(train=own[0], valid=own[1], test=own[2])


def memory() -> dict[str, int]:
  """This process's memory: most that was resident, and the private part of it now, in bytes."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  found = dict(line.split(":", 1) for line in lines)
  return {k: 1024 * int(found[k].split()[0]) for k in ("VmHWM", "RssAnon", "VmData")}


# --- TinyImageNet, 64 x 64 pixels as stored ------------------------------------------------


def tiny(folder: str, where: str) -> dict:
  """Learns one of 20 tasks of TinyImageNet, and again with its own images alone on the device."""
  config = config_of(
    benchmark="tinyimagenet20",
    data_dir=folder,
    order="3,4",
    train_fraction=0.05,
    **{"data.residence": where, "data.cache": f"{folder}/cache"},
  )
  benchmark = data.load(config)
  task = benchmark.tasks[0]
  image = task.train.image
  found = {"where": learned(config, benchmark, task), "memory": memory(), "images": len(image)}
  assert benchmark.image_shape == (224, 224, 3) and isinstance(image, np.ndarray)
  assert residence.is_mapped(image) == (where == "disk")
  return found | {"device": learned(config, benchmark, subset(task))}


@pytest.fixture(scope="module")
def repeated(real_data, tmp_path_factory):
  """-> a folder with TinyImageNet in which links repeat the images at hand: 500 of every class."""
  original = pathlib.Path(real_data) / "tiny-imagenet-200"
  folder = tmp_path_factory.mktemp("tiny")
  copy = folder / "tiny-imagenet-200"
  copy.mkdir()
  for name in ("val", "wnids.txt", "words.txt"):
    (copy / name).symlink_to(original / name)
  for of_class in sorted((original / "train").iterdir()):
    images = sorted((of_class / "images").iterdir())
    own = copy / "train" / of_class.name / "images"
    own.mkdir(parents=True)
    for i in range(NUM_IMAGES // 200):
      (own / f"{of_class.name}_{i}.JPEG").symlink_to(images[i % len(images)])
  return str(folder)


@pytest.mark.parametrize("where", ["disk", "host"])
def test_tiny_imagenet_is_learned_in_2_gib_with_the_bits_of_the_device(where, repeated):
  found = in_a_small_process(f"tiny({repeated!r}, {where!r})")
  print(where, found)
  assert found["images"] > NUM_IMAGES
  assert found["where"] == found["device"] and found["where"]["steps"] >= 10
  assert found["memory"]["RssAnon"] < LIMIT


# --- a folder of photographs, decoded at 224 x 224 pixels ------------------------------------


def photos(folder: str) -> dict:
  """Decodes a folder of images, and learns 1 % of them."""
  keys = {"data_dir": f"{folder}/own", "data.residence": "disk", "data.cache": f"{folder}/cache"}
  config = config_of(benchmark="custom", order="natural", train_fraction=0.01, **keys)
  benchmark = data.load(config)
  (task,) = benchmark.tasks
  found = {"images": task.train.image.shape, "memory": memory()}
  return found | {"where": learned(config, benchmark, task)}


def test_a_folder_is_decoded_into_more_than_2_gib(real_data, tmp_path):
  """The file of the cache takes 2.4 GB. The images are those of TinyImageNet, enlarged."""
  originals = sorted((pathlib.Path(real_data) / "tiny-imagenet-200" / "train").rglob("*.JPEG"))
  for c in range(4):
    folder = tmp_path / "own" / "task" / f"class {c}"
    folder.mkdir(parents=True)
    for i in range(4000):
      (folder / f"{i}.jpg").symlink_to(originals[(4000 * c + i) % len(originals)])
  found = in_a_small_process(f"photos({str(tmp_path)!r})")
  print(found)
  assert found["images"] == [16_000, 224, 224, 3] and LIMIT < 16_000 * 224 * 224 * 3
  assert found["where"]["steps"] >= 5 and found["memory"]["RssAnon"] < LIMIT
  (file,) = (tmp_path / "cache").glob("*.npy")
  assert np.load(file, mmap_mode="r").shape[0] >= 16_000
  file.unlink()  # pytest keeps the folders of three runs


# --- images of 224 x 224 pixels -------------------------------------------------------------


def sparse(file: str, on_device: bool) -> dict:
  """Learns a task of 200 of the images in a file, and again with these alone on the device.

  With `on_device` all images are to be on the device, as they were without data.residence.
  """
  image = np.lib.format.open_memmap(file, mode="r").view(np.ndarray)
  rng = np.random.default_rng(0)
  rows = rng.permutation(NUM_IMAGES)[:200].astype(np.int32)
  label = rng.integers(0, 4, 200).astype(np.int32)
  image = jnp.array(image) if on_device else image
  splits = [
    Split(image, jnp.asarray(rows[part]), jnp.asarray(label[part]))
    for part in (slice(160), slice(160, 180), slice(180, 200))
  ]
  inputs = Inputs(np.full(3, 0.5, np.float32), np.full(3, 0.3, np.float32), None)
  task = Task(0, "sparse", tuple("abcd"), inputs, *splits)
  config, benchmark = config_of(), Benchmark("sparse", (task,), "", False)
  found = {"where": learned(config, benchmark, task), "memory": memory()}
  return found | {"device": learned(config, benchmark, subset(task))}


@pytest.fixture(scope="module")
def large_file(tmp_path_factory):
  """-> a file of 15 GB of which only the images of one task take space on the disk."""
  file = tmp_path_factory.mktemp("large") / "images.npy"
  shape = (NUM_IMAGES, 224, 224, 3)
  image = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
  for row in np.random.default_rng(0).permutation(NUM_IMAGES)[:200]:
    image[row] = np.random.default_rng(row).integers(0, 256, shape[1:], np.uint8)
  return str(file)


def test_15_gb_are_learned_in_2_gib_with_the_bits_of_the_device(large_file):
  assert os.path.getsize(large_file) > 15e9
  found = in_a_small_process(f"sparse({large_file!r}, False)")
  print(found)
  assert found["where"] == found["device"] and found["where"]["steps"] == 10
  assert found["memory"]["RssAnon"] < LIMIT


def test_15_gb_on_the_device_do_not_fit(large_file):
  """The limit holds: without data.residence the same task fails."""
  with pytest.raises(AssertionError, match="RESOURCE_EXHAUSTED|MemoryError|Out of memory"):
    in_a_small_process(f"sparse({large_file!r}, True)")
