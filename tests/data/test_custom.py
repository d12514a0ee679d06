"""Your own images: folders, .npz files; what is wrong with them is said by name."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from halrp_jax import data
from halrp_jax.config import make_config, resolve
from halrp_jax.runs import experiment
from halrp_jax.types import UserError, UserErrors

from . import originals


def draw(path, size=(32, 32), mode="RGB", seed=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8)).save(path)


def tree(folder, tasks=None, n=10):
  """Tasks with two and three classes, PNG and JPEG."""
  for task, classes in (tasks or {"birds": "ab", "cars": "xyz"}).items():
    for c in classes:
      for i in range(n):
        draw(folder / task / c / f"{i}.{'png' if i % 2 else 'jpg'}", seed=hash((task, c, i)) % 999)
  return folder


def load(folder, **more):
  return data.load(originals.config_of("custom", folder, **more))


def npz(path, n=20, size=8, channels=None, **more):
  shape = (n, size, size) if channels is None else (n, size, size, channels)
  image = np.random.default_rng(len(path.stem)).integers(0, 256, shape, np.uint8)
  path.parent.mkdir(parents=True, exist_ok=True)
  np.savez(path, **({"image": image, "label": np.arange(n) % 2} | more))


def test_a_folder_tree(tmp_path):
  benchmark = load(tree(tmp_path))
  birds, cars = benchmark.tasks
  assert (birds.name, birds.class_names, cars.class_names) == ("birds", ("a", "b"), ("x", "y", "z"))
  assert [len(s.index) for s in (birds.train, birds.test, cars.train, cars.test)] == [16, 4, 24, 6]
  assert benchmark.image_shape == (32, 32, 3) and not benchmark.partial
  assert (np.bincount(np.asarray(cars.test.label)) == 2).all()
  assert not np.allclose(birds.inputs.mean, cars.inputs.mean, atol=1e-6)  # each task its own


def test_train_and_test_folders(tmp_path):
  for part, n in (("train", 6), ("test", 3)):
    tree(tmp_path / "task" / part, {c: [""] for c in "pq"}, n)
  (task,) = load(tmp_path).tasks
  assert task.class_names == ("p", "q")
  assert [len(s.index) for s in (task.train, task.test)] == [12, 6]


def test_sizes_modes_and_hidden_files(tmp_path):
  tree(tmp_path)
  draw(tmp_path / "birds" / "a" / "wide.png", (50, 20))
  draw(tmp_path / "birds" / "a" / "grey.png", mode="L")
  (tmp_path / ".DS_Store").write_text("x")
  (tmp_path / "birds" / "notes.txt").write_text("x")
  benchmark = load(tmp_path)
  assert len(benchmark.tasks[0].train.index) + len(benchmark.tasks[0].test.index) == 22


def test_npz_files_with_and_without_test_set(tmp_path):
  npz(tmp_path / "one.npz", class_names=np.array(["no", "yes"]))
  test = np.zeros((4, 8, 8, 3), np.uint8)
  npz(tmp_path / "two.npz", channels=3, test_image=test, test_label=np.array([0, 1, 0, 1]))
  one, two = load(tmp_path).tasks
  assert one.class_names == ("no", "yes") and two.class_names == ("0", "1")
  assert [len(s.index) for s in (one.train, one.test, two.train, two.test)] == [16, 4, 20, 4]
  assert one.train.image.shape[1:] == (8, 8, 3)  # grey beside colour
  np.testing.assert_array_equal(two.test.image[np.asarray(two.test.index)], test)


def spoil(folder, how):
  tree(folder)
  if how == "stray":
    draw(folder / "birds" / "stray.png")
  elif how == "empty class":
    (folder / "birds" / "c").mkdir()
  elif how == "one image":
    draw(folder / "birds" / "c" / "0.png")
  elif how == "one class":
    tree(folder, {"alone": "a"})
  elif how == "damaged":
    (folder / "cars" / "x" / "3.png").write_bytes(b"not an image")
  elif how == "float":
    npz(folder / "t.npz", image=np.zeros((20, 8, 8)))
  elif how == "object":
    np.savez(folder / "t.npz", image=np.array([{}] * 20, object), label=np.zeros(20, int))
  elif how == "gap":
    npz(folder / "t.npz", label=np.arange(20) % 2 * 2)
  elif how == "negative":
    npz(folder / "t.npz", label=np.arange(20) % 2 - 1)
  elif how == "labels":
    npz(folder / "t.npz", label=np.zeros(19, int))
  elif how == "keys":
    np.savez(folder / "t.npz", images=np.zeros(3), label=np.zeros(3))
  elif how == "size":
    npz(folder / "t.npz", size=9)


@pytest.mark.parametrize(
  ("how", "says"),
  [
    ("stray", "birds: stray.png is not in CLASS/"),
    ("empty class", "birds/c: 0 images; a class needs at least 2"),
    ("one image", "birds/c: 1 images; a class needs at least 2"),
    ("one class", "alone: 1 class folders; a task needs at least 2"),
    ("damaged", "cars/x/3.png: not an image that can be read .none of PNG"),
    ("float", r"t.npz: image is float64 \(20, 8, 8\), expected uint8"),
    ("object", "t.npz: can't be read .*pickle"),
    ("gap", "t.npz: label 1 has 0 images"),
    ("negative", "t.npz: label is int64 .* expected whole numbers >= 0"),
    ("labels", "t.npz: label is int64 .19,., expected whole numbers"),
    ("keys", "t.npz: contains no array 'image'"),
    ("size", "the tasks' images differ in size .9 x 9, 32 x 32.; resize them to one size"),
  ],
)
def test_what_is_wrong_is_said_by_name(tmp_path, how, says):
  spoil(tmp_path, how)
  with pytest.raises(UserError, match=says):
    load(tmp_path)


def test_nothing_there(tmp_path):
  with pytest.raises(UserError, match="contains neither folders nor .npz"):
    load(tmp_path)
  with pytest.raises(UserError, match="No such file"):
    load(tmp_path / "nowhere")
  with pytest.raises(UserError, match="data_dir is not set"):
    load("")


# --- what lies in people's folders ----------------------------------------------------


def sizes(task):
  return [len(s.index) for s in (task.train, task.valid, task.test)]


def test_system_files_change_nothing_not_even_the_split(tmp_path):
  clean = load(tree(tmp_path)).split_hash
  for name in ("__MACOSX/birds/a/._0.jpg", "birds/.ipynb_checkpoints/0.png", "cars/x/@eaDir/0.png"):
    draw(tmp_path / name) if name.endswith("png") else (tmp_path / name).parent.mkdir(parents=True)
  (tmp_path / "birds" / "a" / "._0.png").write_bytes(b"\0\5\26\7")
  (tmp_path / "cars" / "Thumbs.db").write_bytes(b"x")
  found = load(tmp_path)
  assert found.split_hash == clean and found.notes == ()


def test_links_to_tasks_parts_classes_and_images(tmp_path):
  plain = load(tree(tmp_path / "store")).split_hash
  linked = tmp_path / "linked"
  (linked / "cars" / "x").mkdir(parents=True)
  (linked / "birds").symlink_to(tmp_path / "store" / "birds")
  for c in "yz":
    (linked / "cars" / c).symlink_to(tmp_path / "store" / "cars" / c)
  for path in (tmp_path / "store" / "cars" / "x").iterdir():
    (linked / "cars" / "x" / path.name).symlink_to(path)
  (linked / "cars" / "x" / "circle").symlink_to(linked)
  found = load(linked)
  assert found.split_hash == plain
  assert found.notes == (f"data_dir={linked}: 1 not used (no suffix 1), for example cars/x/circle",)


def test_links_that_lead_nowhere_are_all_named(tmp_path):
  tree(tmp_path)
  for name in ("fish", "birds/c", "cars/x/gone.png"):
    (tmp_path / name).symlink_to("/mnt/not mounted")
  with pytest.raises(UserErrors) as e:
    load(tmp_path)
  assert len(e.value.lines) == 3
  for line, name in zip(sorted(e.value.lines), ("birds/c", "cars/x/gone.png", "fish"), strict=True):
    assert f"{name}: a link to /mnt/not mounted, which can't be read" in line


def test_what_is_converted_or_not_used_is_said_once(tmp_path):
  tree(tmp_path)
  draw(tmp_path / "birds" / "a" / "wide.WEBP", (50, 20))
  draw(tmp_path / "cars" / "x" / "wide.gif", (50, 20), "L")
  for name in ("labels.csv", "birds/a/notes.txt", "cars/x/p.heic", "cars/y/q.HEIC", "stray.png"):
    (tmp_path / name).write_bytes(b"x")
  what = f"data_dir={tmp_path}"
  assert load(tmp_path).notes == (
    f"{what}: of 52 images 1 with a palette, converted to its colours, 2 resized",
    f"{what}: 5 not used (.csv 1, .heic 2, .png 1, .txt 1), for example birds/a/notes.txt",
  )


def test_what_was_converted_is_also_known_from_the_cache(tmp_path):
  for c in "ab":
    for i in range(3):
      draw(tmp_path / "data" / "t" / c / f"{i}.png", (9, 9), seed=ord(c) + i)
  config = originals.config_of("custom", tmp_path / "data").to_dict()
  config["data"]["cache"] = str(tmp_path / "cache")
  first, second = (data.load(resolve(config)) for _ in "12")
  assert first.notes == second.notes == (f"data_dir={tmp_path}/data: of 6 images 6 resized",)
  assert first.split_hash == second.split_hash == load(tmp_path / "data").split_hash


def test_every_bad_file_of_every_task_is_named(tmp_path):
  tree(tmp_path)
  (tmp_path / "birds" / "a" / "0.jpg").write_text("<html>404</html>")
  (tmp_path / "birds" / "b" / "1.png").write_bytes(b"")
  (tmp_path / "cars" / "z" / "3.png").write_bytes((tmp_path / "cars/z/1.png").read_bytes()[:900])
  np.savez(tmp_path / "fish.npz", image=np.zeros(3))
  with pytest.raises(UserErrors, match=r"a/0.jpg: .*HTML.* \(and 3 more; check_data lists") as e:
    load(tmp_path)
  found = [line.removeprefix(f"{tmp_path}/") for line in e.value.lines]
  for line, says in zip(
    found,
    (
      "birds/a/0.jpg: not an image that can be read (HTML, SVG or XML)",
      "birds/b/1.png: not an image that can be read (an empty file)",
      "cars/z/3.png: not an image that can be read (PNG: ",
      "fish.npz: contains no array 'label'",
    ),
    strict=True,
  ):
    assert line.startswith(says) and "object at" not in line


# --- layouts --------------------------------------------------------------------------


@pytest.mark.parametrize(
  "names", ["train val test", "Train VALIDATION Testing", "training valid TEST"]
)
def test_three_parts(tmp_path, names):
  for part, n in zip(names.split(), (6, 4, 3), strict=True):
    tree(tmp_path / "task" / part, {c: [""] for c in "pq"}, n)
  (task,) = load(tmp_path).tasks
  assert (sizes(task), task.class_names) == ([12, 8, 6], ("p", "q"))


def test_parts_without_a_test_set(tmp_path):
  for part, n in (("train", 10), ("val", 4)):
    tree(tmp_path / "two" / part, {c: [""] for c in "pq"}, n)
  tree(tmp_path / "one" / "train", {c: [""] for c in "pq"}, 10)
  one, two = load(tmp_path).tasks
  assert (sizes(one), sizes(two)) == ([16, 0, 4], [16, 8, 4])


@pytest.mark.parametrize(
  ("places", "says"),
  [
    (("train/p", "train/q", "test/p", "test/q", "extra/p"), "task: extra/p/0.jpg is not in CLASS/"),
    (("train/p", "train/q", "val/p", "validation/q"), "val/ and validation/ both mean val/"),
    (
      ("train/p", "train/q", "test/p", "test/q", "val/p"),
      "val/q: 0 images; a class needs at least 1 in val/",
    ),
    (("train/p", "train/q/r", "test/p"), "q/r/0.jpg is not in CLASS/, or in train/CLASS/"),
    (("test/p", "test/q"), "test/p/0.jpg is not in CLASS/"),
  ],
)
def test_layouts_that_are_refused(tmp_path, places, says):
  for place in places:
    tree(tmp_path / "task", {place: [""]}, 4)
  tree(tmp_path, {"other": "ab"})
  with pytest.raises(UserError, match=says):
    load(tmp_path)


def test_classes_with_the_names_of_parts(tmp_path):
  tree(tmp_path, {"traffic": ["bus", "train"], "words": ["test", "val"]})
  assert [t.class_names for t in load(tmp_path).tasks] == [("bus", "train"), ("test", "val")]


@pytest.mark.parametrize("parts", [False, True])
def test_one_task_as_data_dir(tmp_path, parts):
  for part, n in (("train", 6), ("val", 4), ("test", 3)) if parts else (("", 10),):
    tree(tmp_path / "sites" / part, {c: [""] for c in "pq"}, n)
  (tmp_path / "sites" / "notes.txt").write_text("x")
  benchmark = load(tmp_path / "sites")
  (task,) = benchmark.tasks
  assert (task.name, task.class_names) == ("sites", ("p", "q"))
  assert sizes(task) == ([12, 8, 6] if parts else [16, 0, 4])
  assert "read as one task" in benchmark.notes[0] and "notes.txt" in benchmark.notes[1]


def test_an_npz_with_a_validation_set_and_more(tmp_path):
  more = {"valid_image": np.ones((2, 8, 8), np.uint8), "valid_label": np.array([0, 1])}
  npz(tmp_path / "t.NPZ.npz", **more, hosts=np.zeros(20))
  (tmp_path / "t.NPZ.npz").rename(tmp_path / "t.NPZ")
  benchmark = load(tmp_path)
  (task,) = benchmark.tasks
  assert (task.name, sizes(task)) == ("t", [16, 2, 4])
  assert (task.train.image[np.asarray(task.valid.index)] == 1).all()
  assert "1 not used" in benchmark.notes[0] and "array hosts of t.NPZ" in benchmark.notes[0]


# --- names ----------------------------------------------------------------------------


def test_names_that_are_numbers_are_in_their_order(tmp_path):
  tree(tmp_path, {"10": ["9", "10"], "2": ["b", "a"], "1": ["level 2", "level 10"]}, 3)
  tasks = load(tmp_path).tasks
  assert [(t.id, t.name) for t in tasks] == [(0, "1"), (1, "2"), (2, "10")]
  assert [t.class_names for t in tasks] == [("level 2", "level 10"), ("a", "b"), ("9", "10")]


def test_a_task_that_is_there_twice_is_refused(tmp_path):
  npz(tree(tmp_path) / "birds.npz")
  with pytest.raises(UserError, match="task 'birds' occurs twice; rename"):
    load(tmp_path)


def test_class_names_of_an_npz(tmp_path):
  npz(tmp_path / "t.npz", class_names=np.array(["Äpfel".encode(), b"caf\xe9"]))
  assert load(tmp_path).tasks[0].class_names == ("Äpfel", r"caf\xe9")
  npz(tmp_path / "t.npz", class_names=np.array([b"a", b"a"]))
  with pytest.raises(UserError, match="t.npz: class_names: 'a' occurs twice"):
    load(tmp_path)


def test_composed_and_decomposed_letters_are_the_same_class(tmp_path):
  """macOS writes the second; archives and file servers mix them."""
  for i, part in enumerate(("train", "test")):
    tree(tmp_path / "obst" / part, {c: [""] for c in (("Äpfel", "A\u0308pfel")[i], "Birnen")}, 4)
  assert load(tmp_path).tasks[0].class_names == ("Birnen", "Äpfel")
  tree(tmp_path / "obst" / "train", {"A\u0308pfel": [""]}, 4)
  with pytest.raises(UserError, match="class 'Äpfel' occurs twice"):
    load(tmp_path)


def test_names_that_are_no_text(tmp_path):
  tree(tmp_path, {"t": [os.fsdecode(b"caf\xe9"), "b"]})
  names = load(tmp_path).tasks[0].class_names
  assert names == ("b", r"caf\xe9") and json.dumps(names).encode("utf-8")


# --- images for every class -----------------------------------------------------------


def least(split, num_classes):
  return np.bincount(np.asarray(split.label), minlength=num_classes).min()


def with_few(folder, few):
  label = np.repeat([0, 1, 2], [40, 40, few])
  image = np.random.default_rng(0).integers(0, 256, (len(label), 8, 8), np.uint8)
  np.savez(folder / "t.npz", image=image, label=label)


def load_few(folder, seed, fraction=0.2, **keys):
  config = originals.config_of("custom", folder, seed=seed, **keys).to_dict()
  config["protocol"]["validation_fraction"] = fraction
  config["data"]["test_fraction"] = 0.9 if fraction == 0 else 0.2
  return data.load(resolve(config)).tasks[0]


@pytest.mark.parametrize("keys", [{}, {"train_fraction": 0.05}])
def test_every_split_has_images_of_every_class(tmp_path, keys):
  with_few(tmp_path, 3)
  for seed in range(8):
    task = load_few(tmp_path, seed, **keys)
    assert [least(s, 3) >= 1 for s in (task.train, task.valid, task.test)] == [True] * 3


def test_one_of_two_images_is_left_to_train_on(tmp_path):
  with_few(tmp_path, 2)
  task = load_few(tmp_path, 0, 0)
  assert [least(s, 3) for s in (task.train, task.valid, task.test)] == [1, 0, 1]
  with pytest.raises(
    UserError, match="class '2' has 1 image .* add images .*validation_fraction=0"
  ):
    load_few(tmp_path, 0)


def test_advice_for_too_few_validation_images(digits_config):
  def refusal(**keys):
    with pytest.raises(UserError) as e:
      data.load(resolve(digits_config("stl", order="natural", **keys)))
    return str(e.value)

  assert "set a larger train_fraction" in refusal(
    **{"train_fraction": 0.01, "protocol.validation_fraction": 0.01}
  )
  said = refusal(**{"protocol.validation_fraction": 0.0001})
  assert "validation_fraction = 0.0001 of the 1297 images" in said
  assert "larger fraction, or 0, or add images" in said and "train_fraction" not in said


@pytest.mark.parametrize("method", ["halrp", "stl"])
def test_own_images_are_learned(tmp_path, method):
  """Two tasks of dark and bright images: anything must learn these."""
  rng = np.random.default_rng(0)
  for i in range(2):
    label = np.arange(60) % 2
    image = rng.integers(0, 100, (60, 8, 8)) + 120 * (label if i else 1 - label)[:, None, None]
    np.savez(tmp_path / f"task{i}.npz", image=image.astype(np.uint8), label=label)
  config = make_config(
    method,
    benchmark="custom",
    data_dir=str(tmp_path),
    order="natural",
    network="mlp",
    epochs=8,
    batch_size=16,
    methods_={},
    protocol={},
    data_={"cache": "off"},
  )
  record = experiment.run(config, str(tmp_path / "run"))
  assert record["average_accuracy"] > 90
