"""The systems by name. Each is one module with

  KEYS            its own config keys (`method.*`) with defaults: a dict name -> validate.Key
  VARIANTS        optional: {variant: {key: value}}, what a key left None means
  check(config)   optional: errors that concern several keys, a list of lines
  make(config, model, benchmark) -> types.Method

To add one: a file beside this one and a line in `METHODS`.
"""

from halrp_jax.methods import (
  apd,
  apdfix,
  be,
  bmkp,
  bn,
  clr,
  ewc,
  gpm,
  halrp,
  ibpwf,
  iru,
  l2,
  mtl,
  prd,
  stl,
  wsn,
)
from halrp_jax.types import Method

METHODS = {
  "halrp": halrp,
  "stl": stl,
  "mtl": mtl,
  "l2": l2,
  "ewc": ewc,
  "bn": bn,
  "be": be,
  "clr": clr,
  "wsn": wsn,
  "gpm": gpm,
  "apdfix": apdfix,
  "apd": apd,
  "bmkp": bmkp,
  "prd": prd,
  "iru": iru,
  "ibpwf": ibpwf,
}


def make(config, model, benchmark) -> Method:
  """The method that `config.method.name` names."""
  return METHODS[config.method.name].make(config, model, benchmark)


def variant_defaults(method_config: dict) -> dict:
  """What the keys left None mean under `method.variant`; empty for methods without variants."""
  variants = getattr(METHODS[method_config["name"]], "VARIANTS", {})
  chosen = method_config.get("variant")
  return variants.get(chosen, {}) if isinstance(chosen, str) else {}
