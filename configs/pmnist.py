"""P-MNIST: 10 permutations of MNIST, LeNet (paper, Tables 3a and 8).

  python -m halrp_jax.main --config=configs/pmnist.py --config.data_dir=DIR --workdir=RUN

Another method stands after the colon: --config=configs/pmnist.py:stl. DIR holds mnist/ with the
four idx files.

Expected: not run with these keys. With train_fraction=0.2, method.batch_norm=running and
method.prune_scope=all (HALRP alone), order 0 and seed 0, on a CPU with 4 cores:

  HALRP  ACC 96.54 %, growth 0.621, 909 s  docs/records/pmnist_fraction20_0.json
  STL    ACC 96.96 %, growth 9,     961 s  docs/records/pmnist_fraction20_0_stl.json

The paper's ACC, the mean over five orders: HALRP 98.10 %, STL 98.24 %.
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
      "prd": {"augment": "none"},  # cropping makes no sense for permuted pixels
    },
  )
