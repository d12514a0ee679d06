"""Your own images: folders, .npz files; what is wrong with them is said by name."""

import numpy as np
import pytest
from PIL import Image

from halrp_jax import data, experiment
from halrp_jax.types import UserError

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
    ("keys", "t.npz: holds no array 'image'"),
    ("size", "the tasks' images differ in size .9 x 9, 32 x 32.; give them one size"),
  ],
)
def test_what_is_wrong_is_said_by_name(tmp_path, how, says):
  spoil(tmp_path, how)
  with pytest.raises(UserError, match=says):
    load(tmp_path)


def test_nothing_there(tmp_path):
  with pytest.raises(UserError, match="holds neither folders nor .npz"):
    load(tmp_path)
  with pytest.raises(UserError, match="No such file"):
    load(tmp_path / "nowhere")
  with pytest.raises(UserError, match="data_dir is not set"):
    load("")


@pytest.mark.parametrize("method", ["halrp", "stl"])
def test_own_images_are_learned(tmp_path, method):
  """Two tasks of dark and bright images: anything must learn these."""
  rng = np.random.default_rng(0)
  for i in range(2):
    label = np.arange(60) % 2
    image = rng.integers(0, 100, (60, 8, 8)) + 120 * (label if i else 1 - label)[:, None, None]
    np.savez(tmp_path / f"task{i}.npz", image=image.astype(np.uint8), label=label)
  config = experiment.make_config(
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
