"""Multi-layer perceptron: two hidden layers of 256 (paper Table 4 counts the head as the third)."""

import flax.linen as nn
import jax

from halrp_jax.nn import layers


class MLP(nn.Module):
  """Multi-layer perceptron: dense-ReLU twice, head; no BatchNorm."""

  num_classes: int
  hidden: tuple[int, ...] = (256, 256)
  dtype: jax.typing.DTypeLike | None = None  # of products and activations; None: float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[B, H, W, C] -> logits [B, num_classes]"""
    del train  # nothing here behaves differently in training
    x = x.reshape(x.shape[0], -1)
    for i, features in enumerate(self.hidden, 1):
      x = nn.relu(layers.dense(features, x.shape[-1], dtype=self.dtype, name=f"fc{i}")(x))
    return layers.dense(self.num_classes, x.shape[-1], name="head")(x)
