r"""CIFAR100-Split on a pretrained EfficientNet-Lite0, with images enlarged to 96 x 96 pixels.

  python -m halrp_jax.main --config=configs/cifar100_split_pretrained.py --config.data_dir=DIR \
      --config.base=efficientnet_lite0.safetensors --workdir=RUN

DIR holds cifar-100-binary/ or cifar-100-binary.tar.gz. The base is a file of docs/guide.md, section
"A pretrained base". Only the head of the first task is trained; base_training=all trains the whole
network on it.
"""

from halrp_jax.config import make_config


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
    base_training="head" if method.split(",")[0] == "halrp" else "all",
    epochs=20,
    batch_size=batch_size,
    learning_rate=1e-3,
    protocol={
      "shuffle": True,
      "schedule": "epoch",
      "validation_fraction": 0.2,
      "gradient_scale": 1.0,
    },
    data_={"image_size": image_size},
    # the statistics of the base are those of millions of images
    every_method={"batch_norm": "running"},
    methods_={"halrp": {"alpha": 0.9, "warmup_epochs": 1, "prune": "none", "upper_rank": 4}},
  )
