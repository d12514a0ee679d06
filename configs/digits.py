"""Permuted digits: 10 tasks of 8 x 8 handwritten digits with permuted pixels, MLP.

  python -m halrp_jax.main --config=configs/digits.py --workdir=runs/digits-halrp
  python -m halrp_jax.main --config=configs/digits.py:stl --workdir=runs/digits-stl

No data files are needed: scikit-learn contains the images.

Expected for order 0 and seed 0, on 2 cores of a CPU, where both runs together take 27 s (no record
in docs/records/; `make demo` runs both):

  HALRP  ACC 93.20 %, growth 0.600 (method.variant=published: 92.26 %, 0.774)
  STL    ACC 93.48 %, growth 9
"""

from halrp_jax.config import make_config


def get_config(method: str = "halrp"):
  return make_config(
    method,
    benchmark="digits",
    order="0",
    network="mlp",
    epochs=30,
    batch_size=32,
    learning_rate=1e-3,
    protocol={"shuffle": True, "schedule": "epoch", "validation_fraction": 0.2},
    every_method={"l2": 1e-4},
    methods_={
      "halrp": {
        "variant": "best",  # docs/best.md
        "alpha": 0.9,
        "warmup_epochs": 3,
        "l1": 1e-5,
        "prune_bound": 0.6,
      },
      "prd": {"augment": "none"},  # cropping makes no sense for permuted pixels
    },
  )
