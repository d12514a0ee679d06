r"""TinyImageNet, 20 tasks of 10 classes, ResNet18 (paper Table 3d and Table 8).

  python -m halrp_jax.main --config=configs/tinyimagenet20_resnet18.py \
      --config.data_dir=DIR --workdir=RUN

The method stands after the config's name: configs/tinyimagenet20_resnet18.py:stl. DIR holds tiny-
imagenet-200/ or tiny-imagenet-200.zip. The paper's ACC over five orders: HALRP 70.09, STL 67.00.
Ours, on a part of the images: docs/results.md.
"""

from halrp_jax.config import make_config


def get_config(method: str = "halrp"):
  return tiny_imagenet(
    method,
    benchmark="tinyimagenet20",
    network="resnet18",
    learning_rate=5e-4,
    l2=1e-4,
    halrp={"warmup_epochs": 25, "l1": 5e-4},
  )


def tiny_imagenet(method: str, *, l2: float, halrp: dict, **top):
  """Returns what the settings on TinyImageNet have in common, with the values of one.

  Args:
    method: what stands after the colon.
    l2: `method.l2` of all methods.
    halrp: its keys `method.*` that differ between the settings.
    **top: top-level keys that do.
  """
  return make_config(
    method,
    order="0",
    epochs=50,
    batch_size=32,
    protocol={
      "shuffle": True,
      "schedule": "code",
      "validation_fraction": 0.1,
      "augment": "crop_flip",
    },
    every_method={"l2": l2},
    methods_={"halrp": {"alpha": 0.9, "prune_bound": 0.6} | halrp},
    **top,
  )
