"""The multi-layer perceptron of the paper's Table 4, which counts the head as the third layer."""

import flax.linen as nn
import jax

from halrp_jax.nn import layers


class MLP(nn.Module):
  """Multi-layer perceptron: twice dense-ReLU, head; no BatchNorm."""

  num_classes: int
  hidden: tuple[int, ...] = (256, 256)
  dtype: jax.typing.DTypeLike | None = None  # of products and activations; None for float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits [B, num_classes] of images [B, H, W, C]."""
    del train  # the network is the same in training and evaluation
    x = x.reshape(x.shape[0], -1)
    for i, features in enumerate(self.hidden, 1):
      x = nn.relu(layers.dense(features, x.shape[-1], dtype=self.dtype, name=f"fc{i}")(x))
    return layers.dense(self.num_classes, x.shape[-1], name="head")(x)
