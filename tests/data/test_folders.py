"""The one walk over users' files: what counts, what is named, in which order."""

import os

import pytest

from halrp_jax.data import folders
from halrp_jax.types import UserError, UserErrors


def touch(*paths):
  for path in paths:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


def test_hidden_and_system_entries_do_not_count(tmp_path):
  touch(tmp_path / "a" / "1.png", tmp_path / "a.png")
  for name in (
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    "a/._1.png",
    "a/THUMBS.DB",
    "__MACOSX/a/1.png",
    ".ipynb_checkpoints/1.png",
    "a/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg",
    "$RECYCLE.BIN/1.png",
    "lost+found/1.png",
  ):
    touch(tmp_path / name)
  tree = folders.walk(tmp_path)
  assert (tree.files, tree.folders) == (("a.png", "a/1.png"), ("a",))
  assert not tree.broken and not tree.skipped


def test_a_hidden_folder_that_is_asked_for_counts(tmp_path):
  touch(tmp_path / ".mine" / "1.png")
  assert folders.walk(tmp_path / ".mine").files == ("1.png",)


def test_links_are_followed_but_not_in_circles_and_broken_ones_are_named(tmp_path):
  touch(tmp_path / "store" / "1.png")
  root = tmp_path / "root"
  root.mkdir()
  (root / "to folder").symlink_to(tmp_path / "store")
  (root / "to file.png").symlink_to(tmp_path / "store" / "1.png")
  (root / "twice").symlink_to(tmp_path / "store")
  (tmp_path / "store" / "circle").symlink_to(tmp_path / "store")
  (root / "up").symlink_to(root)
  (root / "unmounted").symlink_to("/mnt/gone")
  (root / "self").symlink_to("self")
  tree = folders.walk(root)
  assert tree.files == ("to file.png", "to folder/1.png", "twice/1.png")
  assert set(tree.skipped) == {"to folder/circle", "twice/circle", "up"}
  assert set(tree.broken) == {"unmounted", "self"}
  assert "root/unmounted: a link to /mnt/gone, which can't be read" in tree.broken["unmounted"]
  child = tree.children()["twice"]
  assert (child.path, child.files, child.skipped) == (root / "twice", ("1.png",), ("circle",))


def test_pipes_are_not_opened(tmp_path):
  os.mkfifo(tmp_path / "1.png")
  assert folders.walk(tmp_path).skipped == ("1.png",)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_can_not_be_read_is_named(tmp_path):
  (tmp_path / "closed").mkdir(mode=0)
  assert "closed: Permission denied" in folders.walk(tmp_path).broken["closed"]


def test_a_folder_that_is_not_there(tmp_path):
  with pytest.raises(UserError, match="data_dir=x: No such file"):
    folders.walk(tmp_path / "x", "data_dir=x")


@pytest.mark.parametrize(
  "names",
  [
    ("1", "2", "10"),
    ("-5", "0", "0.05", "0.5", "10"),
    ("2", "10", "cat"),
    ("site1", "site2", "site10", "site10b"),
    ("v1.2", "v1.10"),
    ("Bear", "ant"),
  ],
)
def test_the_order_of_names(names):
  assert tuple(sorted(reversed(names), key=folders.order)) == names


def test_shown_names():
  assert folders.shown("A\u0308pfel") == "Äpfel"
  assert folders.shown(os.fsdecode(b"caf\xe9")) == r"caf\xe9"


def test_what_is_not_used_is_counted():
  assert folders.unused([]) == ""
  said = folders.unused(["a/x.txt", "b.TXT", "README"])
  assert said == "3 not used (.txt 2, no suffix 1), for example a/x.txt"


def test_all_mistakes_at_once():
  def fail(i):
    if i % 2:
      raise UserErrors([f"{i} a", f"{i} b"]) if i == 3 else UserError(f"{i}")
    return 10 * i

  assert folders.for_all(fail, [0, 2]) == [0, 20]
  with pytest.raises(UserErrors, match=r"^1 \(and 2 more; check_data lists them\)$") as e:
    folders.for_all(fail, range(5))
  assert e.value.lines == ("1", "3 a", "3 b")
