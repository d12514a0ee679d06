"""Listing of the user's folders: which entries are used, how they are named, how they are sorted.

Hidden entries and files that operating systems create (Thumbs.db, __MACOSX) are ignored at every
depth. Symbolic links are followed, except those to a folder that contains them.
"""

import os
import pathlib
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from halrp_jax.types import UserError, UserErrors

S = TypeVar("S")
T = TypeVar("T")

_SYSTEM = {  # entries that operating systems create, in lower case
  "thumbs.db",
  "ehthumbs.db",
  "desktop.ini",
  "icon\r",
  "__macosx",
  "__pycache__",
  "@eadir",
  "@__thumb",
  "#recycle",
  "#snapshot",
  "$recycle.bin",
  "system volume information",
  "network trash folder",
  "temporary items",
  "lost+found",
}
_IMAGES = re.compile(r"\.(a?png|jpg|jpeg|jpe|jfif|webp|bmp|dib|gif|tiff?|p[bgnp]m)$", re.IGNORECASE)
# Image formats that are not read: Pillow can't read them, not on every machine, or not safely.
_UNREAD = re.compile(
  r"\.(heic|heif|avif|jp2|j2k|jxl|svg|eps|psd|xcf|tga|ico|exr|hdr|dds|pcx|raw|dng|cr2|cr3|nef|arw"
  r"|orf|rw2|dcm|nii)$",
  re.IGNORECASE,
)


class Tree(NamedTuple):
  """The contents of a folder at any depth. Names are paths relative to it, with slashes."""

  path: pathlib.Path
  files: tuple[str, ...]  # regular files, sorted
  folders: tuple[str, ...]  # sorted
  broken: dict[str, str]  # for each entry that can't be read: its name and a line that says why
  skipped: tuple[str, ...]  # links to a folder that contains them, devices and pipes

  def children(self) -> dict[str, "Tree"]:
    """Returns the trees of the folders directly in this one, by name."""
    tops = [name for name in self.folders if "/" not in name]
    below = {top: ([], [], [], []) for top in tops}
    for i, names in enumerate((self.files, self.folders, self.broken, self.skipped)):
      for name in names:
        top, _, rest = name.partition("/")
        if rest and top in below:
          below[top][i].append(rest)
    return {
      top: Tree(
        self.path / top,
        tuple(files),
        tuple(folders),
        {name: self.broken[f"{top}/{name}"] for name in broken},
        tuple(skipped),
      )
      for top, (files, folders, broken, skipped) in below.items()
    }


def walk(path: pathlib.Path, text: str = "") -> Tree:
  """Lists the contents of a folder, without hidden and system entries.

  Args:
    path: the folder.
    text: name of the folder in an error message; "" for the path.

  Raises:
    UserError: if the folder itself can't be read. Entries that can't be read are in `Tree.broken`.
  """
  files: list[str] = []
  folders: list[str] = []
  broken: dict[str, str] = {}
  skipped: list[str] = []

  def visit(folder: str, prefix: str, above: frozenset) -> None:
    with os.scandir(folder) as entries:
      found = sorted((e.name, e.path) for e in entries if not is_hidden(e.name))
    for entry, full_path in found:
      name = prefix + entry
      try:
        status = os.stat(full_path)
        key = status.st_dev, status.st_ino
        if stat.S_ISREG(status.st_mode):
          files.append(name)
        elif not stat.S_ISDIR(status.st_mode) or key in above:
          skipped.append(name)
        else:
          folders.append(name)
          visit(full_path, f"{name}/", above | {key})
      except OSError as e:
        broken[name] = f"{full_path}: {_reason(full_path, e)}"

  try:
    status = os.stat(path)
    visit(str(path), "", frozenset({(status.st_dev, status.st_ino)}))
  except OSError as e:
    raise UserError(f"{text or path}: {e.strerror or e}") from e
  return Tree(path, tuple(sorted(files)), tuple(sorted(folders)), broken, tuple(skipped))


def _reason(path: str, error: OSError) -> str:
  """Returns why an entry can't be read."""
  if os.path.islink(path) and not os.path.exists(path):
    target = os.readlink(path)
    return f"a link to {target}, which can't be read; mount the target or delete the link"
  return error.strerror or str(error)


def is_hidden(name: str) -> bool:
  """Returns whether an entry is ignored: it is hidden, or an operating system created it."""
  return name.startswith(".") or name.lower() in _SYSTEM


def is_visible(name: str) -> bool:
  """Returns whether no part of a path with slashes is hidden (see `is_hidden`)."""
  return not any(map(is_hidden, name.split("/")))


# --- names ----------------------------------------------------------------------------


def shown(name: str) -> str:
  """Returns the name of a file as text that can be printed and compared.

  Letters are composed (macOS stores an accent as a character of its own), and bytes that are not
  valid UTF-8 are escaped.
  """
  text = os.fsencode(name).decode("utf-8", "backslashreplace")
  return unicodedata.normalize("NFC", text)


def order(name: str) -> tuple:
  """Returns a sort key that orders numbers by their value, also within names: 1, 2, 10."""
  if re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", name):
    return 0, float(name), [], name
  pieces = re.split(r"([0-9]+)", name)  # alternates text and numbers
  return 1, 0.0, [int(p) if i % 2 else p for i, p in enumerate(pieces)], name


def path_order(name: str) -> list[tuple]:
  """Returns a sort key for a path with slashes: `order` of each part."""
  return [order(part) for part in name.split("/")]


def unique(pairs: Iterable[tuple[str, T]], what: str) -> dict[str, T]:
  """Returns a dict of (name, value) pairs, sorted by name.

  Args:
    pairs: names and values.
    what: beginning of the error message: where the names come from and what they name.

  Raises:
    UserError: if a name occurs twice.
  """
  found: dict[str, T] = {}
  for name, value in pairs:
    if name in found:
      raise UserError(f"{what} {name!r} occurs twice; rename one of the two")
    found[name] = value
  return {name: found[name] for name in sorted(found, key=order)}


# --- images and other files -----------------------------------------------------------


def is_image(name: str) -> bool:
  """Returns whether the suffix of a file is that of an image format that is read."""
  return _IMAGES.search(name) is not None


def is_unread_image(name: str) -> bool:
  """Returns whether the suffix of a file is that of an image format that is not read."""
  return _UNREAD.search(name) is not None


def unused(names: Iterable[str]) -> str:
  """Returns a text that counts unused files by suffix and names one of them; empty for no files."""
  names = list(names)
  if not names:
    return ""
  suffixes = [pathlib.PurePosixPath(name).suffix.lower() or "no suffix" for name in names]
  kinds = ", ".join(f"{s} {suffixes.count(s)}" for s in sorted(set(suffixes)))
  return f"{len(names)} not used ({kinds}), for example {names[0]}"


# --- several errors at once -----------------------------------------------------------


def for_all(fn: Callable[[S], T], items: Iterable[S]) -> list[T]:
  """Returns fn(item) for all items.

  Raises:
    UserErrors: after all items were tried, with the lines of all UserErrors that fn raised.
  """
  results, lines = [], []
  for item in items:
    try:
      results.append(fn(item))
    except UserErrors as e:
      lines += e.lines
    except UserError as e:
      lines.append(str(e))
  if lines:
    raise UserErrors(lines)
  return results
