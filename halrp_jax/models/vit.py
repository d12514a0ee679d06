"""ViT, the vision transformer, in the sizes Ti, S and B.

With patches of 16 x 16 pixels, images of 224 x 224 and a head of 1,000 classes it has 5,717,416
(Ti), 22,050,664 (S) and 86,567,656 (B) parameters, as timm's `vit_*_patch16_224`. Position
embeddings are learned; `runs.convert` adapts them to images of another size.

Reference: https://arxiv.org/abs/2010.11929.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from halrp_jax.nn.conv import conv_general_dilated

_GELU = {"exact": functools.partial(nn.gelu, approximate=False), "tanh": nn.gelu}


class Block(nn.Module):
  """A transformer block: attention and a two-layer perceptron, both with residual sums."""

  num_heads: int
  gelu: str  # "exact", or "tanh" for the approximation by tanh
  dtype: jax.typing.DTypeLike | None = None  # of products and activations; None for float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the tokens [B, N, F] after the block."""
    features, dtype = x.shape[-1], self.dtype
    norm = functools.partial(nn.LayerNorm, dtype=dtype)
    attention = nn.MultiHeadDotProductAttention(self.num_heads, dtype=dtype, name="attention")
    x = x + attention(norm(name="norm1")(x))
    y = nn.Dense(4 * features, dtype=dtype, name="fc1")(norm(name="norm2")(x))
    return x + nn.Dense(features, dtype=dtype, name="fc2")(_GELU[self.gelu](y))


class ViT(nn.Module):
  """Vision transformer: patches, position embeddings, blocks, layer norm, head."""

  num_classes: int
  features: int = 192  # of a token
  num_heads: int = 3
  num_blocks: int = 12
  patch: int = 16  # height and width of a patch
  # what the head gets; token: the class token; mean: the mean over the other tokens, normalised
  # after it (timm); gap: without a class token, the mean, normalised before it (big_vision)
  pool: str = "token"
  gelu: str = "exact"  # "exact", or "tanh" for the approximation by tanh (big_vision)
  dropout: float = 0.0  # in front of the head
  dtype: jax.typing.DTypeLike | None = None  # of products and activations; None for float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits [B, num_classes] of images [B, H, W, C]; H and W are multiples of `patch`."""
    window = (self.patch, self.patch)
    x = nn.Conv(
      self.features,
      window,
      window,
      "VALID",
      dtype=self.dtype,
      conv_general_dilated=conv_general_dilated,
      name="patches",
    )(x)
    x = x.reshape(x.shape[0], -1, self.features)  # [B, N, F]
    if self.pool != "gap":
      token = self.param("token", nn.initializers.zeros, (self.features,))
      token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.features))
      x = jnp.concatenate([token, x], 1)
    positions = self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
    x = x + positions[None].astype(x.dtype)
    for i in range(self.num_blocks):
      x = Block(self.num_heads, self.gelu, self.dtype, name=f"block{i}")(x)
    norm = nn.LayerNorm(dtype=self.dtype, name="norm")
    if self.pool == "gap":
      x = norm(x).mean(1)
    else:
      x = norm(x[:, 0] if self.pool == "token" else x[:, 1:].mean(1))
    if self.dropout:
      x = nn.Dropout(self.dropout, name="dropout")(x, deterministic=not train)
    return nn.Dense(self.num_classes, name="head")(x.astype(jnp.float32))


def vit_ti(num_classes: int, features: int = 192, num_heads: int = 3, **options: Any) -> ViT:  # noqa: ANN401 (the fields of ViT)
  """Returns the ViT-Ti: 12 blocks of width 192 with 3 heads, patches of 16 x 16 pixels."""
  return ViT(num_classes, features, num_heads, **options)


def vit_s(num_classes: int, features: int = 384, num_heads: int = 6, **options: Any) -> ViT:  # noqa: ANN401
  """Returns the ViT-S: 12 blocks of width 384 with 6 heads, patches of 16 x 16 pixels."""
  return ViT(num_classes, features, num_heads, **options)


def vit_b(num_classes: int, features: int = 768, num_heads: int = 12, **options: Any) -> ViT:  # noqa: ANN401
  """Returns the ViT-B: 12 blocks of width 768 with 12 heads, patches of 16 x 16 pixels."""
  return ViT(num_classes, features, num_heads, **options)
