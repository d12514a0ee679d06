"""Makes the config of a run from a config file's values, completes and checks it.

A config file in configs/ calls `make_config`; the command line then changes single keys; `resolve`
turns the result into a checked, typed `keys.Config`.
"""

# pyright: reportMissingParameterType=error, reportMissingTypeArgument=error

import dataclasses
import importlib.machinery
import importlib.util
import pathlib
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, cast

from ml_collections import config_dict  # pyright: ignore[reportMissingTypeStubs] (it has none)

from halrp_jax import data, keys, methods, models
from halrp_jax.keys import Config, Key
from halrp_jax.reports import records
from halrp_jax.types import Json, UserError

# The keys in which runs of one setting may differ. `method.variant` is among them because the
# switches that it stands for are part of the setting.
_NOT_IN_SETTING = {
  *("order", "seed", "train_fraction", "allow_partial", "loop", "method.variant"),
  *("base", "base_source"),  # the standing has the contents of the base
  *keys.NEUTRAL_KEYS,
}
# The values that stand for what halrp_jax did in versions without the key, where that is not the
# key's default.
_WITHOUT_BASE = ("ibpwf", "iru")  # methods whose networks do not start from parameters
WITH_FROZEN_BASE = ("halrp", "inflora", "sdlora")  # methods that can leave the base as it is
_CUSTOM_SIZE = 32  # height and width of the user's own images if `data.image_size` is 0
_VALUES_BEFORE_KEY = {
  "protocol.fraction_per_class": False,
  "method.batch_norm": "own",
  "method.prune_scope": "all",
}


def make_config(
  method: str,
  *,
  protocol: Mapping[str, object],
  every_method: Mapping[str, object] | None = None,
  methods_: Mapping[str, Mapping[str, object]] | None = None,
  data_: Mapping[str, object] | None = None,
  **top: object,
) -> config_dict.ConfigDict:
  """Returns a locked config with the values of a config file, and defaults for all other keys.

  Args:
    method: the text after the colon of --config=FILE.py:METHOD,KEY=VALUE (see `parse`). The values
      given there take precedence over those of the file.
    protocol: values of the keys `protocol.*`.
    every_method: values of keys `method.*`, used for every method that has the key.
    methods_: values of the keys `method.*` of single methods, {method: {key: value}}. They take
      precedence over `every_method`.
    data_: values of the keys `data.*`.
    **top: values of the keys without a section, such as `epochs`.

  Raises:
    UserError: if there is no such method, or a key does not exist.
  """
  method, asked = parse(method)
  specs = {name: keys.spec(module.Config) for name, module in methods.METHODS.items()}
  sections = {"protocol": protocol, "data": data_ or {}, "checkpoint": {}}
  config = _values(keys.spec(Config), top)
  config |= {name: _values(keys.spec(cls), sections[name]) for name, cls in keys.SECTIONS.items()}
  if unknown := set(every_method or ()) - set[str]().union(*specs.values()):
    raise UserError(f"config file: no method has the keys {', '.join(sorted(unknown))}")
  common = {k: v for k, v in (every_method or {}).items() if k in specs[method]}
  own = (methods_ or {}).get(method, {})
  config["method"] = {"name": method} | _values(specs[method], {**common, **own, **asked})
  return config_dict.ConfigDict(config).lock()


def _values(known: Mapping[str, Key], chosen: Mapping[str, object]) -> dict[str, Any]:
  """Returns a value for every known key: the chosen one, or else the default.

  Raises:
    UserError: if a chosen key is unknown.
  """
  if unknown := set(chosen) - set(known):
    raise UserError(f"config file: unknown keys {', '.join(sorted(unknown))}")
  values = {name: chosen.get(name, key.default) for name, key in known.items()}
  # ConfigDict would fix the type of every value. The type `object` lets the command line set any
  # literal, which `resolve` checks with better error messages. Texts need no such reference.
  return {
    k: v if isinstance(v, str) else config_dict.FieldReference(v, field_type=object)
    for k, v in values.items()
  }


