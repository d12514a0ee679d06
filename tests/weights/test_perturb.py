import functools
import importlib.util

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import halrp_jax
from halrp_jax import data, methods, models
from halrp_jax.config import resolve
from halrp_jax.training import losses, networks
from halrp_jax.training.fit import make_fit
from halrp_jax.types import Store, UserError
from halrp_jax.weights import lowrank, perturb, taps, trees

from ..conftest import ROOT
from ..methods.test_networks_and_methods import SMALL

FORMS = ("composed", "factored", "auto")


def random_perturbation(key, kernel, columns, fold):
  num_in, num_out = kernel.shape[-2:]
  k = jax.random.split(key, 5)
  return lowrank.Perturbation(
    R=1 + 0.1 * jax.random.normal(k[0], (num_out,)),
    S=1 + 0.1 * jax.random.normal(k[1], (num_in,)),
    U=0.1 * jax.random.normal(k[2], (num_out, columns)),
    sigma=None if fold else jax.random.uniform(k[3], (columns,)),
    V=0.1 * jax.random.normal(k[4], (num_in, columns)),
  )


def perturbed(model, x, fold=True, columns=2, **kwargs):
  """(kernels, perturbation, rest, stats) of a freshly initialised model."""

  @jax.jit
  def make(x):
    variables = model.init(jax.random.key(0), x, **kwargs)
    kernels, rest = trees.split(variables["params"])
    p = {
      name: random_perturbation(jax.random.fold_in(jax.random.key(1), i), w, columns, fold)
      for i, (name, w) in enumerate(kernels.items())
    }
    return kernels, p, rest, variables.get("batch_stats", {})

  return make(x)


class OneConv(nn.Module):
  arguments: dict

  @nn.compact
  def __call__(self, x):
    return nn.Conv(5, name="conv", **self.arguments)(x)


CONVOLUTIONS = [
  {"kernel_size": (5, 5), "padding": 2},
  {"kernel_size": (3, 3), "padding": 1},
  {"kernel_size": (3, 3), "padding": 1, "strides": (2, 2)},
  {"kernel_size": (1, 1), "strides": (2, 2)},
  {"kernel_size": (4, 4), "padding": "VALID"},
  {"kernel_size": (2, 3), "padding": "SAME", "use_bias": False},
  {"kernel_size": (3, 3), "kernel_dilation": (2, 2)},
]


@pytest.mark.parametrize(
  ("arguments", "fold"),
  [
    pytest.param(arguments, fold, marks=[pytest.mark.slow] * (not fold and i != 2))
    for fold in (True, False)
    for i, arguments in enumerate(CONVOLUTIONS)
  ],
)
def test_a_convolution_composed_equals_factored(arguments, fold):
  model = OneConv(arguments)
  x = jax.random.normal(jax.random.key(2), (2, 9, 8, 4))
  kernels, p, rest, _ = perturbed(model, x, fold)
  check_forms(model, kernels, p, {"params": rest}, x)


@pytest.mark.parametrize("fold", [True, False])
def test_a_dense_layer_composed_equals_factored(fold):
  model = models.make("mlp", 3)
  x = jax.random.normal(jax.random.key(2), (6, 2, 2, 3))
  kernels, p, rest, _ = perturbed(model, x, fold)
  check_forms(model, kernels, p, {"params": rest}, x)


def check_forms(model, kernels, p, variables, x):
  """Values and the gradients of R, S, U, Sigma, V agree between both forms and with `merge`."""

  @jax.jit
  def compute(kernels, p, variables, x):
    def run(p, form):
      return perturb.apply(model, kernels, p, variables, x, form=form)

    want = model.apply({"params": perturb.merge(kernels, p, variables["params"])}, x)
    weight = np.random.default_rng(3).normal(size=want.shape).astype(np.float32)
    values, gradients = [], []
    for form in FORMS:
      value, pull = jax.vjp(functools.partial(run, form=form), p)
      values.append(value)
      gradients.append(pull(weight)[0])
    return want, values, gradients

  want, values, gradients = compute(kernels, p, variables, x)
  for value in values:
    np.testing.assert_allclose(value, want, atol=1e-4)
  chex.assert_trees_all_close(*gradients, atol=2e-3, rtol=1e-3)


