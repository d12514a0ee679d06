"""Writes what tests/runs/test_framing.py compares with: photographs as timm prepares them.

  python benchmarks/timm_photographs.py          # needs the extra [bench]

For each source of pretrained parameters the file has the network's input that timm's or
torchvision's transformation makes of scikit-learn's china.jpg (427 x 640 pixels) at 224 pixels:
every 16th row and column, normalised. A crop that is not the source's own stands beside its name.
"""

import json
import pathlib

import numpy as np

FILE = pathlib.Path(__file__).parents[1] / "tests" / "runs" / "timm_photographs.json"
SIZE, STEP = 224, 16
# name: (base_source, data.crop, what makes the transformation)
CASES = {
  "tf_lite0": ("timm/tf_efficientnet_lite0", 0, "tf_efficientnet_lite0.in1k"),
  "lite0": ("timm/efficientnet_lite0", 0, "efficientnet_lite0.ra_in1k"),
  "resnet50": ("timm/resnet50", 0, "resnet50.a1_in1k"),
  "vit": ("timm/vit", 0, "vit_small_patch16_224.augreg_in21k_ft_in1k"),
  "big_vision": ("big_vision", 0, "vit_small_patch16_224.augreg_in21k_ft_in1k"),
  "torchvision": ("torchvision", 0, "IMAGENET1K_V1"),
  "torchvision_v2": ("torchvision", 0.9655, "IMAGENET1K_V2"),
}


def compute(name: str) -> dict:
  """Returns what is stored of a case."""
  import timm
  import torchvision
  from PIL import Image
  from sklearn.datasets import load_sample_image
  from timm.data import create_transform, resolve_data_config

  source, crop, network = CASES[name]
  if source == "torchvision":
    transform = torchvision.models.ResNet50_Weights[network].transforms()
  else:
    model = timm.create_model(network)  # random parameters
    transform = create_transform(**resolve_data_config({}, model=model))
  x = transform(Image.fromarray(load_sample_image("china.jpg"))).numpy().transpose(1, 2, 0)
  assert x.shape == (SIZE, SIZE, 3)
  rows = np.round(x[::STEP, ::STEP].astype(np.float64), 5).tolist()
  return {"source": source, "crop": crop, "input": rows}


def main():
  lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(compute(name))}" for name in CASES)
  FILE.write_text("{\n" + lines + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
  main()
