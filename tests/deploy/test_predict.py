"""predict: what a run knows of images it has never seen, from its folder alone."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from halrp_jax import __main__ as verbs
from halrp_jax.config import make_config
from halrp_jax.data import incoming
from halrp_jax.deploy import saved
from halrp_jax.methods import stl
from halrp_jax.runs import experiment
from halrp_jax.training import batches
from halrp_jax.types import UserError

from ..conftest import interrupt

ORDER = (3, 1, 0, 2, 4, 5, 6, 7, 8, 9)


def call(capsys, *arguments):
  code = verbs.main(["halrp_jax", "predict", *map(str, arguments)])
  out, err = capsys.readouterr()
  return code, out, err


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
  """Two tasks of ten, then interrupted: grey 8 x 8 digits, pixels permuted by each its own way."""
  folder = tmp_path_factory.mktemp("run")
  config = make_config(
    "halrp",
    benchmark="digits",
    order=",".join(map(str, ORDER)),
    network="mlp",
    epochs=3,
    protocol={},
  )
  interrupt(config, folder, 2)
  return folder


@pytest.fixture
def nine(run_folder):
  """Images of the test set, and the probabilities that the method gives them in the second task."""
  run = saved.open_run(str(run_folder))
  benchmark, _, method, _ = experiment.build(run.config)
  task = benchmark.tasks[1]
  logits = method.predict(run.state, 1, batches.load_batch(task.test, task.inputs, np.arange(9))[0])
  scores = np.exp(np.asarray(logits, float))
  image = np.asarray(task.test.image)[np.asarray(task.test.index[:9])]
  return image, scores / scores.sum(1, keepdims=True)


def rows(place):
  with open(place, newline="") as stream:
    return list(csv.DictReader(stream))


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_the_table_has_what_the_method_predicts(capsys, run_folder, nine, tmp_path, kind):
  image, want = nine
  if kind == "npz":
    np.savez(tmp_path / "new.npz", image=image[..., 0])
    images, more = tmp_path / "new.npz", []
  else:
    images, more = tmp_path / "new", ["--batch_size=4"]
    (images / "b").mkdir(parents=True)
    for i, x in enumerate(image):
      Image.fromarray(x[..., 0]).save(images / ("b" if i > 4 else "") / f"{i}.png")
    names = ["0.png", "1.png", "2.png", "3.png", "4.png", *(f"b/{i}.png" for i in range(5, 9))]
  place = tmp_path / "pred.csv"
  code, out, _ = call(
    capsys, f"--workdir={run_folder}", "--task=1", f"--images={images}", f"--out={place}", *more
  )
  assert code == 0 and "permutation 1 (id 1): 9 images predicted, 0 skipped" in out
  assert "note:" not in out
  table = rows(place)
  assert [r["image"] for r in table] == (names if kind == "folder" else [str(i) for i in range(9)])
  got = np.array([[float(r[f"p({c})"]) for c in range(10)] for r in table])
  np.testing.assert_allclose(got, want, atol=2e-6)
  assert [r["class"] for r in table] == [str(c) for c in want.argmax(1)]
  assert [float(r["probability"]) for r in table] == list(got.max(1))


@pytest.fixture(scope="module")
def be_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("be")
  config = make_config("be", benchmark="digits", order="3,1", network="mlp", epochs=2, protocol={})
  experiment.run(config, str(folder))
  return folder


@pytest.mark.parametrize("method", ["run_folder", "be_folder"])
def test_a_batch_of_mixed_tasks(method, request):
  run = saved.open_run(str(request.getfixturevalue(method)))
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (12, 8, 8, 1), np.uint8)
  ids = rng.permutation([3, 1] * 6)
  got = saved.make_predict_many(run)(ids, image)
  want = np.zeros_like(got)
  for t, task in enumerate(run.learned):
    want[ids == task.id] = saved.make_classifier(run, t)(image[ids == task.id])
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert np.abs(got[0] - saved.make_classifier(run, int(ids[0] == 3))(image[:1])).max() > 1e-3


def test_mixed_batches_that_can_not_be(run_folder):
  run = saved.open_run(str(run_folder))
  image = np.zeros((2, 8, 8, 1), np.uint8)
  with pytest.raises(UserError, match="task 5 is not learned; known: 1, 3"):
    saved.make_predict_many(run)([3, 5], image)
  with pytest.raises(UserError, match=r"images \[1, 8, 8, 1\], given uint8 \[2, 8, 8, 1\]"):
    saved.make_predict_many(run)([3], image)
  with pytest.raises(UserError, match=r"images \[2, 8, 8, 1\], given float32 \[2, 8, 8, 1\]"):
    saved.make_predict_many(run)([3, 1], image.astype(np.float32))
  with pytest.raises(UserError, match=r"task ids, whole numbers \[B\], given float64 \[2\]"):
    saved.make_predict_many(run)([3.0, 1.0], image)
  plain = run.state._replace(tasks=(stl.TaskState({}, {}, np.int32(3)),))
  with pytest.raises(UserError, match="has no perturbations of a base"):
    saved.make_predict_many(run._replace(state=plain))


def test_a_classifier_takes_a_learned_task_and_its_kind_of_images(run_folder):
  run = saved.open_run(str(run_folder))
  for t in (2, -1, "permutation 1"):
    with pytest.raises(UserError, match="position of a learned task: expected .* from 0 to 1"):
      saved.make_classifier(run, t)
  classify = saved.make_classifier(run, 1)
  for image in (np.zeros((2, 8, 8, 1)), np.zeros((2, 8, 8), np.uint8), [[0]]):
    with pytest.raises(UserError, match=r"expected uint8 images \[B, 8, 8, 1\], given"):
      classify(image)


def test_a_run_of_a_version_without_some_keys_is_opened(run_folder, tmp_path):
  shutil.copytree(run_folder, tmp_path / "run")
  path = tmp_path / "run" / "config.json"
  config = json.loads(path.read_text())
  for name in ("deterministic", "parallel", "precision"):
    del config[name]
  del config["checkpoint"]["every_seconds"]
  path.write_text(json.dumps(config))
  assert saved.open_run(str(tmp_path / "run")).config == saved.open_run(str(run_folder)).config


def test_odd_images(tmp_path):
  """Other sizes and modes are converted; what can't be read is said by name and skipped."""
  rng = np.random.default_rng(0)
  wide = rng.integers(0, 256, (20, 50, 3), np.uint8)
  deep = np.full((8, 8), 40_000, np.uint16)
  Image.fromarray(wide).save(tmp_path / "wide.png")
  Image.fromarray(deep).save(tmp_path / "deep.png")
  Image.fromarray(wide).convert("CMYK").save(tmp_path / "cmyk.jpg")
  frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
  frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
  (tmp_path / "cut.png").write_bytes((tmp_path / "wide.png").read_bytes()[:700])
  (tmp_path / "text.jpg").write_text("no image")
  Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
  (tmp_path / "notes.txt").write_text("not looked at")
  found = incoming.open_images(str(tmp_path), (8, 8, 3), 3)
  assert found.total == 7
  batches = list(found.batches)
  assert [b.names for b in batches] == [["cmyk.jpg", "deep.png", "moving.png"], ["wide.png"]]
  skipped = [line for b in batches for line in b.skipped]
  for line, name in zip(skipped, ("cut.png", "huge.png", "text.jpg"), strict=True):
    assert name in line and "\n" not in line
  first = batches[0].image
  assert (first[1] == 40_000 >> 8).all() and (first[2] == (255, 0, 0)).all()
  want = np.asarray(Image.fromarray(wide).resize((8, 8), Image.Resampling.BILINEAR))
  np.testing.assert_array_equal(batches[1].image[0], want)


