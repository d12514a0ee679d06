"""Photographs are resized and cropped as those of the base, in training and in service alike."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy as safetensors
from PIL import Image
from sklearn.datasets import load_sample_image

from halrp_jax import __main__ as verbs
from halrp_jax import data
from halrp_jax.config import make_config, resolve
from halrp_jax.data import formats
from halrp_jax.deploy import export, saved
from halrp_jax.runs import cards, convert, experiment, identity, pretrained
from halrp_jax.training import batches
from halrp_jax.types import Framing, Inputs, UserError

from .test_convert import CASES as ARRAYS
from .test_convert import drawn

CASES = json.loads(pathlib.Path(__file__).with_name("timm_photographs.json").read_text())
STEP = 16  # rows and columns that are stored


@pytest.mark.parametrize("name", CASES)
def test_a_photograph_becomes_the_input_that_timm_makes_of_it(name):
  """Within a grey level; two versions of Pillow need not round alike."""
  case = CASES[name]
  card = convert.SOURCES[case["source"]].preprocessing
  framing = Framing(case["crop"] or card.crop, card.interpolation)
  photograph = load_sample_image("china.jpg")
  stored = formats.photograph(photograph, (224, 224, 3), framing)
  inputs = Inputs(np.float32(card.mean), np.float32(card.std), None)
  found = np.asarray(batches.prepare_images(stored[None], inputs)[0, ::STEP, ::STEP])
  expected = np.array(case["input"])
  difference = np.abs(found - expected)
  assert difference.max() < 1.01 / 255 / min(card.std) and difference.mean() < 1e-3
  whole = formats.photograph(photograph, (224, 224, 3), Framing())
  other = np.asarray(batches.prepare_images(whole[None], inputs)[0, ::STEP, ::STEP])
  assert np.abs(other - expected).mean() > 0.1, "the whole image differs"


@pytest.mark.parametrize(
  ("size", "shape", "crop"),
  [((40, 30), (8, 8), 1), ((30, 41), (8, 8), 0.9), ((9, 64), (8, 8), 0.5), ((50, 20), (8, 24), 1)],
)
def test_the_centre_is_kept_whatever_the_proportions(size, shape, crop):
  """A ramp to the right and one downwards stay centred."""
  width, height = size
  ramp = np.stack(
    [
      np.broadcast_to(np.linspace(0, 255, width)[None], (height, width)),
      np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width)),
      np.zeros((height, width)),
    ]
  )
  image = np.round(ramp).astype(np.uint8).transpose(1, 2, 0)
  stored = formats.photograph(image, (*shape, 3), Framing(crop))
  assert stored.shape == (*shape, 3)
  middle = stored[:, :, :2].astype(float).mean((0, 1))
  np.testing.assert_allclose(middle, 127.5, atol=255 / 8)
  shown = np.array([np.ptp(stored[:, :, i].astype(float)) / 255 for i in (0, 1)])
  scale = max(shape[1] / width, shape[0] / height) / crop  # of the photograph
  expected = np.array([shape[1] / width, shape[0] / height]) / scale
  np.testing.assert_allclose(shown, expected, atol=0.2)
  assert formats.photograph(image[:, :, 0], (*shape, 1), Framing(crop)).shape == (*shape, 1)


@pytest.mark.parametrize("x", [np.zeros((4, 4), np.float32), np.zeros((4, 4, 4), np.uint8)])
def test_an_array_that_is_no_photograph_is_refused(x):
  with pytest.raises(UserError, match=r"photograph: expected uint8 \[h, w\] or \[h, w, 3\], given"):
    formats.photograph(x, (8, 8, 3), Framing())


# --- a run --------------------------------------------------------------------------------


def draw(folder, tasks="pq", n=12):
  """Photographs of 48 x 24 pixels whose class is the colour of their middle."""
  rng = np.random.default_rng(0)
  for task in tasks:
    for c, class_name in enumerate("ab"):
      for i in range(n):
        image = rng.integers(0, 256, (24, 48, 3), np.uint8)
        image[:, 12:36, c] //= 4
        path = folder / task / class_name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
  return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A file of timm's ViT-Ti with one block."""
  path = tmp_path_factory.mktemp("base") / "base.safetensors"
  arrays = {
    n: drawn(n, tuple(s))
    for n, s in ARRAYS["vit"]["arrays"].items()
    if not n.startswith("blocks.") or n.startswith("blocks.0.")
  }
  safetensors.save_file(arrays, path)
  return str(path)


def config_of(folder, base, **more):
  config = make_config(
    "stl",
    benchmark="custom",
    order="natural",
    data_dir=str(folder),
    network="vit_ti16,num_blocks=1",
    base=base,
    epochs=1,
    batch_size=8,
    protocol={},
    data_={"image_size": 64, "cache": "off"},
  )
  with config.unlocked():
    config.update_from_flattened_dict(more)
  return config


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
  folder = tmp_path_factory.mktemp("photographs")
  experiment.run(config_of(draw(folder / "photos"), base), str(folder / "run"))
  return folder


