"""Claims of CLR: an identity at first, BatchNorm's scope decides forgetting."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from halrp_jax import models
from halrp_jax.methods import clr
from halrp_jax.nn.conv import depthwise_conv, patches
from halrp_jax.weights import trees

from .test_networks_and_methods import SMALL


def test_depthwise_convolution_is_that_of_lax():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 5, 7, 4)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(3, 3, 4)), jnp.float32)

  def plain(x, kernel):
    return lax.conv_general_dilated(
      x,
      kernel[:, :, None],
      (1, 1),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=4,
    )

  np.testing.assert_allclose(depthwise_conv(x, kernel), plain(x, kernel), atol=1e-5)
  for i in (0, 1):
    got, want = (
      jax.grad(lambda *args, f=f: jnp.sum(jnp.sin(f(*args))), i)(x, kernel)
      for f in (depthwise_conv, plain)
    )
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_patches_times_the_kernel_are_the_convolution():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 9, 8, 3)), jnp.float32)
  for window, stride, padding in ((3, 1, 1), (3, 2, 1), (1, 2, 0), (4, 1, 0)):
    kernel = jnp.asarray(rng.normal(size=(window, window, 3, 5)), jnp.float32)
    pads = ((padding, padding),) * 2
    rows = patches(x, (window, window), (stride, stride), pads)
    want = lax.conv_general_dilated(
      x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(rows @ kernel.reshape(-1, 5), want, atol=1e-4)


def test_identities_change_nothing_and_1x1_convolutions_have_none():
  model = models.make("resnet18", 3, "batch").clone(**SMALL["resnet18"])
  image = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)
  params = jax.jit(model.init)(jax.random.key(0), image)["params"]
  kernels, _ = trees.split(params)
  adapters = clr._identities(kernels)
  assert len(adapters) == 5 and not any("shortcut" in name for name in adapters)
  with nn.intercept_methods(clr._adapter_interceptor(adapters)):
    got = model.apply({"params": params}, image)
  np.testing.assert_array_equal(got, model.apply({"params": params}, image))
  other = jax.tree.map(lambda x: 2 * x + 0.1, adapters)
  with nn.intercept_methods(clr._adapter_interceptor(other)):
    changed = model.apply({"params": params}, image)
  assert np.abs(changed - got).max() > 1e-2


def test_adapters_have_the_sizes_of_the_authors_port():
  """630 depthwise weights for a task on LeNet, 4,032 on AlexNet, 17,568 on ResNet18."""
  for network, shape, want in (
    ("lenet", (1, 32, 32, 3), 630),
    ("alexnet", (1, 32, 32, 3), 4032),
    ("resnet18", (1, 32, 32, 3), 17568),
    ("wide_lenet", (1, 32, 32, 1), 1728),
  ):
    model = models.make(network, 10)
    shapes = jax.eval_shape(lambda k, m=model, s=shape: m.init(k, jnp.zeros(s)), jax.random.key(0))
    kernels, _ = trees.split(shapes["params"])
    assert sum(x.size for x in clr._identities(kernels).values()) == want
