r"""CIFAR100-Split with HALRP's parts changed one by one (paper, Table 6).

  python -m halrp_jax.main --config=configs/ablation_table6.py:alpha0.75_warmup1 \
      --config.data_dir=DIR --workdir=RUN

The text after the colon is alphaX_warmupN for alpha = X and n_r = N warm-up epochs, lrp (ranks by
singular values alone) or random_lrp (random factors). This command runs all ten rows on 25 % of the
images and compares them with the paper's:

  python -m halrp_jax reproduce --table=6 --budget=small --data_dir=DIR --workdir=RUNS

All other keys are those of configs/cifar100_split.py. Expected: not run with these. With
method.batch_norm=batch and method.prune_scope=all, on 25 % of the images, order A and seed 0, on 2
cores of a CPU:

  alpha0.9_warmup1  ACC 58.50 %, growth 0.234, 221 s
  lrp               ACC 58.43 %, growth 0.234, 389 s
  random_lrp        ACC 31.49 %, growth 0.235, 139 s

The records are docs/records/table6_split25_A_*.json. docs/reproduction.md compares all ten rows
with the paper's.
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
    raise UserError(
      "config file: expected alphaX_warmupN, lrp or random_lrp after the colon, such as "
      f"alpha0.75_warmup1, got {setting!r}"
    )
  return _split.get_config(",".join(("halrp", chosen, *more)))
