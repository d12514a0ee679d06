"""TinyImageNet, 40 tasks of 5 classes: configs/tinyimagenet40_resnet18.py by its short name."""

import pathlib
import runpy

get_config = runpy.run_path(str(pathlib.Path(__file__).with_name("tinyimagenet40_resnet18.py")))[
  "get_config"
]
