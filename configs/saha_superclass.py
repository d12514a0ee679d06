r"""CIFAR100-SuperClass as in GPM's and WSN's papers: 20 tasks of 5 classes, their LeNet.

  python -m halrp_jax.main --config=configs/saha_superclass.py:wsn --config.data_dir=DIR \
      --workdir=RUN
  python -m halrp_jax.main --config=configs/saha_superclass.py:gpm --config.data_dir=DIR \
      --workdir=RUN

DIR holds cifar-100-binary/ or cifar-100-binary.tar.gz. Their papers' ACC: WSN with c = 0.5 61.79,
GPM 57.33. Ours: docs/results.md. The network has no BatchNorm and no biases (GPM's has local
response normalisation), 5 % of the training images validate, batches have 64 images, the learning
rate is halved where the validation loss stops falling, the weights of its lowest are kept.
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
