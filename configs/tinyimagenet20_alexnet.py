r"""TinyImageNet, 20 tasks of 10 classes, AlexNet (paper Table 3d and Table 8).

  python -m halrp_jax.main --config=configs/tinyimagenet20_alexnet.py \
      --config.data_dir=DIR --workdir=RUN

The method stands after the config's name: configs/tinyimagenet20_alexnet.py:stl. DIR holds tiny-
imagenet-200/ or tiny-imagenet-200.zip. The paper's ACC over five orders: HALRP 66.68, STL 66.78.
Ours, on a part of the images: docs/results.md.
"""

from halrp_jax.config import sibling

_base = sibling(__file__, "tinyimagenet20_resnet18")


def get_config(method: str = "halrp"):
  return _base.tiny_imagenet(
    method,
    benchmark="tinyimagenet20",
    network="alexnet",
    learning_rate=1e-3,
    l2=5e-4,
    halrp={"warmup_epochs": 25, "l1": 1e-5},
  )
