"""nnx models are perturbed as Linen's are: the same numbers, kernels frozen, merged or not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from halrp_jax.types import UserError
from halrp_jax.weights import perturb


class Block(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
    self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)])
    self.head = nnx.Linear(8, 5, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.conv(x))).reshape(x.shape[0], -1, 8)
    x = x + self.attention(x)
    for layer in self.layers:
      x = jnp.tanh(layer(x))
    return self.head(x.mean(1))


class LinenBlock(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(8, (3, 3), 2, name="conv")(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
    x = x.reshape(x.shape[0], -1, 8)
    x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x)
    for i in range(2):
      x = jnp.tanh(nn.Dense(8, name=f"layers_{i}")(x))
    return nn.Dense(5, name="head")(x.mean(1))


LAYERS = [
  *(f"attention/{n}" for n in ("key", "out", "query", "value")),
  "conv",
  "layers/0",
  "layers/1",
]


@pytest.fixture(scope="module")
def model():
  model = Block(nnx.Rngs(0))
  model.eval()
  return model


@pytest.fixture(scope="module")
def image():
  return np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)


def changed(perturbation):
  """Returns perturbations of which every part changes the output."""
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32) / 4, perturbation)


def test_it_starts_as_the_model_and_merges_to_what_it_computes(model, image):
  kernels, perturbation, rest = perturb.init(jax.random.key(0), model, rank=2)
  assert list(kernels) == LAYERS
  np.testing.assert_allclose(
    perturb.apply(model, kernels, perturbation, rest, image), model(image), atol=1e-6
  )
  p = changed(perturbation)
  y = perturb.apply(model, kernels, p, rest, image)
  assert not np.allclose(y, model(image), atol=0.1)
  merged = nnx.clone(model)
  nnx.update(merged, perturb.merge(kernels, p, rest))
  np.testing.assert_allclose(merged(image), y, atol=1e-6)


def test_the_numbers_are_linens(model, image):
  kernels, perturbation, rest = perturb.init(jax.random.key(0), model, rank=2)
  p = changed(perturbation)
  network = LinenBlock()
  variables = network.init(jax.random.key(0), image)
  flat = {
    ("layers_" + "".join(map(str, path[1:2])), *path[2:]) if path[0] == "layers" else path: x[...]
    for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: flat[tuple(k.key for k in path)], variables["params"]
  )
  names = {n: n.replace("layers/", "layers_") for n in kernels}
  own, _, others = perturb.init(
    jax.random.key(0), network, variables | {"params": params}, image, rank=2
  )
  for n, kernel in kernels.items():
    np.testing.assert_array_equal(own[names[n]], kernel)
  want = perturb.apply(
    network, own, {names[n]: q for n, q in p.items()}, variables | {"params": others}, image
  )
  np.testing.assert_allclose(perturb.apply(model, kernels, p, rest, image), want, atol=1e-5)


def test_gradients_reach_the_perturbation_and_statistics_come_back(model, image):
  kernels, perturbation, rest = perturb.init(
    jax.random.key(0), model, rank=2, pattern="attention/*"
  )
  training = nnx.clone(model)
  training.train()

  @jax.jit
  def loss(perturbation, rest):
    y, rest = perturb.apply(training, kernels, perturbation, rest, image, mutable=True)
    return jnp.sum(y**2), rest

  (_, new), gradient = jax.value_and_grad(loss, has_aux=True)(changed(perturbation), rest)
  assert all(np.any(x) for x in jax.tree.leaves(gradient))
  assert jax.tree.structure(new) == jax.tree.structure(rest)
  before, after = (dict(nnx.to_flat_state(s))["norm", "mean"][...] for s in (rest, new))
  assert not np.allclose(before, after)


def test_neither_model_nor_rest_is_changed_by_a_call(model, image):
  training = nnx.clone(model)
  training.train()
  kernels, perturbation, rest = perturb.init(jax.random.key(0), training, rank=2)
  before = jax.tree.map(np.array, (rest, nnx.state(training)))
  perturb.apply(training, kernels, perturbation, rest, image)
  merged = perturb.merge(kernels, changed(perturbation), rest)
  nnx.update(training, jax.tree.map(lambda x: x + 1, merged))
  jax.tree.map(np.testing.assert_array_equal, rest, before[0])


class Tied(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(4, 4, rngs=rngs)
    self._second = nnx.Linear(4, 4, rngs=rngs)
    self._second.kernel = self.first.kernel


class Shared(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(4, 4, rngs=rngs)
    self.second = self.first
    self.other = nnx.Linear(4, 4, rngs=rngs)


class Stacked(nnx.Module):
  def __init__(self, rngs):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
      return nnx.Linear(4, 4, rngs=rngs)

    self.blocks = make(rngs)


@pytest.mark.parametrize(
  ("build", "said"),
  [
    (Shared, "first: the same layer is also second; shared layers are not perturbed"),
    (Tied, "its kernel is also that of another layer"),
    (Stacked, "blocks: its kernel has 3 axes, expected 2: layers that are stacked"),
    (lambda rngs: nnx.LayerNorm(4, rngs=rngs), "no layer's path matches"),
    (lambda rngs: nnx.Linear(4, 4, rngs=rngs), "no layer's path matches"),
  ],
)
def test_layers_that_can_not_be_perturbed_are_refused_by_name(build, said):
  with pytest.raises(UserError, match=said):
    perturb.init(jax.random.key(0), build(nnx.Rngs(0)), rank=1)
  if build is Shared:
    kernels, _, _ = perturb.init(jax.random.key(0), build(nnx.Rngs(0)), rank=1, pattern="other")
    assert list(kernels) == ["other"]
