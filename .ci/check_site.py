"""Checks a built site: links to its own pages and anchors lead somewhere, and nothing is loaded.

  python .ci/check_site.py site

A page may link to other sites, but its scripts, styles, images and fonts must be files of the site,
so that it can be read without a network. Exit code 1 if anything is wrong.
"""

import html.parser
import pathlib
import re
import sys
import urllib.parse

LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("link", "href")}
NOT_LOADED = {"canonical", "prev", "next", "alternate", "edit"}  # values of `rel`
IN_STYLE = re.compile(r"""(?:url\(|@import\s)["'\s]*(?:https?:)?//""")


class Page(html.parser.HTMLParser):
  """Collects what a page links to and loads, and the anchors that it has."""

  def __init__(self, text: str) -> None:
    super().__init__()
    self.links, self.loads, self.anchors = [], [], {"", "__top"}
    self.feed(text)

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    """Looks at one element."""
    values = {name: value or "" for name, value in attrs}
    self.anchors |= {values.get("id", ""), values.get("name", "")}
    for name, value in values.items():
      if (tag, name) in LOADED and not NOT_LOADED & set(values.get("rel", "").split()):
        self.loads.append(value)
      elif (tag, name) == ("a", "href"):
        self.links.append(value)
      elif name == "style" and IN_STYLE.search(value):
        self.loads.append(value)


def is_outside(link: str) -> bool:
  """Tells whether a link leaves the site."""
  return bool(re.match(r"[a-z]+:|//", link)) and not link.startswith("data:")


def faults(root: pathlib.Path) -> list[str]:
  """Returns a line for every link that leads nowhere and everything that is loaded from outside."""
  pages = {path: Page(path.read_text(encoding="utf-8")) for path in root.rglob("*.html")}
  wrong = []
  for path, page in pages.items():
    name = path.relative_to(root)
    if name.name == "404.html":  # its links begin at the root of a server
      continue
    wrong += [f"{name}: loads {link}" for link in page.loads if is_outside(link)]
    for link in {link for link in [*page.links, *page.loads] if not is_outside(link)}:
      if link.startswith("data:"):
        continue
      target, _, anchor = link.partition("#")
      file = path if not target else path.parent / urllib.parse.unquote(target.partition("?")[0])
      file = pathlib.Path(file.resolve())
      file = file / "index.html" if file.is_dir() else file
      if not file.is_file():
        wrong.append(f"{name}: {link}: no such file")
      elif file in pages and urllib.parse.unquote(anchor) not in pages[file].anchors:
        wrong.append(f"{name}: {link}: no such anchor")
  for path in root.rglob("*.css"):
    if IN_STYLE.search(path.read_text(encoding="utf-8")):
      wrong.append(f"{path.relative_to(root)}: loads from another site")
  return sorted(wrong)


def main(folder: str) -> int:
  """Prints what is wrong with the site in a folder."""
  root = pathlib.Path(folder).resolve()
  wrong = faults(root)
  print(*wrong, sep="\n", end="\n" if wrong else "")
  count = len(list(root.rglob("*.html")))
  print(f"{folder}: {count} pages, {len(wrong)} faults")
  return int(bool(wrong) or not count)


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
