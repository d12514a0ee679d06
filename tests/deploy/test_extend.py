"""extend: one more task on a run's state, from a folder of pictures; the old ones stay."""

import numpy as np
import pytest
from PIL import Image

from halrp_jax import __main__ as verbs
from halrp_jax.config import make_config
from halrp_jax.deploy import export, saved
from halrp_jax.runs import checkpoint
from halrp_jax.types import UserError

from ..conftest import interrupt

BEST = {"variant": "best", "task_bound": 0.2}


@pytest.fixture(
  scope="module", params=["published", "best", pytest.param("ewc", marks=pytest.mark.slow)]
)
def run_folder(request, tmp_path_factory):
  """Two tasks of digits; those of the best variant without test images."""
  folder = tmp_path_factory.mktemp(request.param)
  is_best = request.param == "best"
  config = make_config(
    "ewc" if request.param == "ewc" else "halrp",
    benchmark="digits",
    order="natural",
    network="mlp",
    epochs=4,
    protocol={"evaluate_on": "unused" if is_best else "test"},
    train_fraction=0.5 if is_best else 1.0,
    data_={"cache": "off"},
    methods_={"halrp": BEST if is_best else {"prune_bound": 0.05}},
  )
  interrupt(config, folder, 2)
  return folder


def draw(folder, classes=3, n=20):
  """Classes that differ in brightness; colour pictures of another size than the network's."""
  rng = np.random.default_rng(0)
  for c in range(classes):
    place = folder / f"level {c}"
    place.mkdir(parents=True)
    for i in range(n):
      x = rng.integers(0, 50, (16, 16, 3)) + 60 * (c % 4)
      Image.fromarray(x.astype(np.uint8)).save(place / f"{i}.png")
  return folder


def call(capsys, *arguments):
  code = verbs.main(["halrp_jax", "extend", *map(str, arguments)])
  out, err = capsys.readouterr()
  return code, out, err


def test_a_folder_of_pictures_becomes_a_task(capsys, run_folder, tmp_path):
  draw(tmp_path / "lights")
  flags = (f"--workdir={run_folder}", f"--data={tmp_path}/lights", f"--out={tmp_path}/more")
  code, out, _ = call(capsys, *flags)
  assert code == 0 and "task 3/3 (lights, id 10): accuracy " in out
  before, after = saved.open_run(str(run_folder)), saved.open_run(str(tmp_path / "more"))
  assert [t.name for t in after.learned] == ["permutation 0", "permutation 1", "lights"]
  assert after.results["accuracy"][2][2] > 60  # of three classes
  method = before.config.method.name
  x = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
  if method == "halrp":
    assert "the 2 earlier tasks are unchanged to the bit" in out
    assert checkpoint.fingerprint((before.state.shared, before.state.tasks)) == (
      checkpoint.fingerprint((after.state.shared, after.state.tasks[:2]))
    )
    for t in range(2):
      old, new = (saved.make_classifier(run, t)(x) for run in (before, after))
      np.testing.assert_array_equal(old, new)
    assert after.results["accuracy"][2][:2] == before.results["accuracy"][1][:2]
    for name, p in after.state.tasks[2].perturbation.items():
      rank = int(after.state.tasks[2].rank[name])
      if p.U.dtype == np.int8:  # the best variant
        assert rank > 0 and np.abs(p.U[:, :rank]).max() == 127
        continue
      assert (p.U[:, :rank] == 0).any() and (p.U[:, :rank] != 0).any()  # it is pruned
    # the new task can be exported beside the old ones: the base is the same
    for run in (before, after):
      sizes = dict(export.write(run, str(tmp_path / "out"), [1], "safetensors", False))
    sizes = dict(export.write(after, str(tmp_path / "out"), [2], "safetensors", False))
    assert "task10" in sizes
    model = export.load(str(tmp_path / "out"), 10)
    assert model.class_names == ["level 0", "level 1", "level 2"]
  else:
    assert "ewc changed weights that tasks share: predictions for the 2 earlier tasks may" in out
    assert after.results["accuracy"][2][:2] == [None, None]
  code, again, _ = call(capsys, *flags)  # finished already
  assert code == 0 and again.splitlines()[-3:] == out.splitlines()[-3:]


@pytest.mark.parametrize(
  ("classes", "change", "says"),
  [
    (11, {}, "task 'lights' has 11 classes, but the heads of "),
    (1, {}, "lights: 1 class folders; a task needs at least 2"),
    (2, {"data": "nowhere"}, "--data=nowhere: no such folder or .npz file"),
    (2, {"data": "big.npz"}, "images are (9, 9, 1), expected (8, 8, 1)"),
    (2, {"out": ""}, "extend: argument --out: a value is missing; for example: "),
  ],
)
def test_mistakes(capsys, monkeypatch, run_folder, tmp_path, classes, change, says):
  monkeypatch.chdir(tmp_path)
  draw(tmp_path / "lights", classes, 5)
  np.savez("big.npz", image=np.zeros((20, 9, 9), np.uint8), label=np.arange(20) % 2)
  flags = {"workdir": run_folder, "data": "lights", "out": "more"} | change
  code, _, err = call(capsys, *(f"--{k}={v}" for k, v in flags.items()))
  assert code == 2 and says in err and err.count("\n") == 1
  assert not (tmp_path / "more").exists()


def test_what_is_done_to_the_pictures_is_told_and_a_name_is_not_given_twice(run_folder, tmp_path):
  draw(tmp_path / "lights", 2, 5)
  (tmp_path / "lights" / "level 1" / ".DS_Store").write_bytes(b"x")
  (tmp_path / "lights" / "notes.txt").write_text("x")
  events = []
  run = saved.open_run(str(run_folder))
  saved.extend(run, str(tmp_path / "lights"), str(tmp_path / "more"), events.append)
  notes = [e["note"] for e in events if e["event"] == "note"]
  assert notes == [
    f"--data={tmp_path}/lights: of 10 images 10 converted from grey to RGB or from colour to grey, "
    "10 resized",
    f"--data={tmp_path}/lights: 1 not used (.txt 1), for example notes.txt",
  ]
  more = saved.open_run(str(tmp_path / "more"))
  with pytest.raises(UserError, match="task 10 of .*more is called 'lights' already: rename"):
    saved.extend(more, str(tmp_path / "lights"), str(tmp_path / "most"))


def test_a_run_is_not_extended_onto_itself_or_gone_on_with(run_folder, tmp_path):
  run = saved.open_run(str(run_folder))
  draw(tmp_path / "lights", 2, 5)
  with pytest.raises(UserError, match="holds a run of another config: .*extended.task = 'lights'"):
    saved.extend(run, str(tmp_path / "lights"), str(run_folder))
  joint = run._replace(method=run.method._replace(groups=lambda n: (tuple(range(n)),)))
  with pytest.raises(UserError, match="learns all tasks at once"):
    saved.extend(joint, str(tmp_path / "lights"), str(tmp_path / "more"))
