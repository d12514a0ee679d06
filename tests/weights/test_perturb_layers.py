"""perturb.init proves itself: layers and inputs that are exact, and those that it refuses."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from halrp_jax.nn import layers
from halrp_jax.nn.conv import conv_general_dilated
from halrp_jax.types import UserError
from halrp_jax.weights import kinds, lowrank, perturb, trees


class Net(nn.Module):
  """One layer, called `layer`, and a head on the mean of what it gives."""

  make: object

  @nn.compact
  def __call__(self, x):
    y = self.make(name="layer")(x)
    return nn.Dense(3, name="head")(y.reshape(-1, y.shape[-1]).mean(0))


FORMS = ("composed", "factored", "auto")


def check_exact(model, x, bound=1e-5, unfold=False, **kwargs):
  """After some change of the perturbation, every form is the merged network."""
  variables = jax.jit(model.init)(jax.random.key(1), x)
  kernels, p, rest = perturb.init(jax.random.key(2), model, variables, x, rank=2, **kwargs)
  others = {k: v for k, v in variables.items() if k != "params"}
  p = {n: q._replace(R=1.2 * q.R, U=np.full(q.U.shape, 0.5, np.float32)) for n, q in p.items()}
  if unfold:
    rows = {n: w.size // p[n].R.size for n, w in kernels.items()}
    p = {n: q._replace(V=jax.random.normal(jax.random.key(3), (rows[n], 2))) for n, q in p.items()}

  @jax.jit
  def compute(p, rest, x):
    def run(form):
      return perturb.apply(model, kernels, p, others | {"params": rest}, x, form=form)

    want = model.apply(others | {"params": perturb.merge(kernels, p, rest)}, x)
    return want, model.apply(variables, x), [run(f) for f in ("composed", "factored", "auto")]

  want, base, forms = compute(p, rest, x)
  want32, base32 = (np.asarray(y, np.float32) for y in (want, base))
  assert np.abs(want32 - base32).max() > 1e-2
  for got in forms:
    assert got.dtype == want.dtype
    np.testing.assert_allclose(
      np.asarray(got, np.float32), want32, atol=bound * np.abs(want32).max(), rtol=0
    )
  return kernels


def conv(size, **arguments):
  return functools.partial(nn.Conv, 6, size, **arguments)


# --- what is exact ------------------------------------------------------------------------

DTYPES = [
  *((name, None) for name in ("uint8", "bool", "bfloat16")),
  *(pytest.param(name, None, marks=pytest.mark.slow) for name in ("int32", "float16")),
]


@pytest.mark.parametrize(("dtype", "layer_dtype"), [*DTYPES, ("uint8", jnp.float16)])
def test_a_convolution_takes_inputs_of_every_dtype(dtype, layer_dtype):
  x = jax.random.randint(jax.random.key(0), (2, 12, 12, 3), 0, 256)
  bound = 5e-3 if layer_dtype else 1e-5
  model = Net(conv((8, 8), strides=2, dtype=layer_dtype))
  check_exact(model, x.astype(dtype), bound)
  check_exact(model, x.astype(dtype), bound, unfold=True)


def test_sums_over_a_window_beyond_the_range_of_float16():
  x = jnp.full((1, 20, 20, 3), 255, jnp.uint8)  # 255 * 20 * 20 > 65504
  model = Net(conv((20, 20), padding="VALID", dtype=jnp.float16))
  variables = model.init(jax.random.key(1), x)
  kernels, p, rest = perturb.init(jax.random.key(2), model, variables, x, rank=2)
  p = {n: q._replace(U=1e-4 * jnp.ones_like(q.U)) for n, q in p.items()}
  got = perturb.apply(model, kernels, p, {"params": rest}, x, form="factored")
  want = model.apply({"params": perturb.merge(kernels, p, rest)}, x)
  assert np.isfinite(got).all()
  np.testing.assert_allclose(got, want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
  ("arguments", "batch"),
  [
    ({"size": 3}, (2, 3)),
    ({"size": (3,), "padding": "CAUSAL"}, ()),
    ({"size": (4,), "padding": "CIRCULAR", "strides": 2}, (2,)),
    ({"size": (3, 2), "padding": ((-1, 2), (0, -2))}, (2, 1)),
    pytest.param({"size": (3, 3), "padding": -1, "strides": (2, 1)}, (), marks=pytest.mark.slow),
    ({"size": (3, 3), "padding": "SAME_LOWER", "strides": 2}, (2,)),
    ({"size": (2, 3, 2), "padding": ((1, 0), (-1, 1), (0, 2)), "strides": (1, 2, 1)}, (2, 2)),
    pytest.param({"size": (3, 3, 3), "padding": "CIRCULAR"}, (), marks=pytest.mark.slow),
    ({"size": (2, 2, 2), "kernel_dilation": 2, "feature_group_count": 2}, (2,)),
    ({"size": (3, 3), "mask": np.tile(np.eye(3)[:, :, None, None], (1, 1, 4, 6))}, (2,)),
  ],
  ids=str,
)
def test_a_convolution_of_every_dimension_padding_and_batch(arguments, batch):
  n = np.size(arguments["size"])
  x = jax.random.normal(jax.random.key(0), (*batch, *(8, 7, 6)[:n], 4))
  check_exact(Net(conv(**arguments)), x)
  check_exact(Net(conv(**arguments)), x, unfold=True)


def test_a_batch_of_no_images_is_taken():
  model, x = Net(conv((3, 3))), jnp.ones((0, 6, 6, 4))
  variables = model.init(jax.random.key(1), x)
  kernels, p, rest = perturb.init(jax.random.key(2), model, variables, x, rank=2)
  assert perturb.apply(model, kernels, p, {"params": rest}, x, form="factored").shape == (3,)


def clipped_product(x, kernel, *args, **kwargs):
  """Not linear in x: as in training with few bits."""
  return jax.lax.dot_general(jnp.clip(x, -0.5, 0.5), kernel, *args, **kwargs)


class Lora(nn.Module):
  """A Dense and a low-rank branch beside it, sharing a scope."""

  @nn.compact
  def __call__(self, x):
    dense = nn.Dense(5, name="inner")
    a = self.param("lora_a", nn.initializers.lecun_normal(), (x.shape[-1], 2))
    b = self.param("lora_b", nn.initializers.lecun_normal(), (2, 5))
    return dense(x) + x @ a @ b


class Remat(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.remat(nn.jit(nn.Dense))(5, name="inner")(x)


class SharedTwice(nn.Module):
  @nn.compact
  def __call__(self, x):
    layer = nn.Dense(x.shape[-1], name="inner")
    return layer(nn.relu(layer(inputs=x)))


OTHERS = {
  "several axes": functools.partial(nn.DenseGeneral, (2, 3), axis=(-3, -1)),
  "axes in disorder": functools.partial(nn.DenseGeneral, (2, 3), axis=(-1, 1)),
  "no bias": functools.partial(nn.DenseGeneral, (2, 3), use_bias=False),
  "own product": functools.partial(nn.Dense, 5, dot_general=clipped_product),
  "lora": Lora,
  "remat and jit": Remat,
  "shared": SharedTwice,
  "fused attention": functools.partial(
    nn.MultiHeadDotProductAttention, 2, qkv_features=6, out_features=5, normalize_qk=True
  ),
  "one weight for all": lambda name: nn.vmap(
    nn.Dense, variable_axes={"params": None}, split_rngs={"params": False}
  )(5, name=name),
  "wider bias": functools.partial(nn.Dense, 5, bias_init=lambda *a: jnp.ones(5, jnp.float32)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_and_ways_to_call_them(name):
  check_exact(Net(OTHERS[name]), jax.random.normal(jax.random.key(0), (2, 4, 6, 4)))


def test_a_bias_wider_than_the_kernel_decides_the_dtype():
  model, x = Net(functools.partial(nn.Dense, 5)), jnp.ones((2, 4), jnp.bfloat16)
  variables = model.init(jax.random.key(0), x)
  variables["params"]["layer"]["kernel"] = variables["params"]["layer"]["kernel"].astype("bfloat16")
  kernels, p, rest = perturb.init(jax.random.key(1), model, variables, x, rank=2)
  for form in ("composed", "factored"):
    got = perturb.apply(model, kernels, p, {"params": rest}, x, form=form)
    assert got.dtype == model.apply(variables, x).dtype == jnp.float32


@pytest.mark.parametrize("wrap", [nn.with_partitioning, nn.with_logical_partitioning])
def test_boxed_parameters_are_taken_out_of_their_boxes(wrap):
  layer = functools.partial(
    nn.Dense, 5, kernel_init=wrap(nn.initializers.lecun_normal(), (None, "model"))
  )
  kernels = check_exact(Net(layer), jax.random.normal(jax.random.key(0), (2, 4)))
  assert isinstance(kernels["layer"], jax.Array)


def test_init_works_under_jit_where_tracing_tells_enough():
  x = jnp.ones((2, 4))

  def run(model):
    variables = model.init(jax.random.key(0), x)
    f = lambda key, v: perturb.init(key, model, v, x, rank=2)[0]
    return jax.jit(f)(jax.random.key(1), variables)

  assert run(Net(functools.partial(nn.Dense, 5))).keys() == {"layer"}
  with pytest.raises(
    UserError, match="layer/inner: under jax.jit it can't be proved .* call init outside"
  ):
    run(Net(Remat))


# --- what is refused ----------------------------------------------------------------------


class Wrapped(nn.Module):
  """The layer's kernel is computed from parameters."""

  how: str

  @nn.compact
  def __call__(self, x):
    if self.how == "weight norm":
      return nn.WeightNorm(nn.Dense(4, name="layer"))(x)
    if self.how == "spectral norm":
      return nn.SpectralNorm(nn.Dense(4, name="layer"))(x, update_stats=False)
    signs = functools.partial(jax.tree.map, jnp.sign)
    mapped = nn.map_variables(nn.Dense, "params", signs, init=self.is_initializing())
    return mapped(4, name="layer")(x)


