"""Where the original files are, how they are fetched, what is inside an archive.

Archives are read in place: nothing is ever extracted to the disk.
"""

import contextlib
import gzip
import hashlib
import io
import json
import pathlib
import stat
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from halrp_jax.data import folders
from halrp_jax.types import UserError, UserErrors, brief


class Remote(NamedTuple):
  """A file as it is published."""

  name: str
  url: str
  size: int  # bytes
  hash: str  # "sha256:..." or "md5:..."; empty: nobody publishes one


class Original(NamedTuple):
  """A data set as its authors publish it."""

  folders: tuple[str, ...]  # its folder below data_dir: ours first, then what others call it
  files: tuple[Remote, ...]
  marker: str  # a file that its folder always has
  most: int  # bytes its files may have together when unpacked; more is a forgery
  archive: bool = False  # the one file is an archive of the folder


class Missing(UserError):
  """The files are not there (as against damaged)."""


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
_GZIP = b"\x1f\x8b"  # what every gzip file starts with


def _idx(base: str, published: tuple[tuple[int, str], ...]) -> tuple[Remote, ...]:
  return tuple(
    Remote(f"{name}.gz", f"{base}{name}.gz", size, f"sha256:{digest}")
    for name, (size, digest) in zip(_IDX, published, strict=True)
  )


# SHA-256 as in TFDS's lists of checksums; that of TinyImageNet is an MD5 many readers carry.
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


class Files(NamedTuple):
  """The files of a data set, in a folder or inside an archive."""

  place: pathlib.Path
  names: tuple[str, ...]  # relative to the data set's folder, sorted
  stream: Callable[[frozenset[str]], Iterator[tuple[str, bytes]]]  # in whatever order they lie

  def read(self, *names: str) -> list[bytes]:
    """Contents of some files, in the order asked for."""
    for name in names:
      if name not in self.names:
        raise UserError(f"{self.place}: {name} is missing; get the original archive again")
    found = dict(self.stream(frozenset(names)))
    return [found[name] for name in names]


# --- finding --------------------------------------------------------------------------


def find(data_dir: str, name: str) -> Files:
  """The files of one of `ORIGINALS` below a folder of the user's.

  Raises:
    Missing: if they are not there; the text says what was looked for and where it is published.
    UserError: if the archive is damaged, or holds what no honest one does.
  """
  original = ORIGINALS[name]
  if not data_dir:
    raise Missing(f"data_dir is not set: give the folder that holds {_wanted(original)}")
  root = path_of("data_dir", data_dir)
  try:
    places = [root / name for name in original.folders]
    places += [root] if root.name in original.folders else []
    for place in places:
      if _has(place, original.marker):
        return folder(place, original.most)
    if original.archive:
      for path in (root / original.files[0].name, *(p / original.files[0].name for p in places)):
        if path.is_file():
          return archive(path, original.folders[0], original.most)
  except OSError as e:
    raise UserError(f"data_dir={data_dir}: {e.filename or root}: {e.strerror or e}") from e
  raise Missing(f"data_dir={data_dir}: {_missing(root, name, original)}")


def path_of(key: str, text: str) -> pathlib.Path:
  """A path that the user gave for some key; ~ is the home."""
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError as e:  # ~nobody, or a user without a home
    raise UserError(f"{key}={text}: ~ stands for no folder here; write the whole path") from e


def _has(place: pathlib.Path, marker: str) -> bool:
  return any((place / (marker + suffix)).exists() for suffix in ("", ".gz", ".zip"))


def _wanted(original: Original, either: str = "or") -> str:
  names = ", ".join(f.name for f in original.files)
  return f"{original.folders[0]}/" + (
    f" {either} {names}" if original.archive else f" with {names}"
  )


def _missing(root: pathlib.Path, name: str, original: Original) -> str:
  pickled = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
  }
  found = ""
  if any((root / p).exists() for p in pickled.get(name, ())):
    found = "found the python version, which is a pickle and is not read; "
  fetch = "--download fetches: " + ", ".join(_published(f) for f in original.files)
  if not all(f.hash for f in original.files):
    fetch = "get it by hand: " + ", ".join(_published(f) for f in original.files)
  what = "neither " if original.archive else "no "
  return f"{found}found {what}{_wanted(original, 'nor')}; {fetch}"


def _published(remote: Remote) -> str:
  return f"{remote.url} ({remote.size:,} bytes, {remote.hash or 'no published checksum'})"


