"""The tables and figures of the HALRP paper: the settings to run for them, and the paper's numbers.

A target is a table or a figure. Each of its cells is a setting: a config file, the text after the
colon in --config=FILE.py:TEXT, and a fraction of the training images. paper.json has the numbers.
"""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

from halrp_jax.reports import records
from halrp_jax.types import Json

SYSTEMS = {  # the paper's name of a method -> its name in `methods.METHODS`
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
NEWER = {"InfLoRA": "inflora", "SD-LoRA": "sdlora"}  # systems that the paper does not have
LABELS = {name: label for label, name in (SYSTEMS | NEWER).items()}
LAMBDA_0 = ("0", "1e-6", "1e-5", "1e-4", "1e-3")
LAMBDA_1 = ("5e-5", "1e-4", "5e-4")
# largest difference from the paper's number that counts as reproduced
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
  """What is run for a cell of a table or figure."""

  config: str  # name of a file in configs/, without .py
  argument: str  # the text after the colon in --config=FILE.py:TEXT
  fraction: float  # fraction of the training images


class Catalogue(NamedTuple):
  """The settings with which those of records are compared (`runs.reproduce.catalogue` makes it)."""

  # returns the setting that records must have to count for a cell; None: the method is missing here
  expected: Callable[[Setting], Json | None]
  # (benchmark, network, method) -> the setting of the file in configs/; None: there is no file
  standard: Callable[[str, str, str], Json | None]
  # config of a record -> its setting, for records of older versions, which hold none or not all of
  # it; None: the setting in the record is used
  setting_of: Callable[[Json], Json] | None = None
  any_share: bool = False  # whether runs on any fraction of the training images count for a cell


class Column(NamedTuple):
  """A column of a table, or one of the quantities that a figure shows."""

  head: str
  metric: str  # accuracy, mopd, aopd or increment; in figures also bwt, seconds or memory
  config: str  # name of a file in configs/, without .py
  # fraction of the training images; None: 1 in the paper, and runs on any fraction are shown
  fraction: float | None = None


class Target(NamedTuple):
  """A table or figure of the paper."""

  name: str  # such as "table 2"
  title: str
  columns: tuple[Column, ...]
  rows: dict[str, str] = SYSTEMS  # label of the row -> text after the colon of the config file
  orders: int = 5  # number of task orders, the first ones of the benchmark's list
  small_fraction: float = 0.05  # fraction of the training images with --budget=small
  small_orders: int = 3  # number of task orders with --budget=small
  small_rows: tuple[str, ...] = ()  # rows with --budget=small; (): all

  @property
  def is_table(self) -> bool:
    """Returns whether this is a table."""
    return self.name.startswith("table")

  @property
  def slug(self) -> str:
    """Returns the name without a space, for the names of files."""
    return self.name.replace(" ", "")


def _columns(configs: dict[str, str], *names: str) -> tuple[Column, ...]:
  """Returns a column per config and metric. `configs`: {head: config}; `names`: the metrics."""
  return tuple(Column(head, metric, config) for head, config in configs.items() for metric in names)


def _cifar(*names: str, split: bool = True, superclass: bool = True) -> tuple[Column, ...]:
  """Returns a column per CIFAR-100 benchmark, fraction of the training images and metric."""
  chosen = {"cifar100_split": split, "cifar100_superclass": superclass}
  heads = {"cifar100_split": "CIFAR100-Split", "cifar100_superclass": "CIFAR100-SuperClass"}
  return tuple(
    Column(f"{heads[config]}, {100 * fraction:g} %", metric, config, fraction)
    for config in (c for c, is_chosen in chosen.items() if is_chosen)
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
_LAMBDAS = {
  "CIFAR100-Split": "ablation_lambda_split",
  "CIFAR100-SuperClass": "ablation_lambda_superclass",
}

TARGETS = {
  t.name: t
  for t in (
    Target(
      "table 2",
      "Accuracy on CIFAR-100, LeNet, by fraction of the training images",
      _cifar("accuracy"),
    ),
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
    Target("figure 2", "Forgetting by fraction of the training images", _cifar("bwt")),
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
STANDARD = (  # the config file of each combination of benchmark and network
  *("cifar100_split", "cifar100_superclass", "pmnist", "omniglot_rotation", "digits"),
  "cifar100_split_pretrained",
  *_FIVE.values(),
  *_TINY.values(),
  *_IRU.values(),
)

BUDGETS = ("smoke", "small", "full")
_SMOKE_FRACTION = 0.01  # fraction of the training images with --budget=smoke


def settings(target: Target, budget: str, only: tuple[str, ...] = ()) -> list[Setting]:
  """Returns the settings of a target under a budget, each once.

  Args:
    target: the table or figure.
    budget: one of `BUDGETS`.
    only: the rows to run, by their text after the colon; (): all.
  """
  small_rows = target.small_rows if budget != "full" else ()
  rows = [a for label, a in target.rows.items() if not small_rows or label in small_rows]
  found: dict[Setting, bool] = {}  # a dict keeps the order
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
def numbers() -> Json:
  """Returns the paper's numbers, {"2": {row: {head: {metric: [value, standard error]}}}}.

  The outer keys are the numbers of the tables. Accuracies are in percent, MOPD and AOPD in points,
  increments are fractions of the base.
  """
  return json.loads(pathlib.Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))


def number(target: Target, row: str, column: Column) -> records.Number | None:
  """Returns the paper's number in a cell; None if it gives none."""
  table = numbers().get(target.name.removeprefix("table "), {})
  found = table.get(row, {}).get(column.head, {}).get(column.metric)
  return records.Number(found[0], found[1] if len(found) > 1 else None) if found else None
