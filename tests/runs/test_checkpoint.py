"""Items on disk: whole or not there, and never trusted when they were touched."""

import errno
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from halrp_jax import packing
from halrp_jax.methods import stl
from halrp_jax.runs import checkpoint
from halrp_jax.types import State
from halrp_jax.weights import lowrank

TREE = {
  "p": lowrank.Perturbation(np.ones(3), np.zeros(2), np.eye(3, 2), None, np.eye(2)),
  "n": (np.int32(4), 7, True, None, "text"),
  "list": [np.arange(6, dtype=np.uint8).reshape(2, 3)],
  "empty": {},
  "no rows": np.zeros((0, 4), np.float32),
}


def save(folder, tree=TREE, **about):
  checkpoint.save(folder, packing.pack(tree), about)


def assert_same(a, b):
  assert type(a) is type(b) or isinstance(a, np.ndarray)
  if isinstance(a, dict):
    assert a.keys() == b.keys()
    a, b = a.values(), b.values()
  if isinstance(a, (tuple, list)) or not isinstance(
    a, (np.ndarray, np.generic, int, str, type(None))
  ):
    for x, y in zip(a, b, strict=True):
      assert_same(x, y)
  else:
    np.testing.assert_array_equal(a, b)


def test_what_is_saved_comes_back(tmp_path):
  save(tmp_path / "item", events=12)
  tree, about = checkpoint.load(tmp_path / "item")
  assert_same(tree, TREE)
  assert tree["p"]._fields == TREE["p"]._fields and about["events"] == 12
  assert not list(tmp_path.glob(".writing*"))


def test_packing_copies(tmp_path):
  x = np.ones(3)
  packed = packing.pack({"x": x, "y": jnp.ones(2)})
  x[:] = 5
  checkpoint.save(tmp_path / "item", packed, {})
  np.testing.assert_array_equal(checkpoint.load(tmp_path / "item")[0]["x"], np.ones(3))


def test_a_missing_item_is_not_a_damaged_one(tmp_path):
  with pytest.raises(FileNotFoundError):
    checkpoint.load(tmp_path / "item")


DAMAGES = {
  "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
  "emptied": lambda path: path.write_bytes(b""),
  "deleted": lambda path: path.unlink(),
  "flipped": lambda path: path.write_bytes(
    bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]
  ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_to_every_file_is_found(tmp_path, damage):
  save(tmp_path / "item")
  names = [p.relative_to(tmp_path / "item") for p in (tmp_path / "item").rglob("*") if p.is_file()]
  assert len(names) > 5
  for name in names:
    if not (tmp_path / "item" / name).stat().st_size and damage != "deleted":
      continue
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "item", copy)
    DAMAGES[damage](copy / name)
    with pytest.raises(checkpoint.Damaged) as e:
      checkpoint.load(copy)
    assert str(copy) in str(e.value)
    shutil.rmtree(copy)


def test_an_empty_folder_is_found(tmp_path):
  (tmp_path / "hollow").mkdir()
  with pytest.raises(checkpoint.Damaged, match="missing"):
    checkpoint.load(tmp_path / "hollow")


# left by file managers, synchronisation, editors and NFS
STRAYS = (".DS_Store", "Thumbs.db", "arrays/desktop.ini", "arrays/d/.nfs000", "about (copy).json")


@pytest.mark.parametrize("name", STRAYS)
def test_a_file_that_the_manifest_does_not_name_is_no_damage(tmp_path, name):
  save(tmp_path / "item")
  (tmp_path / "item" / name).write_bytes(b"\0\0Bud1")
  assert_same(checkpoint.load(tmp_path / "item")[0], TREE)
  assert checkpoint.strays(tmp_path / "item") == [name]


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "arrays/desktop.ini"])
def test_a_file_left_while_an_item_is_written_may_change_later(tmp_path, monkeypatch, name):
  write = checkpoint._write

  def write_with_stray(path, content):
    write(path, content)
    if path.name == "about.json":
      (path.parent / name).write_bytes(b"1")

  with monkeypatch.context() as m:
    m.setattr(checkpoint, "_write", write_with_stray)
    save(tmp_path / "item")
  (tmp_path / "item" / name).write_bytes(b"2")
  assert_same(checkpoint.load(tmp_path / "item")[0], TREE)
  (tmp_path / "item" / name).unlink()
  assert_same(checkpoint.load(tmp_path / "item")[0], TREE)


