"""Files of other libraries give the logits of the networks that they are from."""

import functools
import importlib.util
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy as safetensors
from PIL import Image
from sklearn.datasets import load_sample_image

from halrp_jax import models
from halrp_jax.runs import pretrained
from halrp_jax.types import UserError

from ..conftest import ROOT

CASES = json.loads(pathlib.Path(__file__).with_name("timm_logits.json").read_text())
# compiling a large network takes half a minute
SLOW = {"lite0", "resnet50", "vit_mean", "big_vision"}


def _timm_logits():
  """Returns the module benchmarks/timm_logits.py, which needs no timm to draw weights."""
  path = ROOT / "benchmarks" / "timm_logits.py"
  spec = importlib.util.spec_from_file_location("timm_logits", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


drawn = _timm_logits().drawn  # (name, shape) -> the array of a name


def write(path, case, **changes):
  """Writes the drawn arrays of a case to a file, and returns its path."""
  arrays = {n: drawn(n, tuple(s)) for n, s in CASES[case]["arrays"].items()} | changes
  arrays = {n: x for n, x in arrays.items() if x is not None}
  if case.startswith("big_vision"):
    np.savez(path / "base.npz", **arrays)
    return str(path / "base.npz")
  safetensors.save_file(arrays, path / "base.safetensors")
  return str(path / "base.safetensors")


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES]
)
def test_logits_are_those_of_timm(name, tmp_path):
  case = CASES[name]
  model, size = models.make(case["network"], 1000, "running"), case["size"]
  base = pretrained.read(write(tmp_path, name), model, (size, size, 3), source=case["source"])
  image = drawn("image", (1, size, size, 3)) * np.float32(size)
  logits = jax.jit(functools.partial(model.apply, train=False))(
    {"params": base.start.params, "batch_stats": base.start.stats}, image
  )
  np.testing.assert_allclose(logits[0, : len(case["logits"])], case["logits"], atol=1e-4)
  assert all("num_batches_tracked" in line for line in base.left_out)


def read(path, network="vit_ti16", size=64, num_classes=1000, source="auto"):
  model = models.make(network, num_classes, "running")
  return pretrained.read(path, model, (size, size, 3), source=source)


@pytest.mark.skipif("HALRP_PRETRAINED" not in os.environ, reason="HALRP_PRETRAINED is not set")
def test_the_published_weights_see_what_is_in_a_photograph():
  """palace, bell cote, monastery; daisy, mushroom: classes of ImageNet in order of probability."""
  path = os.path.join(os.environ["HALRP_PRETRAINED"], "efficientnet_lite0.safetensors")
  model = models.make("efficientnet_lite0", 1000, "running")
  base = pretrained.read(path, model, (224, 224, 3))
  assert base.source == "lukemelas" and not base.left_out and base.start.has_head
  card, size = base.preprocessing, 224
  images = []
  for name in ("china.jpg", "flower.jpg"):
    photo = Image.fromarray(load_sample_image(name))
    scale = size / card.crop / min(photo.size)
    photo = photo.resize([round(n * scale) for n in photo.size], Image.Resampling.BICUBIC)
    left, top = ((n - size) // 2 for n in photo.size)
    photo = photo.crop((left, top, left + size, top + size))
    images.append((np.asarray(photo, np.float32) / 255 - card.mean) / card.std)
  variables = {"params": base.start.params, "batch_stats": base.start.stats}
  logits = jax.jit(functools.partial(model.apply, train=False))(variables, np.float32(images))
  best = np.argsort(-np.asarray(logits), 1)
  assert best[0, :3].tolist() == [698, 442, 663] and best[1, :2].tolist() == [985, 947]


def test_half_precision_becomes_float32_and_a_head_of_other_classes_fresh(tmp_path):
  arrays = {n: drawn(n, tuple(s)) for n, s in CASES["vit"]["arrays"].items()}
  safetensors.save_file({n: x.astype(np.float16) for n, x in arrays.items()}, tmp_path / "half")
  base = read(str(tmp_path / "half"), num_classes=7)
  assert {x.dtype for x in jax.tree.leaves(base.start.params)} == {np.dtype(np.float32)}
  assert base.start.params["head"]["kernel"].shape == (192, 7)
  assert any("float16 becomes float32" in line for line in base.left_out)
  assert any("params/head/kernel" in line for line in base.left_out)


FAULTS = {
  "other network": (
    {"network": "efficientnet_lite0"},
    {},
    "its arrays are those of vit_b16 or vit_s16 or vit_ti16, not of network=efficientnet_lite0",
  ),
  "other size": ({"network": "vit_s16"}, {}, r"is .*, expected .* for network=vit_s16 \(and "),
  "other options": ({"network": "vit_ti16,gelu=tanh"}, {}, "set network=vit_ti16,gelu=exact"),
  "other source": ({"source": "torchvision"}, {}, "base_source=torchvision, but its names are"),
  "mean pooling": ({}, {"fc_norm.weight": np.ones(192, np.float32)}, "set pool=mean"),
  "class token": ({"network": "vit_ti16,pool=mean"}, {}, "set pool=token in network=vit_ti16"),
  "other heads": ({"network": "vit_ti16,num_heads=6"}, {}, "has 3 heads of attention, but num_"),
  "missing": ({}, {"blocks.3.norm1.bias": None}, "missing array params/block3/norm1/bias for"),
  "extra head": ({}, {"head_dist.weight": np.ones((1000, 192), np.float32)}, "unexpected array"),
  "grey": (
    {},
    {"patch_embed.proj.weight": np.ones((192, 1, 16, 16), np.float32)},
    "the file's network takes 1 channels, the images have 3",
  ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_in_one_line(fault, tmp_path):
  arguments, changes, said = FAULTS[fault]
  path = write(tmp_path, "vit", **changes)
  with pytest.raises(UserError, match=said) as caught:
    read(path, **arguments)
  assert "\n" not in str(caught.value) and path in str(caught.value)


def test_names_that_two_networks_share_need_the_source(tmp_path):
  path = write(tmp_path, "tf_lite0")
  with pytest.raises(UserError, match="set base_source=timm/tf_efficientnet_lite0 or base_source="):
    read(path, "efficientnet_lite0")
  with pytest.raises(UserError, match="set network=efficientnet_lite0,padding=even,epsilon=1e-05"):
    read(path, "efficientnet_lite0", source="timm/efficientnet_lite0")


@pytest.mark.parametrize("kind", ["half a file", "pickle", "pickled npz"])
def test_files_that_are_not_read(kind, tmp_path):
  whole = pathlib.Path(write(tmp_path, "vit"))
  if kind == "half a file":
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    path, said = whole, "can't be read"
  elif kind == "pickle":
    path, said = tmp_path / "base.pth", "is a pickle, .* convert it once: python -c"
  else:
    path, said = tmp_path / "base.npz", "can't be read"
    np.savez(path, x=np.array([{}], object))
  with pytest.raises(UserError, match=said):
    read(str(path))


def test_bfloat16_of_an_npz_file_becomes_float32(tmp_path):
  arrays = {n: drawn(n, tuple(s)) for n, s in CASES["big_vision"]["arrays"].items()}
  halves = {n: x.astype(jnp.bfloat16) for n, x in arrays.items()}
  np.savez(tmp_path / "base.npz", **halves)
  base = read(str(tmp_path / "base.npz"), "vit_ti16,gelu=tanh")
  found = base.start.params["patches"]["kernel"]
  np.testing.assert_array_equal(found, np.float32(halves["params/embedding/kernel"]))
