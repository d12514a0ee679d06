"""Mutations of every format, two hundred in the slow tests: refused in one line, or read."""

import functools
import random
import warnings

import numpy as np
import pytest

from halrp_jax import data
from halrp_jax.types import UserError

from . import originals
from .test_data import write_small_cifar

NUM_MUTATIONS, NUM_IN_SHORT = 200, 25


def custom_folder(folder):
  rng = np.random.default_rng(6)
  for c in ("a", "b"):
    (folder / "task" / c).mkdir(parents=True)
    for i in range(3):
      (folder / "task" / c / f"{i}.png").write_bytes(originals.picture(rng, (9, 8, 3)))
      (folder / "task" / c / f"{i}.jpg").write_bytes(originals.picture(rng, (9, 8, 3), "JPEG"))


def custom_npz(folder):
  folder.mkdir(exist_ok=True)
  rng = np.random.default_rng(7)
  image = rng.integers(0, 256, (12, 8, 8, 3), np.uint8)
  np.savez(folder / "task.npz", image=image, label=np.arange(12) % 3)
  np.savez_compressed(folder / "two.npz", image=image[..., 0], label=np.arange(12) % 2)


def packed(make, name, archive):
  def write(folder):
    make(folder)
    originals.zipped(folder, name, archive)

  return write


def small_tiny(folder):
  originals.tiny_imagenet(folder, num_train=10, num_val=1)


# format -> writer, benchmark that reads it, which files are mutated
FORMATS = {
  "idx.gz": (originals.mnist, "pmnist20", "*.gz"),
  "idx": (functools.partial(originals.mnist, zipped=False), "pmnist20", "*ubyte"),
  "CIFAR-100 binary": (write_small_cifar, "cifar100_superclass", "*"),
  "CIFAR-100 tar.gz": (
    packed(lambda f: write_small_cifar(f, 1), "cifar-100-binary", "cifar-100-binary.tar.gz"),
    "cifar100_superclass",
    "*.tar.gz",
  ),
  "CIFAR-10 binary": (originals.cifar10, "five_datasets", "*"),
  "SVHN mat": (originals.svhn, "five_datasets", "*.mat"),
  "notMNIST folder": (originals.notmnist, "five_datasets", "*.png"),
  "notMNIST tar.gz": (
    packed(originals.notmnist, "notMNIST_small", "notMNIST_small.tar.gz"),
    "five_datasets",
    "*.tar.gz",
  ),
  "Omniglot zip": (functools.partial(originals.omniglot, drawings=4), "omniglot_rotation", "*.zip"),
  "TinyImageNet folder": (small_tiny, "tinyimagenet40", "*"),
  "TinyImageNet zip": (
    packed(small_tiny, "tiny-imagenet-200", "tiny-imagenet-200.zip"),
    "tinyimagenet40",
    "*.zip",
  ),
  "custom folder": (custom_folder, "custom", "*"),
  "custom npz": (custom_npz, "custom", "*.npz"),
}


KINDS = (
  "flip",
  "header",
  "truncate",
  "insert",
  "delete",
  "repeat",
  "zero",
  "ones",
  "empty",
  "swap",
)


def mutated(rng: random.Random, contents: bytes, other: bytes) -> bytes:
  b, n = bytearray(contents), len(contents)
  at, length = rng.randrange(n + 1), rng.choice([1, 2, 7, 64, 1000])
  kind = rng.choice(KINDS)
  if kind == "flip":
    for _ in range(length):
      b[rng.randrange(n)] ^= 1 << rng.randrange(8)
  elif kind == "header":
    for _ in range(3):
      b[rng.randrange(min(n, 64))] = rng.randrange(256)
  elif kind == "truncate":
    del b[at:]
  elif kind == "insert":
    b[at:at] = rng.randbytes(length)
  elif kind == "delete":
    del b[at : at + length]
  elif kind == "repeat":
    b[at:at] = b[at : at + length]
  elif kind == "zero":
    b[at : at + length] = bytes(len(b[at : at + length]))
  elif kind == "ones":
    b[at : at + length] = b"\xff" * len(b[at : at + length])
  elif kind == "swap":
    return other
  return b"" if kind == "empty" else bytes(b)


def load(config):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # sets that are left out
    return data.load(config)


@pytest.mark.parametrize(
  "num_mutations", [NUM_IN_SHORT, pytest.param(NUM_MUTATIONS, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", FORMATS)
def test_mutated_originals_are_refused_or_read(tmp_path, name, num_mutations):
  """Neither a traceback nor a hang nor a file anywhere."""
  write, benchmark, pattern = FORMATS[name]
  folder = tmp_path / "data"
  write(folder)
  files = sorted(p for p in folder.rglob(pattern) if p.is_file() and p.stat().st_size)
  config, rng = originals.config_of(benchmark, folder), random.Random(name)
  before, counts = sorted(tmp_path.rglob("*")), {"refused": 0, "read": 0}
  assert load(config)
  if num_mutations == NUM_IN_SHORT:
    num_mutations //= 5 if name.startswith("TinyImageNet") else 1  # many files
  else:
    num_mutations //= 4 if name == "TinyImageNet folder" else 1
  for _ in range(num_mutations):
    path, other = rng.choice(files), rng.choice(files)
    contents = path.read_bytes()
    path.write_bytes(mutated(rng, contents, other.read_bytes()))
    try:
      load(config)
      counts["read"] += 1
    except UserError as e:
      assert len(str(e)) < 1500
      counts["refused"] += 1
    path.write_bytes(contents)
  print(f"{name}: {counts}")
  assert sum(counts.values()) == num_mutations and counts["refused"]
  assert sorted(tmp_path.rglob("*")) == before
