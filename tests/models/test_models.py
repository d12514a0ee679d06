import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from halrp_jax import models
from halrp_jax.training import losses, networks, sizes
from halrp_jax.types import UserError
from halrp_jax.weights import trees

from ..conftest import ROOT
from ..methods.test_networks_and_methods import SMALL


def count(name, num_classes, image_shape, statistics="own"):
  model = models.make(name, num_classes, statistics)
  return jax.eval_shape(lambda: networks.initialize(model, jax.random.key(0), image_shape))


def initialize(model, image_shape):
  """Returns parameters and statistics, compiled: one by one the layers' programs take longer."""
  return jax.jit(lambda key: networks.initialize(model, key, image_shape))(jax.random.key(0))


def size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def shapes(tree):
  return {path: x.shape for path, x in traverse_util.flatten_dict(tree).items()}


@pytest.mark.parametrize(("num_classes", "parameters"), [(10, 2_995_620), (5, 2_993_115)])
def test_lenet_has_the_parameters_of_the_paper(num_classes, parameters):
  params, stats = count("lenet", num_classes, (32, 32, 3))
  assert size(params) == parameters
  assert size(stats) == 2 * (20 + 50 + 800 + 500)
  kernels, rest = trees.split(params)
  assert size(kernels) == 2_986_500
  biases_and_batch_norm = sizes.count_rest(rest, kernels, num_classes)
  assert biases_and_batch_norm.biases == 1_370
  assert biases_and_batch_norm.counted == 2_740 + num_classes * 501


@pytest.mark.parametrize(
  ("name", "num_classes", "image_shape", "parameters", "num_perturbed"),
  [
    ("wide_lenet", 12, (32, 32, 1), 24_466_988, 4),
    ("saha_lenet", 10, (32, 32, 3), 2_991_500, 4),
    ("saha_lenet_without_lrn", 5, (32, 32, 3), 2_989_000, 4),
    ("alexnet", 10, (32, 32, 3), 6_533_450, 5),
    ("alexnet", 10, (64, 64, 3), 23_310_666, 5),
    ("alexnet", 5, (64, 64, 3), 23_300_421, 5),
    ("resnet18", 10, (32, 32, 3), 2_807_690, 20),
    ("resnet18", 10, (64, 64, 3), 2_838_410, 20),
    ("resnet18", 5, (64, 64, 3), 2_817_925, 20),
  ],
)
def test_the_networks_of_the_paper(name, num_classes, image_shape, parameters, num_perturbed):
  params, stats = count(name, num_classes, image_shape)
  assert size(params) == parameters
  assert len(trees.layer_names(params)) == num_perturbed
  assert bool(stats) == (name not in ("saha_lenet", "saha_lenet_without_lrn"))  # no BatchNorm


def test_dropout_is_active_in_training_alone():
  model = models.make("alexnet", 10).clone(**SMALL["alexnet"])
  params, stats = initialize(model, (32, 32, 3))
  x = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))

  @functools.partial(jax.jit, static_argnums=0)
  def run(train_mode, seed):
    return networks.apply_model(model, params, stats, x, train_mode, jax.random.key(seed))[0]

  assert (run(True, 0) != run(True, 1)).any()
  assert (run(False, 0) == run(False, 1)).all()


def test_batch_norm_is_chosen_when_the_model_is_made():
  assert models.make("wide_lenet", 12, "own").running
  assert not models.make("wide_lenet", 12, "batch").running
  assert models.make("lenet", 10, "own").running and models.make("lenet", 10, "running").running
  assert models.make("alexnet", 10, "population").running
  assert not models.make("alexnet", 10, "own").running
  model = models.make("lenet", 10, "batch")
  params, stats = count("lenet", 10, (32, 32, 3), "batch")
  assert size(stats) == 2_740 and size(params) == 2_995_620
  assert models.with_stored_statistics(model).running
  assert models.make("mlp", 10, "batch") == models.make("mlp", 10)


def test_mlp():
  params, stats = count("mlp", 10, (8, 8, 1))
  assert size(params) == 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10
  assert stats == {}


@pytest.mark.parametrize("name", sorted(models.NETWORKS))
def test_layers_with_a_kernel_are_perturbed_but_the_head(name):
  params, _ = count(name, 7, (32, 32, 3))
  names = trees.layer_names(params)
  assert names and "head" not in names
  flat = traverse_util.flatten_dict(params, sep="/")
  with_kernel = {path.removesuffix("/kernel") for path in flat if path.endswith("/kernel")}
  assert set(names) == with_kernel - {"head"}


