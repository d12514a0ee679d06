"""CIFAR100-Split: 10 tasks of 10 classes of CIFAR-100, LeNet (paper, Tables 2 and 8).

  python -m halrp_jax.main --config=configs/cifar100_split.py --config.data_dir=DIR --workdir=RUN

Another method stands after the colon: --config=configs/cifar100_split.py:stl. DIR holds
cifar-100-binary/ or cifar-100-binary.tar.gz.

Expected for order A and seed 0, on 2 cores of a CPU with other work beside:

  HALRP  ACC 67.68 %, growth 0.234, 1,662 s  docs/records/split100_A_population.json
  STL    ACC 69.70 %, growth 9,     1,036 s  docs/records/split100_A_stl_population.json

The paper's ACC, the mean over five orders: HALRP 67.92 %, STL 69.55 %.
"""

from halrp_jax.config import make_config


def get_config(method: str = "halrp"):
  return cifar100_lenet(method, benchmark="cifar100_split")


def cifar100_lenet(method: str, benchmark: str):
  """Returns the config of CIFAR100-Split or CIFAR100-SuperClass."""
  return make_config(
    method,
    benchmark=benchmark,
    order="A",
    network="lenet",
    epochs=20,
    batch_size=128,
    learning_rate=1e-3,
    # The authors' code does not shuffle these images, and takes train_fraction of all images of
    # a task together.
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
