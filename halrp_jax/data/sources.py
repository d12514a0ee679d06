"""The original files of the data sets: where to find, how to download and how to read them.

Archives are read in place and never extracted to the disk.
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
from typing import IO, NamedTuple

from halrp_jax.data import folders
from halrp_jax.types import UserError, UserErrors, brief


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
_Stream = IO[bytes] | gzip.GzipFile
_GZIP = b"\x1f\x8b"  # the first bytes of every gzip file


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


class Files(NamedTuple):
  """The files of a data set, in a folder or inside an archive."""

  path: pathlib.Path  # the folder or the archive
  names: tuple[str, ...]  # relative to the data set's folder, sorted
  # Yields (name, contents) of the named files, in the order in which they are stored.
  stream: Callable[[frozenset[str]], Iterator[tuple[str, bytes]]]

  def read(self, *names: str) -> list[bytes]:
    """Returns the contents of some files, in the given order.

    Args:
      *names: names of the files.

    Raises:
      UserError: if a file is missing or can't be read.
    """
    for name in names:
      if name not in self.names:
        raise UserError(f"{self.path}: {name} is missing; download the original archive again")
    found = dict(self.stream(frozenset(names)))
    return [found[name] for name in names]


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
        return folder(path, original.most)
    if original.archive:
      for path in (root / original.files[0].name, *(p / original.files[0].name for p in paths)):
        if path.is_file():
          return archive(path, original.folders[0], original.most)
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


# --- folders and archives -------------------------------------------------------------


def folder(path: pathlib.Path, most: int) -> Files:
  """Returns the files in a folder at any depth, without hidden and system files.

  Args:
    path: the folder.
    most: largest accepted size of a file in bytes.

  Raises:
    UserError: if one of them can't be read, for example a link to a missing file.
  """
  tree = folders.walk(path)
  if tree.broken:
    raise UserErrors(tree.broken.values())
  return files_of(tree, most)


def files_of(tree: folders.Tree, most: int) -> Files:
  """Returns the files of a folder that was listed already.

  Args:
    tree: the folder.
    most: largest accepted size of a file in bytes.
  """

  def stream(names):
    for name in sorted(names):
      yield name, read_file(tree.path / name, most)

  return Files(tree.path, tree.files, stream)


def read_file(path: pathlib.Path, most: int) -> bytes:
  """Returns the contents of a file.

  Args:
    path: the file.
    most: largest accepted size in bytes.

  Raises:
    UserError: if the file can't be read or is too large.
  """
  try:
    if path.stat().st_size > most:
      raise UserError(f"{path}: {path.stat().st_size:,} bytes, expected at most {most:,}")
    return path.read_bytes()
  except OSError as e:
    raise UserError(f"{path}: {e.strerror or e}") from e


def gunzip(contents: bytes, name: str, most: int) -> bytes:
  """Decompresses a gzip file; other contents are returned unchanged.

  Args:
    contents: the file.
    name: name of the file in an error message.
    most: largest accepted size of the result in bytes.

  Raises:
    UserError: if the file is damaged or the result is too large.
  """
  if contents[:2] != _GZIP:
    return contents
  with _reading(name), gzip.open(io.BytesIO(contents)) as stream:
    plain = stream.read(most + 1)
  if len(plain) > most:
    raise UserError(
      f"{name}: decompresses to more than {most:,} bytes, so it is not the original file; delete "
      "it and download it again"
    )
  return plain


def archive(path: pathlib.Path, folder: str, most: int) -> Files:
  """Returns the files of one folder inside a zip, tar or tar.gz archive.

  Args:
    path: the archive.
    folder: name of the folder at the top of the archive.
    most: largest accepted total size of all members in bytes.

  Raises:
    UserError: if the archive is damaged; if a member has an absolute path or a path with "..", is a
      link out of the archive or a device; or if the declared sizes exceed `most`.
  """
  with _reading(path):
    if zipfile.is_zipfile(path):
      return _zip(path, folder, most)
    return _tar(path, folder, most)


@contextlib.contextmanager
def _reading(path: pathlib.Path | str) -> Iterator[None]:
  """Turns any exception of the block, which reads an archive, into a UserError that names it."""
  try:
    yield
  except UserError:
    raise
  except Exception as e:  # readers may raise anything for a damaged archive
    if isinstance(e, OSError) and e.errno:  # an error of the operating system, not of the contents
      raise UserError(f"{path}: {e.strerror}") from e
    raise UserError(
      f"{path}: damaged or truncated ({brief(e)}); delete it and download it again"
    ) from e


def _require_inside(path: pathlib.Path, name: str) -> None:
  """Raises UserError if the path of a member leads out of the archive."""
  parts = pathlib.PurePosixPath(name.replace("\\", "/")).parts
  if name.startswith(("/", "\\")) or ".." in parts or ":" in (parts or ("",))[0]:
    raise UserError(f"{path}: refused, since its member {name!r} leads out of the archive")


def _require_size(path: pathlib.Path, total: int, most: int) -> None:
  """Raises UserError if the members of an archive declare more than `most` bytes."""
  if total > most:
    raise UserError(
      f"{path}: refused, since it declares {total:,} bytes, expected at most {most:,}"
    )


def _zip(path: pathlib.Path, folder: str, most: int) -> Files:
  """Returns the files of one folder of a zip archive (see `archive`)."""
  members: dict[str, zipfile.ZipInfo] = {}
  total = 0
  with zipfile.ZipFile(path) as opened:
    for info in opened.infolist():
      _require_inside(path, info.filename)
      kind = stat.S_IFMT(info.external_attr >> 16)
      if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UserError(f"{path}: refused, since {info.filename!r} is a link or a device")
      if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(
          f"{path}: refused, since {info.filename!r} is encrypted or compressed by an unexpected "
          "method"
        )
      total += info.file_size
      _require_size(path, total, most)
      if not info.is_dir() and info.filename.startswith(f"{folder}/"):
        members[info.filename.removeprefix(f"{folder}/")] = info
    members = {name: info for name, info in members.items() if folders.is_visible(name)}

  def stream(names):
    with _reading(path), zipfile.ZipFile(path) as opened:
      for name in sorted(names):
        yield name, opened.read(members[name])

  return Files(path, tuple(sorted(members)), stream)


def _tar(path: pathlib.Path, folder: str, most: int) -> Files:
  """Returns the files of one folder of a tar archive, gzipped or not (see `archive`)."""
  names: list[str] = []
  total = 0
  with _opened_tar(path, most) as (opened, plain):
    for member in opened:
      _require_tar_member(path, member)
      total += member.size
      _require_size(path, total, most)
      if member.isfile() and member.name.startswith(f"{folder}/"):
        names.append(member.name.removeprefix(f"{folder}/"))
    # tarfile takes a damaged header for the end of the archive. So the rest must be zeros; reading
    # it also makes gzip verify its checksum.
    while block := plain.read(2**16):
      if any(block):
        raise ValueError("its last member is followed by other data")

  def stream(requested):
    with _reading(path), _opened_tar(path, most) as (opened, _):
      for member in opened:  # in the order of the archive, since compressed data can't be skipped
        name = member.name.removeprefix(f"{folder}/")
        if member.isfile() and name in requested and (contents := opened.extractfile(member)):
          yield name, contents.read()

  return Files(path, tuple(sorted(filter(folders.is_visible, set(names)))), stream)


@contextlib.contextmanager
def _opened_tar(path: pathlib.Path, most: int) -> Iterator[tuple[tarfile.TarFile, _Stream]]:
  """Yields an opened tar archive, gzipped or not, and the decompressed stream it is read from."""
  with open(path, "rb") as packed:
    is_gzip = packed.read(2) == _GZIP
    packed.seek(0)
    with (
      gzip.open(packed) if is_gzip else contextlib.nullcontext(packed) as plain,
      # The stubs require methods that tarfile calls only when it writes.
      tarfile.open(  # pyright: ignore[reportCallIssue]
        fileobj=_ForwardStream(plain, 2 * most),  # pyright: ignore[reportArgumentType]
        mode="r:",
      ) as opened,
    ):
      yield opened, plain


class _ForwardStream:
  """A stream that moves forward only, and only up to a given position.

  tarfile trusts every size that a header declares. A negative size would make it read the same
  header again and again; a huge one would make it read the whole decompressed archive into memory.

  Args:
    stream: the stream to read.
    most: largest position in bytes.
  """

  def __init__(self, stream: _Stream, most: int) -> None:
    self._stream, self._most, self.tell = stream, most, stream.tell

  def read(self, size: int) -> bytes:
    """Reads `size` bytes."""
    self._require_position(self.tell() + size)
    return self._stream.read(size)

  def seek(self, position: int) -> int:
    """Moves to a position and returns it."""
    self._require_position(position)
    return self._stream.seek(position)

  def _require_position(self, position: int) -> None:
    """Raises ValueError if a position is behind the current one or too large."""
    if not self.tell() <= position <= self._most:
      raise ValueError("a header declares an impossible size")


def _require_tar_member(path: pathlib.Path, member: tarfile.TarInfo) -> None:
  """Raises UserError if a member leads out of the archive, is a device, or has a negative size."""
  _require_inside(path, member.name)
  if member.islnk() or member.issym():
    _require_inside(path, member.linkname)
  elif not (member.isfile() or member.isdir()):
    raise UserError(f"{path}: refused, since {member.name!r} is a device")
  if member.size < 0:
    raise UserError(f"{path}: refused, since {member.name!r} declares {member.size:,} bytes")


def fingerprint(files: Files, names: Iterable[str]) -> str:
  """Returns a SHA-256 of the contents of files and of their names in the given order.

  The files of a folder are read completely, since a change need not affect size and time. Of an
  archive, the bytes of the archive itself are hashed.

  Args:
    files: the data set.
    names: names of the files.

  Raises:
    UserError: if a file can't be read.
  """
  names = list(names)
  if files.path.is_file():
    try:
      with open(files.path, "rb") as stream:
        found = {"": hashlib.file_digest(stream, "sha256").hexdigest()}
    except OSError as e:
      raise UserError(f"{files.path}: {e.strerror or e}") from e
  else:
    found = {n: hashlib.sha256(x).hexdigest() for n, x in files.stream(frozenset(names))}
  text = json.dumps([names, sorted(found.items())])
  return hashlib.sha256(text.encode()).hexdigest()


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
