"""Images in host memory and on disk: the same bits as on the device, and where `auto` puts them."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest

from halrp_jax import data
from halrp_jax.config import resolve, with_keys
from halrp_jax.data import custom, residence
from halrp_jax.runs import experiment, sweep
from halrp_jax.training import batches
from halrp_jax.types import Split, Stopped, UserError

from ..conftest import slow_except
from . import originals

ON_HOST = ("host", "disk")


def at(config, where, cache, **more):
  """A config whose images stay at `where`."""
  with config.unlocked():
    config.update_from_flattened_dict({"data.residence": where, "data.cache": str(cache)} | more)
  return config


def hashes(record):
  return (
    record["state_hash"],
    record["split_hash"],
    np.nan_to_num(np.array(record["accuracy"], float)),
  )


def require_equal(one, other):
  (*a, x), (*b, y) = hashes(one), hashes(other)
  assert a == b
  np.testing.assert_array_equal(x, y)


# --- the same bits --------------------------------------------------------------------


# halrp: importance of layers, warm-up and two phases; ewc: Fisher information; gpm: `over_samples`;
# mtl: tasks that are learned together
@slow_except("halrp", "stl", "ewc", "gpm", "mtl")
def test_every_residence_gives_the_same_bits(method_name, digits_config, tmp_path):
  """With validation images in every epoch, population statistics and test images."""
  keys = {"order": "0,1", "protocol.keep": "best"}
  if method_name in ("halrp", "stl"):
    keys |= {"network": "lenet"}  # with BatchNorm
  records = {
    where: experiment.run(
      at(digits_config(method_name, **keys), where, tmp_path / "cache"), str(tmp_path / where)
    )
    for where in ("device", *ON_HOST)
  }
  for where in ON_HOST:
    require_equal(records["device"], records[where])
  assert len(list((tmp_path / "cache").glob("images-*.npy"))) == 1


@pytest.mark.parametrize(
  ("loop", "augment"), [("scan", "crop_resize_flip"), ("steps", "crop_flip")]
)
def test_both_loops_give_the_bits_that_they_give_on_the_device(
  loop, augment, digits_config, tmp_path
):
  """HALRP's loops round differently, so that a step of another program would be seen."""
  keys = {"order": "0,1", "loop": loop, "protocol.augment": augment, "data.image_size": 12}
  records = [
    experiment.run(at(digits_config(**keys), where, tmp_path), str(tmp_path / where))
    for where in ("device", "host")
  ]
  require_equal(*records)


def test_a_run_resumes_inside_a_task_with_its_images_elsewhere(digits_config, tmp_path):
  keys = {"order": "0,1", "epochs": 4, "checkpoint.every_seconds": 0.0}
  keys |= {"protocol.augment": "crop_resize_flip"}
  whole = experiment.run(at(digits_config("stl", **keys), "device", tmp_path), str(tmp_path / "a"))
  for first, then in (("device", "disk"), ("host", "device")):
    epochs, folder = [], str(tmp_path / first)

    def show(event, epochs=epochs):
      if event["event"] == "epoch":
        epochs.append(event["epoch"])

    with pytest.raises(Stopped):
      config = at(digits_config("stl", **keys), first, tmp_path)
      experiment.run(config, folder, show, stop_asked=lambda epochs=epochs: 2 in epochs)
    config = at(digits_config("stl", **keys), then, tmp_path)
    require_equal(experiment.run(config, folder, show), whole)
    assert epochs == [1, 2, 3, 4] * 2


def test_runs_at_once_are_then_learned_one_after_another(digits_config, tmp_path):
  """Each is the run that it is alone, to the bit."""
  config = at(digits_config("stl", order="0,1", epochs=1), "host", tmp_path)
  cells = [sweep.Cell(str(seed), with_keys(config, seed=seed)) for seed in (0, 1)]
  for name, vectorize in (("apart", False), ("joint", True)):
    rows = sweep.run(cells, str(tmp_path / name), lambda rows: None, lambda: False, vectorize)
    assert {row["state"] for row in rows} == {"done"}
  for cell in cells:
    apart, joint = (
      json.loads((tmp_path / name / cell.name / "record.json").read_text())
      for name in ("apart", "joint")
    )
    require_equal(apart, joint)


# --- batches --------------------------------------------------------------------------


class Watched(np.ndarray):
  """Images that count how many of them are gathered."""

  gathered = 0

  def take(self, index, *args, **keys):
    Watched.gathered += len(index)
    return np.asarray(self).take(index, *args, **keys)


def watched_split(num_images=40):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (num_images, 4, 4, 1), np.uint8)
  index, label = rng.permutation(num_images).astype(np.int32), np.arange(num_images) % 3
  Watched.gathered = 0
  return Split(image.view(Watched), jax.numpy.asarray(index), jax.numpy.asarray(label, np.int32))


def test_windows_hold_the_images_and_labels_of_their_rows():
  split = watched_split()._replace(owner=np.arange(40, dtype=np.int32) % 2)
  parts = [np.array([3, 1, 2]), np.array([7]), np.array([39, 39]), np.array([0])]
  found = list(batches.windows(split, parts))
  assert len(found) == 4
  for rows, (part, own) in zip(parts, found, strict=True):
    assert isinstance(part.image, jax.Array) and len(part.image) == len(rows)
    np.testing.assert_array_equal(part.image[part.index[own]], split.image[split.index[rows]])
    np.testing.assert_array_equal(part.label[own], split.label[rows])
    np.testing.assert_array_equal(part.owner[own], split.owner[rows])


