r"""Your own images on a pretrained network: a folder or an .npz file per task.

  python -m halrp_jax.main --config=configs/pretrained.py --config.base=FILE --config.data_dir=DIR \
      --workdir=RUN [--config.network=vit_s16] [--config.data.image_size=224]

FILE holds the parameters of an EfficientNet-Lite0, a ResNet-50 or a ViT with the names of timm,
torchvision or big_vision (docs/pretrained.md, also for --config.base_source). DIR is as for
configs/custom.py.

The base stays the published one (base_training=perturb): every task stores what it adds. The
hyper-parameters are a starting point. Expected ACC, growth and time depend on your images.
"""

from halrp_jax.config import sibling


def get_config(method: str = "halrp"):
  file = sibling(__file__, "cifar100_split_pretrained")
  return file.pretrained(method, benchmark="custom", order="natural", image_size=96, batch_size=32)
