"""HALRP and the methods it is compared with, in JAX. Importing the package does not import JAX.

halrp_jax.perturb     low-rank perturbations of the kernels of any Flax Linen model: init, apply,
                      merge
halrp_jax.saved       the model in a run's folder: open_run, make_classifier, make_predict_many,
                      extend
halrp_jax.export      a run's model as files for other programs: write, load
halrp_jax.pretrained  parameters that were trained by others: load
"""

# pyright: reportMissingParameterType=error, reportMissingTypeArgument=error

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported by __getattr__ when they are used
  from halrp_jax.deploy import export as export
  from halrp_jax.deploy import saved as saved
  from halrp_jax.runs import pretrained as pretrained
  from halrp_jax.weights import perturb as perturb

  __version__: str | None

_MODULES = {
  "perturb": "weights.perturb",
  "saved": "deploy.saved",
  "export": "deploy.export",
  "pretrained": "runs.pretrained",
}


def __getattr__(name: str) -> object:
  """Imports a module of the table above when it is first used; knows __version__."""
  if name == "__version__":  # the version stands in setup.cfg alone
    from importlib import metadata

    try:
      return metadata.version("halrp-jax")
    except metadata.PackageNotFoundError:  # the package is not installed
      return None
  if name in _MODULES:
    return importlib.import_module(f"halrp_jax.{_MODULES[name]}")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
