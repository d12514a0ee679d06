"""TinyImageNet, 20 tasks of 10 classes: configs/tinyimagenet20_resnet18.py by its short name."""

import pathlib
import runpy

get_config = runpy.run_path(str(pathlib.Path(__file__).with_name("tinyimagenet20_resnet18.py")))[
  "get_config"
]
