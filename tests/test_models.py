import jax
import pytest

from halrp_jax import models, perturb, train


def count(name, num_classes, image_shape):
  model = models.make(name, num_classes)
  return jax.eval_shape(lambda: train.initialize(model, jax.random.key(0), image_shape))


def size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(("num_classes", "parameters"), [(10, 2_995_620), (5, 2_993_115)])
def test_lenet_has_the_parameters_of_the_paper(num_classes, parameters):
  params, stats = count("lenet", num_classes, (32, 32, 3))
  assert size(params) == parameters
  assert size(stats) == 2 * (20 + 50 + 800 + 500)
  kernels, rest = perturb.split(params)
  assert size(kernels) == 2_986_500
  biases_and_batch_norm = train.count_rest(rest, kernels, num_classes)
  assert biases_and_batch_norm.biases == 1_370
  assert biases_and_batch_norm.counted == 2_740 + num_classes * 501


def test_batch_norm_is_chosen_when_the_model_is_made():
  assert models.make("lenet", 10, "own").running and models.make("lenet", 10, "running").running
  model = models.make("lenet", 10, "batch")
  params, stats = train.initialize(model, jax.random.key(0), (32, 32, 3))
  assert stats == {} and size(params) == 2_995_620
  assert models.make("mlp", 10, "batch") == models.make("mlp", 10)


def test_mlp():
  params, stats = count("mlp", 10, (8, 8, 1))
  assert size(params) == 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10
  assert stats == {}


@pytest.mark.parametrize("name", sorted(models.NETWORKS))
def test_layers_with_a_kernel_are_perturbed_but_the_head(name):
  params, _ = count(name, 7, (32, 32, 3))
  names = perturb.layer_names(params)
  assert names and "head" not in names
  with_kernel = {layer for layer, leaves in params.items() if "kernel" in leaves}
  assert set(names) == with_kernel - {"head"}
