"""The requirements of methods on a network: ours meet them, others get an error with the remedy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halrp_jax import methods, models
from halrp_jax.config import resolve
from halrp_jax.runs import experiment, pretrained
from halrp_jax.training import batches, contract, networks
from halrp_jax.types import Store, UserError
from halrp_jax.weights import perturb

SHAPE = (8, 8, 1)


class Net(nn.Module):
  """A network with one thing that is not as it should be."""

  fault: str = ""
  width: int = 10

  @nn.compact
  def __call__(self, x, train=False):
    kind = jnp.bfloat16 if self.fault == "bfloat16" else jnp.float32
    x = nn.relu(nn.Dense(16, name="a", param_dtype=kind)(x.reshape(x.shape[0], -1)))
    if self.fault == "own random numbers" and train:
      x += jax.random.normal(self.make_rng("noise"), x.shape)
    if self.fault == "normalised":
      x = nn.WeightNorm(nn.Dense(16, name="b"))(x)
    if self.fault == "stack":
      stack = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
      x = stack(16, name="b")(x[None])[0]
    y = nn.Dense(self.width, name="last" if self.fault == "no head" else "head")(x)
    return {"a tuple": (y, x), "more axes": y[:, None]}.get(self.fault, y)


class Deterministic(nn.Module):
  @nn.compact
  def __call__(self, x, deterministic=True):
    x = nn.Dense(16, name="a")(x.reshape(x.shape[0], -1))
    return nn.Dense(10, name="head")(nn.Dropout(0.1)(x, deterministic=deterministic))


class Subclass(Deterministic):
  """What the error advises."""

  @nn.compact
  def __call__(self, x, train=False):
    return super().__call__(x, deterministic=not train)


class WithAttention(nn.Module):
  num_classes: int = 10

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(16, (2, 2), (2, 2), name="patches")(x).reshape(x.shape[0], -1, 16)
    x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
    return nn.Dense(self.num_classes, name="head")(x.mean(1))


FAULTS = {
  "no head": r"Net has no layer 'head' \(its parts: a, last\): call its last layer nn.Dense",
  "a tuple": r"Net returns a tuple, expected one array .* perturb.select_output\(model, 0\); for 2 "
  r"images its outputs are '0' \(float32 \[2, 10\]\), '1' \(float32 \[2, 16\]\)",
  "more axes": r"Net returns float32 \[2, 1, 10\] for 2 images, expected float32 logits \[2, 10\]",
  "bfloat16": "parameter a/bias is bfloat16, expected float32: cast the parameters",
  "own random numbers": 'in training, with .* "dropout" alone can\'t be applied',
}


@pytest.fixture
def config(digits_config):
  return resolve(digits_config("halrp", train_fraction=0.1))


@pytest.mark.parametrize("network", sorted(models.NETWORKS))
def test_our_networks_meet_it_and_are_not_traced_for_it(network):
  model, shape = models.make(network, 10), (32, 32, 3)
  assert contract.is_own(model)
  variables = contract.check(model, shape, 10)
  if models.is_plain(model):
    contract.check_plain(model, variables, shape, "any")
  else:
    with pytest.raises(UserError, match="supports only Dense and ordinary 2-D Conv"):
      contract.check_plain(model, variables, shape, "any")
  found = contract._find_layers(model, variables, shape)
  guessed = contract.guessed_matrix_shapes(variables["params"])
  assert {name: layer.shape for name, layer in found.items()} == guessed


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["halrp", "stl"])
def test_a_network_that_does_not_meet_it_is_refused_with_the_remedy(fault, name, digits_config):
  config = resolve(digits_config(name))
  benchmark, _, _, _ = experiment.build(config)
  with pytest.raises(UserError, match=FAULTS[fault]):
    methods.make(config, Net(fault), benchmark)


def test_a_head_narrower_than_a_task_is_refused(config):
  benchmark, _, _, _ = experiment.build(config)
  with pytest.raises(UserError, match="has 4 outputs, and a task has 10 classes: it needs at"):
    methods.make(config, Net(width=4), benchmark)
  params, _ = networks.initialize(Net(width=4), jax.random.key(0), SHAPE)
  with pytest.raises(UserError, match="has 4 outputs"):
    pretrained.base_state(config.method, benchmark.tasks[0], params, {})


def test_a_network_that_is_not_told_whether_it_is_trained_is_refused(config):
  benchmark, _, _, _ = experiment.build(config)
  says = "Deterministic.__call__ takes no argument `train`.*deterministic=not train"
  for make in (
    lambda: methods.make(config, Deterministic(), benchmark),
    lambda: networks.head_network(Deterministic()),
    lambda: networks.initialize(Deterministic(), jax.random.key(0), SHAPE),
  ):
    with pytest.raises(UserError, match=says):
      make()
  contract.check(Subclass(), SHAPE, 10)
  with pytest.raises(UserError, match="Net is a class"):
    methods.make(config, Net, benchmark)


@pytest.mark.parametrize("name", ["halrp", "be", "gpm"])
@pytest.mark.parametrize("fault", ["normalised", "stack"])
def test_layers_that_a_method_can_not_compute_are_refused(name, fault, digits_config):
  config = resolve(digits_config(name))
  benchmark, _, _, _ = experiment.build(config)
  with pytest.raises(UserError, match="^b: "):
    methods.make(config, Net(fault), benchmark)


@pytest.mark.slow
def test_halrp_sees_attention_as_perturb_does(config):
  """[F, heads * dim], through base_state, ranks and merge."""
  benchmark, _, _, _ = experiment.build(config)
  first, second = benchmark.tasks[:2]
  model = WithAttention()
  method = methods.make(config, model, benchmark)
  params, stats = networks.initialize(model, jax.random.key(0), benchmark.image_shape)
  state = pretrained.base_state(config.method, first, params, stats, model)
  _, p, _ = perturb.init(
    jax.random.key(1), model, {"params": params}, jnp.zeros((1, *SHAPE)), rank=2
  )
  guessed = pretrained.base_state(config.method, first, params, stats).tasks[0].perturbation
  for name, q in p.items():
    for have in (state.tasks[0].perturbation[name], guessed[name]):
      assert (have.R.shape, have.S.shape) == (q.R.shape, q.S.shape)
  state, _ = method.learn(state, (second,), jax.random.key(1), Store("x", lambda e: None))
  image, _ = batches.load_batch(second.test, second.inputs, np.arange(8))
  merged, _ = method.network(method.served(state), state.tasks[1])
  np.testing.assert_allclose(
    method.predict(state, 1, image), model.apply({"params": merged}, image), atol=1e-4
  )


class Ambiguous(nn.Module):
  """Without a bias [4, 4, 16] may be a convolution's kernel or a DenseGeneral's."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.DenseGeneral(16, axis=(-2, -1), use_bias=False, name="a")(x.reshape(-1, 8, 8))
    return nn.Dense(10, name="head")(x)


