r"""CIFAR100-Split with other regularisation coefficients of HALRP (paper, Fig. 4).

  python -m halrp_jax.main --config=configs/ablation_lambda_split.py:1e-5_5e-4 \
      --config.data_dir=DIR --workdir=RUN

The text after the colon is lambda_0 (L1 on U and V) and lambda_1 (L2). The paper's grid is
{0, 1e-6, 1e-5, 1e-4, 1e-3} x {5e-5, 1e-4, 5e-4}. This command runs all of it:

  python -m halrp_jax reproduce --figure=4 --budget=small --data_dir=DIR --workdir=RUNS

All other keys are those of configs/cifar100_split.py. Expected: not run, except for
1e-4_1e-4, which is configs/cifar100_split.py itself. The paper gives no numbers.
"""

import re

from halrp_jax.config import sibling
from halrp_jax.types import UserError

_split = sibling(__file__, "cifar100_split")
_NUMBER = r"(\d+(?:\.\d+)?(?:e-?\d+)?)"


def get_config(setting: str = "1e-4_1e-4"):
  return _split.get_config(halrp_with(setting))


def halrp_with(setting: str) -> str:
  """Turns LAMBDA0_LAMBDA1 into the method HALRP with its keys."""
  lambdas, *more = setting.split(",")
  match = re.fullmatch(f"{_NUMBER}_{_NUMBER}", lambdas)
  if not match:
    raise UserError(
      f"config file: expected LAMBDA0_LAMBDA1 after the colon, such as 1e-5_5e-4, got {setting!r}"
    )
  return ",".join(("halrp", f"l1={match[1]}", f"l2={match[2]}", *more))
