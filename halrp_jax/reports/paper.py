"""What the paper reports: its tables and figures as settings to run, its numbers (paper.json).

A target is a table or figure. Each of its cells is a setting: a file of configs/, what stands after
its colon, and the share of the training images.
"""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

from halrp_jax.reports import records

SYSTEMS = {  # as the paper calls them -> here
  "STL": "stl",
  "MTL": "mtl",
  "L2": "l2",
  "EWC": "ewc",
  "BN": "bn",
  "BE": "be",
  "APD": "apd",
  "APDfix": "apdfix",
  "IBPWF": "ibpwf",
  "GPM": "gpm",
  "WSN": "wsn",
  "BMKP": "bmkp",
  "CLR": "clr",
  "PRD": "prd",
  "IRU": "iru",
  "HALRP": "halrp",
}
LABELS = {name: label for label, name in SYSTEMS.items()}
LAMBDA_0 = ("0", "1e-6", "1e-5", "1e-4", "1e-3")
LAMBDA_1 = ("5e-5", "1e-4", "5e-4")
ONE_POINT = {"accuracy": 1.0, "mopd": 1.0, "aopd": 1.0, "increment": 0.01}

_FRACTIONS = (0.05, 0.25, 0.5, 1.0)
_ABLATIONS = {
  "alpha 0.9, n_r 1": "alpha0.9_warmup1",
  "alpha 0.9, n_r 2": "alpha0.9_warmup2",
  "alpha 0.9, n_r 3": "alpha0.9_warmup3",
  "alpha 0.9, n_r 4": "alpha0.9_warmup4",
  "alpha 0.95, n_r 1": "alpha0.95_warmup1",
  "alpha 0.75, n_r 1": "alpha0.75_warmup1",
  "alpha 0.60, n_r 1": "alpha0.60_warmup1",
  "alpha 0.45, n_r 1": "alpha0.45_warmup1",
  "LRP": "lrp",
  "Random LRP": "random_lrp",
}
_GRID = {f"{a}, {b}": f"{a}_{b}" for a in LAMBDA_0 for b in LAMBDA_1}


class Setting(NamedTuple):
  config: str  # file in configs/, without .py
  argument: str  # what stands after its colon
  fraction: float  # of the training images


class Catalogue(NamedTuple):
  """What the settings of records are compared with (`runs.reproduce.catalogue`)."""

  # what the setting of a record must be to count for a cell; None for a system that isn't here
  wanted: Callable[[Setting], dict | None]
  # (benchmark, network, method) -> the setting of configs/; None if there is none
  standard: Callable[[str, str, str], dict | None]
  # config of a record -> its setting, which records of older versions don't hold or not in full;
  # None: the setting is the one in the record
  setting_of: Callable[[dict], dict] | None = None
  any_share: bool = False  # runs on any share of the training images count for a cell


class Column(NamedTuple):
  head: str
  metric: str  # accuracy, mopd, aopd or increment
  config: str
  fraction: float | None = None  # None: the paper's is 1, any is shown


class Target(NamedTuple):
  name: str  # "table 2"
  title: str
  columns: tuple[Column, ...]
  rows: dict[str, str] = SYSTEMS  # label -> argument
  orders: int = 5  # how many of the benchmark's list
  small_fraction: float = 0.05
  small_orders: int = 3
  small_rows: tuple[str, ...] = ()  # of budget small; (): all

  @property
  def is_table(self) -> bool:
    return self.name.startswith("table")

  @property
  def slug(self) -> str:
    return self.name.replace(" ", "")


def _columns(heads: dict[str, str], *names: str) -> tuple[Column, ...]:
  """heads: head -> config."""
  return tuple(Column(head, metric, config) for head, config in heads.items() for metric in names)


def _cifar(*names: str, split=True, superclass=True) -> tuple[Column, ...]:
  chosen = {"cifar100_split": split, "cifar100_superclass": superclass}
  heads = {"cifar100_split": "CIFAR100-Split", "cifar100_superclass": "CIFAR100-SuperClass"}
  return tuple(
    Column(f"{heads[config]}, {100 * fraction:g} %", metric, config, fraction)
    for config in (c for c, wanted in chosen.items() if wanted)
    for fraction in _FRACTIONS
    for metric in names
  )


_ROBUST = ("accuracy", "mopd", "aopd")
_FIVE = {"AlexNet": "five_datasets_alexnet", "ResNet18": "five_datasets_resnet18"}
_TINY = {
  f"{n}-split, {label}": f"tinyimagenet{n}_{network}"
  for n in (20, 40)
  for label, network in (("AlexNet", "alexnet"), ("ResNet18", "resnet18"))
}
_IRU = {
  "PMNIST-20 (MLP)": "pmnist20_mlp",
  "CIFAR100-20 (ResNet18)": "cifar100_20_resnet18",
  "CIFAR100-20 (MLP)": "cifar100_20_mlp",
}
_LAMBDAS = {"CIFAR100-Split": "ablation_lambda_split"}
_LAMBDAS |= {"CIFAR100-SuperClass": "ablation_lambda_superclass"}