def test_a_state_made_without_the_network_is_refused_where_it_guessed_wrong(config):
  benchmark, _, _, _ = experiment.build(config)
  first, second = benchmark.tasks[:2]
  model = Ambiguous()
  method = methods.make(config, model, benchmark)
  params, stats = networks.initialize(model, jax.random.key(0), SHAPE)
  state = pretrained.base_state(config.method, first, params, stats)
  with pytest.raises(UserError, match=r"a: .* \(8, 16\) there, the network \(64, 16\): give base"):
    method.learn(state, (second,), jax.random.key(1), Store("x", lambda e: None))
  state = pretrained.base_state(config.method, first, params, stats, model)
  assert state.tasks[0].perturbation["a"].S.shape == (64,)


def test_parameters_of_another_network_are_refused(config):
  benchmark, _, _, _ = experiment.build(config)
  params, _ = networks.initialize(Net(), jax.random.key(0), SHAPE)
  with pytest.raises(UserError, match=r"a/kernel: the network has \(64, 16\), the parameters \(3,"):
    wrong = params | {"a": {"kernel": jnp.ones((3, 16)), "bias": jnp.ones(16)}}
    pretrained.base_state(config.method, benchmark.tasks[0], wrong, {}, Net())
  with pytest.raises(UserError, match="a/bias is bfloat16"):
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    pretrained.base_state(config.method, benchmark.tasks[0], small, {})


def test_mtl_needs_to_widen_the_head(digits_config):
  config = resolve(digits_config("mtl"))
  benchmark, _, _, _ = experiment.build(config)
  with pytest.raises(UserError, match="mtl widens the head: Net needs a field num_classes"):
    methods.make(config, Net(), benchmark)