def test_training_predicting_and_an_export_see_the_same_square(run, tmp_path, capsys):
  opened = saved.open_run(str(run / "run"))
  card = convert.SOURCES["timm/vit"].preprocessing
  assert {t.framing for t in opened.benchmark.tasks} == {Framing(0.9, "bicubic")}
  task = experiment.build(opened.config)[0].tasks[0]
  names = sorted((run / "photos/p/a").glob("*.png"))
  expected = formats.photograph(np.asarray(Image.open(names[0])), (64, 64, 3), task.framing)
  np.testing.assert_array_equal(np.asarray(task.train.image)[0], expected)
  np.testing.assert_allclose(opened.learned[0].inputs.mean, card.mean)

  list(export.write(opened, str(tmp_path / "out"), [0], "safetensors", True))
  model = export.load(tmp_path / "out", 0)
  stated = json.loads((tmp_path / "out/task00.json").read_text())["task"]
  assert stated["framing"] == {"crop": 0.9, "interpolation": "bicubic"}
  np.testing.assert_allclose([*stated["mean"], *stated["std"]], 0.5)
  found = model.classify_photographs([names[0], np.asarray(Image.open(names[1])), str(names[2])])
  stored = np.asarray(task.train.image)[:3]
  np.testing.assert_array_equal(found, model.classify(stored))
  np.testing.assert_allclose(found, saved.make_classifier(opened, 0)(stored), atol=1e-6)

  table = tmp_path / "out.csv"
  verbs.main(
    ["halrp", "predict", f"--workdir={run / 'run'}", "--task=p", f"--images={run / 'photos/p/a'}"]
    + [f"--out={table}"]
  )
  rows = [line.split(",") for line in table.read_text().splitlines()[1:]]
  predicted = {row[0]: np.array(row[3:], float) for row in rows}
  for name, p in zip(names, found, strict=False):
    np.testing.assert_allclose(predicted[name.name], p, atol=2e-6)
  assert "12 images predicted, 0 skipped" in capsys.readouterr().out
  with pytest.raises(UserError, match="not an image that can be read"):
    model.classify_photographs([run / "run/record.json"])


def test_a_new_task_is_framed_as_the_others(run, tmp_path):
  draw(tmp_path, "r")
  opened = saved.open_run(str(run / "run"))
  task = saved._load_new_task(opened, str(tmp_path / "r"), lambda line: None)
  assert task.framing == Framing(0.9, "bicubic")
  first = min((tmp_path / "r/a").glob("*.png"))
  expected = formats.photograph(np.asarray(Image.open(first)), (64, 64, 3), task.framing)
  np.testing.assert_array_equal(np.asarray(task.train.image)[0], expected)


def test_keys_say_how_photographs_are_framed(base, tmp_path):
  def framing(base="", **more):
    more = {f"data.{k}": x for k, x in more.items()}
    config = pretrained.framed(resolve(config_of(tmp_path, base, **more)))
    return data.custom.framing_of(config.data)

  assert framing() == Framing(0.0, "bilinear")
  assert framing(interpolation="bicubic") == Framing(0.0, "bicubic")
  assert framing(framing="central") == Framing(1.0, "bilinear")
  assert framing(crop=0.8) == Framing(0.8, "bilinear")
  assert framing(base) == Framing(0.9, "bicubic")
  assert framing(base, framing="whole") == Framing(0.0, "bilinear")
  assert framing(base, crop=1.0, interpolation="bilinear") == Framing(1.0, "bilinear")
  with pytest.raises(UserError, match="framing=whole crops nothing; set data.framing=central"):
    framing(framing="whole", crop=0.5)
  pathlib.Path(base).with_name("half").write_bytes(pathlib.Path(base).read_bytes()[:1000])
  with pytest.raises(UserError, match="half: can't be read"):
    framing(str(pathlib.Path(base).with_name("half")))
  other = resolve(config_of(tmp_path, "nowhere", benchmark="digits"))
  assert pretrained.framed(other) is other, "only photographs are framed"


def test_images_of_the_cache_are_those_of_one_framing(base, tmp_path):
  draw(tmp_path / "photos")
  more = {"data.cache": str(tmp_path / "cache")}
  found = [
    np.asarray(
      data.load(pretrained.framed(resolve(config_of(tmp_path / "photos", b, **more))))
      .tasks[0]
      .train.image
    )
    for b in ("", base, "")
  ]
  np.testing.assert_array_equal(found[0], found[2])
  assert not np.array_equal(found[0], found[1])


def test_a_run_of_a_version_without_the_key_used_whole_photographs(run, base, tmp_path):
  path = tmp_path / "run"
  path.mkdir()
  values = resolve(config_of(run / "photos", base)).to_dict()
  for key in ("framing", "crop", "interpolation"):
    del values["data"][key]
  (path / "config.json").write_text(json.dumps(values))
  assert identity.read_config(str(path))["data"]["framing"] == "whole"
  values["base"] = ""
  (path / "config.json").write_text(json.dumps(values))
  assert identity.read_config(str(path))["data"]["framing"] == "auto"


def test_cards_without_framing_are_read_and_others_are_refused():
  card = {"id": 0, "name": "a", "class_names": ["x", "y"], "permutation": None}
  card |= {"mean": [0.5] * 3, "std": [0.5] * 3}
  assert cards.to_task(card, (8, 8, 3)).framing == Framing()
  kept = cards.to_task(card | {"framing": {"crop": 0.5, "interpolation": "bicubic"}}, (8, 8, 3))
  assert cards.to_task(cards.of_task(kept), (8, 8, 3)).framing == Framing(0.5, "bicubic")
  for wrong in ({"crop": 2}, {"interpolation": "cubic"}):
    with pytest.raises(ValueError, match="framing is"):
      cards.to_task(card | {"framing": wrong}, (8, 8, 3))