# --- folders and archives -------------------------------------------------------------


def folder(place: pathlib.Path, most: int) -> Files:
  """Returns the files below a folder, without hidden and system files.

  Raises:
    UserError: if one of them can't be read, for example a link that leads nowhere.
  """
  tree = folders.walk(place)
  if tree.broken:
    raise UserErrors(tree.broken.values())
  return files_of(tree, most)


def files_of(tree: folders.Tree, most: int) -> Files:
  """Returns the files of a folder; most: bytes of one."""

  def stream(names):
    for name in sorted(names):
      yield name, read_file(tree.path / name, most)

  return Files(tree.path, tree.files, stream)


def read_file(path: pathlib.Path, most: int) -> bytes:
  """A file of the user's; UserError if it can't be read or is too large."""
  try:
    if path.stat().st_size > most:
      raise UserError(f"{path}: {path.stat().st_size:,} bytes, more than it can have")
    return path.read_bytes()
  except OSError as e:
    raise UserError(f"{path}: {e.strerror or e}") from e


def gunzip(contents: bytes, name: str, most: int) -> bytes:
  """Unpacks gzip, at most `most` bytes; what is not packed is returned as it is."""
  if contents[:2] != _GZIP:
    return contents
  with _refusing(name), gzip.open(io.BytesIO(contents)) as stream:
    plain = stream.read(most + 1)
  if len(plain) > most:
    raise UserError(f"{name}: unpacks to more than {most:,} bytes; it is not the original")
  return plain


def archive(path: pathlib.Path, folder: str, most: int) -> Files:
  """The files below `folder/` inside a zip, tar or tar.gz archive.

  Raises:
    UserError: if it is damaged, or if a member has an absolute path, a path with .., is a link out
      of the archive or a device, or if they declare more than `most` bytes together.
  """
  with _refusing(path):
    if zipfile.is_zipfile(path):
      return _zip(path, folder, most)
    return _tar(path, folder, most)


@contextlib.contextmanager
def _refusing(place):
  try:
    yield
  except UserError:
    raise
  except Exception as e:  # a damaged archive makes its reader raise almost anything
    if isinstance(e, OSError) and e.errno:  # the disk's own
      raise UserError(f"{place}: {e.strerror}") from e
    raise UserError(
      f"{place}: damaged or truncated ({brief(e)}); delete it and download it again"
    ) from e


def _require_inside(path, name: str) -> None:
  parts = pathlib.PurePosixPath(name.replace("\\", "/")).parts
  if name.startswith(("/", "\\")) or ".." in parts or ":" in (parts or ("",))[0]:
    raise UserError(f"{path}: refused, since its member {name!r} points out of the archive")


def _require_size(path, total: int, most: int) -> None:
  if total > most:
    raise UserError(f"{path}: refused, since it declares {total:,} bytes; at most {most:,} are due")


def _zip(path, folder: str, most: int) -> Files:
  members, total = {}, 0
  with zipfile.ZipFile(path) as opened:
    for info in opened.infolist():
      _require_inside(path, info.filename)
      kind = stat.S_IFMT(info.external_attr >> 16)
      if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UserError(f"{path}: refused, since {info.filename!r} is a link or a device")
      if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{path}: refused, since {info.filename!r} is encrypted or oddly packed")
      total += info.file_size
      _require_size(path, total, most)
      if not info.is_dir() and info.filename.startswith(f"{folder}/"):
        members[info.filename.removeprefix(f"{folder}/")] = info
    members = {name: info for name, info in members.items() if folders.counts(name)}

  def stream(names):
    with _refusing(path), zipfile.ZipFile(path) as opened:
      for name in sorted(names):
        yield name, opened.read(members[name])

  return Files(path, tuple(sorted(members)), stream)


def _tar(path, folder: str, most: int) -> Files:
  names, total = [], 0
  with _opened_tar(path, most) as (opened, plain):
    for member in opened:
      _require_tar_member(path, member)
      total += member.size
      _require_size(path, total, most)
      if member.isfile() and member.name.startswith(f"{folder}/"):
        names.append(member.name.removeprefix(f"{folder}/"))
    # tarfile takes a damaged header for the end; reading on makes gzip check its checksum, too
    while block := plain.read(2**16):
      if any(block):
        raise ValueError("something follows its last member")

  def stream(wanted):
    with _refusing(path), _opened_tar(path, most) as (opened, _):
      for member in opened:  # in order: a compressed tar can't be searched
        name = member.name.removeprefix(f"{folder}/")
        if member.isfile() and name in wanted:
          yield name, opened.extractfile(member).read()

  return Files(path, tuple(sorted(filter(folders.counts, set(names)))), stream)


