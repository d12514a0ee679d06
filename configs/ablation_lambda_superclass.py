r"""CIFAR100-SuperClass with other regularisation coefficients of HALRP (paper, Fig. 4).

  python -m halrp_jax.main --config=configs/ablation_lambda_superclass.py:1e-5_5e-4 \
      --config.data_dir=DIR --workdir=RUN

The text after the colon is lambda_0 (L1 on U and V) and lambda_1 (L2). The paper's grid is
{0, 1e-6, 1e-5, 1e-4, 1e-3} x {5e-5, 1e-4, 5e-4}. This command runs all of it:

  python -m halrp_jax reproduce --figure=4 --budget=small --data_dir=DIR --workdir=RUNS

All other keys are those of configs/cifar100_superclass.py. Expected: not run, except for
1e-4_1e-4, which is configs/cifar100_superclass.py itself. The paper gives no numbers.
"""

from halrp_jax.config import sibling

_superclass = sibling(__file__, "cifar100_superclass")
_lambdas = sibling(__file__, "ablation_lambda_split")


def get_config(setting: str = "1e-4_1e-4"):
  return _superclass.get_config(_lambdas.halrp_with(setting))
