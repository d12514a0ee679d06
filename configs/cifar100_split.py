r"""CIFAR100-Split: 10 tasks of 10 classes, LeNet (paper Table 2 and Table 8).

  python -m halrp_jax.main --config=configs/cifar100_split.py --config.data_dir=DIR \
      --workdir=RUN

The same with :stl after the config's name runs STL.

DIR holds cifar-100-binary/ or cifar-100-binary.tar.gz. The paper's ACC over five orders:
HALRP 67.92, STL 69.55. Ours: docs/results.md.
"""

from halrp_jax.config import make_config


def get_config(method: str = "halrp"):
  return cifar100_lenet(method, benchmark="cifar100_split")


def cifar100_lenet(method: str, benchmark: str):
  """Returns what CIFAR100-Split and CIFAR100-SuperClass have in common."""
  return make_config(
    method,
    benchmark=benchmark,
    order="A",
    network="lenet",
    epochs=20,
    batch_size=128,
    learning_rate=1e-3,
    # the authors' loader never shuffles these, and takes its fraction of a task's images together
    protocol={
      "shuffle": False,
      "schedule": "code",
      "validation_fraction": 0.2,
      "fraction_per_class": False,
    },
    every_method={"l2": 1e-4},
    methods_={
      "halrp": {
        "alpha": 0.9,
        "warmup_epochs": 1,
        "l1": 1e-4,
        "prune_bound": 0.2,
      },
    },
  )
