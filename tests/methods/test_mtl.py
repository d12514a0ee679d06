"""Claims of joint training: which images share a batch, whose permutation and head they get."""

import jax
import numpy as np
import pytest

from halrp_jax import methods
from halrp_jax.config import make_config, resolve
from halrp_jax.runs import experiment
from halrp_jax.training import batches, epoch


@pytest.fixture(scope="module")
def config():
  return resolve(make_config("mtl", protocol={}, benchmark="digits", batch_size=64))


@pytest.fixture(scope="module")
def built(config):
  return experiment.build(config)


@pytest.fixture(scope="module")
def digits(built):
  return built[0]


def test_joined_inputs_are_those_of_each_task(digits):
  joint = batches.join_tasks(digits.tasks[:3], mixed=True)
  owner = np.asarray(joint.train.owner)
  rows = np.array([np.flatnonzero(owner == t)[5] for t in (2, 0, 1)])
  got = batches.make_batch(joint.train, joint.inputs, joint.num_classes, rows)
  for i, t in enumerate((2, 0, 1)):
    image, label = batches.load_batch(digits.tasks[t].train, digits.tasks[t].inputs, np.array([5]))
    np.testing.assert_allclose(got.image[i], image[0], atol=1e-6)
    assert int(got.label[i]) == int(label[0]) and int(got.owner[i]) == t
  assert got.num_classes.shape == (3, 1)
  assert joint.blocks == (len(owner),)


def test_single_task_batches_take_turns_and_cover_every_image(config, built):
  """Full batches of the tasks in turn, every image once an epoch."""
  digits, model, *_ = built
  joint = batches.join_tasks(digits.tasks[:3], mixed=False)
  owner, seen = np.asarray(joint.train.owner), []

  def step(state, rows, *args):
    jax.debug.callback(lambda rows: seen.append(np.asarray(rows)), rows)
    return state, jax.numpy.zeros(2)

  run_epoch = epoch.make(methods.setup_of(config, model, digits), step)
  run_epoch(None, {}, {}, (), joint.blocks, jax.random.key(0), lambda *args: None)
  jax.effects_barrier()
  assert all(len(set(owner[rows])) == 1 for rows in seen)
  assert sorted(np.concatenate(seen)) == list(range(len(owner)))
  full = [owner[rows][0] for rows in seen if len(rows) == 64]
  assert full == [0, 1, 2] * (len(full) // 3) and len(full) > 6


@pytest.mark.parametrize("mix", ["single", "mixed"])
def test_all_tasks_are_learned_at_once(mix, digits_config, tmp_path):
  record = experiment.run(digits_config("mtl", **{"method.mix": mix}), str(tmp_path))
  assert record["average_accuracy"] > 70
  assert record["bwt"] is None and record["forgetting"] is None
