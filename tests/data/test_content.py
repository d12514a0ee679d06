"""Hashes of what a task consists of, and the image cache that is keyed by contents."""

import os

import numpy as np
import pytest
from PIL import Image

from halrp_jax import data
from halrp_jax.config import make_config, resolve
from halrp_jax.data import content


def config_of(folder, **overrides):
  config = make_config(
    "stl", benchmark="custom", data_dir=str(folder), order="natural", network="mlp", protocol={}
  )
  with config.unlocked():
    config.data.image_size, config.data.cache = 8, "off"
    config.update_from_flattened_dict(overrides)
  return resolve(config)


def draw(folder, tasks=("a", "b"), images=12):
  """Tasks of two classes; every picture is another one."""
  for t, task in enumerate(tasks):
    for c in range(2):
      place = folder / task / f"class {c}"
      place.mkdir(parents=True)
      for i in range(images):
        Image.fromarray(np.full((8, 8, 3), [100 * t, 100 * c, i], np.uint8)).save(
          place / f"{i:02d}.png"
        )
  return folder


def hashes(*args, **overrides):
  """{task's name: (data hash, split hash)}"""
  found = data.read(config_of(*args, **overrides)).tasks
  return {task.name: (task.data_hash, task.split_hash) for task in found}


def test_paths_dates_and_other_tasks_make_no_difference(tmp_path):
  before = hashes(draw(tmp_path / "here"))
  (tmp_path / "here").rename(tmp_path / "there")
  for path in (tmp_path / "there").rglob("*.png"):
    os.utime(path, (1, 1))
  assert hashes(tmp_path / "there") == before
  assert hashes(tmp_path / "there", order="1,0") == before
  draw(tmp_path / "there", ["c"])
  assert {k: v for k, v in hashes(tmp_path / "there").items() if k != "c"} == before
  assert len({h for pair in before.values() for h in pair}) == 4


@pytest.mark.parametrize(
  "overrides",
  [{"seed": 1}, {"train_fraction": 0.5}, {"protocol.validation_fraction": 0.3}],
)
def test_draws_change_the_split_alone(tmp_path, overrides):
  before, after = hashes(draw(tmp_path)), hashes(tmp_path, **overrides)
  for name, (whole, split) in before.items():
    assert after[name][0] == whole and after[name][1] != split


@pytest.mark.parametrize("how", ["pixel", "class", "name", "image"])
def test_other_contents_change_both_hashes_of_their_task_alone(tmp_path, how):
  before = hashes(draw(tmp_path))
  place = tmp_path / "a" / "class 0"
  if how == "pixel":
    x = np.array(Image.open(place / "03.png"))
    x[2, 5, 1] += 1
    Image.fromarray(x).save(place / "03.png")
  elif how == "class":
    (place / "03.png").rename(tmp_path / "a" / "class 1" / "99.png")
  elif how == "name":
    place.rename(tmp_path / "a" / "class 00")
  else:
    (place / "03.png").unlink()
  after = hashes(tmp_path)
  assert after["b"] == before["b"]
  assert all(x != y for x, y in zip(after["a"], before["a"], strict=True))


def test_a_test_set_of_the_data_sets_own_is_part_of_the_data(tmp_path):
  def write(num_train):
    x = np.random.default_rng(0).integers(0, 256, (30, 8, 8), np.uint8)
    label = np.arange(30) % 2
    parts = {"image": x[:num_train], "label": label[:num_train]}
    parts |= {"test_image": x[num_train:], "test_label": label[num_train:]}
    np.savez(tmp_path / "a.npz", **parts)
    return hashes(tmp_path)["a"][0]

  assert write(20) != write(10)


def test_grey_images_are_the_same_in_one_channel_and_in_three(tmp_path):
  """An .npz of grey images gets three channels where another task has colours."""
  grey = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
  np.savez(tmp_path / "a.npz", image=grey, label=np.arange(20) % 2)
  before = hashes(tmp_path)
  draw(tmp_path, ["b"])
  assert hashes(tmp_path)["a"] == before["a"]


def test_every_image_has_a_hash_of_its_own():
  x = np.random.default_rng(0).integers(0, 256, (1500, 4, 4, 3), np.uint8)
  found = content.image_digests(x)
  assert len(np.unique(found, axis=0)) == len(x)
  np.testing.assert_array_equal(content.image_digests(x[1400:]), found[1400:])


def test_every_image_counts_in_benchmarks_that_draw_nothing(digits_config):
  tasks = data.read(resolve(digits_config("stl", train_fraction=0.1))).tasks
  whole = data.read(resolve(digits_config("stl", seed=3))).tasks
  assert [t.data_hash for t in tasks] == [t.data_hash for t in whole]
  assert len({t.data_hash for t in tasks}) == len(tasks)  # their permutations differ


# --- the cache ------------------------------------------------------------------------


def test_the_cache_notices_other_contents_of_equal_size_and_date(tmp_path):
  path = draw(tmp_path / "mine") / "a" / "class 0" / "03.png"
  keys = {"data.cache": str(tmp_path / "cache")}
  before, status = hashes(tmp_path / "mine", **keys), path.stat()
  x = np.array(Image.open(path))
  x[:] = x[..., ::-1] + 7
  Image.fromarray(x).save(path)
  with open(path, "ab") as stream:  # what stands after the end of a PNG is not read
    stream.write(bytes(max(0, status.st_size - path.stat().st_size)))
  os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
  now = path.stat()
  assert (now.st_size, now.st_mtime_ns) == (status.st_size, status.st_mtime_ns)
  after = hashes(tmp_path / "mine", **keys)
  assert after["a"] != before["a"] and after["b"] == before["b"]
  assert after == hashes(tmp_path / "mine")  # without a cache


def test_moved_files_are_not_decoded_again(tmp_path, monkeypatch):
  draw(tmp_path / "mine")
  keys = {"data.cache": str(tmp_path / "cache")}
  before = hashes(tmp_path / "mine", **keys)
  (tmp_path / "mine").rename(tmp_path / "moved")
  monkeypatch.setattr(data.custom.formats, "picture", None)
  assert hashes(tmp_path / "moved", **keys) == before