def test_lenet_perturbed_by_the_identity_is_the_base_to_the_bit():
  model = models.make("lenet", 10).clone(channels=(4,), hidden=(12,))
  x = np.random.default_rng(2).normal(size=(2, 32, 32, 3)).astype(np.float32)
  initialize = jax.jit(lambda key: networks.initialize(model, key, (32, 32, 3)))
  params, stats = initialize(jax.random.key(0))
  kernels, rest = trees.split(params)
  p = {n: lowrank.identity(w, 2, fold=True) for n, w in kernels.items()}
  variables = {"params": rest, "batch_stats": stats}
  got = perturb.apply(model, kernels, p, variables, x, train=False, form="composed")
  want = model.apply({"params": params, "batch_stats": stats}, x, train=False)
  np.testing.assert_array_equal(got, want)


def test_split_and_join_are_inverse():
  model = models.make("lenet", 10)
  shapes, _ = jax.eval_shape(
    lambda key: networks.initialize(model, key, (32, 32, 3)), jax.random.key(0)
  )
  params = jax.tree.map(lambda x: np.arange(x.size, dtype=x.dtype).reshape(x.shape), shapes)
  kernels, rest = trees.split(params)
  assert "kernel" in rest["head"] and "conv1" not in rest
  chex.assert_trees_all_equal(trees.join(kernels, rest), params)


def test_nested_layers_are_found_and_perturbed():
  class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(4, name="dense")(x)

  class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(2, name="head")(Block(name="block")(x))

  model, x = Nested(), jax.random.normal(jax.random.key(0), (3, 5))
  kernels, p, rest, _ = perturbed(model, x)
  assert list(kernels) == ["block/dense"]
  check_forms(model, kernels, p, {"params": rest}, x)


def test_the_frozen_kernel_needs_no_gradient_in_a_wide_dense_layer():
  """The factored form is chosen where it saves work; its backward pass has no W-sized product."""
  model = models.make("mlp", 3)
  x = jax.random.normal(jax.random.key(2), (128, 16, 16, 3))
  kernels, p, rest, _ = perturbed(model, x)

  def loss(p):
    return jnp.sum(perturb.apply(model, kernels, p, {"params": rest}, x))

  shapes = [
    eqn.outvars[0].aval.shape
    for eqn in jax.make_jaxpr(jax.grad(loss))(p).jaxpr.eqns
    if eqn.primitive.name == "dot_general"
  ]
  assert (768, 256) not in shapes and (256, 768) not in shapes


@pytest.mark.parametrize("fold", [True, False])
def test_padded_columns_stay_zero_under_training(digits_config, fold):
  """Rank 2 of 6 columns; Adam, L1 and L2 must leave columns 2 to 5 zero in U, Sigma and V."""
  config = resolve(digits_config(**{"method.sigma": "folded" if fold else "kept"}))
  benchmark = data.load(config)
  task, model = benchmark.tasks[0], models.make("mlp", 10)
  params, _ = networks.initialize(model, jax.random.key(0), benchmark.image_shape)
  kernels, rest = trees.split(params)
  free = jax.tree.map(lambda w: w + 0.1 * jnp.sin(7 * w), kernels)
  start = {
    n: lowrank.truncate(lowrank.decompose(w, free[n]), 2, 6, fold) for n, w in kernels.items()
  }

  def apply_fn(params, frozen, stats, image, train_mode, key):
    return perturb.apply(
      model, frozen, params["p"], {"params": params["rest"]}, image, train=train_mode
    ), stats

  def penalty_fn(params, frozen):
    return sum(
      1e-4 * (losses.sum_absolute(x) + losses.sum_squares(x))
      for q in params["p"].values()
      for x in (q.U, q.V)
    )

  fit = make_fit(methods.setup_of(config, model, benchmark), apply_fn, penalty_fn)
  trained, _ = fit(
    {"p": start, "rest": rest}, {}, kernels, task, jax.random.key(1), 2, Store("", lambda e: None)
  )
  for name, q in trained["p"].items():
    for x in (q.U, q.V) if fold else (q.U, q.V, q.sigma[None]):
      assert not np.any(x[:, 2:])
    assert not np.allclose(q.U[:, :2], start[name].U[:, :2])  # it did train


