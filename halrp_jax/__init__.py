"""HALRP and the systems it is compared with, in JAX. Importing this imports nothing heavy."""


def __getattr__(name: str):
  if name == "__version__":  # setup.cfg is the one place that says it
    from importlib import metadata

    return metadata.version("halrp-jax")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