TARGETS = {
  t.name: t
  for t in (
    Target("table 2", "Accuracy on CIFAR-100, LeNet, by share of the images", _cifar("accuracy")),
    Target("table 3a", "P-MNIST, LeNet", _columns({"P-MNIST": "pmnist"}, *_ROBUST)),
    Target("table 3b", "Five-dataset", _columns(_FIVE, *_ROBUST)),
    Target(
      "table 3c",
      "Omniglot-Rotation, wide LeNet (APD: quoted by the paper from APD's)",
      _columns({"Omniglot-Rotation": "omniglot_rotation"}, *_ROBUST),
    ),
    Target("table 3d", "TinyImageNet", _columns(_TINY, *_ROBUST)),
    Target(
      "table 4",
      "The setting of IRU (MTL and IRU: quoted by the paper from IRU's)",
      _columns(_IRU, "accuracy"),
      {k: SYSTEMS[k] for k in ("MTL", "IRU", "HALRP")},
    ),
    Target("table 5", "Order robustness on CIFAR-100, LeNet", _cifar("mopd", "aopd")),
    Target(
      "table 6",
      "HALRP's parts one by one, CIFAR100-Split, LeNet, order A",
      _columns({"CIFAR100-Split": "ablation_table6"}, "accuracy", "increment"),
      _ABLATIONS,
      orders=1,
      small_fraction=0.25,
      small_orders=1,
    ),
    Target(
      "table 7",
      "HALRP and IBPWF",
      _columns({"P-MNIST": "pmnist", "Five-dataset": "five_datasets_alexnet"}, *_ROBUST),
      {k: SYSTEMS[k] for k in ("IBPWF", "HALRP")},
    ),
    Target("figure 2", "Forgetting by share of the images", _cifar("bwt")),
    Target(
      "figure 3a",
      "Growth of the model on CIFAR100-SuperClass",
      _columns({"CIFAR100-SuperClass": "cifar100_superclass"}, "increment"),
      small_rows=("APD", "HALRP"),
    ),
    Target(
      "figure 3b",
      "Accumulated time on P-MNIST",
      _columns({"P-MNIST": "pmnist"}, "seconds"),
      small_orders=1,
    ),
    Target(
      "figure 4", "HALRP's regularisation", _columns(_LAMBDAS, *_ROBUST), _GRID, small_orders=2
    ),
    Target("figure 5", "Forgetting by order, CIFAR100-Split", _cifar("bwt", superclass=False)),
    Target("figure 6", "Forgetting by order, CIFAR100-SuperClass", _cifar("bwt", split=False)),
    Target(
      "figure 7",
      "Memory",
      _columns(
        {
          "Omniglot-Rotation": "omniglot_rotation",
          "40-split, AlexNet": "tinyimagenet40_alexnet",
        },
        "memory",
      ),
      orders=1,
      small_orders=1,
    ),
  )
}
STANDARD = (  # one config per benchmark and network
  *("cifar100_split", "cifar100_superclass", "pmnist", "omniglot_rotation", "digits"),
  *_FIVE.values(),
  *_TINY.values(),
  *_IRU.values(),
)


BUDGETS = ("smoke", "small", "full")
_SMOKE_FRACTION = 0.01


def settings(target: Target, budget: str, only: tuple[str, ...] = ()) -> list[Setting]:
  """The settings of a target under a budget, each once. `only`: arguments, (): all."""
  small_rows = target.small_rows if budget != "full" else ()
  rows = [a for label, a in target.rows.items() if not small_rows or label in small_rows]
  found = {}
  for column in target.columns:
    for argument in rows:
      if only and argument not in only:
        continue
      fraction = {
        "full": column.fraction or 1.0,
        "small": target.small_fraction,
        "smoke": _SMOKE_FRACTION,
      }[budget]
      found[Setting(column.config, argument, fraction)] = True
  return list(found)


@functools.cache
def numbers() -> dict:
  """{"2": {row: {head: {metric: [value, standard error]}}}}, percent; increments are fractions."""
  return json.loads(pathlib.Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))


def number(target: Target, row: str, column: Column) -> records.Number | None:
  """What the paper has in a cell."""
  table = numbers().get(target.name.removeprefix("table "), {})
  found = table.get(row, {}).get(column.head, {}).get(column.metric)
  return records.Number(found[0], found[1] if len(found) > 1 else None) if found else None