def test_a_folder_of_all_kinds(capsys, run_folder, tmp_path):
  new = tmp_path / "new"
  (new / "10").mkdir(parents=True)
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8))
  for name in ("2.webp", "1.BMP", "10/3.gif", "10/20.tif", "10/1.jfif", "10/x.pgm"):
    image.save(new / name, "JPEG" if name.endswith("jfif") else None)
  image.convert("LA").resize((4, 4)).save(new / "10" / "la.png")
  (new / "._2.webp").write_bytes(b"x")
  (new / "9.heic").write_bytes(b"\0\0\0\x18ftypheic")
  (new / "8.png").symlink_to("/mnt/gone.png")
  (new / "notes.txt").write_text("x")
  flags = (f"--workdir={run_folder}", "--task=id:3", f"--images={new}", f"--out={tmp_path}/p.csv")
  code, out, _ = call(capsys, *flags)
  assert code == 1 and "7 images predicted, 2 skipped" in out
  names = ["10/1.jfif", "10/3.gif", "10/20.tif", "10/la.png", "10/x.pgm", "1.BMP", "2.webp"]
  assert [r["image"] for r in rows(tmp_path / "p.csv")] == names
  assert "8.png: a link to /mnt/gone.png, which can't be read" in out
  assert "9.heic: not an image that can be read (HEIC" in out
  assert "1 resized\n" in out and "note: 1 not used (.txt 1), for example notes.txt\n" in out


