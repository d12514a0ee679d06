r"""IRU's own setting of PMNIST-20: the published notebook mlp_permuted_mnist.ipynb, MLP of 256.

The notebook: https://github.com/CSIPlab/task-increment-rank-update.

  python -m halrp_jax.main --config=configs/iru_pmnist20.py --config.data_dir=DIR --workdir=RUN

DIR holds mnist/ with the four idx files. Pixels from 0 to 255, no validation images, squared error
on the softmax, 500 epochs per task. ACC of the notebook 85.50, of its paper 85.60; not run by us.
"""

from halrp_jax.config import make_config


def get_config(method: str = "iru"):
  return make_config(
    method,
    benchmark="pmnist20",
    order="natural",
    network="mlp",
    epochs=500,
    batch_size=128,
    learning_rate=1e-4,
    protocol={
      "shuffle": True,
      "schedule": "constant",
      "gradient_scale": 1.0,
      "validation_fraction": 0.0,
    },
    data_={"normalise": False},
    methods_={
      "iru": {
        "first_factors": 11,
        "factors": 1,
        "start": "fresh",
        "loss": "mse",
        "first_rate": 0.1,
      },
      "halrp": {"importance_split": "train"},  # there are no validation images
    },
  )