def test_an_item_that_can_not_be_deleted_is_replaced_all_the_same(tmp_path, monkeypatch):
  """As with a file that is open on NFS."""
  save(tmp_path / "item", {"x": np.ones(3)})
  (tmp_path / ".writing-item").mkdir()
  (tmp_path / ".replaced-item").mkdir()
  with monkeypatch.context() as m:
    m.setattr(checkpoint.shutil, "rmtree", lambda path, ignore_errors: None)
    save(tmp_path / "item", {"x": np.zeros(3)})
  np.testing.assert_array_equal(checkpoint.load(tmp_path / "item")[0]["x"], np.zeros(3))
  checkpoint.delete_items(tmp_path, set())
  assert [p.name for p in tmp_path.iterdir()] == ["item"]


def test_a_file_that_can_not_be_read_now_is_no_damage(tmp_path, monkeypatch):
  save(tmp_path / "item")

  def away(path):
    raise OSError(errno.EIO, "Input/output error", str(path))

  monkeypatch.setattr(checkpoint, "_entry", away)
  with pytest.raises(OSError, match="Input/output"):
    checkpoint.load(tmp_path / "item")


def test_plain_folders_of_orbax_may_hold_strays(tmp_path):
  checkpoint.save_plain(tmp_path / "item", {"a": {"x": np.ones(3, np.float32)}})
  (tmp_path / "item" / ".DS_Store").write_bytes(b"1")
  (tmp_path / "item" / "d" / "Thumbs.db").write_bytes(b"1")
  np.testing.assert_array_equal(checkpoint.load_plain(tmp_path / "item")["a"]["x"], np.ones(3))


def forge(folder, **changes):
  """Changes about.json and makes the manifest fit, as somebody who means harm would."""
  about = json.loads((folder / "about.json").read_text()) | changes
  (folder / "about.json").write_text(json.dumps(about))
  (folder / "manifest.json").write_text(json.dumps(checkpoint._manifest(folder)))


@pytest.mark.parametrize(
  "changes",
  [
    {"structure": {"named": "os:system", "items": []}},
    {"structure": {"named": "halrp_jax.checkpoint:save", "items": []}},
    {"structure": {"array": 99}},
    {"structure": 3},
    {"structure": {}},
    {"leaves": [[[9], "float32"]]},
    {"leaves": [[[3], "object"]]},
    {"leaves": "no"},
  ],
)
def test_forged_items_run_nothing_and_are_refused(tmp_path, changes):
  save(tmp_path / "item", {"x": np.ones(3)})
  forge(tmp_path / "item", **changes)
  with pytest.raises(checkpoint.Damaged):
    checkpoint.load(tmp_path / "item")


def test_an_interrupted_save_leaves_the_old_item(tmp_path, monkeypatch):
  save(tmp_path / "item", {"x": np.ones(3)})

  def full(path, content):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(checkpoint, "_write", full)
  with pytest.raises(OSError, match="No space left"):
    save(tmp_path / "item", {"x": np.zeros(3)})
  np.testing.assert_array_equal(checkpoint.load(tmp_path / "item")[0]["x"], np.ones(3))
  assert [p.name for p in tmp_path.iterdir()] == ["item"]


def test_fingerprints_tell_bits_apart():
  a = {"x": np.float32([0.0, 1.0])}
  assert checkpoint.fingerprint(a) == checkpoint.fingerprint({"x": jnp.array([0.0, 1.0])})
  assert checkpoint.fingerprint(a) != checkpoint.fingerprint({"x": np.float32([-0.0, 1.0])})
  assert checkpoint.fingerprint(a) != checkpoint.fingerprint({"y": a["x"]})


def test_a_task_state_has_the_hash_of_the_dict_that_older_versions_kept():
  task = stl.TaskState({"head": jnp.ones(2)}, {}, jnp.int32(3))
  older = {"params": {"head": jnp.ones(2)}, "stats": {}, "num_classes": jnp.int32(3)}
  tree, other = (State({"x": jnp.zeros(1)}, (t,)) for t in (task, older))
  assert checkpoint.fingerprint(tree) == checkpoint.fingerprint(other)
  assert checkpoint.fingerprint(task) != checkpoint.fingerprint(task._replace(num_classes=task[0]))
