"""The paper's tables and figures as settings to run: the cells of a target under a budget."""

import functools
import pathlib

from halrp_jax import arguments, methods
from halrp_jax.config import resolve, setting_of, with_keys
from halrp_jax.data import orders
from halrp_jax.reports import paper
from halrp_jax.runs import sweep
from halrp_jax.types import UserError

# --- settings -------------------------------------------------------------------------


def configs_folder(text: str = "") -> str:
  """Returns the folder configs/: as named, of the current folder, or the one installed with us.

  Raises:
    UserError: if it is nowhere.
  """
  for folder in [text] if text else ["configs", arguments.configs_folder()]:
    if (pathlib.Path(folder) / "cifar100_split.py").is_file():
      return str(pathlib.Path(folder).resolve())
  raise UserError(f"--configs={text or 'configs'}: no such folder of configs; name the source's")


@functools.cache
def config(folder: str, setting: paper.Setting, smoke: bool = False):
  """The config of a setting, not yet resolved; None for a system that isn't here."""
  if setting.argument in paper.LABELS and setting.argument not in methods.METHODS:
    return None
  file = str(pathlib.Path(folder) / f"{setting.config}.py")
  found = arguments.load_config(file, setting.argument)
  return _shortened(with_keys(found, train_fraction=setting.fraction), smoke)


def _shortened(found, smoke: bool):
  """As few epochs as every phase needs, if it is only to be seen that all runs."""
  if not smoke:
    return found
  method = found.method
  for key in (k for k in method if k.endswith("epochs") and isinstance(method[k], int)):
    method[key] = min(method[key], 4)
  phases = [method.get(key) or 1 for key in ("warmup_epochs", "fine_tune_epochs")]
  return with_keys(found, epochs=1 + max(phases))


@functools.cache
def _standard_setting(folder: str, name: str, method: str) -> dict:
  found = config(folder, paper.Setting(name, method, 1.0))
  return setting_of(resolve(found).to_dict())


def catalogue(folder: str, smoke: bool = False) -> paper.Catalogue:
  """Returns what the settings of records are compared with: the configs of a folder.

  smoke: the runs are those of `--budget=smoke`.
  """

  def wanted(setting):
    found = config(folder, setting, smoke)
    return None if found is None else setting_of(resolve(found).to_dict())

  def standard(benchmark, network, method):
    if method in methods.METHODS:
      for name in paper.STANDARD:
        found = _standard_setting(folder, name, method)
        if (found["benchmark"], found["network"]) == (benchmark, network):
          return found
    return None

  return paper.Catalogue(functools.cache(wanted), standard, setting_of, any_share=smoke)


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
  """The cells of a target under a budget, and the systems that are not here.

  small: a share of the images, the first orders, one seed; smoke: that everything runs; full: the
  paper's five orders with five seeds each.
  """
  found, absent = [], {}
  for setting in paper.settings(target, budget, only):
    chosen = config(folder, setting, budget == "smoke")
    if chosen is None:
      absent[setting.argument] = True
      continue
    chosen = with_keys(chosen, **(overrides or {}))
    count = {"full": target.orders, "small": target.small_orders, "smoke": 2}[budget]
    names = list(orders.PAPER[chosen.benchmark])[: min(count, target.orders)]
    label = f"{setting.config}-{100 * setting.fraction:g}/{setting.argument}"
    found += sweep.cells(
      {label: chosen},
      order_names or ",".join(names),
      seeds or ("0,1,2,3,4" if budget == "full" else "0"),
    )
  return found, list(absent)
