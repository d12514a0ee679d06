r"""CIFAR100-SuperClass as in the GPM and WSN papers: 20 tasks of 5 classes, their LeNet.

  python -m halrp_jax.main --config=configs/saha_superclass.py:wsn --config.data_dir=DIR \
      --workdir=RUN
  python -m halrp_jax.main --config=configs/saha_superclass.py:gpm --config.data_dir=DIR \
      --workdir=RUN

DIR holds cifar-100-binary/ or cifar-100-binary.tar.gz. The network has neither BatchNorm nor
biases; with GPM it has local response normalisation. 5 % of the training images are held out for
validation, and batches have 64 images. The learning rate is halved when the validation loss stops
falling, and the weights with the lowest validation loss are used.

Expected for order A and seed 0, on 2 cores of a CPU:

  WSN  ACC 64.95 %, growth 0.640, 4,275 s  docs/records/saha_wsn.json
  GPM  ACC 58.21 %, growth 0.016, 6,681 s  docs/records/saha_gpm.json

ACC in their papers: WSN with c = 0.5 61.79 %, GPM 57.33 %.
"""

from halrp_jax.config import make_config, parse


def get_config(method: str = "wsn"):
  return make_config(
    method,
    benchmark="cifar100_superclass",
    order="A",
    network="saha_lenet" if parse(method)[0] == "gpm" else "saha_lenet_without_lrn",
    epochs=50,
    batch_size=64,
    learning_rate=1e-3,
    protocol={
      "gradient_scale": 1.0,
      "schedule": "plateau",
      "keep": "best_loss",
      "validation_fraction": 0.05,
    },
    methods_={
      "wsn": {"share": 0.5},
      "gpm": {
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "threshold": 0.98,
        "threshold_step": 0.001,
      },
    },
  )
