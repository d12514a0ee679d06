"""What the documents say of this tree is so: paths in them lead somewhere."""

import itertools
import re

from .conftest import ROOT

FOLDERS = ("halrp_jax", "tests", "docs", "configs", "launch", "benchmarks", "examples")
INSIDE = sorted(p.parent.name for p in (ROOT / "halrp_jax").glob("*/__init__.py"))
PATH = re.compile(rf"(?<![\w/.\-])(?:{'|'.join([*FOLDERS, *INSIDE])})/[\w/.*]*\w")
SUFFIXES = (".py", ".md", ".sh", ".json", ".html")


def _texts():
  """Yields the documents, and the sources whose docstrings and comments name files."""
  yield from (ROOT / name for name in ("README.md", "BUILD.md", "Makefile", "launch/common.sh"))
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


def test_the_layout_in_the_readme_has_every_folder():
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  layout = text[text.index("## Layout") : text.index("## Add a method")]
  listed = re.findall(r"^\| `([\w/]+)/` \|", layout, re.M)
  assert sorted(listed) == sorted([*FOLDERS, *(f"halrp_jax/{name}" for name in INSIDE)])


def test_a_module_in_the_readme_is_one():
  """Such as `training.fit.make_fit`; `halrp_jax.NAME` are the shorter names of the package."""
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  for folder, module, name in re.findall(r"`(\w+)\.(\w+)\.(\w+)`", text):
    if folder in INSIDE:
      source = (ROOT / "halrp_jax" / folder / f"{module}.py").read_text(encoding="utf-8")
      assert re.search(rf"^(def|class) {name}\b|^{name} = ", source, re.M), name
