r"""CIFAR100-SuperClass: 20 tasks of 5 classes of CIFAR-100, LeNet (paper, Tables 2 and 8).

  python -m halrp_jax.main --config=configs/cifar100_superclass.py --config.data_dir=DIR \
      --workdir=RUN

Another method stands after the colon: --config=configs/cifar100_superclass.py:stl. DIR holds
cifar-100-binary/ or cifar-100-binary.tar.gz.

Expected for order A and seed 0, on 2 cores of a CPU:

  HALRP  ACC 61.93 %, growth 0.263, 1,967 s  docs/records/super100_A_population.json
  STL    ACC 64.31 %, growth 19,    1,143 s  docs/records/super100_A_stl_population.json

The paper's ACC, the mean over five orders: HALRP 62.56 %, STL 64.47 %.
"""

from halrp_jax.config import sibling

_split = sibling(__file__, "cifar100_split")


def get_config(method: str = "halrp"):
  return _split.cifar100_lenet(method, benchmark="cifar100_superclass")
