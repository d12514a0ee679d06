"""The runs behind the paper's tables and figures: their configs, and the cells of a sweep."""

import functools
import pathlib
from typing import Any

from ml_collections import config_dict

from halrp_jax import arguments, methods
from halrp_jax.config import resolve, setting_of, with_keys
from halrp_jax.data import orders
from halrp_jax.reports import paper
from halrp_jax.runs import sweep
from halrp_jax.types import UserError

# --- settings -------------------------------------------------------------------------


def configs_folder(text: str = "") -> str:
  """Returns the absolute path of the folder configs/.

  Args:
    text: its path as the user gave it; "": the one in the current folder, or the installed one.

  Raises:
    UserError: if there is no such folder.
  """
  for folder in [text] if text else ["configs", arguments.configs_folder()]:
    if (pathlib.Path(folder) / "cifar100_split.py").is_file():
      return str(pathlib.Path(folder).resolve())
  raise UserError(
    f"--configs={text or 'configs'}: no such folder of configs; give that of the source tree"
  )


@functools.cache
def config(
  folder: str, setting: paper.Setting, smoke: bool = False
) -> config_dict.ConfigDict | None:
  """Returns the config of a setting, not yet resolved; None for a method not implemented here.

  Args:
    folder: path of the config files, from `configs_folder`.
    setting: setting of a table or figure.
    smoke: whether it is to run only as many epochs as every phase needs.
  """
  if setting.argument in paper.LABELS and setting.argument not in methods.METHODS:
    return None
  file = str(pathlib.Path(folder) / f"{setting.config}.py")
  found = arguments.load_config(file, setting.argument)
  found = with_keys(found, train_fraction=setting.fraction)
  return _shortened(found) if smoke else found


def _shortened(found: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """Returns a config with as few epochs as every phase needs, to see whether everything runs."""
  method: Any = found.method
  for key in (k for k in method if k.endswith("epochs") and isinstance(method[k], int)):
    method[key] = min(method[key], 4)
  phases = [method.get(key) or 1 for key in ("warmup_epochs", "fine_tune_epochs")]
  return with_keys(found, epochs=1 + max(phases))


@functools.cache
def _standard_setting(folder: str, name: str, method: str) -> dict:
  """Returns the setting of a method in the standard config file NAME.py."""
  found = config(folder, paper.Setting(name, method, 1.0))
  assert found is not None, method  # callers ask for methods that are implemented
  return setting_of(resolve(found).to_dict())


def catalogue(folder: str, smoke: bool = False) -> paper.Catalogue:
  """Returns the settings that records are compared with, from the configs of a folder.

  Args:
    folder: path of the config files, from `configs_folder`.
    smoke: whether the records are of `--budget=smoke`.
  """

  def expected(setting):
    found = config(folder, setting, smoke)
    return None if found is None else setting_of(resolve(found).to_dict())

  def standard(benchmark, network, method):
    if method in methods.METHODS:
      for name in paper.STANDARD:
        found = _standard_setting(folder, name, method)
        if (found["benchmark"], found["network"]) == (benchmark, network):
          return found
    return None

  return paper.Catalogue(functools.cache(expected), standard, setting_of, any_share=smoke)


# --- cells to run ---------------------------------------------------------------------


def cells(
  folder: str,
  target: paper.Target,
  budget: str,
  only: tuple[str, ...] = (),
  order_names: str = "",
  seeds: str = "",
  overrides: dict | None = None,
) -> tuple[list[sweep.Cell], list[str]]:
  """Returns the cells of a table or figure under a budget.

  Args:
    folder: path of the config files, from `configs_folder`.
    target: the table or figure.
    budget: "smoke" (to see whether everything runs), "small" (a fraction of the training images,
      the first orders, one seed) or "full" (the paper's five orders with five seeds each).
    only: names of the methods to run; (): all of the target.
    order_names: names with commas, or "all"; "": those of the budget.
    seeds: whole numbers with commas; "": those of the budget.
    overrides: values of top-level config keys.

  Returns:
    The cells, and the names of the target's methods that are not implemented here.
  """
  found, missing = [], {}
  for setting in paper.settings(target, budget, only):
    chosen = config(folder, setting, budget == "smoke")
    if chosen is None:
      missing[setting.argument] = True
      continue
    chosen = with_keys(chosen, **(overrides or {}))
    count = {"full": target.orders, "small": target.small_orders, "smoke": 2}[budget]
    names = list(orders.PAPER[str(chosen.benchmark)])[: min(count, target.orders)]
    label = f"{setting.config}-{100 * setting.fraction:g}/{setting.argument}"
    found += sweep.cells(
      {label: chosen},
      order_names or ",".join(names),
      seeds or ("0,1,2,3,4" if budget == "full" else "0"),
    )
  return found, list(missing)
