r"""PMNIST-20: 20 permutations of MNIST, MLP of 256 (paper Table 4, the setting of IRU).

  python -m halrp_jax.main --config=configs/pmnist20_mlp.py --config.data_dir=DIR --workdir=RUN

The method stands after the config's name: configs/pmnist20_mlp.py:stl. DIR holds mnist/ with the
four idx files. The paper's ACC: HALRP 92.02, IRU 85.60. Ours: docs/results.md.
"""

from halrp_jax.config import make_config


def get_config(method: str = "halrp"):
  return make_config(
    method,
    benchmark="pmnist20",
    order="0",
    network="mlp",
    epochs=12,
    batch_size=128,
    learning_rate=1e-3,
    # the paper gives no hyper-parameters for this setting: these are ours, after P-MNIST
    protocol={
      "shuffle": True,
      "schedule": "epoch",
      "validation_fraction": 0.2,
      "last_batch": "drop",
    },
    every_method={"l2": 1e-4},
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