@pytest.fixture(scope="module")
def plain_networks():
  """benchmarks/plain_networks.py: the same networks as a newcomer would write them."""
  path = ROOT / "benchmarks" / "plain_networks.py"
  spec = importlib.util.spec_from_file_location("plain_networks", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize(
  "name",
  ["lenet", "mlp"]
  + [pytest.param(n, marks=pytest.mark.slow) for n in ("alexnet", "resnet18", "wide_lenet")],
)
def test_ours_equal_the_plain_networks_in_losses_and_gradients(name, plain_networks):
  """Leaf by leaf over three steps of gradient descent. AlexNet's dropout draws other numbers, so
  that it is compared in evaluation, which normalises with the batch's statistics too."""
  channels = 1 if name == "wide_lenet" else 3
  ours, plain = models.make(name, 10), plain_networks.NETWORKS[name](10)
  x = jax.random.normal(jax.random.key(1), (8, 32, 32, channels))
  label = np.arange(8)
  if name.endswith("lenet"):  # the shapes of the whole network; the values of a small one
    whole, plain_whole = (
      jax.eval_shape(lambda m=m: initialize(m, x.shape[1:])[0]) for m in (ours, plain)
    )
    assert shapes(plain_networks.from_ours(whole)) == shapes(plain_whole)
    if name == "wide_lenet":  # the LeNet again but for its sizes
      return
    ours, plain = (m.clone(**SMALL[name]) for m in (ours, plain))
  params, stats = initialize(ours, x.shape[1:])
  _, plain_stats = initialize(plain, x.shape[1:])
  in_training = name != "alexnet"

  def loss(model, params, stats):
    variables = {"params": params, "batch_stats": stats}
    logits, _ = model.apply(variables, x, train=in_training, mutable=["batch_stats"])
    return losses.cross_entropy(logits, label, 10)

  ours_fn, plain_fn = (
    jax.jit(jax.value_and_grad(lambda p, m=m, s=s: loss(m, p, s)))
    for m, s in ((ours, stats), (plain, plain_stats))
  )
  for _ in range(3):
    got, gradient = ours_fn(params)
    want, plain_gradient = plain_fn(plain_networks.from_ours(params))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    flat = traverse_util.flatten_dict(plain_networks.from_ours(gradient), sep="/")
    plain_flat = traverse_util.flatten_dict(plain_gradient, sep="/")
    assert flat.keys() == plain_flat.keys()
    largest = max(np.abs(g).max() for g in plain_flat.values())
    for path, g in plain_flat.items():
      # by norms: rounding turns single ReLUs round, which moves single entries
      scale = max(np.linalg.norm(g), 1e-3 * largest * np.sqrt(g.size))
      assert np.linalg.norm(flat[path] - g) < 0.02 * scale, path
    params = jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(n, marks=[pytest.mark.slow] * (n not in ("lenet", "mlp")))
    for n in sorted(set(models.NETWORKS) - {"wide_lenet"})
  ],
)
def test_bfloat16_is_of_products_and_activations_alone(name):
  """Parameters, their gradients, statistics and logits are float32 and near those of float32."""
  sizes = SMALL.get(name, {})
  exact = models.make(name, 3, "running").clone(**sizes)
  rough = models.make(name, 3, "running", "bfloat16").clone(**sizes)
  x = jax.random.normal(jax.random.key(1), (32, 32, 32, 3))
  params, stats = initialize(rough, (32, 32, 3))
  assert {x.dtype for x in jax.tree.leaves((params, stats))} == {jnp.dtype("float32")}

  def loss(params, model):
    logits, new = networks.apply_model(model, params, stats, x, True, jax.random.key(2))
    assert logits.dtype == jnp.float32
    return losses.cross_entropy(logits, jnp.arange(32) % 3, jnp.int32(3)), new

  gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
  ((want, _), grad), ((got, new), rough_grad) = (gradient(params, m) for m in (exact, rough))
  np.testing.assert_allclose(got, want, rtol=0.03)
  assert {x.dtype for x in jax.tree.leaves((rough_grad, new))} == {jnp.dtype("float32")}
  g, other = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (grad, rough_grad))
  assert jnp.vdot(g, other) > 0.9 * jnp.linalg.norm(g) * jnp.linalg.norm(other)
  products = [
    eqn.outvars[0].aval
    for eqn in jax.make_jaxpr(lambda p: rough.apply({"params": p, "batch_stats": stats}, x))(
      params
    ).eqns
    if eqn.primitive.name in ("dot_general", "conv_general_dilated")
  ]
  assert [a.dtype for a in products if a.shape != (32, 3)] == [jnp.bfloat16] * (len(products) - 1)


@pytest.mark.parametrize(
  ("text", "says"),
  [
    ("lenett", r"network must be one of .*, got 'lenett' \(did you mean lenet\?\)"),
    ("vit_s16,patch=x", "patch must be a whole number > 0, got 'x'"),
    ("vit_s16,pool=sum", "pool must be one of token, mean, gap, got 'sum'"),
    ("vit_s16,patch=8,patch=16", "patch is given twice"),
    ("vit_s16,num_heads=5", "features = 384 is no multiple of num_heads = 5"),
    ("saha_lenet,lrn=false", "'lrn=false' is no OPTION=VALUE"),
    ("vit_s16,dropout=1.5", "dropout must be a number >= 0 and < 1"),
    ("efficientnet_lite0,padding=same", "padding must be one of tensorflow, even"),
  ],
)
def test_wrong_options_of_a_network_are_named(text, says):
  with pytest.raises(UserError, match=says):
    models.parse(text)


def test_options_are_fields_of_the_network():
  model = models.make("vit_s16,patch=32,pool=gap,dropout=0.1", 3)
  assert (model.patch, model.pool, model.dropout, model.features) == (32, "gap", 0.1, 384)
  with pytest.raises(UserError, match="set data.image_size to a multiple of 32"):
    models.require_image_shape(model, (48, 64, 3))
