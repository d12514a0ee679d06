r"""CIFAR100-20: 20 tasks of 5 classes by chance, MLP of 256 (paper Table 4, the setting of IRU).

  python -m halrp_jax.main --config=configs/cifar100_20_mlp.py --config.data_dir=DIR --workdir=RUN

The method stands after the config's name: configs/cifar100_20_mlp.py:stl. DIR holds
cifar-100-binary/ or cifar-100-binary.tar.gz. The paper's ACC: HALRP 67.21, IRU 65.90. Ours:
docs/results.md.
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
    # the paper gives no hyper-parameters here: these are ours, after CIFAR100-SuperClass
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
