"""The config of a run: made from a benchmark's file, completed and checked."""

import dataclasses
import importlib.util
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from halrp_jax import data, keys, methods, models
from halrp_jax.keys import Config
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
) -> config_dict.ConfigDict:
  """Returns a locked config: defaults of every key, then what a benchmark's file chooses.

  Args:
    method: what stands after the colon of --config=FILE.py:METHOD,KEY=VALUE (`parse`); its keys
      go before those of the file.
    protocol: values of protocol.*.
    every_method: values of method.* for all methods that have the key.
    methods_: values for one method each: {method: {key: value}}.
    data_: values of data.*.
    **top: values of the other keys.

  Raises:
    UserError: if there is no such method, or no such key.
  """
  method, asked = parse(method)
  specs = {name: keys.spec(module.Config) for name, module in methods.METHODS.items()}

  def values(spec, chosen):
    if unknown := set(chosen) - set(spec):
      raise UserError(f"config file: unknown keys {', '.join(sorted(unknown))}")
    filled = {name: chosen.get(name, key.default) for name, key in spec.items()}
    # Texts are typed; the type object takes any literal from the command line: `resolve` checks.
    return {
      k: v if isinstance(v, str) else config_dict.FieldReference(v, field_type=object)
      for k, v in filled.items()
    }

  chosen = {"protocol": protocol, "data": data_ or {}, "checkpoint": {}}
  config = values(keys.spec(Config), top)
  config |= {name: values(keys.spec(cls), chosen[name]) for name, cls in keys.SECTIONS.items()}
  if unknown := set(every_method or ()) - set().union(*specs.values()):
    raise UserError(f"config file: no method has the keys {', '.join(sorted(unknown))}")
  common = {k: v for k, v in (every_method or {}).items() if k in specs[method]}
  own = (methods_ or {}).get(method, {})
  config["method"] = {"name": method} | values(specs[method], common | own | asked)
  return config_dict.ConfigDict(config).lock()


def resolve(config: config_dict.ConfigDict | Config | Mapping) -> Config:
  """Returns the config with the switches left None filled in, every key checked.

  Args:
    config: from `make_config` or a command line; or one that is resolved, or its `to_dict()`.

  Raises:
    UserError: one line that names every key that is wrong.
  """
  values = dict(config) if isinstance(config, Mapping) else config.to_dict()
  values = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
  chosen = values.get("method")
  name = chosen.get("name") if isinstance(chosen, dict) else None
  if not isinstance(name, str) or name not in methods.METHODS:
    raise UserError(f"method.name must be one of {', '.join(methods.METHODS)}, got {name!r}")
  for key, value in methods.variant_defaults(chosen).items():
    if chosen.get(key) is None:
      chosen[key] = value
  flat = keys.flat(values)
  del flat["method.name"]
  method = methods.METHODS[name]
  lines = keys.errors(flat, keys.keys_of(method.Config))
  for key, known in (("benchmark", data.BENCHMARKS), ("network", models.NETWORKS)):
    if isinstance(flat.get(key), str) and flat[key] not in known:
      hint = keys.nearest(flat[key], known)
      lines.append(f"{key} must be one of {', '.join(known)}, got {flat[key]!r}{hint}")
  keys.require(lines)
  sections = {section: cls(**values[section]) for section, cls in keys.SECTIONS.items()}
  resolved = Config(**values | sections | {"method": method.Config(**chosen)})
  if hasattr(method, "check"):
    keys.require(method.check(resolved))
  return resolved


def with_keys(config: config_dict.ConfigDict, **top) -> config_dict.ConfigDict:
  """Returns a copy with other values of top-level keys."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.update(top)
  return config


def setting_of(config: dict) -> dict:
  """Returns what makes a setting: dotted key -> value. `config`: resolved, of any version."""
  flat = keys.flat(config)
  if (name := flat["method.name"]) in methods.METHODS:
    known = keys.keys_of(methods.METHODS[name].Config)
    switches = methods.variant_defaults(config["method"])
    before = {k: v for k, v in _BEFORE.items() if k in known}
    flat = {k: key.default for k, key in known.items()} | before | flat
    for key, value in switches.items():
      if flat.get(f"method.{key}") is None:
        flat[f"method.{key}"] = value
  setting = {k: v for k, v in flat.items() if k not in _FREE}
  return setting | {"method.batch_norm": records.KINDS[records.statistics(setting)]}


# --- what config files use beside `make_config` ----------------------------------------


def parse(argument: str) -> tuple[str, dict[str, Any]]:
  """Splits what stands after the colon of --config=FILE.py:METHOD,KEY=VALUE,KEY=VALUE.

  Returns:
    The name of the method, and the values of its keys that were given.

  Raises:
    UserError: one line that names the method, or every key, that is wrong.
  """
  name, *settings = argument.split(",")
  if name not in methods.METHODS:
    raise UserError(
      f"unknown method {name!r}{keys.nearest(name, methods.METHODS)}; "
      f"known: {', '.join(methods.METHODS)}"
    )
  fields = {f.name: f.type for f in dataclasses.fields(methods.METHODS[name].Config)}
  known, found, lines = keys.spec(methods.METHODS[name].Config), {}, []
  for setting in settings:
    key, is_setting, text = setting.partition("=")
    if not is_setting:
      lines.append(f"{argument}: {setting!r} is not KEY=VALUE")
    elif key not in known:
      lines.append(f"{argument}: {name} has no key {key!r}{keys.nearest(key, known)}")
    elif key in found:
      lines.append(f"{argument}: {key} is given twice")
    else:
      found[key] = _typed(text, fields[key])
      if not known[key].accepts(found[key]):
        lines.append(f"{argument}: {key} must be {known[key].expected}, got {text!r}")
  keys.require(lines)
  return name, found


def _typed(text: str, kind: Any) -> Any:
  """Returns a text as a value of a field's type, or as it is where it is no such value."""
  for cls in typing.get_args(kind) or (kind,):
    try:
      return {"true": True, "false": False}[text.lower()] if cls is bool else cls(text)
    except (KeyError, ValueError):
      pass
  return text


def sibling(file: str, name: str) -> types.ModuleType:
  """Loads another config file of the same folder, for what two files share.

  Config files are loaded by their path and are in no package: they can't import one another.

  Args:
    file: `__file__` of the config file that asks.
    name: of the other one, without .py.

  Raises:
    UserError: if it is missing.
  """
  path = pathlib.Path(file).with_name(f"{name}.py")
  if not path.is_file():
    raise UserError(f"{file} is made from {path}, which is missing")
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