def resolve(config: config_dict.ConfigDict | Config | Mapping[str, object]) -> Config:
  """Checks every key of a config and returns it with types.

  Keys whose value is None take the value that `method.variant` stands for.

  Args:
    config: a config of `make_config` or of the command line; a resolved config, or its
      `to_dict()`.

  Raises:
    UserError: if a key is unknown, missing or out of range; one line names all such keys.
  """
  # ConfigDict is not typed
  values = _copy(config if isinstance(config, Mapping) else cast("Any", config).to_dict())
  chosen: Json = values["method"] if isinstance(values.get("method"), dict) else {}
  name = chosen.get("name")
  if not isinstance(name, str) or name not in methods.METHODS:
    raise UserError(f"method.name must be one of {', '.join(methods.METHODS)}, got {name!r}")
  for key, value in methods.variant_defaults(chosen).items():
    if chosen.get(key) is None:
      chosen[key] = value
  if values.get("benchmark") == "custom" and isinstance(values.get("data"), dict):
    values["data"]["image_size"] = values["data"].get("image_size") or _CUSTOM_SIZE
  flat = keys.flat(values)
  del flat["method.name"]
  method = methods.METHODS[name]
  lines = keys.errors(flat, keys.keys_of(method.Config))
  benchmark, known = flat.get("benchmark"), data.BENCHMARKS
  if isinstance(benchmark, str) and benchmark not in known:
    hint = keys.nearest(benchmark, known)
    lines.append(f"benchmark must be one of {', '.join(known)}, got {benchmark!r}{hint}")
  if isinstance(flat.get("network"), str):
    try:
      models.parse(flat["network"])
    except UserError as e:
      lines += getattr(e, "lines", [str(e)])
  keys.require(lines)
  sections: Json = {section: cls(**values[section]) for section, cls in keys.SECTIONS.items()}
  resolved = Config(**{**values, **sections, "method": method.Config(**chosen)})
  if resolved.base and name in _WITHOUT_BASE:
    raise UserError(f"base: {name} makes its kernels of factors, it can't start from a network")
  if resolved.base_training != "all" and name not in WITH_FROZEN_BASE:
    raise UserError(
      f"base_training = {resolved.base_training!r} is for {', '.join(WITH_FROZEN_BASE)}; {name} "
      "trains all parameters: set base_training=all"
    )
  if resolved.data.num_tasks and not known[resolved.benchmark].has_num_tasks:
    raise UserError(
      f"data.num_tasks = {resolved.data.num_tasks}: {resolved.benchmark} has its own number of "
      "tasks; set data.num_tasks=0, and choose tasks with order"
    )
  if resolved.data.framing == "whole" and resolved.data.crop:
    raise UserError(
      f"data.crop = {resolved.data.crop}: framing=whole crops nothing; set data.framing=central"
    )
  if hasattr(method, "check"):
    keys.require(method.check(resolved))
  return resolved


def _copy(values: Mapping[str, object]) -> Json:
  """Returns the values of a config and its sections as new dicts."""
  return {
    k: dict(cast("Mapping[str, object]", v)) if isinstance(v, Mapping) else v
    for k, v in values.items()
  }


def with_keys(config: config_dict.ConfigDict, **top: object) -> config_dict.ConfigDict:
  """Returns a copy of a config with other values of keys without a section."""
  copy = cast("Any", config).copy_and_resolve_references()  # ConfigDict is not typed
  with copy.unlocked():
    copy.update(top)
  return copy