def test_zeroing_sigma_alone_would_wake_up():
  """Why U, Sigma and V are zeroed together: dL/dSigma = u' dL/dB v is not zero."""
  base = jax.random.normal(jax.random.key(0), (4, 5))
  d = lowrank.decompose(base, base + jax.random.normal(jax.random.key(1), (4, 5)))
  p = lowrank.truncate(d, 4, 4, fold=False)
  awake = p._replace(sigma=p.sigma.at[2:].set(0))
  padded = lowrank.truncate(d, 2, 4, fold=False)

  def loss(p):
    return jnp.sum(jnp.cos(lowrank.compose(base, p)))

  assert np.all(jax.grad(loss)(awake).sigma[2:])
  gradient = jax.grad(loss)(padded)
  for x in (gradient.sigma[None], gradient.U, gradient.V):
    assert not np.any(x[:, 2:])


@pytest.mark.parametrize("network", ["mlp", "lenet", "resnet18", "alexnet"])
def test_without_its_head_a_network_gives_what_the_head_gets(network):
  model = models.make(network, 3, "batch").clone(**SMALL[network])

  @jax.jit
  def compute(key, image):
    params = model.init(key, image, train=False)["params"]
    rest = {name: x for name, x in params.items() if name != "head"}
    with taps.without_head():
      features = model.apply({"params": rest}, image)
    return features, params["head"], model.apply({"params": params}, image)

  image = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
  features, head, want = compute(jax.random.key(0), image)
  np.testing.assert_allclose(features @ head["kernel"] + head["bias"][None], want, atol=1e-5)


# --- any Linen model --------------------------------------------------------------------


class OfOne(nn.Module):
  """One layer, called `layer`."""

  make: object

  @nn.compact
  def __call__(self, x):
    return self.make(name="layer")(x)


def conv(**arguments):
  return functools.partial(nn.Conv, 6, (3, 3), **arguments)


LAYERS = {
  "dense": functools.partial(nn.Dense, 5),
  "pointwise": functools.partial(nn.Conv, 6, (1, 1)),
  "strided": conv(strides=2),
  "dilated": conv(kernel_dilation=2),
  "grouped": conv(feature_group_count=2),
  "depthwise": functools.partial(nn.Conv, 4, (3, 3), feature_group_count=4),
  "circular": conv(padding="CIRCULAR"),
  "split heads": functools.partial(nn.DenseGeneral, (3, 2)),
  "join heads": functools.partial(nn.DenseGeneral, 5, axis=(-2, -1)),
  "attention": functools.partial(nn.MultiHeadDotProductAttention, 2),
}


HALF = {("attention", jnp.bfloat16), ("dense", jnp.float16), ("strided", jnp.bfloat16)}


