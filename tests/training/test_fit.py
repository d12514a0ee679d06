import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from halrp_jax import data, methods, models
from halrp_jax.config import resolve
from halrp_jax.nn import layers
from halrp_jax.training import batches, epoch, losses, networks
from halrp_jax.training.evaluate import evaluate
from halrp_jax.training.fit import Recipe, learning_rate_decay, make_fit
from halrp_jax.types import Inputs, Store


def fit_plain(config, epochs=None, seed=0, loss_scale=None):
  """Trains the plain network on the first task; returns params, events."""
  config = resolve(config)
  benchmark = data.load(config)
  model = models.make(config.network, benchmark.max_classes)
  fit = make_fit(methods.setup_of(config, model, benchmark), *networks.plain_network(model))
  params, stats = networks.initialize(model, jax.random.key(0), benchmark.image_shape)
  events = []
  params, _ = fit(
    params,
    stats,
    {"l2": 1e-4},
    benchmark.tasks[0],
    jax.random.key(seed),
    epochs or config.epochs,
    Store("test", events.append),
  )
  return params, [e for e in events if e["event"] == "epoch"]


def test_images_are_scaled_permuted_and_normalised():
  image = np.arange(2 * 2 * 2 * 1, dtype=np.uint8).reshape(2, 2, 2, 1)
  inputs = Inputs(np.float32([0.5]), np.float32([0.25]), np.int32([3, 2, 1, 0]))
  got = batches.prepare_images(image, inputs)
  want = (image[:, ::-1, ::-1] / 255 - 0.5) / 0.25
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_permutation_mixes_channels_jointly():
  image = np.arange(3, dtype=np.uint8).reshape(1, 1, 1, 3)
  inputs = Inputs(np.zeros(3, np.float32), np.ones(3, np.float32) / 255, np.int32([2, 0, 1]))
  np.testing.assert_allclose(batches.prepare_images(image, inputs).ravel(), [2, 0, 1], atol=1e-5)


def test_classes_beyond_the_tasks_own_get_no_probability_and_no_gradient():
  logits, label = jnp.array([[1.0, 2.0, 9.0]]), jnp.array([0])
  loss, gradient = jax.value_and_grad(losses.cross_entropy)(logits, label, 2)
  assert float(loss) == pytest.approx(float(np.log1p(np.e)), rel=1e-6)
  assert gradient[0, 2] == 0 and np.all(np.isfinite(gradient))


def test_l1_is_flat_at_zero():
  value, gradient = jax.value_and_grad(losses.sum_absolute)(jnp.array([-2.0, 0.0, 3.0]))
  assert value == 5
  np.testing.assert_array_equal(gradient, [-1, 0, 1])


@pytest.mark.parametrize("rest", ["train", "drop"])
def test_scan_and_steps_learn_the_same(digits_config, rest):
  """Same batches in the same order: equal to rounding over the first epochs."""
  overrides = {"protocol.last_batch": rest, "batch_size": 100}
  (a, events_a), (b, events_b) = (
    fit_plain(digits_config("stl", loop=loop, **overrides)) for loop in ("scan", "steps")
  )
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-4)
  for x, y in zip(events_a, events_b, strict=True):
    assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)


def test_how_an_epoch_is_cut_does_not_change_a_bit(digits_config, monkeypatch):
  (a, _), (b, _) = (
    fit_plain(digits_config("stl", batch_size=32, loop="scan"))
    for seconds in (1e-9, 1e9)
    if monkeypatch.setattr(epoch, "_CHUNK_SECONDS", seconds) is None
  )
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


