"""The AlexNet of the paper, for the Five-dataset (32 pixels) and TinyImageNet (64 pixels).

The layers are those of the authors' code. The network has 6,533,450 parameters for images of
32 x 32 pixels and 10 classes, 23,310,666 for 64 x 64 pixels and 10 classes, and 23,300,421 for
64 x 64 pixels and 5 classes. The paper's network evaluates BatchNorm with the statistics of the
test batch (`running=False`).
"""

import functools

import flax.linen as nn
import jax

from halrp_jax.nn import layers
from halrp_jax.nn.norm import BatchNorm
from halrp_jax.nn.pool import max_pool


class AlexNet(nn.Module):
  """AlexNet: three times conv-BN-ReLU-dropout-pool, twice dense-BN-ReLU-dropout, head."""

  num_classes: int
  channels: tuple[int, ...] = (64, 128, 256)
  kernels: tuple[int, ...] = (4, 3, 2)  # width of each convolution's window
  dropout: tuple[float, ...] = (0.2, 0.2, 0.5)  # rates after convolutions; 0.5 after dense layers
  hidden: tuple[int, ...] = (2048, 2048)
  running: bool = False  # whether BatchNorm evaluates with stored statistics
  axis_name: str | None = None  # jax.pmap axis over which a training batch is sharded
  dtype: jax.typing.DTypeLike | None = None  # of products and activations; None for float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits [B, num_classes] of images [B, H, W, C]."""
    norm = functools.partial(BatchNorm, self.running, axis_name=self.axis_name)
    blocks = zip(self.channels, self.kernels, self.dropout, strict=True)
    for i, (features, width, rate) in enumerate(blocks, 1):
      num_in = width**2 * x.shape[-1]
      x = layers.conv(features, width, padding=0, dtype=self.dtype, name=f"conv{i}")(x)
      x = norm(relu=True, num_in=num_in, name=f"bn{i}")(x, train)
      x = layers.Dropout(rate)(x, train)
      x = max_pool(x)
    x = x.reshape(x.shape[0], -1)
    for i, features in enumerate(self.hidden, 1):
      num_in = x.shape[-1]
      x = layers.dense(features, num_in, bias=False, dtype=self.dtype, name=f"fc{i}")(x)
      x = norm(relu=True, num_in=num_in, name=f"bn_fc{i}")(x, train)
      x = layers.Dropout(0.5)(x, train)
    return layers.dense(self.num_classes, x.shape[-1], name="head")(x)
