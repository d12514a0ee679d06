"""Reads the files of a folder or an archive, which is never extracted to the disk."""

import contextlib
import gzip
import hashlib
import io
import json
import pathlib
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO, NamedTuple

from halrp_jax.data import folders
from halrp_jax.types import UserError, UserErrors, brief

_Stream = IO[bytes] | gzip.GzipFile
_GZIP = b"\x1f\x8b"  # the first bytes of every gzip file


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
