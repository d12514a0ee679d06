r"""CIFAR100-SuperClass: 20 tasks of 5 classes, LeNet (paper Table 2 and Table 8).

  python -m halrp_jax.main --config=configs/cifar100_superclass.py --config.data_dir=DIR \
      --workdir=RUN

The same with :stl after the config's name runs STL.

DIR holds cifar-100-binary/ or cifar-100-binary.tar.gz. The paper's ACC over five orders:
HALRP 62.56, STL 64.47. Ours: docs/results.md.
"""

from halrp_jax.config import sibling

_split = sibling(__file__, "cifar100_split")


def get_config(method: str = "halrp"):
  return _split.cifar100_lenet(method, benchmark="cifar100_superclass")
