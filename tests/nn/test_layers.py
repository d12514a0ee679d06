import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from halrp_jax.nn import layers
from halrp_jax.nn.conv import conv_general_dilated
from halrp_jax.nn.init import uniform_fan_in
from halrp_jax.nn.norm import BatchNorm, _fused_batch_norm, _plain_batch_norm, local_response_norm
from halrp_jax.nn.pool import (
  _isolated_max,
  max_pool,
  overlapping_max_pool,
  window_cells,
  window_sum,
)

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def normal(seed, shape):
  """Returns numbers of a normal distribution; drawn by NumPy, nothing is compiled for them."""
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def value_and_gradients(fn, weight, *arguments):
  """Returns fn(*arguments) and the gradients of its sum weighted by `weight`."""
  value, pull = jax.vjp(fn, *arguments)
  return value, pull(weight)


def plain(x, kernel, padding, stride):
  groups = x.shape[-1] // kernel.shape[2]
  return lax.conv_general_dilated(
    *(x, kernel, (stride, stride), padding),
    dimension_numbers=DIMENSIONS,
    feature_group_count=groups,
  )


def ours(x, kernel, padding, stride):
  numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, DIMENSIONS)
  groups = x.shape[-1] // kernel.shape[2]
  return conv_general_dilated(
    *(x, kernel, (stride, stride), padding), dimension_numbers=numbers, feature_group_count=groups
  )


CONVOLUTIONS = [
  ((16, 16, 20), (5, 5, 20, 50), ((2, 2), (2, 2)), 1),  # LeNet conv2
  ((32, 32, 3), (5, 5, 3, 20), ((2, 2), (2, 2)), 1),  # LeNet conv1: on blocks
  ((32, 32, 3), (4, 4, 3, 64), ((0, 0), (0, 0)), 1),  # AlexNet
  ((14, 14, 64), (3, 3, 64, 128), ((0, 0), (0, 0)), 1),
  ((6, 6, 128), (2, 2, 128, 256), ((0, 0), (0, 0)), 1),
  ((16, 16, 32), (3, 3, 32, 64), ((1, 1), (1, 1)), 2),  # ResNet18
  ((16, 16, 32), (1, 1, 32, 64), ((0, 0), (0, 0)), 2),
  ((9, 7, 3), (4, 4, 3, 5), ((0, 0), (0, 0)), 1),
  ((9, 7, 3), (4, 4, 3, 5), ((0, 0), (0, 0)), 2),
  ((7, 10, 1), (3, 5, 1, 4), ((1, 1), (2, 2)), 1),
  ((7, 10, 6), (3, 5, 6, 4), ((1, 1), (2, 2)), 2),
  ((5, 5, 6), (2, 2, 6, 3), ((0, 0), (0, 0)), 2),
  ((6, 5, 8), (2, 3, 8, 4), ((1, 0), (0, 2)), 1),
  ((5, 5, 6), (1, 1, 6, 7), ((0, 0), (0, 0)), 1),
  ((5, 5, 2), (1, 1, 2, 7), "SAME", 1),
  ((8, 9, 6), (3, 4, 6, 2), "SAME", 1),
  ((8, 9, 6), (3, 4, 6, 2), "SAME", 2),
  ((8, 9, 3), (3, 4, 3, 2), "VALID", 1),
  ((4, 4, 3), (2, 2, 3, 2), ((3, 3), (3, 3)), 1),  # wider than the kernel: the plain operation
  ((9, 6, 16), (3, 3, 16, 20), ((0, 1), (2, 0)), 1),  # Winograd's form
  ((3, 3, 16), (3, 3, 16, 16), ((0, 0), (0, 0)), 1),  # one output: too little for Winograd's form
  ((8, 8, 6), (3, 3, 6, 4), ((0, 0), (0, 0)), 2),  # the last row and column are not used
  ((9, 8, 6), (3, 5, 1, 6), ((1, 1), (2, 2)), 1),  # depthwise
  ((9, 8, 6), (5, 3, 1, 6), "SAME", 2),
  ((8, 8, 6), (3, 3, 1, 12), "SAME", 1),  # two outputs for each channel: the plain operation
]
# (index, batch) of those that differ in their form: both sides unfolded (4), one folded (0), blocks
# (1), windows unfolded (5), 1 x 1 (6), Winograd's (19), depthwise (22), the plain operation (18)
# and an odd number of rows, whose gradient is one product
IN_SHORT = {(i, 8) for i in (0, 1, 4, 5, 6, 8, 9, 10, 12, 16, 17, 18, 19, 21, 22, 23)} | {(13, 5)}