@pytest.mark.parametrize("x", [jnp.ones((2, 4)), jnp.zeros((2, 4))], ids=["ones", "zeros"])
@pytest.mark.parametrize("how", ["weight norm", "spectral norm", "signs"])
def test_a_kernel_computed_from_parameters_is_refused(how, x):
  """Fresh normalised weights are normalised already: unchanged they give away nothing."""
  model = Wrapped(how)
  variables = model.init(jax.random.key(0), x)
  with pytest.raises(UserError, match="layer: the kernel it computes with is not the parameter"):
    perturb.init(jax.random.key(1), model, variables, x, rank=1)


class Inside(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(4, name="layer")(x)


class Outside(nn.Module):
  """A network with parameters of its own is applied inside, its paths starting anew."""

  inner: str = "layer"

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(4, name="layer")(x)
    constant = {"kernel": jnp.full((4, 4), 0.1), "bias": jnp.zeros(4)}
    x = Inside(parent=None).apply({"params": {"layer": constant}}, x)
    return nn.Dense(3, name="other")(x)


def test_networks_inside_networks_are_refused_only_where_they_can_be_mistaken():
  x = jax.random.normal(jax.random.key(0), (2, 4))
  variables = Outside().init(jax.random.key(0), x)
  with pytest.raises(UserError, match="layer: the kernel .* a network applied inside another"):
    perturb.init(jax.random.key(1), Outside(), variables, x, rank=1)
  check_exact(Outside(), x, pattern="other")


class Tied(nn.Module):
  """The kernel is used outside of its layer too."""

  @nn.compact
  def __call__(self, x):
    layer = nn.Dense(4, name="layer")
    y = nn.relu(layer(x))
    return nn.Dense(4, name="free")(y @ layer.variables["params"]["kernel"].T)


def test_a_kernel_used_outside_of_its_layer_is_refused():
  x = jnp.ones((2, 4))
  variables = Tied().init(jax.random.key(0), x)
  with pytest.raises(UserError, match="layer: its kernel is used outside of the layer"):
    perturb.init(jax.random.key(1), Tied(), variables, x, rank=1)
  check_exact(Tied(), x, pattern="free")


class Mine(nn.Dense):
  @nn.compact
  def __call__(self, x):
    return 2 * super().__call__(x)


@pytest.mark.parametrize(
  ("make", "says"),
  [
    (Mine, "layer: Mine is not perturbed"),
    (lambda features, name: nn.Einsum((4, features), "...i,ij->...j", name=name), "layer: Einsum"),
    (
      lambda features, name: nn.vmap(
        nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}
      )(features, name=name),
      "layer: its kernel is one of a stack",
    ),
    (
      lambda features, name: nn.ConvTranspose(features, (3,), name=name),
      "layer: ConvTranspose is not perturbed",
    ),
    (
      lambda features, name: nn.RNN(nn.OptimizedLSTMCell(features, name=name)),
      "layer/h.: DenseParams is not perturbed",
    ),
    (
      functools.partial(nn.Dense, param_dtype=jnp.complex64, dtype=jnp.complex64),
      "layer: a kernel of complex64 is not perturbed",
    ),
  ],
)
def test_other_layers_are_refused_by_name(make, says):
  x, model = jnp.ones((2, 6, 4)), Net(functools.partial(make, 4))
  variables = model.init(jax.random.key(0), x)
  with pytest.raises(UserError, match=says):
    perturb.init(jax.random.key(1), model, variables, x, rank=1)