@contextlib.contextmanager
def _opened_tar(path, most: int):
  """A tar archive, gzipped or not, and the stream it is read from."""
  with open(path, "rb") as packed:
    is_gzip = packed.read(2) == _GZIP
    packed.seek(0)
    with (
      gzip.open(packed) if is_gzip else contextlib.nullcontext(packed) as plain,
      tarfile.open(fileobj=_Forward(plain, 2 * most), mode="r:") as opened,
    ):
      yield opened, plain


class _Forward:
  """A stream that goes forward only, and not beyond some byte.

  tarfile believes every size that a header declares: a negative one takes it back to where it was,
  for ever; a huge one makes it read all of an archive, unpacked, into the memory.
  """

  def __init__(self, stream, most: int):
    self._stream, self._most, self.tell = stream, most, stream.tell

  def read(self, size: int) -> bytes:
    self._require(self.tell() + size)
    return self._stream.read(size)

  def seek(self, position: int) -> int:
    self._require(position)
    return self._stream.seek(position)

  def _require(self, end: int) -> None:
    if not self.tell() <= end <= self._most:
      raise ValueError("a header declares an impossible size")


def _require_tar_member(path, member: tarfile.TarInfo) -> None:
  _require_inside(path, member.name)
  if member.islnk() or member.issym():
    _require_inside(path, member.linkname)
  elif not (member.isfile() or member.isdir()):
    raise UserError(f"{path}: refused, since {member.name!r} is a device")
  if member.size < 0:
    raise UserError(f"{path}: refused, since {member.name!r} declares {member.size:,} bytes")


def fingerprint(files: Files, names: Iterable[str]) -> str:
  """Hashes what some files contain and their names in the order given: SHA-256.

  Every file of a folder is read, since sizes and times stay the same under some changes; of an
  archive its bytes are hashed.
  """
  names = list(names)
  if files.place.is_file():
    try:
      with open(files.place, "rb") as stream:
        found = {"": hashlib.file_digest(stream, "sha256").hexdigest()}
    except OSError as e:
      raise UserError(f"{files.place}: {e.strerror or e}") from e
  else:
    found = {n: hashlib.sha256(x).hexdigest() for n, x in files.stream(frozenset(names))}
  text = json.dumps([names, sorted(found.items())])
  return hashlib.sha256(text.encode()).hexdigest()


# --- fetching -------------------------------------------------------------------------


def download(data_dir: str, names: Iterable[str], tell: Callable[[str], None]) -> None:
  """Fetches what is missing of some `ORIGINALS`; a file appears when its checksum is right.

  Args:
    data_dir: the user's folder; made if it isn't there.
    names: keys of `ORIGINALS`.
    tell: is called with a line per file.

  Raises:
    UserError: if a file can't be fetched, is not the published one, or has no published checksum.
  """
  if not data_dir:
    raise UserError("data_dir is not set: name the folder to download to")
  root = path_of("data_dir", data_dir)
  for name in names:
    original = ORIGINALS[name]
    try:
      place, found = find(data_dir, name).place, True
    except Missing:
      place, found = root if original.archive else root / original.folders[0], False
    for remote in original.files:
      if not (found and (original.archive or _has(place, _unpacked(remote.name)))):
        _fetch(remote, place, tell)


def _unpacked(name: str) -> str:
  return name.removesuffix(".gz").removesuffix(".zip")


def _fetch(remote: Remote, place: pathlib.Path, tell) -> None:
  import pooch  # half a second to import, needed for this alone

  if not remote.hash:
    raise UserError(
      f"--download: nobody publishes a checksum of {remote.name}, so it is not fetched unseen; "
      f"get {remote.url} by hand and put it into {place}"
    )
  tell(f"downloading {_published(remote)} to {place}")
  pooch.get_logger().setLevel("WARNING")  # `tell` has said it
  get = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=2**16, timeout=60)
  try:
    pooch.retrieve(
      remote.url, known_hash=remote.hash, fname=remote.name, path=place, downloader=get
    )
  except Exception as e:  # requests, urllib3, pooch and the disk raise what they like
    raise UserError(
      f"--download: {remote.url} is not in {place} as published ({brief(e)}); try again, or get "
      "it by hand"
    ) from e
