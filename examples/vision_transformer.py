"""Your own model: a small vision transformer learns digits, then permuted ones by perturbations.

  python examples/vision_transformer.py

The network, attention included, is ordinary Flax. Its weights are trained on the first task and
frozen; the second task trains <R, S, U, V> of the layers inside the blocks, layer norms and head,
and is merged into ordinary parameters. Needs no files.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from halrp_jax.weights import perturb

NUM_TRAIN = 1297


class Block(nn.Module):
  """Attention and a two-layer perceptron, each on normalised inputs and added to them."""

  num_heads: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, N, F] -> [B, N, F]"""
    features = x.shape[-1]
    attention = nn.MultiHeadDotProductAttention(self.num_heads, name="attention")
    x = x + attention(nn.LayerNorm(name="norm1")(x))
    y = nn.gelu(nn.Dense(2 * features, name="fc1")(nn.LayerNorm(name="norm2")(x)))
    return x + nn.Dense(features, name="fc2")(y)


class VisionTransformer(nn.Module):
  """Patches, positions, blocks, mean over the places, head."""

  num_classes: int
  patch: int = 2
  features: int = 32
  num_blocks: int = 2
  num_heads: int = 4

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[B, H, W, C] -> logits [B, num_classes]"""
    window = (self.patch, self.patch)
    x = nn.Conv(self.features, window, window, "VALID", name="patches")(x)
    x = x.reshape(x.shape[0], -1, self.features)  # [B, N, F]
    places = self.param("places", nn.initializers.normal(0.02), x.shape[1:])
    x = x + places[None]
    for i in range(self.num_blocks):
      x = Block(self.num_heads, name=f"block{i}")(x)
    return nn.Dense(self.num_classes, name="head")(nn.LayerNorm(name="norm")(x).mean(1))


def fit(logits_fn, params, image, label, steps: int, batch_size: int = 64):
  """Adam on the cross-entropy of random batches."""
  tx = optax.adam(3e-3)

  @jax.jit
  def step(params, opt_state, rows):
    def loss_fn(params):
      logits = logits_fn(params, image[rows])
      return optax.softmax_cross_entropy_with_integer_labels(logits, label[rows]).mean()

    updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state)
    return optax.apply_updates(params, updates), opt_state

  opt_state, rng = tx.init(params), np.random.default_rng(0)
  for _ in range(steps):
    params, opt_state = step(params, opt_state, rng.integers(0, len(label), batch_size))
  return params


def main(steps: int = 300) -> dict[str, float]:
  """-> accuracies in percent"""
  digits = load_digits()
  image = jnp.asarray(digits.images[..., None] / 16, jnp.float32)  # [1797, 8, 8, 1]
  label = jnp.asarray(digits.target)
  # whole rows change places, which a transformer on patches of two rows can't read off
  turned = image[:, np.random.default_rng(1).permutation(8)]
  model = VisionTransformer(num_classes=10)

  def accuracy(params, image):
    logits = jax.jit(model.apply)({"params": params}, image[NUM_TRAIN:])
    return 100 * float(jnp.mean(jnp.argmax(logits, -1) == label[NUM_TRAIN:]))

  def plain(params, image):
    return model.apply({"params": params}, image)

  init_key, v_key = jax.random.split(jax.random.key(0))
  base = model.init(init_key, image[:1])["params"]
  base = fit(plain, base, image[:NUM_TRAIN], label[:NUM_TRAIN], steps)

  kernels, perturbation, rest = perturb.init(
    v_key, model, {"params": base}, image[:1], rank=4, pattern="block*"
  )

  def perturbed(params, image):
    return perturb.apply(model, kernels, params["perturbation"], {"params": params["rest"]}, image)

  start = {"perturbation": perturbation, "rest": rest}
  learned = fit(perturbed, start, turned[:NUM_TRAIN], label[:NUM_TRAIN], steps)
  merged = perturb.merge(kernels, learned["perturbation"], learned["rest"])
  added = sum(x.size for x in jax.tree.leaves(learned["perturbation"]))
  results = {
    "first task": accuracy(base, image),
    "second task by the first's weights": accuracy(base, turned),
    "second task": accuracy(merged, turned),
  }
  for name, value in results.items():
    print(f"{name}: {value:.1f} %")
  print(f"perturbed: {', '.join(kernels)}")
  print(f"{added:,} numbers perturb {sum(w.size for w in kernels.values()):,}")
  return results


if __name__ == "__main__":
  main()
