"""A network that returns a tuple or a dict is used by one output, with its own parameters."""

import inspect
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from halrp_jax import methods
from halrp_jax.config import resolve
from halrp_jax.runs import experiment, pretrained
from halrp_jax.training import batches, networks
from halrp_jax.types import Store, UserError
from halrp_jax.weights import perturb


class Heads(NamedTuple):
  first: jax.Array
  second: jax.Array


def arranged(form, logits, features):
  """Returns the outputs in one of the forms that `PATHS` has."""
  return {
    "tuple": (features, logits),
    "dict": {"logits": logits, "features": features},
    "nested": {"features": features, "heads": [logits, 2 * logits]},
    "named": Heads(features, logits),
    "array": logits,
  }[form]


PATHS = {"tuple": 1, "dict": "logits", "nested": "heads/0", "named": "second"}
SAID = {
  "tuple": r"no output 'x'; it has '0' \(float32 \[3, 16\]\), '1' \(float32 \[3, 10\]\)",
  "dict": r"no output 'x'; it has 'features' \(float32 \[3, 16\]\), 'logits' \(float32 \[3, 10\]\)",
  "nested": r"no output 'x'; it has 'features' .*, 'heads/0' .*, 'heads/1' \(float32 \[3, 10\]\)",
  "named": r"no output 'x'; it has 'first' .*, 'second' \(float32 \[3, 10\]\)",
  "array": "Linen returns one array, there is nothing to select",
}


class Linen(nn.Module):
  form: str
  num_classes: int = 10

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(16, name="a")(x.reshape(x.shape[0], -1))
    x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
    return arranged(self.form, nn.Dense(self.num_classes, name="head")(x), x)


class WithSetup(nn.Module):
  form: str

  def setup(self):
    self.a, self.head = nn.Dense(16), nn.Dense(10)

  def __call__(self, x, train=False):
    x = nn.relu(self.a(x.reshape(x.shape[0], -1)))
    return arranged(self.form, self.head(x), x)


class Nnx(nnx.Module):
  def __init__(self, form, rngs):
    self.form = form
    self.a, self.head = nnx.Linear(64, 16, rngs=rngs), nnx.Linear(16, 10, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.a(x.reshape(x.shape[0], -1)))
    return arranged(self.form, self.head(x), x)


X = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)


def flat(tree):
  return jax.tree_util.tree_leaves_with_path(tree)


@pytest.mark.parametrize("form", PATHS)
@pytest.mark.parametrize("network", [Linen, WithSetup])
def test_a_linen_model_has_the_same_parameters_and_is_perturbed_by_its_output(network, form):
  model = network(form)
  chosen = perturb.select_output(model, PATHS[form])
  variables = model.init(jax.random.key(0), X)
  for (path, x), (other_path, y) in zip(
    flat(chosen.init(jax.random.key(0), X)), flat(variables), strict=True
  ):
    assert path == other_path
    np.testing.assert_array_equal(x, y)
  whole, array = network("array"), model.apply(variables, X)
  expected = whole.apply(variables, X)
  np.testing.assert_array_equal(chosen.apply(variables, X), expected)
  assert not hasattr(array, "shape"), "the given model is as it was"
  kernels, p, rest = perturb.init(jax.random.key(1), chosen, variables, X, rank=2)
  assert list(kernels) == ["a"]
  p = jax.tree.map(lambda x: x + 0.1, p)
  others = variables | {"params": rest}
  y = perturb.apply(chosen, kernels, p, others, X)
  merged = {**variables, "params": perturb.merge(kernels, p, rest)}
  np.testing.assert_allclose(y, whole.apply(merged, X), atol=1e-5)
  assert np.abs(y - expected).max() > 0.1


@pytest.mark.parametrize("form", PATHS)
def test_an_nnx_model_shares_its_variables_and_is_perturbed_by_its_output(form):
  model = Nnx(form, nnx.Rngs(0))
  chosen = perturb.select_output(model, PATHS[form])
  kernels, p, rest = perturb.init(jax.random.key(1), chosen, rank=2)
  assert list(kernels) == ["a"]
  p = jax.tree.map(lambda x: x + 0.1, p)
  y = perturb.apply(chosen, kernels, p, rest, X)
  nnx.update(model, perturb.merge(kernels, p, rest))
  model.form = "array"
  np.testing.assert_allclose(y, model(X), atol=1e-5)
  np.testing.assert_allclose(y, chosen(X), atol=1e-5)
  assert type(model) is Nnx and type(chosen) is not Nnx


@pytest.mark.parametrize("form", SAID)
def test_an_output_that_is_not_there_is_refused_with_those_that_are(form):
  model = perturb.select_output(Linen(form), "x")
  variables = Linen("array").init(jax.random.key(0), X)
  with pytest.raises(UserError, match=f"select_output: .*{SAID[form]}"):
    perturb.init(jax.random.key(0), model, variables, X, rank=1)
  chosen = perturb.select_output(Nnx("tuple", nnx.Rngs(0)), "x")
  kernels, p, rest = perturb.init(jax.random.key(0), chosen, rank=1)
  with pytest.raises(UserError, match=f"select_output: Nnx has {SAID['tuple']}"):
    perturb.apply(chosen, kernels, p, rest, X)


@pytest.mark.parametrize("model", [Linen, Nnx, object(), nnx.State({})])
def test_only_an_instance_of_a_module_has_outputs(model):
  with pytest.raises(UserError, match="expected an instance of a Flax module, given"):
    perturb.select_output(model, 0)


def test_all_outputs_of_a_batch_of_several_tasks_come_back():
  model = WithSetup("dict")
  variables = model.init(jax.random.key(0), X)
  kernels, p, rest = perturb.init(jax.random.key(1), model, variables, X, rank=2)
  changed = jax.tree.map(lambda x: x + 0.1, p)
  many = perturb.stack([p, changed])
  others = {"params": jax.tree.map(lambda x: jnp.stack([x, x]), rest)}
  found = perturb.apply_many(model, kernels, many, others, np.array([0, 1, 0]), X)
  for i, own in enumerate([p, changed, p]):
    expected = perturb.apply(model, kernels, own, {"params": rest}, X)
    for name in ("logits", "features"):
      np.testing.assert_allclose(found[name][i], expected[name][i], atol=1e-5)


def test_halrp_learns_a_network_by_its_output_and_it_stays_the_users(digits_config):
  """With a base, BatchNorm's statistics, a merged network and a head that mtl can widen."""
  config = resolve(digits_config("halrp", train_fraction=0.1, epochs=2))
  benchmark, _, _, _ = experiment.build(config)
  model = perturb.select_output(Linen("nested"), "heads/0")
  assert list(inspect.signature(type(model).__call__).parameters) == ["self", "x", "train"]
  assert model.clone(num_classes=4).num_classes == 4
  with pytest.raises(UserError, match=r"choose it with perturb.select_output\(model, 'heads/0'\)"):
    methods.make(config, Linen("nested"), benchmark)
  first, second = benchmark.tasks[:2]
  method = methods.make(config, model, benchmark)
  params, stats = networks.initialize(model, jax.random.key(0), benchmark.image_shape)
  state = pretrained.base_state(config.method, first, params, stats, model)
  state, _ = method.learn(state, (second,), jax.random.key(1), Store("x", lambda e: None))
  image, _ = batches.load_batch(second.test, second.inputs, np.arange(8))
  merged, stats = method.network(method.served(state), state.tasks[1])
  y = Linen("array").apply({"params": merged, "batch_stats": stats}, image)
  np.testing.assert_allclose(method.predict(state, 1, image), y, atol=1e-4)