@pytest.mark.parametrize(
  ("image", "kernel", "padding", "stride", "batch"),
  [
    pytest.param(*case, batch, marks=[pytest.mark.slow] * ((i, batch) not in IN_SHORT))
    for batch in (8, 5)
    for i, case in enumerate(CONVOLUTIONS)
  ],
)
def test_convolution_equals_lax_in_values_and_gradients(image, kernel, padding, stride, batch):
  x, w = normal(0, (batch, *image)), normal(1, kernel)

  @jax.jit
  def both(x, w):
    forms = [functools.partial(f, padding=padding, stride=stride) for f in (ours, plain)]
    weight = normal(2, jax.eval_shape(forms[1], x, w).shape)
    return [value_and_gradients(f, weight, x, w) for f in forms]

  (y, got), (want_y, want) = both(x, w)
  np.testing.assert_allclose(y, want_y, atol=2e-5 * float(np.abs(want_y).max()) + 1e-5)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * float(np.abs(b).max()) + 1e-5)


@pytest.mark.parametrize(
  "arguments",
  [
    {"strides": (2, 2)},
    {"kernel_dilation": (2, 2)},
    {"feature_group_count": 2},
    {"strides": 1},
    {"padding": "VALID"},
    {"padding": "CIRCULAR"},
  ],
)
def test_flax_conv_gives_the_same_with_and_without(arguments):
  x = normal(0, (2, 9, 8, 6))
  fast = nn.Conv(4, (3, 3), conv_general_dilated=conv_general_dilated, **arguments)
  slow = nn.Conv(4, (3, 3), **arguments)

  @jax.jit
  def both(key, x):
    variables = slow.init(key, x)
    return fast.apply(variables, x), slow.apply(variables, x)

  np.testing.assert_allclose(*both(jax.random.key(1), x), atol=1e-5)


def test_batch_norm_against_flax_and_the_unbiased_variance():
  x = 3 * normal(0, (7, 5)) + 1
  module = BatchNorm()
  variables = module.init(jax.random.key(1), x, False)
  y, new = module.apply(variables, x, True, mutable=["batch_stats"])
  flax = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5)
  want, _ = flax.apply(flax.init(jax.random.key(1), x), x, mutable=["batch_stats"])
  np.testing.assert_allclose(y, want, atol=1e-5)
  stats = new["batch_stats"]
  np.testing.assert_allclose(stats["mean"], 0.1 * np.mean(x, 0), rtol=1e-5)
  np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * np.var(x, 0, ddof=1), rtol=1e-5)
  variables = {"params": variables["params"], "batch_stats": stats}
  z = module.apply(variables, x, False)
  want = (x - stats["mean"][None]) / np.sqrt(stats["var"][None] + 1e-5)
  np.testing.assert_allclose(z, want, atol=1e-5)


