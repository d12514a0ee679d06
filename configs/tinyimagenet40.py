"""TinyImageNet in 40 tasks of 5 classes: a short name of configs/tinyimagenet40_resnet18.py."""

from halrp_jax.config import sibling

get_config = sibling(__file__, "tinyimagenet40_resnet18").get_config
