r"""CIFAR100-Split with HALRP's parts changed one by one (paper Table 6).

  python -m halrp_jax.main --config=configs/ablation_table6.py:alpha0.75_warmup1 \
      --config.data_dir=DIR --workdir=RUN

After the colon: alphaX_warmupN for alpha = X and n_r = N epochs, lrp (ranks by singular values
alone) or random_lrp (random factors). All ten rows at a quarter of the images, and how they
compare with the paper's:

  python -m halrp_jax reproduce --table=6 --budget=small --data_dir=DIR --workdir=RUNS

Everything else is configs/cifar100_split.py's. Ours: docs/reproduction.md.
"""

import pathlib
import re
import runpy

from halrp_jax.types import UserError

_base = runpy.run_path(str(pathlib.Path(__file__).with_name("cifar100_split.py")))["get_config"]


def get_config(setting: str = "alpha0.9_warmup1"):
  config = _base("halrp")
  match = re.fullmatch(r"alpha(0?\.\d+|1)_warmup(\d+)", setting)
  if match:
    config.method.alpha, config.method.warmup_epochs = float(match[1]), int(match[2])
  elif setting in ("lrp", "random_lrp"):
    config.method.rank_rule = setting.removesuffix("_lrp")
  else:
    raise UserError(f"{setting!r} is none of alphaX_warmupN, lrp, random_lrp")
  return config
