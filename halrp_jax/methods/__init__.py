"""The systems by name. Each is one module with

  KEYS            its own config keys (`method.*`) with defaults: a dict name -> validate.Key
  VARIANTS        optional: {variant: {key: value}}, what a key left None means
  check(config)   optional: errors that concern several keys, a list of lines
  make(config, model, benchmark) -> types.Method, without `predict`

To add one: a file beside this one and a line in `METHODS`.
"""

from halrp_jax import models, population, train
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
  """Builds the method that `config.method.name` names, ready to learn and to predict."""
  build = METHODS[config.method.name].make
  method = build(config, model, benchmark)
  if config.method.batch_norm == "population" or models.evaluates_with_batch(model):
    fixed = models.with_stored_statistics(model)
    logits_fn = (method if fixed is model else build(config, fixed, benchmark)).logits
    batch_size = train.evaluation_batch_size(config)
    method = method._replace(learn=population.keep(method, logits_fn, batch_size))
  return method._replace(predict=train.make_predict(method))


def variant_defaults(method_config: dict) -> dict:
  """What the keys left None mean under `method.variant`; empty for methods without variants."""
  variants = getattr(METHODS[method_config["name"]], "VARIANTS", {})
  chosen = method_config.get("variant")
  return variants.get(chosen, {}) if isinstance(chosen, str) else {}
