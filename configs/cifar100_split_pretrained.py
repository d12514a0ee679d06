r"""CIFAR100-Split on a pretrained EfficientNet-Lite0, with images enlarged to 96 x 96 pixels.

  python -m halrp_jax.main --config=configs/cifar100_split_pretrained.py --config.data_dir=DIR \
      --config.base=efficientnet_lite0.safetensors --workdir=RUN

DIR holds cifar-100-binary/ or cifar-100-binary.tar.gz. The base is a file of docs/guide.md, section
"A pretrained base". It stays as it is: every task, the first one too, stores its own perturbation
(base_training=perturb). BatchNorm keeps the statistics of the base (method.batch_norm=frozen).

The methods that keep the base have equally many numbers for a task, 4.6 % of the base: HALRP,
InfLoRA and SD-LoRA by their defaults here, LoRA, EVA and PEARL with

  --config=configs/cifar100_split_pretrained.py:halrp,rank_rule=lora,scales=False,warmup_epochs=0,\
budget=0.029617

and rank_rule=eva, or rank_rule=pearl and warmup_epochs=1. docs/pretrained.md compares them.
"""

from halrp_jax.config import make_config

_KEEPING_THE_BASE = ("halrp", "inflora", "sdlora")  # methods that add to it and leave it as it is


def get_config(method: str = "halrp"):
  # 25 divides the 200 training, 50 validation and 1,000 test images of a task at 5 %, so that no
  # smaller batch has to be compiled
  return pretrained(method, benchmark="cifar100_split", order="A", image_size=96, batch_size=25)


def pretrained(method: str, benchmark: str, order: str, image_size: int, batch_size: int):
  """Returns a config that starts from a pretrained EfficientNet-Lite0."""
  return make_config(
    method,
    benchmark=benchmark,
    order=order,
    network="efficientnet_lite0",
    base_training="all" if method.split(",")[0] not in _KEEPING_THE_BASE else "perturb",
    epochs=10,  # with the 200 images of a task at 5 % the loss is below 0.001 by then
    batch_size=batch_size,
    learning_rate=1e-3,
    protocol={
      "shuffle": True,
      "schedule": "epoch",
      "validation_fraction": 0.2,
      "gradient_scale": 1.0,
      "head_rate": 3.0,
    },
    data_={"image_size": image_size},
    # the statistics of the base are those of millions of images
    every_method={"batch_norm": "frozen"},
    methods_={
      "halrp": {
        "warmup_epochs": 1,
        "warmup_rate": 0.1,
        "prune": "none",
        "upper_rank": 8,
        "min_rank": 0,
        "budget": 0.02022,
      },
      "inflora": {"budget": 0.042033},
      "sdlora": {"budget": 0.042033},
      # a mask of half of the base's weights destroys it (docs/pretrained.md)
      "wsn": {"scores": "kernels", "share": 0.9},
    },
  )
