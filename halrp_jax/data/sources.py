"""The original files of the data sets: where they are published, found and downloaded to."""

import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

from halrp_jax.data import archives
from halrp_jax.data.archives import Files
from halrp_jax.types import UserError, brief


class Remote(NamedTuple):
  """A published file."""

  name: str
  url: str
  size: int  # bytes
  hash: str  # "sha256:..." or "md5:..."; empty if no checksum is published


class Original(NamedTuple):
  """A data set as its authors publish it."""

  folders: tuple[str, ...]  # names of its folder in data_dir: ours, then those of other programs
  files: tuple[Remote, ...]
  marker: str  # a file that the folder always has
  most: int  # largest total size of the decompressed files in bytes; an archive with more is forged
  archive: bool = False  # whether the only file is an archive of the folder


class Missing(UserError):
  """The files of a data set were not found. Damaged files raise UserError itself."""


_CIFAR = "https://www.cs.toronto.edu/~kriz/"
_MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_OMNIGLOT = "https://github.com/brendenlake/omniglot/raw/master/python/"
_SVHN = "http://ufldl.stanford.edu/housenumbers/"
_IDX = (
  "train-images-idx3-ubyte",
  "train-labels-idx1-ubyte",
  "t10k-images-idx3-ubyte",
  "t10k-labels-idx1-ubyte",
)


def _idx(base: str, published: tuple[tuple[int, str], ...]) -> tuple[Remote, ...]:
  """Returns the files of a data set in MNIST's format, given sizes and SHA-256 checksums."""
  return tuple(
    Remote(f"{name}.gz", f"{base}{name}.gz", size, f"sha256:{digest}")
    for name, (size, digest) in zip(_IDX, published, strict=True)
  )


