import io
import json
import pathlib
import tarfile

import numpy as np
import pytest

from halrp_jax import data
from halrp_jax.config import make_config, resolve
from halrp_jax.data import cifar100, orders
from halrp_jax.types import UserError

from ..conftest import ROOT

RECORD = 3074


def cifar_config(folder, benchmark="cifar100_split", method="stl", **overrides):
  config = make_config(
    method,
    benchmark=benchmark,
    data_dir=str(folder),
    order="A",
    network="lenet",
    protocol={},
    methods_={},
  )
  with config.unlocked():
    config.update_from_flattened_dict(overrides)
  return resolve(config)


def write_small_cifar(folder: pathlib.Path, per_class=10):
  """A CIFAR-100 of random images in the original layout, `per_class` training images a class."""
  rng = np.random.default_rng(0)
  to = folder / "cifar-100-binary"
  to.mkdir(parents=True)
  for name, n in (("train.bin", per_class), ("test.bin", 2)):
    fine = np.tile(np.arange(100, dtype=np.uint8), n)
    pixels = rng.integers(0, 256, (len(fine), 3072), dtype=np.uint8)
    (to / name).write_bytes(np.column_stack([fine // 5, fine, pixels]).tobytes())
  (to / "fine_label_names.txt").write_text("\n".join(f"fine{i}" for i in range(100)))
  (to / "coarse_label_names.txt").write_text("\n".join(f"coarse{i}" for i in range(20)))
  return to


def test_orders_of_the_paper():
  assert orders.resolve("B", "cifar100_split", 10) == (1, 7, 4, 5, 2, 0, 8, 6, 9, 3)
  assert orders.resolve("natural", "cifar100_split", 3) == (0, 1, 2)
  assert orders.resolve("2,0,1", "cifar100_split", 3) == (2, 0, 1)
  assert orders.resolve("2,0", "cifar100_split", 3) == (2, 0)
  assert orders.resolve("0", "digits", 10) == tuple(np.random.RandomState(0).permutation(10))


def test_some_of_the_tasks_are_the_same_data_and_are_said_to_be_partial(digits_config):
  whole, some = (data.load(resolve(digits_config(order=o))) for o in ("natural", "4,1"))
  assert [task.id for task in some.tasks] == [4, 1]
  assert some.partial and not whole.partial and some.split_hash == whole.split_hash
  np.testing.assert_array_equal(some.tasks[0].train.index, whole.tasks[4].train.index)


def test_every_order_is_a_permutation():
  for table in (orders.PAPER, orders.CODE):
    for named in table.values():
      for order in named.values():
        assert sorted(order) == list(range(len(order)))


@pytest.mark.parametrize("order", ["F", "", "0,3", "0,0,1", "1,2,3", "a,b", "A,B"])
def test_a_wrong_order_is_refused(order):
  with pytest.raises(UserError, match="order must be"):
    orders.resolve(order, "cifar100_split", 3)


def test_orders_equal_the_spec_where_it_is_at_hand():
  spec = ROOT.parent / "shared" / "spec" / "task_orders.json"
  if not spec.is_file():
    pytest.skip("no ../shared/spec here")
  spec, ours = json.loads(spec.read_text()), {"five_dataset": "five_datasets"}
  ours |= {f"tinyimagenet_{n}split": f"tinyimagenet{n}" for n in (20, 40)}
  for name, paper in spec["paper"].items():
    name_here = ours.get(name, name)
    assert {k: list(v) for k, v in orders.PAPER[name_here].items()} == paper
    for order, ids in spec["code"].get(name, {}).items():
      num_tasks = spec["T"][name]
      assert list(orders.resolve(order, name_here, num_tasks, "code")) == ids


def test_digits_are_real_and_split_without_overlap(digits_config):
  benchmark = data.load(resolve(digits_config()))
  assert benchmark.image_shape == (8, 8, 1) and len(benchmark.tasks) == 10
  for task in benchmark.tasks:
    rows = [set(np.asarray(s.index).tolist()) for s in (task.train, task.valid, task.test)]
    assert [len(r) for r in rows] == [1038, 259, 500]
    assert not (rows[0] & rows[1] or rows[0] & rows[2] or rows[1] & rows[2])
    assert task.train.image is benchmark.tasks[0].train.image  # one array for all


def test_the_split_depends_on_seed_and_task_and_not_on_the_order(digits_config):
  def split(**overrides):
    benchmark = data.load(resolve(digits_config(**overrides)))
    return {t.id: np.asarray(t.train.index) for t in benchmark.tasks}, benchmark.split_hash

  (a, hash_a), (b, hash_b), (c, hash_c) = split(order="0"), split(order="1"), split(seed=1)
  assert all(np.array_equal(a[i], b[i]) for i in range(10)) and hash_a == hash_b
  assert not np.array_equal(a[0], c[0]) and hash_a != hash_c
  assert not np.array_equal(a[0], a[1])


PER_TASK = {"protocol.fraction_per_class": False}


@pytest.mark.parametrize(("fraction", "train", "valid"), [(1.0, 80, 20), (0.05, 4, 1)])
def test_fractions_as_in_the_authors_loader(tmp_path, fraction, train, valid):
  write_small_cifar(tmp_path)
  benchmark = data.load(
    cifar_config(tmp_path, allow_partial=True, train_fraction=fraction, **PER_TASK)
  )
  assert benchmark.partial
  for task in benchmark.tasks:
    assert (len(task.train.index), len(task.valid.index)) == (train, valid)
    assert len(task.test.index) == 20  # always the whole test set


def test_too_small_a_fraction_is_refused(tmp_path):
  write_small_cifar(tmp_path)
  with pytest.raises(UserError, match="train_fraction = 0.01 leaves task"):
    data.load(cifar_config(tmp_path, allow_partial=True, train_fraction=0.01, **PER_TASK))


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.99, 1.0])
def test_fractions_per_class_are_balanced_and_nested(tmp_path, fraction):
  write_small_cifar(tmp_path)

  def used(fraction):
    benchmark = data.load(cifar_config(tmp_path, allow_partial=True, train_fraction=fraction))
    return {
      t.id: np.concatenate([np.asarray(s.index) for s in (t.train, t.valid)])
      for t in benchmark.tasks
    }

  label = np.tile(np.arange(100), 10)
  rows, whole = used(fraction), used(1.0)
  for i, found in rows.items():
    counts = np.bincount(label[found], minlength=100)[10 * i : 10 * i + 10]
    assert (counts == np.ceil(fraction * 10)).all()
    assert set(found) <= set(whole[i]) and len(set(found)) == len(found)


@pytest.mark.parametrize("benchmark", ["cifar100_split", "cifar100_superclass"])
def test_pixels_and_labels_come_from_the_files(tmp_path, benchmark):
  folder = write_small_cifar(tmp_path)
  raw = np.frombuffer((folder / "train.bin").read_bytes(), np.uint8).reshape(-1, RECORD)
  tasks = data.load(cifar_config(tmp_path, benchmark, allow_partial=True)).tasks
  num_classes = 10 if benchmark == "cifar100_split" else 5
  for task in (tasks[0], tasks[3]):
    for row, label in zip(np.asarray(task.train.index), np.asarray(task.train.label), strict=True):
      assert raw[row, 1] == num_classes * task.id + label
      assert task.class_names[label] == f"fine{raw[row, 1]}"
    row = int(task.train.index[0])
    planes = raw[row, 2:].reshape(3, 32, 32)
    np.testing.assert_array_equal(task.train.image[row], planes.transpose(1, 2, 0))


def test_folder_and_archive_give_the_same(tmp_path):
  folder = write_small_cifar(tmp_path / "extracted")
  (tmp_path / "packed").mkdir()
  with tarfile.open(tmp_path / "packed" / "cifar-100-binary.tar.gz", "w:gz") as tar:
    tar.add(folder, "cifar-100-binary")
  hashes = {
    data.load(cifar_config(place, allow_partial=True)).split_hash
    for place in (tmp_path / "extracted", folder, tmp_path / "packed")
  }
  assert len(hashes) == 1


def damage(folder: pathlib.Path, how: str):
  train = folder / "train.bin"
  if how == "truncated":
    train.write_bytes(train.read_bytes()[:-1])
  elif how == "short":
    train.write_bytes(train.read_bytes()[: 50 * RECORD])
  elif how == "empty":
    train.write_bytes(b"")
  elif how == "missing":
    (folder / "test.bin").unlink()
  elif how == "label":
    contents = bytearray(train.read_bytes())
    contents[1] = 200
    train.write_bytes(contents)
  elif how == "names":
    (folder / "fine_label_names.txt").write_text("one two")
  elif how == "class":
    raw = np.frombuffer(train.read_bytes(), np.uint8).reshape(-1, RECORD)
    train.write_bytes(raw[raw[:, 1] != 7].tobytes())


@pytest.mark.parametrize(
  ("how", "partial", "says"),
  [
    ("truncated", True, "train.bin: .* truncated or damaged"),
    ("short", False, "has no training images of class"),
    ("empty", True, "train.bin: 0 bytes"),
    ("missing", True, "test.bin is missing"),
    ("label", True, "label is out of range"),
    ("names", True, "fine_label_names.txt: 2 names, expected 100"),
    ("class", True, "has no training images of class 'fine7'"),
  ],
)
def test_damaged_data_get_one_clear_line(tmp_path, how, partial, says):
  damage(write_small_cifar(tmp_path), how)
  with pytest.raises(UserError, match=says):
    data.load(cifar_config(tmp_path, allow_partial=partial))


def test_too_few_images_are_refused_by_how_many(tmp_path):
  write_small_cifar(tmp_path)
  says = "task 'classes 0 to 9' has 100 training images, 4,900 fewer than the 5,000 of the protocol"
  with pytest.raises(UserError, match=f"{says} .and 19 more.; .* allow_partial=True"):
    data.load(cifar_config(tmp_path))


def test_missing_data_name_what_was_looked_for(tmp_path):
  with pytest.raises(UserError, match="found neither cifar-100-binary/ nor cifar-100-binary.tar"):
    data.load(cifar_config(tmp_path))
  with pytest.raises(UserError, match="data_dir is not set"):
    data.load(cifar_config(""))


def test_the_python_version_is_refused_by_name(tmp_path):
  (tmp_path / "cifar-100-python").mkdir()
  with pytest.raises(UserError, match="python version.*cifar-100-binary.tar.gz"):
    data.load(cifar_config(tmp_path))


@pytest.mark.parametrize("contents", [b"", b"<html>not found</html>", b"\x1f\x8b" + b"x" * 99])
def test_a_damaged_archive_gets_one_clear_line(tmp_path, contents):
  (tmp_path / "cifar-100-binary.tar.gz").write_bytes(contents)
  with pytest.raises(UserError, match="cifar-100-binary.tar.gz: .*(damaged|not the archive)"):
    data.load(cifar_config(tmp_path))


def test_an_archive_of_something_else_gets_one_clear_line(tmp_path):
  with tarfile.open(tmp_path / "cifar-100-binary.tar.gz", "w:gz") as tar:
    member = tarfile.TarInfo("other/file")
    tar.addfile(member, io.BytesIO(b""))
  with pytest.raises(UserError, match="train.bin is missing; download the original archive again"):
    data.load(cifar_config(tmp_path))


def test_real_cifar100(real_data):
  benchmark = data.load(cifar_config(real_data))
  assert not benchmark.partial
  assert benchmark.tasks[0].class_names[:3] == ("apple", "aquarium_fish", "baby")
  for task in benchmark.tasks:
    sizes = [len(s.index) for s in (task.train, task.valid, task.test)]
    assert sizes == [4000, 1000, 1000]
    assert set(np.bincount(np.asarray(task.test.label))) == {100}
  benchmark = data.load(cifar_config(real_data, "cifar100_superclass", train_fraction=0.05))
  assert benchmark.tasks[0].name == "aquatic_mammals"
  assert benchmark.tasks[0].class_names == ("beaver", "dolphin", "otter", "seal", "whale")
  assert [len(benchmark.tasks[19].train.index), len(benchmark.tasks[19].valid.index)] == [100, 25]


def test_real_superclasses_equal_the_spec(real_data):
  spec = ROOT.parent / "shared" / "spec" / "task_orders.json"
  if not spec.is_file():
    pytest.skip("no ../shared/spec here")
  want = json.loads(spec.read_text())["cifar100_class_map"]["superclass"]
  names = data.load(cifar_config(real_data)).tasks
  fine = [name for task in names for name in task.class_names]
  for task in data.load(cifar_config(real_data, "cifar100_superclass")).tasks:
    assert task.name == want[str(task.id)]["name"]
    assert [fine.index(c) for c in task.class_names] == want[str(task.id)]["fine_ids"]


def test_normalisation_constants():
  np.testing.assert_allclose(cifar100._MEAN, [0.507, 0.487, 0.441])
  np.testing.assert_allclose(cifar100._STD, [0.267, 0.256, 0.276])


# --- no class without images ----------------------------------------------------------


def counts(split, num_classes):
  return np.bincount(np.asarray(split.label), minlength=num_classes)


@pytest.mark.parametrize("fraction", [0.02, 0.01])
def test_a_small_fraction_of_digits_keeps_every_class(digits_config, fraction):
  """26 or 13 images of 10 classes."""
  keys = {"protocol.fraction_per_class": False, "protocol.validation_fraction": 0.2}
  for seed in range(5):
    config = digits_config("stl", train_fraction=fraction, seed=seed, order="natural", **keys)
    benchmark = data.load(resolve(config))
    train = np.array([counts(task.train, 10) for task in benchmark.tasks])
    assert train.min() >= 1 and not benchmark.notes
    sizes = {len(t.train.index) + len(t.valid.index) for t in benchmark.tasks}
    assert sizes == {round(1297 * fraction)}


def test_what_is_drawn_changes_where_a_class_would_be_empty_only():
  label = np.array([0, 1, 0, 1, 2, 0, 2, 3])
  marked = data._first_of_classes
  for (count, least, spare), rows in {
    (5, 1, 0): [0, 1, 2, 4, 7],  # 7 in the place of 3
    (8, 1, 1): [0, 1, 2, 4],  # all but the last of each class
    (2, 1, 1): [0, 1, 4],  # the third class, too, and nothing of the only one of the fourth
    (1, 0, 1): [0],
    (5, 0, 1): [0, 1, 2, 4],  # 4 in the place of 3
  }.items():
    assert np.flatnonzero(marked(label, count, least, spare)).tolist() == rows
  for count in (0, 3, 8):
    np.testing.assert_array_equal(marked(label, count, 0, 0), np.arange(8) < count)


def test_fewer_images_than_classes_are_asked_for(tmp_path):
  write_small_cifar(tmp_path)
  config = cifar_config(tmp_path, allow_partial=True, train_fraction=0.05, **PER_TASK)
  (note,) = data.load(config).notes
  assert note.startswith("train_fraction = 0.05 leaves 6") and "of 100 classes without" in note


def test_unused_images_are_none_of_those_that_were_drawn(tmp_path):
  write_small_cifar(tmp_path)
  keys = {"allow_partial": True, "train_fraction": 0.5, "protocol.fraction_per_class": True}
  usual = data.read(cifar_config(tmp_path, **keys))
  unused = data.read(cifar_config(tmp_path, **keys, **{"protocol.evaluate_on": "unused"}))
  assert usual.split_hash != unused.split_hash
  for ours, theirs in zip(unused.tasks, usual.tasks, strict=True):
    for split in ("train", "valid"):
      np.testing.assert_array_equal(getattr(ours, split).index, getattr(theirs, split).index)
    rows = set(np.asarray(ours.test.index).tolist())
    drawn = {*np.asarray(ours.train.index).tolist(), *np.asarray(ours.valid.index).tolist()}
    assert len(rows) == len(theirs.test.index) == 20 and not rows & drawn
    assert max(rows) < 1000  # the training images come first
    assert set(np.asarray(ours.test.label).tolist()) <= set(range(10))


def test_without_unused_images_the_run_is_refused(tmp_path):
  write_small_cifar(tmp_path)
  config = cifar_config(tmp_path, allow_partial=True, **{"protocol.evaluate_on": "unused"})
  with pytest.raises(UserError, match="'unused': no training images of class .* are unused: set a"):
    data.read(config)