X = jnp.ones((2, 4))
DENSE = Net(functools.partial(nn.Dense, 5))


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (lambda k, v: (k, Net, v, X), r"Net is a class: pass an instance, Net\(...\)"),
    (
      lambda k, v: (k, nnx.Linear(4, 5, rngs=nnx.Rngs(0)), v, X),
      r"Linear is an nnx model, which holds its variables .* call perturb.init\(key, model, rank",
    ),
    (lambda k, v: (k, v, DENSE, X), "expected a Flax Linen module .*, given dict"),
    (lambda k, v: (k, DENSE, v["params"], X), 'given layer, head; .* pass {"params": params}'),
    (lambda k, v: (k, DENSE, {}, X), "given nothing"),
    (lambda k, v: (k, DENSE, X, v), "variables: expected a dict"),
    (lambda k, v: (k, DENSE, v), "can't be applied .* missing 1 required positional argument: 'x'"),
    (lambda k, v: (k, DENSE, v, jnp.ones((2, 7))), "can't be applied to this example: .*shape"),
    (lambda k, v: (0, DENSE, v, X), r"key: expected one such as jax.random.key\(0\), given 0"),
  ],
)
def test_arguments_of_the_wrong_kind_are_named(arguments, says):
  variables = DENSE.init(jax.random.key(0), X)
  with pytest.raises(UserError, match=says):
    perturb.init(*arguments(jax.random.key(1), variables), rank=1)


