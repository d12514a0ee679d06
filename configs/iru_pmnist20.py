"""PMNIST-20 in the setting of IRU's published notebook: 20 permutations of MNIST, MLP of width 256.

The notebook is mlp_permuted_mnist.ipynb of https://github.com/CSIPlab/task-increment-rank-update.

  python -m halrp_jax.main --config=configs/iru_pmnist20.py --config.data_dir=DIR --workdir=RUN

DIR holds mnist/ with the four idx files. Pixels are from 0 to 255, there are no validation images,
the loss is the squared error of the softmax, and each task is trained for 500 epochs.

Expected: not run with 20 tasks of 500 epochs. For seed 0, on 2 cores of a CPU:

  order=0,1  ACC 87.76 %, growth -0.910, 2,739 s  docs/records/iru_pmnist20_two_tasks.json
  epochs=10  ACC 70.71 %, growth -0.631,   405 s  docs/records/iru_pmnist20_epochs10.json

ACC of the notebook: 85.50 %, of IRU's paper: 85.60 %.
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
      "halrp": {"importance_split": "train"},  # because there are no validation images
    },
  )