@pytest.mark.parametrize(
  ("shape", "pool", "relu"),
  [
    ((8, 6, 6, 3), 2, True),
    ((4, 7, 5, 3), 2, True),
    ((4, 6, 9, 2), 3, True),
    ((16, 5), 1, True),
    ((4, 7, 5, 3), 2, False),
    pytest.param((8, 6, 6, 3), 2, False, marks=pytest.mark.slow),
    pytest.param((4, 6, 9, 2), 3, False, marks=pytest.mark.slow),
    ((16, 5), 1, False),
  ],
)
def test_fused_batch_norm_equals_the_plain_one(shape, pool, relu):
  x = 2 * normal(0, shape) + 1
  scale = normal(1, shape[-1:])  # negative ones too: they turn the order round
  bias = normal(2, shape[-1:])
  forms = [
    lambda *a, f=f: f(*a, epsilon=1e-5, relu=relu, pool=pool, axis_name=None)
    for f in (_fused_batch_norm, _plain_batch_norm)
  ]

  @jax.jit
  def both(*arguments):
    outputs = [form(*arguments) for form in forms]
    weight = normal(3, outputs[0][0].shape)
    values = [lambda *a, form=form: form(*a)[0] for form in forms]
    return outputs, [value_and_gradients(f, weight, *arguments)[1] for f in values]

  outputs, gradients = both(x, scale, bias)
  for a, b in zip(*outputs, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  for a, b in zip(*gradients, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_pooling_gives_the_gradient_to_the_first_of_equal_values():
  x = jnp.zeros((1, 2, 2, 1))
  got = jax.grad(lambda x: jnp.sum(_isolated_max(window_cells(x, 2))))(x)
  np.testing.assert_array_equal(got.ravel(), [1, 0, 0, 0])


def test_batch_norm_that_evaluates_with_the_batch_keeps_statistics_all_the_same():
  x = 3 * normal(0, (4, 3, 3, 2)) + 1
  module = BatchNorm(running=False)
  variables = module.init(jax.random.key(1), x, False)
  y, new = module.apply(variables, x, True, mutable=["batch_stats"])
  np.testing.assert_allclose(module.apply(variables, x, False), y, atol=1e-6)
  _, want = BatchNorm().apply(variables, x, True, mutable=["batch_stats"])
  jax.tree.map(np.testing.assert_array_equal, new, want)
  # which are of no effect, and need not be there
  np.testing.assert_array_equal(module.apply({"params": variables["params"]}, x, False), y)


@pytest.mark.parametrize("shape", [(2, 6, 4, 3), (2, 7, 5, 3)])
def test_max_pool_equals_flax(shape):
  x = normal(0, shape)

  @jax.jit
  def both(x):
    plain = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
    weight = normal(1, jax.eval_shape(plain, x).shape)
    return [value_and_gradients(f, weight, x) for f in (max_pool, plain)]

  jax.tree.map(np.testing.assert_array_equal, *both(x))


def test_initialisation_is_uniform_within_fan_in():
  x = uniform_fan_in()(jax.random.key(0), (5, 5, 4, 1000))
  assert 0.099 < float(jnp.abs(x).max()) <= 0.1  # 1 / sqrt(5 * 5 * 4)
  assert float(x.std()) == pytest.approx(0.1 / np.sqrt(3), rel=0.02)
  bias = uniform_fan_in(400)(jax.random.key(0), (1000,))
  assert 0.049 < float(jnp.abs(bias).max()) <= 0.05


@pytest.mark.parametrize("running", [True, False])
def test_batch_norm_keeps_the_bias_of_the_layer_before(running):
  """The same as a bias added before BatchNorm, in training and in evaluation."""
  x, bias = 3 * normal(0, (16, 5)) + 1, jnp.linspace(-2.0, 2.0, 5)
  with_bias, without = BatchNorm(running, num_in=4), BatchNorm(running)
  variables = without.init(jax.random.key(1), x, False)
  params = variables["params"] | {"input_bias": bias}
  stats = {k: v for k, v in variables.items() if k != "params"}
  got, got_stats = with_bias.apply({"params": params} | stats, x, True, mutable=["batch_stats"])
  want, want_stats = without.apply(variables, x + bias[None], True, mutable=["batch_stats"])
  np.testing.assert_allclose(got, want, atol=1e-5)
  for a, b in zip(jax.tree.leaves(got_stats), jax.tree.leaves(want_stats), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  got = with_bias.apply({"params": params} | got_stats, 2 * x, False)
  want = without.apply({"params": variables["params"]} | got_stats, 2 * x + bias[None], False)
  np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
  ("window", "strides", "padding"),
  [
    ((5, 5), (1, 1), ((2, 2), (2, 2))),
    ((3, 3), (2, 2), ((1, 1), (1, 1))),
    ((2, 3), (1, 2), ((0, 0), (1, 0))),
    ((3, 2), (2, 2), "SAME"),
    ((3, 3), (1, 1), "VALID"),
  ],
)
def test_window_sum_equals_a_convolution_with_ones(window, strides, padding):
  x = normal(0, (3, 9, 8, 4))
  kernel = jnp.ones((*window, 1, 4))

  def plain(x):
    return lax.conv_general_dilated(
      x, kernel, strides, padding, dimension_numbers=DIMENSIONS, feature_group_count=4
    )

  def ours(x):
    return window_sum(x, window, strides, padding)

  @jax.jit
  def both(x):
    weight = normal(1, jax.eval_shape(plain, x).shape)
    return [value_and_gradients(f, weight, x) for f in (ours, plain)]

  check = functools.partial(np.testing.assert_allclose, atol=1e-5)
  jax.tree.map(check, *both(x))


def test_not_a_number_stays_not_a_number():
  """The fusion barrier is a branch on a NaN."""
  x = jnp.ones((4, 6, 6, 8)).at[0, 0, 0, 0].set(jnp.nan)
  assert jnp.isnan(jax.jit(lambda x: ours(x, jnp.ones((3, 3, 8, 2)), "SAME", 1))(x)).any()
  assert jnp.isnan(max_pool(x)).any()


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_dropout_keeps_the_expectation(rate):
  x = jnp.ones((250, 401))
  y = layers.Dropout(rate).apply({}, x, True, rngs={"dropout": jax.random.key(0)})
  assert float(jnp.mean(y == 0)) == pytest.approx(rate, abs=0.01)
  assert float(y.mean()) == pytest.approx(1, abs=0.01)
  np.testing.assert_array_equal(layers.Dropout(rate).apply({}, x, False), x)


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (2, 7, 5, 3)])
def test_overlapping_max_pool_equals_flax(shape):
  x = normal(0, shape)
  want = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
  np.testing.assert_array_equal(overlapping_max_pool(x), want)


def test_local_response_norm_by_hand():
  x = jnp.arange(1.0, 6.0)[None]  # channels 1 2 3 4 5; a channel sees two before and one behind
  sums = np.array([1 + 4, 1 + 4 + 9, 1 + 4 + 9 + 16, 4 + 9 + 16 + 25, 9 + 16 + 25])
  want = np.arange(1, 6) / (2 + 0.3 / 4 * sums) ** 0.5
  got = local_response_norm(x, size=4, alpha=0.3, beta=0.5, k=2.0)
  np.testing.assert_allclose(got[0], want, rtol=1e-6)