def named(run, *names):
  tasks = tuple(
    task._replace(id=i, name=name)
    for i, (task, name) in enumerate(zip(run.benchmark.tasks, names, strict=False))
  )
  return run._replace(benchmark=run.benchmark._replace(tasks=tasks))


def test_a_task_is_found_by_name_or_id(run_folder):
  run = saved.open_run(str(run_folder))
  find = saved.find_task
  assert find(named(run, "2", "dogs"), "dogs") == find(named(run, "2", "dogs"), "1") == 1
  assert find(named(run, "2", "dogs"), "2") == 0
  assert find(named(run, "1", "0"), "id:1") == 1
  with pytest.raises(UserError) as e:
    find(named(run, "1", "0"), "1")
  assert str(e.value) == (
    "--task=1 can mean several tasks: write --task=id:0 (called '1') or --task=id:1 (called '0')"
  )
  with pytest.raises(UserError, match="id:0 .called 'dogs'. or --task=id:1 .called 'dogs'."):
    find(named(run, "dogs", "dogs"), "dogs")
  with pytest.raises(UserError, match="--task=id:7: there is no such task; learned: 0 .a., 1 .b."):
    find(named(run, "a", "b"), "id:7")


def test_skipped_images_are_listed_and_change_the_exit_code(capsys, run_folder, nine, tmp_path):
  (tmp_path / "new").mkdir()
  Image.fromarray(nine[0][0][..., 0]).save(tmp_path / "new" / "good.png")
  (tmp_path / "new" / "bad.png").write_bytes(b"PNG")
  code, out, _ = call(
    capsys,
    f"--workdir={run_folder}",
    "--task=permutation 3",
    f"--images={tmp_path}/new",
    f"--out={tmp_path}/pred.csv",
  )
  assert code == 1 and "skipped " in out and "bad.png: not an image" in out
  assert [r["image"] for r in rows(tmp_path / "pred.csv")] == ["good.png"]


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"task": "5"}, "--task=5: "),
    ({"task": "12"}, "--task=12: there is no such task; learned: 3 (permutation 3), 1 (perm"),
    ({"task": ""}, "--task is missing; learned: 3 "),
    ({"images": "nowhere"}, "nowhere: expected an existing folder or .npz file"),
    ({"images": "empty"}, "contains no images"),
    ({"images": "shape.npz"}, "image is uint8 (2, 9, 8), expected uint8 [N, 8 x 8 x 1]"),
    ({"images": "object.npz"}, "object.npz: can't be read"),
    ({"images": "text.npz"}, "text.npz: can't be read"),
    ({"images": "keys.npz"}, "contains no array 'image'"),
    ({"out": "nowhere/pred.csv"}, "nowhere/pred.csv: No such file"),
    ({"workdir": "empty"}, "holds no config.json"),
    ({"batch_size": "-1"}, "must be at least 1"),
  ],
)
def test_mistakes(capsys, run_folder, tmp_path, monkeypatch, change, says):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "empty").mkdir()
  np.savez("good.npz", image=np.zeros((2, 8, 8), np.uint8))
  np.savez("shape.npz", image=np.zeros((2, 9, 8), np.uint8))
  np.savez("object.npz", image=np.array([{}], object))
  np.savez("keys.npz", images=np.zeros(2))
  (tmp_path / "text.npz").write_text("x")
  flags = {"workdir": run_folder, "task": "3", "images": "good.npz", "out": "pred.csv"} | change
  code, _, err = call(capsys, *(f"--{k}={v}" for k, v in flags.items()))
  assert code == 2 and says in err and err.count("\n") == 1
  assert not list(tmp_path.glob("*.csv*"))


@pytest.mark.parametrize(
  ("spoil", "says"),
  [
    (lambda path: path.unlink(), "holds no tasks.json"),
    (lambda path: path.write_text("{"), "tasks.json: can't be read"),
    (lambda path: change(path, schema=2), "has schema 2, expected 1"),
    (lambda path: change(path, num_classes=9), "was changed or damaged"),
    (lambda path: change(path, input_shape=[8, 8, 3]), "was changed or damaged"),
    (lambda path: change(path, image_shape=[4, 8, 1]), "was changed or damaged"),
    (lambda path: change(path, tasks=[{}]), "was changed or damaged"),
  ],
)
def test_without_a_whole_tasks_json(run_folder, tmp_path, spoil, says):
  """As an older run lacks it."""
  shutil.copytree(run_folder, tmp_path / "run")
  spoil(tmp_path / "run" / "tasks.json")
  with pytest.raises(UserError, match=says):
    saved.open_run(str(tmp_path / "run"))


def change(path, **values):
  path.write_text(json.dumps(json.loads(path.read_text()) | values))