def test_plain_convolutions_are_not_put_into_a_loop_on_the_cpu(digits_config):
  """The automatic loop of a network with plain convolutions is the one over steps."""

  class Plain(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      return nn.Dense(10, name="head")(nn.Conv(4, (3, 3))(x).reshape(len(x), -1))

  class Fast(Plain):
    @nn.compact
    def __call__(self, x, train=False):
      return nn.Dense(10, name="head")(layers.conv(4, 3, 1, name="conv")(x).reshape(len(x), -1))

  if jax.default_backend() != "cpu":
    pytest.skip("the automatic loop asks on the CPU alone")
  config = resolve(digits_config("stl"))
  benchmark = data.load(config)
  task = benchmark.tasks[0]
  for model, in_a_loop in ((Plain(), False), (Fast(), True)):
    traces = []

    def apply_fn(params, frozen, stats, image, train_mode, key, model=model, traces=traces):
      traces.append(image.shape)
      return model.apply({"params": params}, image), stats

    setup = methods.setup_of(config, model, benchmark)
    fit = make_fit(setup, apply_fn, lambda params, frozen: 0.0)
    params, stats = networks.initialize(model, jax.random.key(0), (8, 8, 1))
    fit(params, stats, {}, task, jax.random.key(0), 1, Store("", lambda event: None))
    # full and last batch; a network that isn't put into a loop is traced once more to find out
    assert len(traces) == (2 if in_a_loop else 3)


def test_the_loss_goes_down(digits_config):
  _, events = fit_plain(digits_config("stl"), epochs=5)
  losses = [e["loss"] for e in events]
  assert losses[-1] < 0.5 * losses[0]
  assert events[-1]["train_accuracy"] > 80


def test_keep_best_returns_the_epoch_of_the_best_validation_accuracy(digits_config):
  config = digits_config("stl", **{"protocol.keep": "best", "learning_rate": 0.1, "epochs": 6})
  params, events = fit_plain(config)
  scores = [e["valid_accuracy"] for e in events]
  best = int(np.argmax(scores))
  again, _ = fit_plain(digits_config("stl", **{"learning_rate": 0.1, "epochs": 6}), epochs=best + 1)
  for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(x, y)


def test_shuffling_changes_the_run_and_its_absence_ignores_the_key(digits_config):
  def leaves(shuffle, seed):
    config = digits_config("stl", **{"protocol.shuffle": shuffle})
    return jax.tree.leaves(fit_plain(config, seed=seed)[0])

  same = zip(leaves(False, 0), leaves(False, 1), strict=True)
  assert all(np.array_equal(x, y) for x, y in same)
  different = zip(leaves(True, 0), leaves(True, 1), strict=True)
  assert not all(np.array_equal(x, y) for x, y in different)


def test_the_callers_parameters_survive(digits_config):
  """The state is donated to the step; what the caller passed must not be."""
  config = resolve(digits_config("stl"))
  benchmark = data.load(config)
  model = models.make("mlp", 10)
  fit = make_fit(methods.setup_of(config, model, benchmark), *networks.plain_network(model))
  params, stats = networks.initialize(model, jax.random.key(0), benchmark.image_shape)
  before = jax.tree.map(np.asarray, params)
  store = Store("test", lambda event: None)
  fit(params, stats, {"l2": 0.0}, benchmark.tasks[0], jax.random.key(0), 1, store)
  for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
  ("schedule", "num_tasks", "fraction", "per_step"),
  [
    # of the authors' code: CIFAR Split 100 %, SuperClass 100 %, Split 5 %
    ("code", 10, 1.0, 0.998360),
    ("code", 20, 1.0, 0.996723),
    ("code", 10, 0.05, 0.967705),
    ("constant", 10, 1.0, 1.0),
  ],
)
def test_learning_rate_decay_is_that_of_the_authors_program(
  digits_config, schedule, num_tasks, fraction, per_step
):
  config = resolve(digits_config("stl", batch_size=128, train_fraction=fraction))
  benchmark = data.load(resolve(digits_config("stl")))
  benchmark = benchmark._replace(tasks=(benchmark.tasks * 2)[:num_tasks])
  setup = methods.setup_of(config, models.make("mlp", 10), benchmark)
  decay = learning_rate_decay(setup, schedule, benchmark.tasks[0])
  assert decay == pytest.approx(per_step, abs=5e-7)


def test_epoch_schedule_decays_by_five_percent_per_epoch(digits_config):
  config = resolve(digits_config("stl"))
  benchmark = data.load(config)
  task = benchmark.tasks[0]
  steps = len(task.train.index) / config.batch_size
  setup = methods.setup_of(config, models.make("mlp", 10), benchmark)
  assert learning_rate_decay(setup, "epoch", task) ** steps == pytest.approx(0.95)


