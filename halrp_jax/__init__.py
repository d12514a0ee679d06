"""HALRP and the systems it is compared with, in JAX. Importing this imports nothing heavy.

halrp_jax.perturb    any Flax Linen model + low-rank perturbations of its kernels: init, apply,
                     merge
halrp_jax.saved      a run's folder -> its model: open_run, make_classifier, make_predict_many,
                     extend
halrp_jax.export     a model as files for other programs: write, load
halrp_jax.pretrained parameters that others have trained: load
"""

import importlib

_MODULES = {
  "perturb": "weights.perturb",
  "saved": "deploy.saved",
  "export": "deploy.export",
  "pretrained": "deploy.pretrained",
}


def __getattr__(name: str):
  if name == "__version__":  # setup.cfg is the one place that says it
    from importlib import metadata

    try:
      return metadata.version("halrp-jax")
    except metadata.PackageNotFoundError:  # a copy of the tree that nobody has installed
      return None
  if name in _MODULES:
    return importlib.import_module(f"halrp_jax.{_MODULES[name]}")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
