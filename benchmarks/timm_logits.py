"""Writes what tests/runs/test_convert.py compares with: logits of timm's networks.

  python benchmarks/timm_logits.py          # needs the extra [bench]

For each network the file has the names and shapes of its arrays, as timm or big_vision write them,
and timm's logits for weights and an image that are drawn with NumPy from each array's name
(`drawn`). The test draws the same weights, converts them to our names, and computes the logits.
"""

import json
import pathlib
import tempfile
import zlib

import numpy as np

FILE = pathlib.Path(__file__).parents[1] / "tests" / "runs" / "timm_logits.json"
NUM_LOGITS = 64
# name: (timm's network, its arguments, our network, base_source, width and height of the image)
CASES = {
  "lite0": (
    "efficientnet_lite0",
    {},
    "efficientnet_lite0,padding=even,epsilon=1e-5",
    "timm/efficientnet_lite0",
    64,
  ),
  "tf_lite0": (
    "tf_efficientnet_lite0",
    {},
    "efficientnet_lite0",
    "timm/tf_efficientnet_lite0",
    63,
  ),
  "resnet50": ("resnet50", {}, "resnet50", "auto", 64),
  "vit": ("vit_tiny_patch16_224", {"img_size": 64}, "vit_ti16", "auto", 64),
  "vit_mean": (
    "vit_tiny_patch16_224",
    {"img_size": 64, "global_pool": "avg"},
    "vit_ti16,pool=mean",
    "auto",
    64,
  ),
  "vit_interpolated": ("vit_tiny_patch16_224", {"img_size": 96}, "vit_ti16", "auto", 64),
  "big_vision": (
    "vit_tiny_patch16_224",
    {"img_size": 64, "act_layer": "gelu_tanh", "no_embed_class": True},
    "vit_ti16,gelu=tanh",
    "auto",
    64,
  ),
  "big_vision_gap": (
    "vit_tiny_patch16_224",
    {
      "img_size": 64,
      "act_layer": "gelu_tanh",
      "class_token": False,
      "global_pool": "avg",
      "fc_norm": False,
    },
    "vit_ti16,gelu=tanh,pool=gap",
    "auto",
    64,
  ),
}


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns the array of a name: variances are near 1, the others such that outputs stay near 1."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  if name.endswith("num_batches_tracked"):
    return np.zeros(shape, np.int64)
  if name.endswith("running_var"):
    return rng.uniform(0.5, 1.5, shape).astype(np.float32)
  x = rng.standard_normal(shape).astype(np.float32)
  if len(shape) > 1:
    is_flax = name.endswith("kernel")
    fan_in = np.prod(shape) / (shape[-1] if is_flax else shape[0])
    return x * np.float32(fan_in**-0.5)
  return np.float32(0.1) * x + np.float32(name.endswith(("scale", "weight")))


def big_vision_shapes(has_token: bool) -> dict[str, tuple[int, ...]]:
  """Returns names and shapes of the arrays of big_vision's ViT-Ti/16 for images of 64 pixels."""
  width, heads = 192, 3
  shapes = {
    "params/embedding/kernel": (16, 16, 3, width),
    "params/embedding/bias": (width,),
    "params/pos_embedding": (1, 16, width),
    "params/Transformer/encoder_norm/scale": (width,),
    "params/Transformer/encoder_norm/bias": (width,),
    "params/head/kernel": (width, 1000),
    "params/head/bias": (1000,),
  } | ({"params/cls": (1, 1, width)} if has_token else {})
  for i in range(12):
    block = f"params/Transformer/encoderblock_{i}/"
    for norm in ("LayerNorm_0", "LayerNorm_1"):
      shapes |= {f"{block}{norm}/{k}": (width,) for k in ("scale", "bias")}
    attention = f"{block}MultiHeadDotProductAttention_0/"
    for part in ("query", "key", "value"):
      shapes[f"{attention}{part}/kernel"] = (width, heads, width // heads)
      shapes[f"{attention}{part}/bias"] = (heads, width // heads)
    shapes[f"{attention}out/kernel"] = (heads, width // heads, width)
    shapes[f"{attention}out/bias"] = (width,)
    for j, (n, m) in enumerate(((width, 4 * width), (4 * width, width))):
      shapes[f"{block}MlpBlock_0/Dense_{j}/kernel"] = (n, m)
      shapes[f"{block}MlpBlock_0/Dense_{j}/bias"] = (m,)
  return shapes


def compute(name: str) -> dict:
  """Returns what is stored of a case."""
  import timm  # here, because the tests draw weights without them
  import torch

  network, arguments, ours, source, size = CASES[name]
  model = timm.create_model(network, **arguments)
  shapes = {k: tuple(x.shape) for k, x in model.state_dict().items()}
  if name.startswith("big_vision"):
    shapes = big_vision_shapes(arguments.get("class_token", True))
    with tempfile.TemporaryDirectory() as folder:
      path = f"{folder}/weights.npz"
      np.savez(path, **{k: drawn(k, s) for k, s in shapes.items()})
      model.load_pretrained(path, prefix="params/")
  else:
    arrays = {k: torch.from_numpy(np.asarray(drawn(k, s))) for k, s in shapes.items()}
    model.load_state_dict(arrays)
  if name == "vit_interpolated":
    model.set_input_size((size, size))
  image = drawn("image", (1, size, size, 3)) * np.float32(size)
  with torch.no_grad():
    logits = model.eval()(torch.from_numpy(image.transpose(0, 3, 1, 2).copy()))[0]
  return {
    "network": ours,
    "source": source,
    "size": size,
    "arrays": {k: list(s) for k, s in shapes.items()},
    "logits": [float(f"{x:.6g}") for x in logits[:NUM_LOGITS].tolist()],
  }


def main():
  lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(compute(name))}" for name in CASES)
  FILE.write_text("{\n" + lines + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
  main()
