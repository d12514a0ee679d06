"""The config of a run: made from a benchmark's file, completed and checked."""

from ml_collections import config_dict

from halrp_jax import data, keys, methods, models
from halrp_jax.reports import records
from halrp_jax.types import UserError

# Not part of a setting. The variant is spelled out by its switches.
_FREE = {"order", "seed", "train_fraction", "allow_partial", "loop", "method.variant"}
_FREE |= set(keys.NEUTRAL_KEYS)
# What programs did before the key existed, where that is not its default.
_BEFORE = {
  "protocol.fraction_per_class": False,
  "method.batch_norm": "own",
  "method.prune_scope": "all",
}


def make_config(
  method: str,
  *,
  protocol: dict,
  every_method: dict | None = None,
  methods_: dict[str, dict] | None = None,
  data_: dict | None = None,
  **top,
):
  """A locked config: defaults of every key, then what a benchmark's file chooses.

  Args:
    method: name of the method, the part after the colon of --config=FILE:method.
    protocol: values of protocol.*.
    every_method: values of method.* for all methods that have the key.
    methods_: values for one method each: {method: {key: value}}.
    data_: values of data.*.
    **top: values of the other keys.

  Raises:
    UserError: if there is no such method.
  """
  if method not in methods.METHODS:
    raise UserError(
      f"unknown method {method!r}{keys.nearest(method, methods.METHODS)}; "
      f"known: {', '.join(methods.METHODS)}"
    )
  method_keys = methods.METHODS[method].KEYS

  def values(spec, chosen):
    if unknown := set(chosen) - set(spec):
      raise UserError(f"config file: unknown keys {', '.join(sorted(unknown))}")
    filled = {name: chosen.get(name, key.default) for name, key in spec.items()}
    # Texts are typed; the type object takes any literal from the command line: `validate` checks.
    return {
      k: v if isinstance(v, str) else config_dict.FieldReference(v, field_type=object)
      for k, v in filled.items()
    }

  config = values(keys.KEYS, top)
  config["protocol"] = values(keys.PROTOCOL_KEYS, protocol)
  config["data"] = values(keys.DATA_KEYS, data_ or {})
  config["checkpoint"] = values(keys.CHECKPOINT_KEYS, {})
  if unknown := set(every_method or ()) - set().union(*(m.KEYS for m in methods.METHODS.values())):
    raise UserError(f"config file: no method has the keys {', '.join(sorted(unknown))}")
  common = {k: v for k, v in (every_method or {}).items() if k in method_keys}
  own = (methods_ or {}).get(method, {})
  config["method"] = {"name": method} | values(method_keys, common | own)
  return config_dict.ConfigDict(config).lock()


def resolve(config) -> config_dict.ConfigDict:
  """Fills in the switches left None, checks every key. Returns a frozen plain config.

  Raises:
    UserError: one line that names every key that is wrong.
  """
  values = config.to_dict()
  name = values["method"].get("name")
  if not isinstance(name, str) or name not in methods.METHODS:
    raise UserError(f"method.name must be one of {', '.join(methods.METHODS)}, got {name!r}")
  for key, value in methods.variant_defaults(values["method"]).items():
    if values["method"].get(key) is None:
      values["method"][key] = value
  flat = keys.flat(values)
  del flat["method.name"]
  method = methods.METHODS[name]
  lines = keys.errors(flat, keys.keys_of(method.KEYS))
  for key, known in (("benchmark", data.BENCHMARKS), ("network", models.NETWORKS)):
    if isinstance(flat.get(key), str) and flat[key] not in known:
      hint = keys.nearest(flat[key], known)
      lines.append(f"{key} must be one of {', '.join(known)}, got {flat[key]!r}{hint}")
  keys.require(lines)
  config = config_dict.ConfigDict(values)
  if hasattr(method, "check"):
    keys.require(method.check(config))
  return config_dict.FrozenConfigDict(config)


def with_keys(config, **top):
  """A copy with other values of top-level keys."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.update(top)
  return config


def setting_of(config: dict) -> dict:
  """Returns what makes a setting: dotted key -> value. `config`: resolved, of any version."""
  flat = keys.flat(config)
  if (name := flat["method.name"]) in methods.METHODS:
    known = keys.keys_of(methods.METHODS[name].KEYS)
    switches = methods.variant_defaults(config["method"])
    before = {k: v for k, v in _BEFORE.items() if k in known}
    flat = {k: key.default for k, key in known.items()} | before | flat
    for key, value in switches.items():
      if flat.get(f"method.{key}") is None:
        flat[f"method.{key}"] = value
  setting = {k: v for k, v in flat.items() if k not in _FREE}
  return setting | {"method.batch_norm": records.KINDS[records.statistics(setting)]}
