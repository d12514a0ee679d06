"""Reads the docstrings for the site as they are written here (an extension of griffe).

Indented lines, such as commands and formulas, become code; brackets of `shared["kernels"]` make no
links; the comment of a field or a constant becomes its description.
"""

import pathlib
import re

import griffe

SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes|Examples?|Notes?):$")
COMMENT = re.compile(r".*?\s{2}# (.+)")


class Docstrings(griffe.Extension):
  """Changes every docstring before mkdocstrings renders it."""

  def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
    """Rewrites the docstring of one module, class, function or attribute."""
    if obj.is_attribute and not obj.docstring and (text := _comment(obj)):
      obj.docstring = griffe.Docstring(text, parent=obj)
    if obj.docstring:
      obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
  """Returns a docstring whose free text is Markdown; its sections stay as they are."""
  found, is_code = [], False
  lines = text.splitlines()
  for i, line in enumerate(lines):
    if SECTION.match(line):
      found += ["```", ""] if is_code else []
      return "\n".join(found + lines[i:])
    is_indented = line.startswith("  ")
    if is_indented and not is_code and (i == 0 or not lines[i - 1].strip()):
      found.append("```text")
      is_code = True
    elif is_code and line.strip() and not is_indented:
      found += ["```", ""]
      is_code = False
    found.append(line.removeprefix("  ") if is_code else _plain(line))
  return "\n".join(found + ["```"] * is_code)


def _plain(line: str) -> str:
  """Returns a line in which brackets outside of `code` make no links, and no HTML."""
  parts = line.split("`")
  parts[::2] = [re.sub(r"(?<!\\)\[", r"\\[", part).replace("<", "&lt;") for part in parts[::2]]
  return line if "](" in line else "`".join(parts)


def _comment(obj: griffe.Object) -> str:
  """Returns the comment behind the definition of an attribute, or the one directly above it."""
  if not obj.lineno or not isinstance(obj.filepath, pathlib.Path):
    return ""
  lines = obj.filepath.read_text(encoding="utf-8").splitlines()
  if behind := COMMENT.fullmatch(lines[obj.lineno - 1]):
    return _sentence(behind[1])
  above = []
  for line in reversed(lines[: obj.lineno - 1]):
    if not line.strip().startswith("# ") or "---" in line:
      break
    above.insert(0, line.strip()[2:])
  return _sentence(" ".join(above))


def _sentence(text: str) -> str:
  """Returns a text that begins with a capital, unless with a symbol, and ends with a full stop."""
  if not text:
    return ""
  text = text[0].upper() + text[1:] if re.match(r"[a-z]+\b[^_.(=\[]", text) else text
  return text if text.endswith((".", "?", "!")) else f"{text}."