def setting_of(config: Json) -> Json:
  """Returns the setting of a run: the keys that runs to be averaged have in common.

  Args:
    config: a resolved config, written by any version of halrp_jax.

  Returns:
    {dotted key: value}, without the keys that may differ, such as order and seed. Keys that the
    config does not have yet get the value that stands for what halrp_jax did then.
  """
  flat = keys.flat(config)
  if (name := flat["method.name"]) in methods.METHODS:
    known = keys.keys_of(methods.METHODS[name].Config)
    switches = methods.variant_defaults(config["method"])
    before = {k: v for k, v in _VALUES_BEFORE_KEY.items() if k in known}
    if "base" not in flat and flat["benchmark"] != "custom":
      flat["data.image_size"] = 0  # it was for custom alone
    if flat.get("base") and flat["benchmark"] == "custom":
      before["data.framing"] = "whole"  # photographs were
    flat = {k: key.default for k, key in known.items()} | before | flat
    for key, value in switches.items():
      if flat.get(f"method.{key}") is None:
        flat[f"method.{key}"] = value
  setting = {k: v for k, v in flat.items() if k not in _NOT_IN_SETTING}
  return setting | {"method.batch_norm": records.KINDS[records.statistics(setting)]}


# --- further functions for config files -------------------------------------------------


def parse(argument: str) -> tuple[str, dict[str, object]]:
  """Splits METHOD,KEY=VALUE,KEY=VALUE, the text after the colon of --config=FILE.py:TEXT.

  Returns:
    The name of the method, and {key: value} of its keys that are given.

  Raises:
    UserError: if the method or a key is unknown, or a value is out of range; one line names all.
  """
  name, *settings = argument.split(",")
  if name not in methods.METHODS:
    raise UserError(
      f"unknown method {name!r}{keys.nearest(name, methods.METHODS)}; "
      f"known: {', '.join(methods.METHODS)}"
    )
  method_config = methods.METHODS[name].Config
  types_of = {f.name: f.type for f in dataclasses.fields(method_config)}
  known = keys.spec(method_config)
  found: dict[str, object] = {}
  lines: list[str] = []
  for setting in settings:
    key, is_setting, text = setting.partition("=")
    if not is_setting:
      lines.append(f"{argument}: {setting!r} is not KEY=VALUE")
    elif key not in known:
      lines.append(f"{argument}: {name} has no key {key!r}{keys.nearest(key, known)}")
    elif key in found:
      lines.append(f"{argument}: {key} is given twice")
    else:
      found[key] = _typed(text, types_of[key])
      if not known[key].accepts(found[key]):
        lines.append(f"{argument}: {key} must be {known[key].expected}, got {text!r}")
  keys.require(lines)
  return name, found


def _typed(text: str, field_type: object) -> bool | int | float | str:
  """Returns a text as a value of a field's type, or unchanged if it is no such value."""
  kinds: tuple[Any, ...] = typing.get_args(field_type) or (field_type,)
  for cls in kinds:
    try:
      return {"true": True, "false": False}[text.lower()] if cls is bool else cls(text)
    except (KeyError, ValueError):
      pass
  return text


def sibling(file: str, name: str) -> types.ModuleType:
  """Loads another config file of the same folder, so that two files can share values.

  Config files are loaded by path and belong to no package, so they can't import each other.

  Args:
    file: `__file__` of the config file that calls this function.
    name: the other file's name without ".py".

  Raises:
    UserError: if there is no such file.
  """
  path = pathlib.Path(file).with_name(f"{name}.py")
  if not path.is_file():
    raise UserError(f"{file} is made from {path}, which is missing")
  return load_file(path)


def load_file(path: pathlib.Path) -> types.ModuleType:
  """Executes a config file, which may have any suffix, and returns it as a module."""
  name = f"config_file_{path.stem}"
  loader = importlib.machinery.SourceFileLoader(name, str(path))
  found = importlib.util.spec_from_loader(name, loader)
  assert found is not None  # it is None only without a loader
  module = importlib.util.module_from_spec(found)
  sys.modules[name] = module  # dataclasses in the file look their module up here
  loader.exec_module(module)
  return module