@pytest.mark.parametrize(
  ("keys", "says"),
  [
    ({"rank": -1}, "rank = -1 must be a whole number"),
    ({"rank": 1.5}, "rank = 1.5 must be a whole number"),
    ({"rank": 1, "pattern": None}, "pattern = None must be a text"),
  ],
)
def test_rank_and_pattern_of_the_wrong_kind_are_named(keys, says):
  with pytest.raises(UserError, match=says):
    perturb.init(jax.random.key(1), DENSE, DENSE.init(jax.random.key(0), X), X, **keys)


@pytest.mark.parametrize(
  ("strides", "own", "factored"),
  [
    ((1, 1), True, False),  # Winograd's form makes the gradient of the kernel cheap
    ((2, 2), True, True),
    ((1, 1), False, True),  # XLA's convolution
  ],
)
def test_a_layer_is_composed_where_winograds_form_computes_it(strides, own, factored):
  ours = {"conv_general_dilated": conv_general_dilated} if own else {}
  layer = nn.Conv(64, (3, 3), strides, use_bias=False, **ours)
  kernel, x = np.zeros((3, 3, 64, 64), np.float32), np.zeros((128, 16, 16, 64), np.float32)
  p = lowrank.identity(kernel, 8, fold=True)
  assert kinds._factored_is_cheaper(layer, kernel, p, x) == factored


@pytest.mark.parametrize(
  "make",
  [
    lambda **name: nn.Dense(256, **name),
    lambda **name: nn.DenseGeneral((4, 64), **name),
    lambda **name: nn.DenseGeneral(256, axis=(-1, -2), **name),
    lambda **name: nn.Conv(256, (1, 1), padding=((1, 0), (2, 1)), **name),
    lambda **name: layers.conv(256, 1, 0, 2, **name),
  ],
)
def test_a_step_takes_two_products_with_a_frozen_kernel_and_full_training_three(make):
  """XLA counts the operations of the compiled programs; both forms have the same gradients."""
  x = jax.random.normal(jax.random.key(0), (4, 16, 16, 256))
  if getattr(make(name="layer"), "axis", -1) != -1:
    x = x.reshape(4, 256, 4, 64)
  model = Net(make)
  variables = model.init(jax.random.key(1), x)
  kernels, rest = trees.split(variables["params"])
  p = lowrank.identity(kernels["layer"].reshape(256, 256), 2, True)
  p = {"layer": jax.tree.map(lambda v: v + 0.1 * jnp.sin(jnp.arange(v.size)).reshape(v.shape), p)}

  def perturbed(p, x, form):
    return jnp.sum(jnp.sin(perturb.apply(model, kernels, p, {"params": rest}, x, form=form)))

  programs = {
    form: jax.jit(jax.grad(functools.partial(perturbed, form=form), (0, 1))).lower(p, x).compile()
    for form in FORMS
  }
  own = {form: program.cost_analysis()["flops"] for form, program in programs.items()}
  assert own["factored"] == own["auto"] < 0.8 * own["composed"]
  one, other = (programs[form](p, x) for form in ("composed", "factored"))
  scale = max(float(jnp.abs(v).max()) for v in jax.tree.leaves(one))
  chex.assert_trees_all_close(one, other, rtol=1e-4, atol=1e-5 * scale)
