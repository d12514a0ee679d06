"""What the documents say of this tree is so: paths in them lead somewhere."""

import itertools
import re
import tomllib

import pytest

from .conftest import ROOT

FOLDERS = ("halrp_jax", "tests", "docs", "configs", "launch", "benchmarks", "examples")
INSIDE = sorted(p.parent.name for p in (ROOT / "halrp_jax").glob("*/__init__.py"))
PATH = re.compile(rf"(?<![\w/.\-])(?:{'|'.join([*FOLDERS, *INSIDE])})/[\w/.*]*\w")
SUFFIXES = (".py", ".md", ".sh", ".json", ".html")


AT_THE_TOP = ("README.md", "BUILD.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)")


def _texts():
  """Yields the documents, and the sources whose docstrings and comments name files."""
  told = (*AT_THE_TOP, "Makefile", "launch/common.sh")
  yield from (ROOT / name for name in told if name != "CHANGELOG.md")  # it names what is gone
  folders = (ROOT / name for name in ("docs", "halrp_jax", "configs", "examples", "benchmarks"))
  for path in itertools.chain.from_iterable(folder.rglob("*") for folder in folders):
    if path.suffix in (".py", ".md") and "records" not in path.parts:
      yield path


def test_paths_lead_somewhere():
  wrong = []
  for path in _texts():
    for line in path.read_text(encoding="utf-8").splitlines():
      for name in PATH.findall(line):
        is_pattern = "*" in name or re.search(r"\b[A-Z]+\.py$", name)  # methods/NAME.py
        if is_pattern or not name.endswith(SUFFIXES):
          continue
        if not any((root / name).is_file() for root in (ROOT, ROOT / "halrp_jax")):
          wrong.append(f"{path.relative_to(ROOT)}: {name}")
  assert not wrong


def test_links_lead_somewhere():
  """Those to files; `make docs` checks the anchors too."""
  wrong = []
  for path in [*(ROOT / name for name in AT_THE_TOP), *(ROOT / "docs").glob("*.md")]:
    for name in LINK.findall(path.read_text(encoding="utf-8")):
      if not (path.parent / name).exists():
        wrong.append(f"{path.relative_to(ROOT)}: {name}")
  assert not wrong


def test_every_document_is_on_the_site_and_in_its_index():
  site = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
  pages = {page for entry in site["nav"] for page in _pages(entry)}
  assert pages == {path.name for path in (ROOT / "docs").glob("*.md")}
  index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
  assert pages - {"index.md"} <= set(LINK.findall(index))


def _pages(entry):
  """Yields the pages of an entry of the navigation, with those below it."""
  for value in entry.values():
    if isinstance(value, str):
      yield value
    else:
      for below in value:
        yield from _pages(below)


def test_the_layout_has_every_folder():
  layout = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
  listed = re.findall(r"^\| `([\w/]+)/` \|", layout, re.M)
  assert sorted(listed) == sorted([*FOLDERS, *(f"halrp_jax/{name}" for name in INSIDE)])


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/guide.md", "docs/layout.md"])
def test_a_module_in_a_document_is_one(document):
  """Such as `training.fit.make_fit`; `halrp_jax.NAME` are the shorter names of the package."""
  text = (ROOT / document).read_text(encoding="utf-8")
  for folder, module, name in re.findall(r"`(\w+)\.(\w+)\.(\w+)`", text):
    if folder in INSIDE:
      source = (ROOT / "halrp_jax" / folder / f"{module}.py").read_text(encoding="utf-8")
      assert re.search(rf"^(def|class) {name}\b|^{name} = ", source, re.M), name
