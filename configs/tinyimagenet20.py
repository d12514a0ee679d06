"""TinyImageNet, 20 tasks of 10 classes: configs/tinyimagenet20_resnet18.py by its short name."""

from halrp_jax.config import sibling

get_config = sibling(__file__, "tinyimagenet20_resnet18").get_config
