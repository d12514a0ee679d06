"""Perturbs your own nnx model: a small vision transformer learns two tasks of handwritten digits.

  python examples/nnx_vit.py

The model is ordinary flax.nnx. Its weights are trained on the first task and then frozen. The
second task, digits with permuted rows, trains the factors <R, S, U, V> of the layers inside the
blocks, and the other parameters. At the end the factors are merged into an ordinary model. No data
files are needed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from halrp_jax.weights import perturb

NUM_TRAIN = 1297  # of 1797 images; the others are for testing


class Block(nnx.Module):
  """A block of attention and a two-layer perceptron, both with layer norm and a residual sum."""

  def __init__(self, features: int, num_heads: int, rngs: nnx.Rngs):
    self.norm1 = nnx.LayerNorm(features, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(num_heads, features, decode=False, rngs=rngs)
    self.norm2 = nnx.LayerNorm(features, rngs=rngs)
    self.fc1 = nnx.Linear(features, 2 * features, rngs=rngs)
    self.fc2 = nnx.Linear(2 * features, features, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the tokens [B, N, F] after attention and perceptron."""
    x = x + self.attention(self.norm1(x))
    return x + self.fc2(nnx.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nnx.Module):
  """A vision transformer: patches, position embeddings, blocks, mean over the tokens, head."""

  def __init__(self, num_classes: int, rngs: nnx.Rngs, features: int = 32, num_blocks: int = 2):
    self.patches = nnx.Conv(1, features, (2, 2), 2, padding="VALID", rngs=rngs)
    self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (16, features)))
    self.blocks = nnx.List([Block(features, 4, rngs) for _ in range(num_blocks)])
    self.norm = nnx.LayerNorm(features, rngs=rngs)
    self.head = nnx.Linear(features, num_classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the logits [B, num_classes] of images [B, 8, 8, 1]."""
    x = self.patches(x).reshape(x.shape[0], 16, -1) + self.positions[...][None]
    for block in self.blocks:
      x = block(x)
    return self.head(self.norm(x).mean(1))


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
  graph, base = nnx.split(VisionTransformer(10, nnx.Rngs(0)))

  def plain(state, image):
    return nnx.merge(graph, state)(image)

  def accuracy(state, image):
    logits = jax.jit(plain)(state, image[NUM_TRAIN:])
    return 100 * float(jnp.mean(jnp.argmax(logits, -1) == label[NUM_TRAIN:]))

  base = fit(plain, base, image[:NUM_TRAIN], label[:NUM_TRAIN], steps)
  model = nnx.merge(graph, base)
  kernels, perturbation, rest = perturb.init(jax.random.key(0), model, rank=4, pattern="blocks/*")

  def perturbed(params, image):
    return perturb.apply(model, kernels, params["perturbation"], params["rest"], image)

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