@pytest.mark.parametrize(
  ("kind", "dtype"),
  [
    pytest.param(
      k,
      d,
      marks=[pytest.mark.slow] * (d != jnp.float32 and (k, d) not in HALF),
      id=f"{k}-{d.__name__}",
    )
    for k in LAYERS
    for d in (jnp.float32, jnp.bfloat16, jnp.float16)
  ],
)
def test_merged_is_unmerged_for_every_kind_of_layer_and_dtype(kind, dtype):
  model = OfOne(functools.partial(LAYERS[kind], dtype=dtype))
  x = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
  variables = jax.jit(model.init)(jax.random.key(1), x)
  kernels, p, rest = perturb.init(jax.random.key(2), model, variables, x, rank=2)
  assert len(kernels) == (4 if kind == "attention" else 1)
  plain = jax.jit(model.apply)

  @functools.partial(jax.jit, static_argnums=1)
  def run(p, form):
    return perturb.apply(model, kernels, p, {"params": rest}, x, form=form)

  base = plain(variables, x)
  tolerance = {jnp.float32: 1e-5, jnp.bfloat16: 0.06, jnp.float16: 0.01}[dtype]
  np.testing.assert_array_equal(run(p, "composed"), base)  # nothing is changed yet
  moved = {
    n: q._replace(R=1.1 * q.R, S=0.9 * q.S, U=np.full(q.U.shape, 0.3, np.float32))
    for n, q in p.items()
  }
  merged = plain({"params": perturb.merge(kernels, moved, rest)}, x)
  assert np.abs(merged - base).max() > 3 * tolerance  # so the agreement below says something
  for form in FORMS:
    got = run(moved, form)
    assert got.dtype == merged.dtype == dtype
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (got, merged)), atol=tolerance)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_without_columns_is_scaled_alone(kind):
  model = OfOne(LAYERS[kind])
  x = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
  variables = jax.jit(model.init)(jax.random.key(1), x)
  kernels, p, rest = perturb.init(jax.random.key(2), model, variables, x, rank=2)
  scaled = {n: q._replace(R=1.1 * q.R, U=q.U[:, :0], V=q.V[:, :0]) for n, q in p.items()}

  @functools.partial(jax.jit, static_argnums=1)
  def loss(p, form):
    y = perturb.apply(model, kernels, p, {"params": rest}, x, form=form)
    return jnp.sum(y**2)

  merged = model.apply({"params": perturb.merge(kernels, scaled, rest)}, x)
  for form in FORMS:
    value, gradient = jax.value_and_grad(loss)(scaled, form)
    np.testing.assert_allclose(value, jnp.sum(merged**2), rtol=1e-5)
    assert all(np.abs(q.R).max() > 0 for q in gradient.values())


def test_a_grouped_kernel_is_composed_as_the_formula_says():
  kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 6))  # two groups of 2 inputs
  p = random_perturbation(jax.random.key(1), kernel, 2, fold=True)
  want = np.einsum("j,hwij,i->hwij", p.R, kernel, p.S) + (p.V @ p.U.T)[None, None]
  np.testing.assert_allclose(perturb.compose(kernel, p), want, atol=1e-5)
  heads = jax.random.normal(jax.random.key(0), (4, 3, 2))  # DenseGeneral, [4, 6] as a matrix
  p = random_perturbation(jax.random.key(1), heads.reshape(4, 6), 2, fold=True)
  want = (np.einsum("j,ij,i->ij", p.R, heads.reshape(4, 6), p.S) + p.V @ p.U.T).reshape(4, 3, 2)
  np.testing.assert_allclose(perturb.compose(heads, p), want, atol=1e-5)


