"""Small synthetic data sets in the layout of the originals."""

import gzip
import io
import pathlib
import struct
import tarfile
import zipfile

import numpy as np
from PIL import Image
from scipy import io as scipy_io

from halrp_jax.config import make_config, resolve


def picture(rng, shape=(28, 28), format="PNG") -> bytes:
  out = io.BytesIO()
  Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(out, format)
  return out.getvalue()


def idx(array: np.ndarray) -> bytes:
  return (
    bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
  )


def mnist(folder: pathlib.Path, name="mnist", num_train=40, num_test=20, zipped=True) -> None:
  rng = np.random.default_rng(len(name))
  (folder / name).mkdir(parents=True)
  for part, n in (("train", num_train), ("t10k", num_test)):
    files = {
      f"{part}-images-idx3-ubyte": rng.integers(0, 256, (n, 28, 28), np.uint8),
      f"{part}-labels-idx1-ubyte": np.arange(n, dtype=np.uint8) % 10,
    }
    for file, array in files.items():
      path = folder / name / (file + ".gz" * zipped)
      path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))


def cifar10(folder: pathlib.Path, per_batch=20) -> None:
  rng = np.random.default_rng(1)
  place = folder / "cifar-10-batches-bin"
  place.mkdir(parents=True)
  for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
    label = (np.arange(per_batch) % 10).astype(np.uint8)[:, None]
    rows = np.hstack([label, rng.integers(0, 256, (per_batch, 3072), np.uint8)])
    (place / f"{name}.bin").write_bytes(rows.tobytes())
  (place / "batches.meta.txt").write_text("\n".join(f"class{i}" for i in range(10)) + "\n\n")


def svhn(folder: pathlib.Path, n=30) -> None:
  rng = np.random.default_rng(2)
  (folder / "svhn").mkdir(parents=True)
  for name in ("train_32x32.mat", "test_32x32.mat"):
    image = rng.integers(0, 256, (32, 32, 3, n), np.uint8)
    label = (np.arange(n) % 10 + 1).astype(np.uint8)[:, None]  # 1 to 10, 10 being the digit 0
    scipy_io.savemat(folder / "svhn" / name, {"X": image, "y": label})


def notmnist(folder: pathlib.Path, per_class=10) -> None:
  rng = np.random.default_rng(3)
  for c in "ABCDEFGHIJ":
    place = folder / "notMNIST_small" / c
    place.mkdir(parents=True)
    for i in range(per_class):
      (place / f"{i:02d}.png").write_bytes(picture(rng))
  # as in the original: not an image
  (folder / "notMNIST_small/A/RGVtb2NyYXRpY2FCb2xkT2xkc3R5bGUgQm9sZC50dGY=.png").write_bytes(b"")


def omniglot(folder: pathlib.Path, characters=12, drawings=20) -> None:
  rng = np.random.default_rng(4)
  (folder / "omniglot").mkdir(parents=True)
  for half, numbers in (
    ("images_background", range(1, characters)),
    ("images_evaluation", range(characters, characters + 1)),
  ):
    with zipfile.ZipFile(folder / "omniglot" / f"{half}.zip", "w") as archive:
      for c in numbers:
        for i in range(drawings):
          name = f"{half}/Alphabet/character{c:02d}/{c:04d}_{i:02d}.png"
          archive.writestr(name, picture(rng, (105, 105)))


def tiny_imagenet(folder: pathlib.Path, num_train=10, num_val=2) -> None:
  """Some JPEGs are grey, as some of the original's."""
  rng = np.random.default_rng(5)
  place = folder / "tiny-imagenet-200"
  wnids = [f"n{i:08d}" for i in range(200)]
  some = [_blocks(rng, (8, 8, 3)) for _ in range(7)] + [_blocks(rng, (8, 8))]
  lines = []
  for c, wnid in enumerate(wnids):
    images = place / "train" / wnid / "images"
    images.mkdir(parents=True)
    for i in range(num_train):
      (images / f"{wnid}_{i}.JPEG").write_bytes(some[(c + i) % 8])
    for i in range(num_val):
      lines.append(f"val_{c * num_val + i}.JPEG\t{wnid}\t0\t0\t63\t63\n")
  (place / "val" / "images").mkdir(parents=True)
  for i, line in enumerate(lines):
    (place / "val" / "images" / line.split("\t")[0]).write_bytes(some[i % 8])
  (place / "val" / "val_annotations.txt").write_text("".join(lines))
  (place / "wnids.txt").write_text("\n".join(reversed(wnids)) + "\n")
  (place / "words.txt").write_text("".join(f"{w}\tthing {w}, stuff\n" for w in wnids))


def _blocks(rng, shape) -> bytes:
  """A JPEG of 64 x 64 pixels that is quickly decoded."""
  out = io.BytesIO()
  small = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
  small.resize((64, 64), Image.Resampling.NEAREST).save(out, "JPEG")
  return out.getvalue()


def zipped(folder: pathlib.Path, name: str, archive: str) -> None:
  """Packs folder/name into folder/archive and deletes the folder."""
  files = sorted(p for p in (folder / name).rglob("*") if p.is_file())
  if archive.endswith(".zip"):
    with zipfile.ZipFile(folder / archive, "w") as out:
      for path in files:
        out.write(path, path.relative_to(folder))
  else:
    with tarfile.open(folder / archive, "w:gz") as out:
      for path in files:
        out.add(path, path.relative_to(folder))
  for path in files:
    path.unlink()
  for path in sorted((folder / name).rglob("*"), reverse=True):
    path.rmdir()
  (folder / name).rmdir()


def config_of(benchmark, folder, data_keys=(), **more):
  """A config that reads what is there."""
  config = make_config(
    "stl",
    benchmark=benchmark,
    data_dir=str(folder),
    order="natural",
    allow_partial=True,
    methods_={},
    protocol={"validation_fraction": 0.0},
    data_={"cache": "off"} | dict(data_keys),
    **more,
  )
  return resolve(config)
