"""CIFAR100-20: 20 tasks of 5 random classes of CIFAR-100, MLP of width 256 (paper, Table 4).

  python -m halrp_jax.main --config=configs/cifar100_20_mlp.py --config.data_dir=DIR --workdir=RUN

Another method stands after the colon: --config=configs/cifar100_20_mlp.py:stl. DIR holds
cifar-100-binary/ or cifar-100-binary.tar.gz. The setting is that of the IRU paper (arXiv
2207.09074).

Expected: not run. The paper's ACC: HALRP 67.21 %, IRU 65.90 %.
"""

from halrp_jax.config import make_config


def get_config(method: str = "halrp"):
  return make_config(
    method,
    benchmark="cifar100_20",
    order="0",
    network="mlp",
    epochs=20,
    batch_size=128,
    learning_rate=1e-3,
    # The paper gives no hyper-parameters for this setting. These follow CIFAR100-SuperClass.
    protocol={"shuffle": True, "schedule": "epoch", "validation_fraction": 0.2},
    every_method={"l2": 1e-4},
    methods_={
      "halrp": {
        "alpha": 0.9,
        "warmup_epochs": 1,
        "l1": 1e-4,
        "prune_bound": 0.6,
      },
    },
  )
