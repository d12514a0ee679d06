r"""Your own images: a folder per task, an .npz file per task, or data sets of TFDS.

  python -m halrp_jax check_data --config=configs/custom.py --config.data_dir=DIR
  python -m halrp_jax.main --config=configs/custom.py --config.data_dir=DIR --workdir=RUN \
      [--config.network=resnet18] [--config.data.image_size=64]

DIR holds TASK/CLASS/IMAGE; or TASK/train/CLASS/IMAGE with TASK/val/... and TASK/test/...; or
TASK.npz. halrp_jax/data/custom.py describes all layouts. check_data prints what is read, converted,
left out, and wrong.

The hyper-parameters are those of configs/cifar100_split.py with shuffled images: a starting point
for your own. HALRP is the variant of docs/best.md. For many tasks give each of them the same
room, --config.method.task_bound=0.02. Expected ACC, growth and time depend on your images.
"""

from halrp_jax.config import make_config


def get_config(method: str = "halrp"):
  return make_config(
    method,
    benchmark="custom",
    order="natural",
    network="lenet",
    epochs=20,
    batch_size=32,
    learning_rate=1e-3,
    protocol={"shuffle": True, "schedule": "epoch", "validation_fraction": 0.2},
    every_method={"l2": 1e-4},
    methods_={
      "halrp": {
        "variant": "best",
        "alpha": 0.9,
        "warmup_epochs": 1,
        "l1": 1e-4,
        "prune_bound": 0.2,
      },
    },
  )
