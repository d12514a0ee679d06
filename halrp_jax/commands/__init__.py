"""The verbs of `python -m halrp_jax VERB`: one module each with `main(arguments) -> exit code`.

The table is in this file so that the verbs can be listed without importing them, which takes
seconds.
"""

import importlib
from types import ModuleType

COMMANDS = {  # verb -> the first line of its module's docstring
  "compare": "Prints finished runs side by side.",
  "sweep": "Learns many runs: several methods, orders and seeds, a folder for each run.",
  "report": "Writes a report of all finished runs below a folder: tables, figures and a page.",
  "reproduce": "Learns the runs of a table or figure of the paper and writes its report.",
  "tune": "Tries a grid of config values and ranks them by their accuracy on validation images.",
  "extend": "Learns one more task, of your own images, on top of a run.",
  "predict": "Classifies new images with a run and writes a table.",
  "export": "Writes the model of a run to files for other programs.",
  "check_data": "Checks the images of a benchmark and draws a contact sheet of them.",
  "doctor": "Checks this machine, the files of a run and the data.",
}

# Verbs whose `main(arguments, stop_asked)` can stop at a signal and resume.
STOPPABLE = {"sweep", "reproduce", "tune", "extend"}


def load(verb: str) -> ModuleType:
  """Imports the module of a verb."""
  return importlib.import_module(f"{__name__}.{verb}")
