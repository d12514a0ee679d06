"""Claims of PRD: its losses are the sums they say, each trains its own parts, views are as said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halrp_jax.config import resolve
from halrp_jax.methods import prd
from halrp_jax.runs import experiment
from halrp_jax.training import batches
from halrp_jax.types import Store

from ..conftest import building_anew


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_contrast_is_the_double_sum_over_pairs():
  z, label, tau = random(8, 5), np.array([0, 1, 2, 1, 0, 1, 2, 1]), 0.3
  unit = z / np.linalg.norm(z, axis=1, keepdims=True)
  means = []
  for i in range(8):
    others = [a for a in range(8) if a != i]
    total = sum(np.exp(unit[i] @ unit[a] / tau) for a in others)
    positives = [p for p in others if label[p] == label[i]]
    means.append(np.mean([np.log(np.exp(unit[i] @ unit[p] / tau) / total) for p in positives]))
  got, gradient = jax.value_and_grad(prd.contrast)(jnp.asarray(z), jnp.asarray(label), tau)
  assert float(got) == pytest.approx(-tau / 0.07 * np.mean(means), rel=1e-5)
  assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-3


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def kl(p, q):
  return np.sum(p * np.log(p / q))


# tasks of 2 and of 3 classes were learned, the third is not there yet
SEEN = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]], bool)


@pytest.mark.parametrize("over", ["classes", "samples"])
def test_divergence_is_the_sum_over_earlier_tasks(over):
  scores, target = random(4, 3, 3, seed=1), random(4, 3, 3, seed=2)
  want = 0.0
  for k, width in ((0, 2), (1, 3)):
    new, old = scores[:, k, :width], target[:, k, :width]
    if over == "samples":
      new, old = new.T, old.T
    want += np.mean([kl(softmax(o), softmax(n)) for n, o in zip(new, old, strict=True)])
  args = (jnp.asarray(scores), jnp.asarray(target), jnp.asarray(SEEN), over)
  got, gradient = jax.value_and_grad(prd.divergence)(*args)
  assert float(got) == pytest.approx(want, rel=1e-5)
  assert (np.abs(gradient).max(0) > 0)[SEEN].all()
  assert not np.abs(gradient).max(0)[~SEEN].any()


def test_divergence_is_nothing_while_there_is_no_earlier_task():
  s = jnp.asarray(random(4, 3, 3))
  for over in ("classes", "samples"):
    got, gradient = jax.value_and_grad(prd.divergence)(s, 2 * s, jnp.zeros((3, 3), bool), over)
    assert got == 0 and not np.asarray(gradient).any()


@pytest.fixture
def gradients(digits_config, monkeypatch):
  """(**keys of the method) -> gradients of the objective in the second of three tasks."""

  def get(**keys):
    objectives = []
    monkeypatch.setattr(
      prd, "make_fit", lambda *_, objective_fn, **__: objectives.append(objective_fn)
    )
    config = digits_config("prd", **{f"method.{k}": v for k, v in keys.items()})
    with building_anew():
      experiment.build(resolve(config))
    encoder = {
      "fc1": {"kernel": random(64, 256) / 8, "bias": random(256)},
      "fc2": {"kernel": random(256, 256) / 16, "bias": random(256)},
    }
    projection = prd.Projection().init(jax.random.key(0), jnp.zeros((1, 256)))["params"]
    params = {"encoder": encoder, "projection": projection, "prototypes": random(3, 10, 256)}
    # not where the teacher is, or the distillation's gradient would be 0
    teacher = jax.tree.map(lambda x: 0.9 * x, {k: params[k] for k in ("encoder", "prototypes")})
    seen = np.zeros((3, 10), bool)
    seen[0] = True
    frozen = {"teacher": teacher | {"stats": {}}, "seen": seen, "t": jnp.int32(1)}
    label = jnp.arange(20) % 10
    batch = batches.Batch(jnp.asarray(random(20, 8, 8, 1)), label, jnp.int32(10), None)

    def loss(params):
      return objectives[0](params, frozen, {}, batch, True, jax.random.key(0))[0]

    return jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, params))

  return get


def largest(tree):
  return max(float(np.abs(x).max()) for x in jax.tree.leaves(tree))


def test_each_loss_trains_its_own_parts(gradients):
  without, alone = gradients(beta=0.0, alpha=0.0), gradients(alpha=0.0)
  assert largest(without["encoder"]) > 0 and largest(without["projection"]) > 0
  assert not np.asarray(without["prototypes"]).any()
  # the prototypes' loss: those of the task, nothing else
  for part in ("encoder", "projection"):
    jax.tree.map(np.testing.assert_array_equal, without[part], alone[part])
  assert [largest(p) > 0 for p in alone["prototypes"]] == [False, True, False]
  # the distillation: the encoder and the prototypes of earlier tasks
  both = gradients(beta=0.0)
  jax.tree.map(np.testing.assert_array_equal, both["projection"], without["projection"])
  change = jax.tree.map(lambda a, b: a - b, both["encoder"], without["encoder"])
  assert largest(change) > 1e-4
  assert [largest(p) > 0 for p in both["prototypes"]] == [True, False, False]


def test_grey_images_are_cropped_and_mirrored_alone():
  image = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (64, 6, 6, 1)), jnp.float32)
  got = np.asarray(prd.augment(jax.random.key(0), image, True))
  for x, y in zip(np.asarray(image), got, strict=True):
    assert set(y.ravel()) <= {*x.ravel(), -1.0}
  assert (got == -1).any() and (got != -1).any()


def test_colours_change_as_often_as_they_should():
  image = jnp.asarray(random(2000, 4, 4, 3))
  free, cut = (np.asarray(prd.change_colours(jax.random.key(1), image, c)) for c in (False, True))
  grey = (np.ptp(free, axis=-1) < 1e-6).all((1, 2))
  same = (free == np.asarray(image)).all((1, 2, 3))
  assert grey.mean() == pytest.approx(0.2, abs=0.03)
  assert same.mean() == pytest.approx(0.2 * 0.8, abs=0.03)
  jittered = ~(cut == free).all((1, 2, 3))
  assert jittered.mean() == pytest.approx(0.8, abs=0.03)
  assert cut[jittered].min() >= 0 and cut[jittered].max() <= 1 + 1e-6


def test_jitter_is_brightness_contrast_and_saturation():
  """Whatever the factors: the mean luminance is scaled by one of them, within its range."""
  image = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (500, 4, 4, 3)), jnp.float32)
  got = np.asarray(prd.change_colours(jax.random.key(2), image, False))
  weights = np.array([0.299, 0.587, 0.114])
  ratio = (got @ weights).mean((1, 2)) / (np.asarray(image) @ weights).mean((1, 2))
  assert 0.6 - 1e-5 <= ratio.min() < 0.62 and 1.38 < ratio.max() <= 1.4 + 1e-5


def test_with_running_statistics_an_image_is_predicted_alone(digits_config):
  keys = {"method.batch_norm": "running", "method.epochs": 1, "train_fraction": 0.1}
  config = resolve(digits_config("prd", network="lenet", **keys))
  benchmark, _, method, _ = experiment.build(config)
  state = method.init(jax.random.key(0), benchmark)
  for t in range(2):
    before = state.shared
    state, _ = method.learn(
      state, (benchmark.tasks[t],), jax.random.key(t), Store("", lambda event: None)
    )
  moved = jax.tree.map(lambda a, b: a - b, state.shared["stats"], before["stats"])
  assert largest(moved) > 0
  image = jnp.asarray(random(5, 8, 8, 1))
  whole = method.predict(state, 0, image)
  np.testing.assert_allclose(method.predict(state, 0, image[:1]), whole[:1], atol=1e-5)