class Odd(nn.Module):
  """Layers that can't be perturbed, beside one that can."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(4, name="good")(x)
    x = nn.ConvTranspose(4, (3, 3), name="transposed")(x)
    x = nn.ConvLocal(4, (1, 1), name="local")(x)
    return nn.DenseGeneral((4,), axis=-1, batch_dims=(0,), name="batched")(x)


@pytest.mark.parametrize(
  ("pattern", "says"),
  [
    ("transposed", "transposed: ConvTranspose is not perturbed"),
    ("local", "local: ConvLocal is not perturbed"),
    ("batched", "batched: DenseGeneral with batch_dims"),
    ("missing*", "no layer's path matches 'missing.'; layers with a kernel: batched, good, local"),
  ],
)
def test_what_can_not_be_perturbed_is_refused_by_name(pattern, says):
  x = jnp.ones((1, 4, 4, 4))
  variables = Odd().init(jax.random.key(0), x)
  with pytest.raises(UserError, match=says):
    perturb.init(jax.random.key(0), Odd(), variables, x, rank=1, pattern=pattern)
  kernels, _, _ = perturb.init(jax.random.key(0), Odd(), variables, x, rank=1, pattern="go*")
  assert list(kernels) == ["good"]


def test_a_stack_of_layers_is_refused():
  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return nn.Dense(4, name="dense")(x), None

  class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
      layers = nn.scan(Layer, {"params": 0}, split_rngs={"params": True}, length=3)
      return layers(name="layers")(x, None)[0]

  x = jnp.ones((2, 4))
  variables = Stack().init(jax.random.key(0), x)
  with pytest.raises(UserError, match="layers/dense: its kernel is one of a stack"):
    perturb.init(jax.random.key(0), Stack(), variables, x, rank=1)


def test_the_package_exports_it():
  assert halrp_jax.perturb.init is perturb.init
  with pytest.raises(AttributeError, match="has no attribute 'perturbed'"):
    halrp_jax.perturbed  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vision_transformer", "nnx_vit"])
def test_the_vision_transformers_of_the_examples(name):
  """With one block and few steps: the perturbed task gains what the frozen weights lack."""
  spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
  vit = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(vit)
  vit.VisionTransformer = functools.partial(vit.VisionTransformer, num_blocks=1)
  results = vit.main(steps=60)
  assert results["first task"] > 60
  assert results["second task"] > results["second task by the first's weights"] + 20


# --- a batch with samples of several tasks ----------------------------------------------

MANY = {
  "lenet": (models.make("lenet", 3).clone(channels=(4,), hidden=(16,)), (32, 32, 3)),
  "resnet18": (models.make("resnet18", 3).clone(width=4), (32, 32, 3)),
  "dilated": (OneConv({"kernel_size": (3, 3), "kernel_dilation": (2, 2)}), (9, 9, 2)),
}


@pytest.mark.parametrize("fold", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "resnet18")) for n in sorted(MANY)]
)
def test_many_tasks_at_once_equal_each_alone(name, fold):
  model, shape = MANY[name]
  kwargs = {} if name == "dilated" else {"train": False}
  x = jax.random.normal(jax.random.key(2), (6, *shape))
  parts = []
  for t in range(3):
    kernels, p, rest, stats = perturbed(model, x, fold, columns=4, **kwargs)
    p = jax.tree.map(lambda leaf, t=t: leaf * (1 + 0.2 * t), p)
    # two tasks use one column of four
    p = {n: q._replace(U=q.U.at[:, 1:].set(0)) if t else q for n, q in p.items()}
    stats = jax.tree.map(lambda leaf, t=t: leaf + 0.1 * t, stats)
    rest = jax.tree.map(lambda leaf, t=t: leaf * (1 + t), rest)
    parts.append((p, {"params": rest, "batch_stats": stats}))
  stacked = perturb.stack([p for p, _ in parts])
  variables = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[v for _, v in parts])
  t = jnp.array([2, 0, 1, 1, 0, 2])
  many = jax.jit(functools.partial(perturb.apply_many, model, **kwargs))
  one = jax.jit(functools.partial(perturb.apply, model, **kwargs))
  got = many(kernels, stacked, variables, t, x)
  for i, owner in enumerate(t.tolist()):
    want = one(kernels, *parts[owner], x[i : i + 1])
    np.testing.assert_allclose(got[i], want[0], atol=1e-5 * np.abs(want).max(), rtol=1e-5)


def test_a_stack_is_as_wide_as_the_highest_rank():
  kernel = jnp.ones((6, 5))
  p = random_perturbation(jax.random.key(0), kernel, 4, True)
  parts = [{"a": p._replace(U=p.U.at[:, k:].set(0), V=p.V.at[:, k:].set(0))} for k in (0, 2, 1)]
  stacked = perturb.stack(parts)["a"]
  assert stacked.U.shape == (3, 5, 2) and stacked.V.shape == (3, 6, 2)
  assert perturb.stack(parts[:1])["a"].U.shape == (1, 5, 0)
