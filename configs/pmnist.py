r"""P-MNIST: 10 permutations of MNIST, LeNet (paper Table 3a and Table 8).

  python -m halrp_jax.main --config=configs/pmnist.py --config.data_dir=DIR --workdir=RUN

The method stands after the config's name: configs/pmnist.py:stl. DIR holds mnist/ with the four idx
files. The paper's ACC over five orders: HALRP 98.10, STL 98.24. Ours: docs/results.md.
"""

from halrp_jax.config import make_config


def get_config(method: str = "halrp"):
  return make_config(
    method,
    benchmark="pmnist",
    order="0",
    network="lenet",
    epochs=12,
    batch_size=128,
    learning_rate=1e-3,
    protocol={
      "shuffle": True,
      "schedule": "code",
      "validation_fraction": 0.2,
      "last_batch": "drop",
    },
    every_method={"l2": 1e-3},
    methods_={
      "halrp": {
        "alpha": 0.9,
        "warmup_epochs": 1,
        "l1": 1e-6,
        "prune_bound": 0.6,
      },
      "prd": {"augment": "none"},  # permuted pixels have no neighbours
    },
  )
