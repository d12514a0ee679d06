r"""CIFAR100-Split with HALRP's parts changed one by one (paper Table 6).

  python -m halrp_jax.main --config=configs/ablation_table6.py:alpha0.75_warmup1 \
      --config.data_dir=DIR --workdir=RUN

After the colon: alphaX_warmupN for alpha = X and n_r = N epochs, lrp (ranks by singular values
alone) or random_lrp (random factors). All ten rows at a quarter of the images, and how they
compare with the paper's:

  python -m halrp_jax reproduce --table=6 --budget=small --data_dir=DIR --workdir=RUNS

Everything else is configs/cifar100_split.py's. Ours: docs/reproduction.md.
"""

import re

from halrp_jax.config import sibling
from halrp_jax.types import UserError

_split = sibling(__file__, "cifar100_split")


def get_config(setting: str = "alpha0.9_warmup1"):
  row, *more = setting.split(",")
  if match := re.fullmatch(r"alpha(0?\.\d+|1)_warmup(\d+)", row):
    chosen = f"alpha={match[1]},warmup_epochs={match[2]}"
  elif row in ("lrp", "random_lrp"):
    chosen = f"rank_rule={row.removesuffix('_lrp')}"
  else:
    raise UserError(f"{setting!r} is none of alphaX_warmupN, lrp, random_lrp")
  return _split.get_config(",".join(("halrp", chosen, *more)))
