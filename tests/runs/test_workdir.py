"""A run's folder: what is interrupted goes on to the same bits, what is damaged is noticed."""

import json
import os
import shutil
import time

import jax
import numpy as np
import pytest

from halrp_jax import data, packing
from halrp_jax.config import resolve
from halrp_jax.data import digits
from halrp_jax.runs import checkpoint, experiment, states, workdir
from halrp_jax.types import Diverged, InUse, Stopped, UserError

from ..conftest import slow_except

TIMES = ("seconds", "memory_bytes", "peak_memory_bytes", "date")


def timeless(x):
  """Without what differs between two equal runs."""
  if isinstance(x, dict):
    return {k: timeless(v) for k, v in x.items() if k not in TIMES}
  return [timeless(y) for y in x] if isinstance(x, list) else x


def events(folder):
  return [timeless(json.loads(x)) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def same(a, b):
  """Record and events of two run folders."""
  records = [timeless(json.loads((f / "record.json").read_text())) for f in (a, b)]
  return records[0] == records[1] and events(a) == events(b)


class StopAt:
  """Asks to stop at the n-th time it is asked."""

  def __init__(self, n):
    self.left = n

  def __call__(self):
    self.left -= 1
    return self.left == 0


@pytest.fixture
def digits_config(digits_config):
  """Three of the ten tasks are enough to be interrupted in, and two epochs of PRD too.

  Runs of seconds have checkpoints to resume from only if they do not wait before they write them.
  """

  def build(method, **overrides):
    if method == "prd":
      overrides |= {"method.epochs": 2}
    keys = {"order": "3,1,0", "checkpoint.every_seconds": 0.0}
    return digits_config(method, **keys | overrides)

  return build


# methods that differ in what they store: one that shares weights and measures them after training,
# and one of two phases and ranks
every_kind = slow_except("ewc", "halrp")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Uninterrupted runs, shared: config -> folder, how often it asked whether to stop."""
  cache = {}

  def get(config):
    name = config.method.name
    if name not in cache:
      folder, asked = tmp_path_factory.mktemp("whole"), StopAt(-1)
      experiment.run(config, str(folder), stop_asked=asked)
      cache[name] = folder, -asked.left - 1
    return cache[name]

  return get


def test_short_epochs_write_no_checkpoint_each(digits_config, tmp_path, monkeypatch):
  written = []
  monkeypatch.setattr(
    workdir.Workdir, "_write", lambda self, name, tree: written.append(name) or name
  )
  for seconds in (0.0, 3600.0):
    config = digits_config("stl", order="3,1", **{"checkpoint.every_seconds": seconds})
    experiment.run(config, str(tmp_path / str(seconds)))
    assert any(name.endswith("/fit") for name in written) == (seconds == 0)
    assert any(name.endswith("/result") for name in written)
    written.clear()


@every_kind
def test_stopped_runs_go_on_to_the_same_bits(whole, digits_config, method_name, tmp_path):
  config = digits_config(method_name)
  folder, asked = whole(config)
  stops = 0
  for n in (2, asked // 3, 5):
    try:
      experiment.run(config, str(tmp_path), stop_asked=StopAt(n))
    except Stopped:
      stops += 1
  experiment.run(config, str(tmp_path))
  assert stops == 3 and same(folder, tmp_path)


PLATEAU = {
  "epochs": 12,
  "learning_rate": 3e-2,
  "train_fraction": 0.3,
  "protocol.schedule": "plateau",
  "protocol.patience": 1,
  "protocol.stop_rate": 1e-2,
}


@pytest.mark.parametrize("keep", ["best", pytest.param("best_loss", marks=pytest.mark.slow)])
def test_best_weights_and_plateaus_survive_stops(keep, digits_config, tmp_path):
  config = digits_config("stl", order="3,1", **PLATEAU, **{"protocol.keep": keep})
  whole, seen = tmp_path / "whole", []
  asked = StopAt(-1)
  experiment.run(config, str(whole), seen.append, stop_asked=asked)
  epochs = [e for e in seen if e["event"] == "epoch"]
  assert len(epochs) < 2 * 12 and max(e["epoch"] for e in epochs) > 3  # plateaus end some early
  for n in (-asked.left // 5, -asked.left // 3):
    with pytest.raises(Stopped):
      experiment.run(config, str(tmp_path / "parts"), stop_asked=StopAt(n))
  experiment.run(config, str(tmp_path / "parts"))
  assert same(whole, tmp_path / "parts")


def test_a_slow_disk_saves_what_was_known_then(whole, digits_config, tmp_path, monkeypatch):
  """Saves run in a thread, behind the tasks that are learned meanwhile."""
  config, save, seen = digits_config("stl"), workdir.checkpoint.save, []

  def slow(folder, packed, about):
    time.sleep(0.5 if folder.name.startswith("state-") else 0)
    save(folder, packed, about)

  def in_third_task():
    return any(e["event"] == "task" and e["t"] == 2 for e in seen)

  with monkeypatch.context() as m, pytest.raises(Stopped):
    m.setattr(workdir.checkpoint, "save", slow)
    experiment.run(config, str(tmp_path), seen.append, stop_asked=in_third_task)
  items = tmp_path / "checkpoints"
  for later in (
    items / "state-0002",
    *items.glob("now.*"),
  ):  # as if killed before these were written
    shutil.rmtree(later)
  experiment.run(config, str(tmp_path))
  assert same(whole(config)[0], tmp_path)


def test_a_finished_run_says_so_and_does_nothing(whole, digits_config):
  config = digits_config("stl")
  folder, _ = whole(config)
  seen = []
  record = experiment.run(config, str(folder), seen.append)
  assert seen == [{"event": "finished"}]
  assert record == json.loads((folder / "record.json").read_text())


def test_another_config_is_refused_by_the_keys_that_differ(whole, digits_config):
  folder, _ = whole(digits_config("stl"))
  with pytest.raises(UserError, match=r"epochs = 3 \(was 2\).*learning_rate"):
    experiment.run(digits_config("stl", epochs=3, learning_rate=0.5), str(folder))
  neutral = digits_config("stl", **{"checkpoint.every_epochs": 7, "data_dir": "/elsewhere"})
  experiment.run(neutral, str(folder))


THREE_EPOCHS = {"epochs": 3, "train_fraction": 0.3}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
  """Made once: a run that was stopped in its third task, and the same run uninterrupted."""
  cache = []

  def get(config):
    if not cache:
      root, seen = tmp_path_factory.mktemp("half"), []

      def in_third_task():
        return any(e["event"] == "epoch" and e["phase"] == "task02/tune" for e in seen)

      with pytest.raises(Stopped):
        experiment.run(config, str(root / "half"), seen.append, stop_asked=in_third_task)
      states = sorted(p.name for p in (root / "half" / "checkpoints").glob("state-*"))
      assert states == ["state-0001", "state-0002"]
      experiment.run(config, str(root / "whole"))
      cache.append(root)
    return cache[0]

  return get


@pytest.fixture
def half(digits_config, originals, tmp_path):
  """A copy of the stopped run, its config, the uninterrupted run."""
  config = digits_config("bn", **THREE_EPOCHS)
  root = originals(config)
  shutil.copytree(root / "half", tmp_path / "run")
  return tmp_path / "run", config, root / "whole"


@pytest.mark.parametrize(
  ("part", "damage"),
  [
    ("state-0002", "truncate"),
    ("state-0002", "folder"),
    ("task01-*", "flip"),
    ("shared-*", "delete"),
    ("now.*", "flip"),
    ("now.*", "delete"),
  ],
)
def test_damage_is_noticed_and_mended(half, part, damage):
  folder, config, want = half
  for item in (folder / "checkpoints").glob(part):
    path = max((p for p in item.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = path.read_bytes()
    if damage == "folder":
      shutil.rmtree(item)
      item.mkdir()
    elif damage == "delete":
      path.unlink()
    elif damage == "flip":
      path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
      path.write_bytes(content[: len(content) // 2])
  with pytest.warns(UserWarning, match="checkpoints"):
    experiment.run(config, str(folder))
  assert same(folder, want)


@pytest.mark.parametrize("other", [{"seed": 1}, {"network": "lenet"}])
@pytest.mark.parametrize("part", ["task01-*", "now.task02.tune.fit"])
def test_a_checkpoint_of_another_run_is_noticed(half, digits_config, tmp_path, part, other):
  """Whole in itself, so that only its contents can tell."""
  folder, config, want = half
  if other == {"network": "lenet"}:  # another model: no kernel has the shape it should have
    params = {"fc1": {"kernel": np.ones((3, 4), np.float32)}}
    foreign = {"tree": params} if part == "task01-*" else [params["fc1"]["kernel"]]
  else:  # another seed or dtype: the same shapes
    (item,) = (folder / "checkpoints").glob(part)
    foreign = jax.tree.map(
      lambda x: x.astype(np.float64) + 1 if isinstance(x, np.ndarray) else x,
      checkpoint.load(item)[0],
    )
  (item,) = (folder / "checkpoints").glob(part)
  about = {"events": json.loads((item / "about.json").read_text()).get("events", 0)}
  checkpoint.save(item, packing.pack(foreign), about)
  with pytest.warns(UserWarning, match="do not match the hash|not those of this config's model"):
    experiment.run(config, str(folder))
  assert same(folder, want)


def test_strict_stops_at_damage(half, digits_config):
  folder, _, _ = half
  (folder / "checkpoints" / "state-0002" / "about.json").write_text("")
  config = digits_config("bn", **THREE_EPOCHS, **{"checkpoint.strict": True})
  with pytest.raises(UserError, match="about.json: was changed"):
    experiment.run(config, str(folder))


def test_what_an_interrupted_save_left_behind_is_no_harm(half):
  folder, config, want = half
  (folder / "checkpoints" / ".writing-state-0003").mkdir()
  (folder / "checkpoints" / ("shared-" + "0" * 16)).mkdir()
  experiment.run(config, str(folder))
  assert same(folder, want)
  names = {p.name for p in (folder / "checkpoints").iterdir()}
  assert not names & {".writing-state-0003", "shared-" + "0" * 16}


def test_what_the_run_has_not_written_is_neither_used_nor_deleted(half, recwarn):
  folder, config, want = half
  items = folder / "checkpoints"
  shutil.copytree(items / "state-0001", items / "state-0002 copy")
  (items / "state-0009").write_text("a file")
  (items / "state-0003.zip").write_text("packed")
  (items / "stray").mkdir()
  for item in list(items.iterdir()):
    if item.is_dir():
      (item / ".DS_Store").write_bytes(b"1")
  assert states.newest_state(str(folder))[1]["rows"][1]
  experiment.run(config, str(folder))
  assert same(folder, want) and not recwarn.list
  names = {p.name for p in items.iterdir()}
  assert {"state-0002 copy", "state-0003.zip", "state-0009", "stray"} <= names
  strays = {item["name"]: item["strays"] for item in states.inspect(str(folder))[0]}
  assert strays["stray"] == ["stray"] and strays["state-0002 copy"]


def test_what_is_damaged_is_set_aside_with_all_that_can_still_be_read(half):
  folder, config, want = half
  items = folder / "checkpoints"
  (damaged,) = items.glob("task00-*")  # both states need it
  next((damaged / "arrays" / "d").iterdir()).write_bytes(b"")
  before = {p.name for p in items.iterdir()}
  whole = {p.name: checkpoint.load(p) for p in items.iterdir() if p != damaged}
  with pytest.warns(UserWarning, match=f"starts anew; .* are set aside in {folder}/set_aside"):
    experiment.run(config, str(folder))
  assert same(folder, want)
  aside = folder / "set_aside"
  assert {p.name for p in aside.iterdir()} == before and len(whole) == len(before) - 1
  for name, (_, about) in whole.items():
    assert checkpoint.load(aside / name)[1] == about
  experiment.run(config, str(folder), overwrite=True)
  assert not aside.exists()


def test_a_disk_that_is_away_costs_no_task(half, monkeypatch):
  folder, config, want = half
  before = sorted(p.name for p in (folder / "checkpoints").iterdir())

  def away(path):
    raise OSError(5, "Input/output error", str(path))

  with monkeypatch.context() as m:
    m.setattr(checkpoint, "_entry", away)
    with pytest.raises(UserError, match="Input/output error .*check the disk"):
      experiment.run(config, str(folder))
    with pytest.raises(UserError, match="Input/output error"):
      states.newest_state(str(folder))
  assert before == sorted(p.name for p in (folder / "checkpoints").iterdir())
  experiment.run(config, str(folder))
  assert same(folder, want)


def test_a_record_and_events_that_are_spoiled_are_written_again(whole, digits_config, tmp_path):
  config = digits_config("stl")
  shutil.copytree(whole(config)[0], tmp_path / "run")
  record = tmp_path / "run" / "record.json"
  record.write_bytes(record.read_bytes()[:100])
  with pytest.raises(UserError, match="record.json: can't be read .*delete it: the same command"):
    experiment.run(config, str(tmp_path / "run"))
  record.unlink()
  with open(tmp_path / "run" / "metrics.jsonl", "ab") as stream:
    stream.write(b"\xff\xfe")  # cut off, as all that came after the last state
  experiment.run(config, str(tmp_path / "run"))
  assert timeless(json.loads(record.read_text(encoding="utf-8"))) == timeless(
    json.loads((whole(config)[0] / "record.json").read_text(encoding="utf-8"))
  )


def test_two_runs_in_one_folder(digits_config, tmp_path):
  config = resolve(digits_config("stl")).to_dict()
  arguments = (str(tmp_path), config, False, False, lambda: False, {})
  with (
    workdir.opened(*arguments),
    pytest.raises(InUse, match=f"in use .process {os.getpid()} on"),
    workdir.opened(*arguments),
  ):
    pass
  with workdir.opened(*arguments):  # free again
    pass


def test_a_full_disk_is_one_clear_line_and_loses_nothing(half, monkeypatch):
  folder, config, want = half

  def full(*args):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as m, pytest.raises(UserError, match="No space left on device"):
    m.setattr(workdir.checkpoint, "save", full)
    experiment.run(config, str(folder))
  experiment.run(config, str(folder))
  assert same(folder, want)


def test_infinite_loss_says_where_and_what_to_try(digits_config, tmp_path):
  config = digits_config("stl", learning_rate=1e30)
  with pytest.raises(Diverged, match=r"task00/train, epoch \d, step \d+ of \d+: the loss became"):
    experiment.run(config, str(tmp_path))
  saved, _ = checkpoint.load(tmp_path / "checkpoints" / "now.task00.train.diverged")
  assert saved["step"] > 0 and not np.isfinite(saved["params"]["fc1"]["kernel"]).all()


@every_kind
def test_disk_use_stays_near_the_size_of_the_model(whole, digits_config, method_name):
  """Two states are kept, which share what has not changed; padding is compressed away."""
  folder, _ = whole(digits_config(method_name))
  files = [p for p in (folder / "checkpoints").rglob("*") if p.is_file()]
  size = json.loads((folder / "record.json").read_text())["size"][-1]
  model = 4 * (size["dense"] + size["training_only"])
  assert sum(p.stat().st_size for p in files) < 2 * model + 2_000 * len(files)


def test_disk_use_is_the_sum_of_the_parts(whole, digits_config):
  """One item per task and one for what is shared; nothing is left of the work inside tasks."""
  folder, _ = whole(digits_config("stl"))
  names = sorted(p.name.split("-")[0] for p in (folder / "checkpoints").iterdir())
  assert names == ["shared", *["state"] * 3, *(f"task{t:02d}" for t in range(3))]


@every_kind
def test_the_test_split_is_never_seen(whole, digits_config, method_name, monkeypatch, tmp_path):
  """Noise for test images and shuffled test labels: everything that is learned stays the same."""
  rng = np.random.default_rng(0)
  read = digits.read

  def spoiled(config):
    tasks = read(config)
    image = np.array(tasks[0].train.image)
    rows = tasks[0].test.index
    image[rows] = rng.integers(0, 256, image[rows].shape)
    label = rng.permutation(tasks[0].test.label)
    return [
      t._replace(
        train=t.train._replace(image=image),
        valid=t.valid._replace(image=image),
        test=t.test._replace(image=image, label=label),
      )
      for t in tasks
    ]

  config = digits_config(method_name)
  folder, _ = whole(config)
  family = data.BENCHMARKS["digits"]._replace(read=spoiled)
  monkeypatch.setitem(data.BENCHMARKS, "digits", family)
  noisy = experiment.run(config, str(tmp_path))
  clean = json.loads((folder / "record.json").read_text())
  assert noisy["state_hash"] == clean["state_hash"]
  assert noisy["accuracy"] != clean["accuracy"]  # other test images indeed


def test_notes_on_the_data_are_logged_once_and_cost_no_event(digits_config, tmp_path, monkeypatch):
  """Also where the run is interrupted inside its first task."""
  config, seen, load = digits_config("stl", order="0,1", epochs=3), [], data.load
  note = ("12 images were turned",)
  monkeypatch.setattr(data, "load", lambda config: load(config)._replace(notes=note))

  def stop_asked():
    return sum(e["event"] == "epoch" for e in seen) == 1

  with pytest.raises(Stopped):
    experiment.run(config, str(tmp_path), seen.append, stop_asked=stop_asked)
  experiment.run(config, str(tmp_path))
  lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  events = [json.loads(line)["event"] for line in lines]
  one = ["task", "epoch", "epoch", "epoch", "evaluation"]
  assert events == ["note", *one, *one]
