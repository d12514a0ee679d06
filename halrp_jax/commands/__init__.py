"""The verbs of `python -m halrp_jax VERB`: one module each with `main(arguments) -> exit code`.

The table is here so that the verbs can be listed without importing them, which takes seconds.
"""

import importlib
from types import ModuleType

COMMANDS = {  # verb -> the first line of its module's docstring
  "compare": "Prints finished runs side by side.",
  "sweep": "Learns many runs, a folder each: several methods, orders and seeds.",
  "report": "Writes all finished runs below a folder as tables, figures and a page.",
  "reproduce": "Learns the runs of a table or figure of the paper and writes its report.",
  "tune": "Finds the best of a grid of config values, on validation images.",
  "extend": "Learns one more task on top of what a run has learned.",
  "predict": "Writes the classes of new images as a table.",
  "export": "Writes the model of a run as files for other programs.",
  "check_data": "Checks the images of a benchmark and draws a contact sheet.",
  "doctor": "Checks this machine, the files of a run and the data.",
}


def load(verb: str) -> ModuleType:
  """Imports the module of a verb."""
  return importlib.import_module(f"{__name__}.{verb}")
