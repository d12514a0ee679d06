r"""CIFAR100-Split with other regularisation of HALRP (paper Fig. 4).

  python -m halrp_jax.main --config=configs/ablation_lambda_split.py:1e-5_5e-4 \
      --config.data_dir=DIR --workdir=RUN

After the colon: lambda_0 (L1 on U and V) and lambda_1 (L2). The paper's grid is
{0, 1e-6, 1e-5, 1e-4, 1e-3} x {5e-5, 1e-4, 5e-4}:

  python -m halrp_jax reproduce --figure=4 --budget=small --data_dir=DIR --workdir=RUNS

Everything else is configs/cifar100_split.py's. The paper gives no numbers. Ours:
docs/reproduction.md.
"""

import pathlib
import re
import runpy

from halrp_jax.types import UserError

_base = runpy.run_path(str(pathlib.Path(__file__).with_name("cifar100_split.py")))["get_config"]
_NUMBER = r"(\d+(?:\.\d+)?(?:e-?\d+)?)"


def get_config(setting: str = "1e-4_1e-4"):
  config = _base("halrp")
  match = re.fullmatch(f"{_NUMBER}_{_NUMBER}", setting)
  if not match:
    raise UserError(f"{setting!r} is not LAMBDA0_LAMBDA1, such as 1e-5_5e-4")
  config.method.l1, config.method.l2 = float(match[1]), float(match[2])
  return config
