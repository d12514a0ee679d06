"""TinyImageNet in 20 tasks of 10 classes: a short name of configs/tinyimagenet20_resnet18.py."""

from halrp_jax.config import sibling

get_config = sibling(__file__, "tinyimagenet20_resnet18").get_config
