r"""Five-dataset: CIFAR-10, MNIST, SVHN, FashionMNIST, notMNIST; ResNet18.

Paper Table 3b, Table 8.

  python -m halrp_jax.main --config=configs/five_datasets_resnet18.py \
      --config.data_dir=DIR --workdir=RUN

The method stands after the config's name: configs/five_datasets_resnet18.py:stl. DIR holds
cifar-10-batches-bin/, mnist/, svhn/, fashion_mnist/ and notMNIST_small/ (or their archives). The
paper's ACC over five orders: HALRP 93.39, STL 94.24. Ours: docs/results.md.
"""

from halrp_jax.config import make_config


def get_config(method: str = "halrp"):
  return make_config(
    method,
    benchmark="five_datasets",
    order="0",
    network="resnet18",
    epochs=12,
    batch_size=128,
    learning_rate=1e-3,
    protocol={
      "shuffle": True,
      "schedule": "code",
      "validation_fraction": 0.2,
      "last_batch": "drop",
    },
    every_method={"l2": 1e-4},
    methods_={
      "halrp": {
        "alpha": 0.95,
        "warmup_epochs": 3,
        "l1": 1e-6,
        "prune_bound": 0.6,
        "upper_rank": 120,
      },
      "prd": {"momentum": 0.0},  # the authors' scripts leave it out here
    },
  )
