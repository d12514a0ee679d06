"""Walks over the folders that users have: which entries count, what their names are, their order.

Hidden entries and those that systems leave behind (Thumbs.db, __MACOSX) do not count, wherever they
lie. Links are followed; a link to a folder that holds it is not.
"""

import os
import pathlib
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable
from typing import NamedTuple

from halrp_jax.types import UserError, UserErrors

_SYSTEM = {  # in small letters
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
# images that Pillow reads not at all, not everywhere, or not without risk
_UNREAD = re.compile(
  r"\.(heic|heif|avif|jp2|j2k|jxl|svg|eps|psd|xcf|tga|ico|exr|hdr|dds|pcx|raw|dng|cr2|cr3|nef|arw"
  r"|orf|rw2|dcm|nii)$",
  re.IGNORECASE,
)


class Tree(NamedTuple):
  """What a folder holds, at any depth; names are relative to it, with slashes."""

  path: pathlib.Path
  files: tuple[str, ...]  # regular files, sorted as texts
  folders: tuple[str, ...]
  broken: dict[str, str]  # name -> a line that says why it can't be read
  skipped: tuple[str, ...]  # links to a folder that holds them, devices and pipes

  def children(self) -> dict[str, "Tree"]:
    """Returns the trees of the folders in this one, by name."""
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
  """Returns what counts below a folder.

  Args:
    path: the folder.
    text: what to call it in an error; the path if empty.

  Raises:
    UserError: if the folder itself can't be read. What lies below it and can't is in `broken`.
  """
  files, folders, broken, skipped = [], [], {}, []

  def visit(folder: str, prefix: str, above: frozenset) -> None:
    with os.scandir(folder) as entries:
      found = sorted((e.name, e.path) for e in entries if not is_hidden(e.name))
    for entry, place in found:
      name = prefix + entry
      try:
        status = os.stat(place)
        key = status.st_dev, status.st_ino
        if stat.S_ISREG(status.st_mode):
          files.append(name)
        elif not stat.S_ISDIR(status.st_mode) or key in above:
          skipped.append(name)
        else:
          folders.append(name)
          visit(place, f"{name}/", above | {key})
      except OSError as e:
        broken[name] = f"{place}: {_why(place, e)}"

  try:
    status = os.stat(path)
    visit(str(path), "", frozenset({(status.st_dev, status.st_ino)}))
  except OSError as e:
    raise UserError(f"{text or path}: {e.strerror or e}") from e
  return Tree(path, tuple(sorted(files)), tuple(sorted(folders)), broken, tuple(skipped))


def _why(place: str, error: OSError) -> str:
  if os.path.islink(place) and not os.path.exists(place):
    return f"a link to {os.readlink(place)}, where nothing can be read; mount or delete it"
  return error.strerror or str(error)


def is_hidden(name: str) -> bool:
  """Returns whether an entry does not count: hidden, or left there by a system."""
  return name.startswith(".") or name.lower() in _SYSTEM


def counts(name: str) -> bool:
  """Returns whether no part of a path with slashes is hidden."""
  return not any(map(is_hidden, name.split("/")))


# --- names ----------------------------------------------------------------------------


def shown(name: str) -> str:
  """Returns a file's name as text: composed letters (macOS stores them in parts), no odd bytes."""
  text = os.fsencode(name).decode("utf-8", "backslashreplace")
  return unicodedata.normalize("NFC", text)


def order(name: str) -> tuple:
  """Sorts names as people do: numbers by their value, also inside of names (1, 2, 10)."""
  if re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", name):
    return 0, float(name), [], name
  pieces = re.split(r"([0-9]+)", name)  # texts and numbers in turn
  return 1, 0.0, [int(p) if i % 2 else p for i, p in enumerate(pieces)], name


def path_order(name: str) -> list[tuple]:
  """`order` for a path with slashes."""
  return [order(part) for part in name.split("/")]


def unique(pairs: Iterable[tuple[str, object]], what: str) -> dict:
  """Returns a dict of (name, value) pairs in the order of names.

  Raises:
    UserError: if two have one name.
  """
  found = {}
  for name, value in pairs:
    if name in found:
      raise UserError(f"{what} {name!r} is there twice; rename one of the two")
    found[name] = value
  return {name: found[name] for name in sorted(found, key=order)}


# --- files that are no images ---------------------------------------------------------


def is_image(name: str) -> bool:
  """Returns whether a file is, by its ending, an image that is read."""
  return _IMAGES.search(name) is not None


def is_unread_image(name: str) -> bool:
  """Returns whether a file is, by its ending, an image of a format that is not read."""
  return _UNREAD.search(name) is not None


def unused(names: Iterable[str]) -> str:
  """Returns a text that counts files by their endings and names one; empty if there are none."""
  names = list(names)
  if not names:
    return ""
  endings = [pathlib.PurePosixPath(name).suffix.lower() or "no ending" for name in names]
  kinds = ", ".join(f"{e} {endings.count(e)}" for e in sorted(set(endings)))
  return f"{len(names)} not used ({kinds}), for example {names[0]}"


# --- several mistakes at once ---------------------------------------------------------


def for_all(fn: Callable, items: Iterable) -> list:
  """Returns [fn(item) for item in items].

  Raises:
    UserErrors: if any raised a UserError, after all were tried.
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