@pytest.mark.parametrize(("num_images", "rest", "steps"), [(200, "train", 4), (200, "drop", 3)])
def test_steps_per_epoch(digits_config, num_images, rest, steps):
  config = digits_config("stl", batch_size=60, **{"protocol.last_batch": rest})
  assert resolve(config).steps_per_epoch(num_images) == steps


def test_evaluate_counts_every_image_once(digits_config):
  config = resolve(digits_config("stl"))
  task = data.load(config).tasks[0]
  label = np.asarray(task.test.label)
  empty = task.test._replace(index=task.test.index[:0], label=task.test.label[:0])
  three, four, none = evaluate(
    lambda i, image: jnp.tile(jnp.arange(10)[None] == 3 + i, (len(image), 1)),
    (task, task, task._replace(test=empty)),
    "test",
    64,
  )
  assert three == pytest.approx(100 * np.mean(label == 3))
  assert four == pytest.approx(100 * np.mean(label == 4))
  assert np.isnan(none)


def test_a_recipe_may_treat_parts_of_the_parameters_differently(digits_config):
  """SGD as PyTorch has it: decay is added after the gradient is scaled, and momentum follows."""
  config = resolve(digits_config("stl", batch_size=1038))
  benchmark = data.load(config)
  task = benchmark.tasks[0]
  slope = {"held": 0.3, "free": -0.2}

  def objective(params, frozen, stats, batch, train_mode, key):
    loss = sum(slope[k] * jnp.sum(params[k]) for k in slope)
    return loss, jnp.zeros((len(batch.label), 10)), stats

  decayed = optax.chain(optax.add_decayed_weights(0.1), optax.trace(0.9))
  fit = make_fit(
    methods.setup_of(config, models.make("mlp", 10), benchmark),
    None,
    lambda params, frozen: 0.0,
    objective_fn=objective,
    recipe=Recipe(
      optax.masked(decayed, {"held": True, "free": False}), 0.0, 0.01, 10.0, "constant", "last"
    ),
  )
  start = {k: jnp.array([2.0]) for k in slope}
  got, _ = fit(start, {}, {}, task, jax.random.key(0), 3, Store("", lambda event: None))
  held, speed = 2.0, 0.0
  for _ in range(3):  # one batch per epoch
    speed = 0.9 * speed + 10 * slope["held"] + 0.1 * held
    held -= 0.01 * speed
  assert float(got["held"][0]) == pytest.approx(held, rel=1e-6)
  assert float(got["free"][0]) == pytest.approx(2.0 + 3 * 0.01 * 10 * 0.2, rel=1e-6)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"params": jnp.int32}, "params/head/bias must be floating point"),
    ({"image": jnp.float32}, r"train: images must be uint8 \[N, H, W, C\]"),
    ({"label": jnp.float32}, r"train: index, label and owner must be integers \[n\]"),
    ({"label": slice(5)}, r"train: index, label and owner must be integers \[n\]"),
    ({"index": None}, r"train: index, label and owner must be integers \[n\]"),
    ({"num_classes": 10}, "num_classes must be a scalar for one task"),
  ],
)
def test_arguments_of_other_types_and_shapes_are_refused(digits_config, change, message):
  ((name, how),) = change.items()
  config = resolve(digits_config("stl"))
  benchmark = data.load(config)
  model = models.make("mlp", 10)
  fit = make_fit(methods.setup_of(config, model, benchmark), *networks.plain_network(model))
  params, _ = networks.initialize(model, jax.random.key(0), benchmark.image_shape)
  stats, task = {"count": jnp.int32(0)}, benchmark.tasks[0]  # which may be of any type
  if name == "params":
    params["head"]["bias"] = params["head"]["bias"].astype(how)
  elif name == "num_classes":
    task = batches.join_tasks([task, task], True)._replace(num_classes=np.int32(10))
  else:
    x = getattr(task.train, name)
    x = x[how] if isinstance(how, slice | None) else x.astype(how)
    task = task._replace(train=task.train._replace(**{name: x}))
  with pytest.raises(AssertionError, match=message):
    fit(params, stats, {"l2": 0.0}, task, jax.random.key(0), 1, Store("", lambda event: None))
