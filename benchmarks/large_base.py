"""Learns two tasks on a base of 86 million parameters and exports what they add to it.

  python benchmarks/large_base.py --workdir=DIR [--network=vit_b16] [--size=224] [--rank=8]
      [--images=11] [--private=norm]

The base is a ViT with random parameters in a .safetensors file with timm's names, 343 MB for
ViT-B/16. The tasks are folders of photographs: crops of scikit-learn's two, two classes a task.
The first task trains its head alone. The second one is warmed up for one epoch and perturbed at the
same rank everywhere; its 20 steps of fine-tuning follow. It is exported without the base, read
again together with the base's file, and compared with the network in the folder of the run.

Prints one line of JSON: sizes in bytes, seconds, and the peak of the process's memory in bytes.
Other programs that run beside it change the seconds.
"""

import argparse
import json
import pathlib
import resource
import shutil
import sys
import time

import jax
import numpy as np
import safetensors.numpy as safetensors
from PIL import Image
from sklearn.datasets import load_sample_image

from halrp_jax import models
from halrp_jax.config import make_config
from halrp_jax.deploy import export, saved
from halrp_jax.runs import experiment
from halrp_jax.training import networks

BATCH, STEPS = 4, 20


def timm_shapes(model, size: int) -> dict[str, tuple[int, ...]]:
  """Returns names and shapes of the arrays of timm's ViT of the same sizes."""
  width, patch = model.features, model.patch
  tokens = (size // patch) ** 2 + 1
  shapes = {
    "cls_token": (1, 1, width),
    "pos_embed": (1, tokens, width),
    "patch_embed.proj.weight": (width, 3, patch, patch),
    "patch_embed.proj.bias": (width,),
    "norm.weight": (width,),
    "norm.bias": (width,),
    "head.weight": (1000, width),
    "head.bias": (1000,),
  }
  for i in range(model.num_blocks):
    for name, out, inner in (
      ("attn.qkv", 3 * width, width),
      ("attn.proj", width, width),
      ("mlp.fc1", 4 * width, width),
      ("mlp.fc2", width, 4 * width),
    ):
      shapes |= {f"blocks.{i}.{name}.weight": (out, inner), f"blocks.{i}.{name}.bias": (out,)}
    for norm in ("norm1", "norm2"):
      shapes |= {f"blocks.{i}.{norm}.{k}": (width,) for k in ("weight", "bias")}
  return shapes


def write_base(path: pathlib.Path, model, size: int) -> int:
  """Writes random parameters with timm's names; returns their number without the head's."""
  rng = np.random.default_rng(0)

  def draw(name, shape):
    x = rng.standard_normal(shape, np.float32) * np.float32(0.02)
    return x + np.float32(1) if "norm" in name and name.endswith("weight") else x

  arrays = {name: draw(name, shape) for name, shape in timm_shapes(model, size).items()}
  safetensors.save_file(arrays, path)
  return sum(x.size for name, x in arrays.items() if not name.startswith("head"))


def write_photographs(folder: pathlib.Path, per_class: int, size: int) -> None:
  """Writes two tasks of two classes, crops of two photographs, of which one class is dimmed."""
  rng = np.random.default_rng(1)
  for task, name in (("first", "china.jpg"), ("second", "flower.jpg")):
    photograph = load_sample_image(name)
    for c, class_name in enumerate(("bright", "dim")):
      place = folder / task / class_name
      place.mkdir(parents=True)
      for i in range(per_class):
        top, left = (int(rng.integers(0, n - size)) for n in photograph.shape[:2])
        crop = photograph[top : top + size, left : left + size + size // 4]
        Image.fromarray((crop // (1 + c)).astype(np.uint8)).save(place / f"{i}.jpg")


def measure(options) -> dict:
  folder = pathlib.Path(options.workdir)
  folder.mkdir(parents=True)
  model = models.make(options.network, 2, "running")
  base = folder / "base.safetensors"
  found = {"network": options.network, "size": options.size, "rank": options.rank}
  found |= {"private": options.private, "parameters": write_base(base, model, options.size)}
  write_photographs(folder / "photographs", options.images, options.size)
  config = make_config(
    "halrp",
    benchmark="custom",
    order="natural",
    data_dir=str(folder / "photographs"),
    network=options.network,
    base=str(base),
    base_training="head",
    batch_size=BATCH,
    learning_rate=1e-4,
    # one epoch of warm-up, and as many as give 20 steps; an image of each class is for testing
    epochs=1 + -(-STEPS // -(-2 * (options.images - 1) // BATCH)),
    protocol={"validation_fraction": 0.0, "gradient_scale": 1.0},
    data_={"image_size": options.size, "cache": "off", "test_fraction": 0.01},
    methods_={
      "halrp": {
        "rank_rule": "flat",
        "upper_rank": options.rank,
        "svd": "randomized",
        "svd_rank": options.rank,
        "importance_split": "train",
        "prune": "none",
        "private": options.private,
      }
    },
  )
  events = []
  start = time.perf_counter()
  record = experiment.run(config, str(folder / "run"), events.append)
  found["seconds_run"] = time.perf_counter() - start
  tuned = [e for e in events if e["event"] == "epoch" and e["phase"] == "task01/finetune"]
  found |= {"losses": [round(e["loss"], 5) for e in tuned], "accuracy": record["accuracy"][-1]}
  found["seconds_select"] = record["seconds"][1].get("select")
  found |= {"ranks": sorted(set(record["ranks"][1].values())), "growth": record["increment"][-1]}

  run = saved.open_run(str(folder / "run"))
  start = time.perf_counter()
  arguments = (run, str(folder / "exported"), [1], "safetensors", False, True)
  ((stem, size),) = export.write(*arguments)
  found["seconds_export"] = time.perf_counter() - start
  found |= {"bytes_base": base.stat().st_size, "bytes_task": size}
  found["share_of_base"] = size / found["bytes_base"]
  start = time.perf_counter()
  model = export.load(folder / "exported", run.learned[1].id, base=str(base))
  found["seconds_load"] = time.perf_counter() - start

  @jax.jit
  def logits(variables, image):
    return model.network.apply(variables, image, train=False)

  image = np.random.default_rng(2).standard_normal((2, options.size, options.size, 3), np.float32)
  network = run.method.network(run.method.served(run.state), run.state.tasks[1])
  stored = logits({"params": network.params, "batch_stats": network.stats}, image)
  found["logits_same_bits"] = bool((np.asarray(logits(model.variables, image)) == stored).all())
  found["stem"] = stem
  first = networks.merged(run.state.shared, run.state.tasks[0])
  other = logits({"params": first.params, "batch_stats": first.stats}, image)
  found["difference_to_first_task"] = float(np.abs(other - stored).max())
  found["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return found


def main(argv=None) -> dict:
  parser = argparse.ArgumentParser()
  parser.add_argument("--workdir", required=True, help="a folder that does not exist")
  parser.add_argument("--network", default="vit_b16")
  parser.add_argument("--size", type=int, default=224)
  parser.add_argument("--rank", type=int, default=8)
  parser.add_argument("--images", type=int, default=11, help="photographs of a class")
  parser.add_argument("--private", default="norm", choices=("all", "norm", "head"))
  parser.add_argument("--delete", action="store_true", help="delete DIR at the end")
  options = parser.parse_args(argv)
  found = measure(options)
  if options.delete:
    shutil.rmtree(options.workdir)
  print(json.dumps(found))
  return found


if __name__ == "__main__":
  main(sys.argv[1:])