def test_no_more_than_two_batches_are_gathered_ahead():
  split, parts = watched_split(), [np.arange(i, i + 4) for i in range(0, 40, 4)]
  seen = 0
  for i, _ in enumerate(batches.windows(split, parts), 1):
    assert Watched.gathered <= 4 * (i + 2)
    seen = i
  assert seen == 10 and Watched.gathered == 40
  split = watched_split()
  windows = batches.windows(split, parts)
  next(windows)
  windows.close()  # as after an error: the thread ends, the rest is not gathered
  assert Watched.gathered <= 12


def test_what_fails_in_the_thread_fails_in_the_caller():
  with pytest.raises(IndexError):
    list(batches.windows(watched_split(), [np.array([1]), np.array([400])]))


# --- where images stay ----------------------------------------------------------------


@pytest.mark.parametrize(
  ("size", "device", "cache", "expected"),
  [
    (24, 100, "", "device"),
    (26, 100, "", "host"),
    (101, 1000, "", "device"),
    (101, 100, "", "disk"),
    (101, 100, "off", "host"),
  ],
)
def test_auto_chooses_by_size(size, device, cache, expected, digits_config, monkeypatch):
  monkeypatch.setattr(residence, "_machine_memory", lambda: 200)
  monkeypatch.setattr(residence, "_device_memory", lambda machine: device)
  assert residence.of(resolve(at(digits_config(), "auto", cache)), size) == expected
  assert residence.of(resolve(at(digits_config(), "device", cache)), size) == "device"


def test_a_machine_has_the_memory_that_its_cgroup_leaves(tmp_path, monkeypatch):
  physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  limit, unlimited = tmp_path / "limit", tmp_path / "max"
  limit.write_text("123456\n")
  unlimited.write_text("max\n")
  monkeypatch.setattr(residence, "_LIMITS", (str(unlimited), str(tmp_path / "none")))
  assert residence._machine_memory() == physical
  monkeypatch.setattr(residence, "_LIMITS", (str(unlimited), str(limit)))
  assert residence._machine_memory() == 123456


def test_auto_says_where_large_images_stay(digits_config, tmp_path, monkeypatch):
  config = resolve(at(digits_config(), "auto", tmp_path))
  on_device = data.load(config)
  assert isinstance(on_device.tasks[0].train.image, jax.Array) and not on_device.notes
  monkeypatch.setattr(residence, "_machine_memory", lambda: 1000)
  on_disk = data.load(config)
  image = on_disk.tasks[0].train.image
  assert residence.is_mapped(image) and not image.flags.writeable
  assert on_disk.notes == ("the images take 0.0 GB: they stay on disk (data.residence)",)
  np.testing.assert_array_equal(image, on_device.tasks[0].train.image)


@pytest.mark.parametrize("where", ["device", *ON_HOST])
def test_tasks_of_several_folders_and_files_are_one_array(where, tmp_path):
  """An .npz file with grey images beside a folder with colours; on disk nothing is concatenated."""
  rng = np.random.default_rng(0)
  for c in ("a", "b"):
    folder = tmp_path / "own" / "first" / c
    folder.mkdir(parents=True)
    for i in range(4):
      (folder / f"{i}.png").write_bytes(originals.picture(rng, (9, 8, 3), "PNG"))
  grey = rng.integers(0, 256, (9, 8, 8), np.uint8)
  np.savez(tmp_path / "own" / "second.npz", image=grey, label=np.arange(9) % 2)
  config = originals.config_of("custom", tmp_path / "own")
  own = {"image_size": 8, "residence": where, "cache": str(tmp_path / "cache")}
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, **own))
  found = data.load(config)
  first, second = found.tasks
  image = first.train.image
  assert image is second.test.image and image.shape == (17, 8, 8, 3)
  np.testing.assert_array_equal(image[8:], np.broadcast_to(grey[..., None], (9, 8, 8, 3)))
  assert isinstance(image, jax.Array if where == "device" else np.ndarray)
  assert residence.is_mapped(image) == (where == "disk")


def test_disk_without_a_cache_is_refused(digits_config, tmp_path):
  with pytest.raises(UserError, match="data.residence=disk keeps .* set data.cache to a folder"):
    data.load(resolve(at(digits_config(), "disk", "off")))
  blocked = tmp_path / "file"
  blocked.write_text("")
  with pytest.raises(UserError, match="data.cache=.*file"):
    data.load(resolve(at(digits_config(), "disk", blocked)))


def test_images_in_memory_are_no_memory_map(digits_config, tmp_path):
  for _ in range(2):  # the second time, the cache has them
    image = data.load(resolve(at(digits_config(), "host", tmp_path))).tasks[0].train.image
    assert isinstance(image, np.ndarray) and not residence.is_mapped(image)


@pytest.mark.parametrize("shape", [(5000, 64, 64, 3), (300, 5, 9, 3), (40, 6, 6, 1)])
def test_mean_and_std_of_a_few_images_at_a_time_have_the_bits_of_all_at_once(shape):
  """The first shape has more pixels than float32 can count."""
  rng = np.random.default_rng(0)
  image = rng.integers(0, 200, shape, np.uint8)
  rows = np.sort(rng.permutation(len(image)))
  x = image[rows] / np.float32(255)
  mean, std = custom._mean_and_std(image, rows)
  np.testing.assert_array_equal(mean, x.mean((0, 1, 2), np.float32))
  np.testing.assert_array_equal(std, x.std((0, 1, 2), np.float32))
  assert mean.dtype == std.dtype == np.float32
