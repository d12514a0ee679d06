"""The systems by name. Each is one module with

  KEYS            its own config keys (`method.*`) with defaults: a dict name -> validate.Key
  VARIANTS        optional: {variant: {key: value}}, what a key left None means
  check(config)   optional: errors that concern several keys, a list of lines
  make(config, model, benchmark) -> types.Method

To add one: a file beside this one and a line in `METHODS`.
"""

from halrp_jax import contract
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
from halrp_jax.types import Method, UserError

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

# whose rules need the kernel [.., J] of every layer to have its inputs before and its outputs last
_PLAIN_LAYERS = {"apd", "apdfix", "bmkp", "clr", "gpm", "ibpwf", "iru", "wsn"}


def make(config, model, benchmark) -> Method:
  """The method that `config.method.name` names.

  Raises:
    UserError: if the network is not what the method demands (`contract`).
  """
  name, image_shape = config.method.name, benchmark.image_shape
  if not contract.is_own(model) and name not in ("halrp", "be"):  # which do it themselves
    variables = contract.check(model, image_shape, benchmark.max_classes)
    if name in _PLAIN_LAYERS:
      contract.check_plain(model, variables, image_shape, name)
    if name == "mtl" and not hasattr(model, "num_classes"):
      raise UserError(
        f"mtl widens the head: {type(model).__name__} needs a field num_classes, the head's width"
      )
  return METHODS[name].make(config, model, benchmark)


def variant_defaults(method_config: dict) -> dict:
  """What the keys left None mean under `method.variant`; empty for methods without variants."""
  variants = getattr(METHODS[method_config["name"]], "VARIANTS", {})
  chosen = method_config.get("variant")
  return variants.get(chosen, {}) if isinstance(chosen, str) else {}