# The checksums are those in the lists of TFDS. TinyImageNet is not there; its MD5 is the one that
# several other readers of the data set use.
ORIGINALS: dict[str, Original] = {
  "cifar10": Original(
    ("cifar-10-batches-bin",),
    (
      Remote(
        "cifar-10-binary.tar.gz",
        f"{_CIFAR}cifar-10-binary.tar.gz",
        170052171,
        "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
      ),
    ),
    "test_batch.bin",
    200_000_000,
    archive=True,
  ),
  "cifar100": Original(
    ("cifar-100-binary",),
    (
      Remote(
        "cifar-100-binary.tar.gz",
        f"{_CIFAR}cifar-100-binary.tar.gz",
        168513733,
        "sha256:58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
      ),
    ),
    "train.bin",
    200_000_000,
    archive=True,
  ),
  "mnist": Original(
    ("mnist", "MNIST/raw", "MNIST"),
    _idx(
      _MNIST,
      (
        (9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        (28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        (1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        (4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
      ),
    ),
    "train-images-idx3-ubyte",
    60_000_000,
  ),
  "fashion_mnist": Original(
    ("fashion_mnist", "FashionMNIST/raw", "FashionMNIST", "fashion-mnist"),
    _idx(
      _FASHION,
      (
        (26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
        (29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
        (4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
        (5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
      ),
    ),
    "train-images-idx3-ubyte",
    60_000_000,
  ),
  "svhn": Original(
    ("svhn", "SVHN"),
    (
      Remote(
        "train_32x32.mat",
        f"{_SVHN}train_32x32.mat",
        182040794,
        "sha256:435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
      ),
      Remote(
        "test_32x32.mat",
        f"{_SVHN}test_32x32.mat",
        64275384,
        "sha256:cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
      ),
    ),
    "train_32x32.mat",
    400_000_000,
  ),
  "omniglot": Original(
    ("omniglot", "omniglot-py"),
    (
      Remote(
        "images_background.zip",
        f"{_OMNIGLOT}images_background.zip",
        9464212,
        "sha256:ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
      ),
      Remote(
        "images_evaluation.zip",
        f"{_OMNIGLOT}images_evaluation.zip",
        6462886,
        "sha256:1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
      ),
    ),
    "images_background",
    400_000_000,
  ),
  "tiny_imagenet": Original(
    ("tiny-imagenet-200",),
    (
      Remote(
        "tiny-imagenet-200.zip",
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        248100043,
        "md5:90528d7ca1a48142e341f4ef8d21d0de",
      ),
    ),
    "wnids.txt",
    2_000_000_000,
    archive=True,
  ),
  "notmnist": Original(
    ("notMNIST_small",),
    (
      Remote(
        "notMNIST_small.tar.gz",
        "http://yaroslavvb.com/upload/notMNIST/notMNIST_small.tar.gz",
        8458043,
        "",
      ),
    ),
    "A",
    200_000_000,
    archive=True,
  ),
}


# --- search ---------------------------------------------------------------------------


def find(data_dir: str, name: str) -> Files:
  """Finds the files of a data set, in a folder or an archive.

  Args:
    data_dir: the user's folder with data sets, or the folder of the data set itself.
    name: a key of `ORIGINALS`.

  Raises:
    Missing: if they are not found; says what was looked for and where it is published.
    UserError: if the archive is damaged or forged.
  """
  original = ORIGINALS[name]
  if not data_dir:
    raise Missing(f"data_dir is not set: give the folder that contains {_expected(original)}")
  root = path_of("data_dir", data_dir)
  try:
    paths = [root / name for name in original.folders]
    paths += [root] if root.name in original.folders else []
    for path in paths:
      if _has(path, original.marker):
        return archives.folder(path, original.most)
    if original.archive:
      for path in (root / original.files[0].name, *(p / original.files[0].name for p in paths)):
        if path.is_file():
          return archives.archive(path, original.folders[0], original.most)
  except OSError as e:
    raise UserError(f"data_dir={data_dir}: {e.filename or root}: {e.strerror or e}") from e
  raise Missing(f"data_dir={data_dir}: {_missing_text(root, name, original)}")


def path_of(key: str, text: str) -> pathlib.Path:
  """Returns the path that the user gave for a key, with ~ replaced by the home folder.

  Args:
    key: name of the key or flag, for the error message.
    text: the path.

  Raises:
    UserError: if ~ can't be replaced.
  """
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError as e:  # an unknown user after ~, or a user without a home folder
    raise UserError(
      f"{key}={text}: ~ does not stand for a folder here; write the whole path"
    ) from e


def _has(path: pathlib.Path, name: str) -> bool:
  """Returns whether a folder contains a file, compressed or not."""
  return any((path / (name + suffix)).exists() for suffix in ("", ".gz", ".zip"))


def _expected(original: Original, conjunction: str = "or") -> str:
  """Returns a text with the folder and the files of a data set, joined by "or" or "nor"."""
  names = ", ".join(f.name for f in original.files)
  return f"{original.folders[0]}/" + (
    f" {conjunction} {names}" if original.archive else f" with {names}"
  )


def _missing_text(root: pathlib.Path, name: str, original: Original) -> str:
  """Returns a text that says what was not found and where it is published."""
  pickled = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
  }
  found = ""
  if any((root / p).exists() for p in pickled.get(name, ())):
    found = "found the python version, which consists of pickles and is not read; "
  fetch = "--download fetches: " + ", ".join(_published(f) for f in original.files)
  if not all(f.hash for f in original.files):
    fetch = "get it by hand: " + ", ".join(_published(f) for f in original.files)
  what = "neither " if original.archive else "no "
  return f"{found}found {what}{_expected(original, 'nor')}; {fetch}"


def _published(remote: Remote) -> str:
  """Returns a text with address, size and checksum of a file."""
  return f"{remote.url} ({remote.size:,} bytes, {remote.hash or 'no published checksum'})"


# --- download -------------------------------------------------------------------------


def download(data_dir: str, names: Iterable[str], notify: Callable[[str], None]) -> None:
  """Downloads the missing files of data sets. A file is kept only if its checksum is correct.

  Args:
    data_dir: the user's folder with data sets; created if it does not exist.
    names: keys of `ORIGINALS`.
    notify: is called with a line for each file.

  Raises:
    UserError: if a file can't be downloaded, differs from the published one, or has no published
      checksum.
  """
  if not data_dir:
    raise UserError("data_dir is not set: name the folder to download to")
  root = path_of("data_dir", data_dir)
  for name in names:
    original = ORIGINALS[name]
    try:
      path, found = find(data_dir, name).path, True
    except Missing:
      path, found = root if original.archive else root / original.folders[0], False
    for remote in original.files:
      if not (found and (original.archive or _has(path, _without_suffix(remote.name)))):
        _fetch(remote, path, notify)


def _without_suffix(name: str) -> str:
  """Returns the name of a file without the suffix of a compressed file."""
  return name.removesuffix(".gz").removesuffix(".zip")


def _fetch(remote: Remote, path: pathlib.Path, notify: Callable[[str], None]) -> None:
  """Downloads one file into the folder `path`."""
  import pooch  # takes half a second to import

  if not remote.hash:
    raise UserError(
      f"--download: nobody publishes a checksum of {remote.name}, so it can't be verified; "
      f"download {remote.url} by hand and put it into {path}"
    )
  notify(f"downloading {_published(remote)} to {path}")
  pooch.get_logger().setLevel("WARNING")  # without pooch's own line about the download
  get = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=2**16, timeout=60)
  try:
    pooch.retrieve(
      remote.url,
      known_hash=remote.hash,
      fname=remote.name,
      path=path,
      # pooch's own downloader does not have the types that pooch declares
      downloader=get,  # pyright: ignore[reportArgumentType]
    )
  except Exception as e:  # requests, urllib3, pooch and the operating system raise many types
    raise UserError(
      f"--download: {remote.url}: the published file could not be downloaded to {path} "
      f"({brief(e)}); try again, or download it by hand"
    ) from e
