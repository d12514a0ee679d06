"""Perturbs your own model: a small vision transformer learns two tasks of handwritten digits.

  python examples/vision_transformer.py

The network is ordinary Flax and includes attention. Its weights are trained on the first task and
then frozen. The second task, digits with permuted rows, trains the factors <R, S, U, V> of the
layers inside the blocks, the layer norms and the head. At the end the factors are merged into
ordinary parameters. No data files are needed.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from halrp_jax.weights import perturb

NUM_TRAIN = 1297  # of 1797 images; the others are for testing


class Block(nn.Module):
  """A block of attention and a two-layer perceptron, both with layer norm and a residual sum."""

  num_heads: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the tokens [B, N, F] after attention and perceptron."""
    features = x.shape[-1]
    attention = nn.MultiHeadDotProductAttention(self.num_heads, name="attention")
    x = x + attention(nn.LayerNorm(name="norm1")(x))
    y = nn.gelu(nn.Dense(2 * features, name="fc1")(nn.LayerNorm(name="norm2")(x)))
    return x + nn.Dense(features, name="fc2")(y)


class VisionTransformer(nn.Module):
  """A vision transformer: patches, position embeddings, blocks, mean over the tokens, head."""

  num_classes: int
  patch: int = 2
  features: int = 32
  num_blocks: int = 2
  num_heads: int = 4

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns the logits [B, num_classes] of images [B, H, W, C]."""
    window = (self.patch, self.patch)
    x = nn.Conv(self.features, window, window, "VALID", name="patches")(x)
    x = x.reshape(x.shape[0], -1, self.features)  # [B, N, F]
    positions = self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
    x = x + positions[None]
    for i in range(self.num_blocks):
      x = Block(self.num_heads, name=f"block{i}")(x)
    return nn.Dense(self.num_classes, name="head")(nn.LayerNorm(name="norm")(x).mean(1))


def fit(logits_fn, params, image, label, steps: int, batch_size: int = 64):
  """Minimises the cross-entropy on random batches with Adam; returns the parameters.

  Args:
    logits_fn: (params, image [B, H, W, C]) -> logits [B, num_classes].
    params: the parameters to start from.
    image: training images [N, H, W, C].
    label: their classes, int [N].
    steps: number of optimizer steps.
    batch_size: images per step.
  """
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
  """Learns both tasks; prints and returns accuracies in percent, {what: accuracy}."""
  digits = load_digits()
  image = jnp.asarray(digits.images[..., None] / 16, jnp.float32)  # [1797, 8, 8, 1]
  label = jnp.asarray(digits.target)
  # Permuted rows change every patch of two rows, so the first task's weights do not fit.
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
