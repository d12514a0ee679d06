"""The systems by name. Each is one module with

  KEYS            its own config keys (`method.*`) with defaults: a dict name -> validate.Key
  VARIANTS        optional: {variant: {key: value}}, what a key left None means
  check(config)   optional: errors that concern several keys, a list of lines
  make(config, model, benchmark) -> types.Method, without `predict`

To add one: a file beside this one and a line in `METHODS`.
"""

from halrp_jax import models
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
from halrp_jax.training import batches, contract, population
from halrp_jax.training.evaluate import make_predict
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
  """Builds the method that `config.method.name` names, ready to learn and to predict.

  Raises:
    UserError: if the network is not what the method demands (`contract`).
  """
  _check_network(config.method.name, model, benchmark)
  build = METHODS[config.method.name].make
  method = build(config, model, benchmark)
  if config.method.batch_norm == "population" or models.evaluates_with_batch(model):
    if not contract.is_own(model):
      population.require_measurable(model, benchmark.image_shape)
    fixed = models.with_stored_statistics(model)
    logits_fn = (method if fixed is model else build(config, fixed, benchmark)).logits
    batch_size = batches.evaluation_batch_size(config)
    method = method._replace(learn=population.keep(method, logits_fn, batch_size))
  return method._replace(predict=make_predict(method))


def _check_network(name: str, model, benchmark) -> None:
  """Refuses a network of somebody else's that the method can't work with."""
  if contract.is_own(model) or name in ("halrp", "be"):  # which do it themselves
    return
  variables = contract.check(model, benchmark.image_shape, benchmark.max_classes)
  if name in _PLAIN_LAYERS:
    contract.check_plain(model, variables, benchmark.image_shape, name)
  if name == "mtl" and not hasattr(model, "num_classes"):
    raise UserError(
      f"mtl widens the head: {type(model).__name__} needs a field num_classes, the head's width"
    )


def variant_defaults(method_config: dict) -> dict:
  """What the keys left None mean under `method.variant`; empty for methods without variants."""
  variants = getattr(METHODS[method_config["name"]], "VARIANTS", {})
  chosen = method_config.get("variant")
  return variants.get(chosen, {}) if isinstance(chosen, str) else {}
