"""TinyImageNet, 40 tasks of 5 classes: configs/tinyimagenet40_resnet18.py by its short name."""

from halrp_jax.config import sibling

get_config = sibling(__file__, "tinyimagenet40_resnet18").get_config
