"""What is HALRP's own: sizes, pruning, ranks, variants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from halrp_jax import models
from halrp_jax.config import resolve
from halrp_jax.methods import halrp
from halrp_jax.runs import experiment
from halrp_jax.training import batches, networks, sizes
from halrp_jax.training.evaluate import evaluate
from halrp_jax.types import State, Store, UserError
from halrp_jax.weights import lowrank, trees

from ..conftest import building_anew

CAP = 100
QUIET = Store("test", lambda event: None)


@functools.cache
def lenet():
  model = models.make("lenet", 10)
  return jax.jit(lambda key: networks.initialize(model, key, (32, 32, 3)))(jax.random.key(0))


def lenet_state(num_tasks: int, rank: int, sigma: str = "folded") -> State:
  """A LeNet after `num_tasks` tasks of ten classes, all ranks at min(rank, full), random values."""
  params, stats = lenet()
  kernels, rest = trees.split(params)
  rng = np.random.default_rng(0)
  tasks = []
  for t in range(num_tasks):
    perturbation, ranks = {}, {}
    for name, kernel in kernels.items():
      num_in, num_out = kernel.shape[-2:]
      width = min(CAP, num_in, num_out)
      ranks[name] = k = min(rank, width) if t else 0
      p = lowrank.identity(kernel, width, sigma == "folded")
      u, v = np.zeros((num_out, width), np.float32), np.zeros((num_in, width), np.float32)
      u[:, :k], v[:, :k] = rng.normal(size=(num_out, k)), rng.normal(size=(num_in, k))
      perturbation[name] = p._replace(U=u, V=v)
    tasks.append(halrp.TaskState(perturbation, ranks, rest, stats, np.int32(10)))
  return State({"kernels": kernels}, tuple(tasks))


def method_config(digits_config, **switches):
  overrides = {f"method.{k}": v for k, v in ({"prune_scope": "all"} | switches).items()}
  return resolve(digits_config(**overrides)).method


class PruneOnly:
  prune = staticmethod(lowrank.prune)


def prune(state, m, num_tasks=10):
  return halrp.prune(PruneOnly, state, m, num_tasks)


def prune_all(state, m):
  assert m.prune_scope == "all"
  return prune(state, m)


def test_size_with_all_ranks_at_the_cap(digits_config):
  """Spec a.8 and h.5: Split, all ranks 100, bound .2 -> increment .235 after task 10."""
  m = method_config(digits_config, prune_bound=0.2)
  state = prune_all(lenet_state(10, CAP), m)
  assert round(sizes.perturbed(state).increment, 3) == 0.235


def test_size_of_one_task_by_hand():
  low_rank = 531_469  # spec b: low-rank values at the cap per task
  fixed = 5_393 + 2_740 + 5_010  # R and S, BatchNorm, head
  state = lenet_state(2, CAP)
  own = jax.tree.map(lambda x: x + 1, state.tasks[1].stats)
  size = sizes.perturbed(state._replace(tasks=(state.tasks[0], state.tasks[1]._replace(stats=own))))
  assert size.base == 2_995_620
  assert size.paper == size.base + fixed + low_rank
  statistics, biases = 2_740, 1_370
  assert size.dense == size.paper + 2 * statistics + biases
  assert size.nonzero == size.dense and size.mask_bits == 0
  assert sizes.perturbed(state).dense == size.dense - statistics  # those of the first are kept once


def test_sigma_is_counted_where_it_is_kept():
  folded, kept = (sizes.perturbed(lenet_state(2, 7, sigma)) for sigma in ("folded", "kept"))
  assert kept.paper - folded.paper == 3 + 7 + 7 + 7  # conv1 has rank 3 at most


def test_pruned_values_need_a_mask_and_are_no_size(digits_config):
  m = method_config(digits_config, prune_bound=0.1)
  state = lenet_state(2, CAP)
  pruned = sizes.perturbed(prune_all(state, m))
  whole = sizes.perturbed(state)
  assert pruned.mask_bits == 531_469
  assert pruned.dense == whole.dense and pruned.nonzero < whole.nonzero
  kept = pruned.paper - pruned.base - 13_143
  dense_growth = (13_143 + 531_469) / 2_995_620
  assert kept == pytest.approx(531_469 * 0.1 / dense_growth, rel=1e-4)


def test_below_the_bound_nothing_is_pruned_not_even_zeros(digits_config):
  m = method_config(digits_config, prune_bound=0.6, prune_threshold=10.0)
  state = lenet_state(2, CAP)
  assert prune_all(state, m) is state


def test_unbounded_mixed_pruning_applies_the_absolute_threshold_alone(digits_config):
  m = method_config(digits_config, prune_bound="none", prune_threshold=0.5)
  p = prune_all(lenet_state(2, 5), m).tasks[1].perturbation["fc1"]
  before = lenet_state(2, 5).tasks[1].perturbation["fc1"]
  np.testing.assert_array_equal(p.U, np.where(np.abs(before.U) > 0.5, before.U, 0))


def test_what_is_pruned_stays_zero_in_the_epochs_after_it(digits_config, monkeypatch):
  """And the values that are left are trained on; the size is that of pruning."""
  recover, seen = halrp.recover, []

  def spy(f, config, state, *args):
    seen.append(state)
    return recover(f, config, state, *args)

  monkeypatch.setattr(halrp, "recover", spy)
  switches = {"method.prune_bound": 0.02, "method.prune_epochs": 1, "method.alpha": 1.0}
  state, *_ = learn_two(digits_config("halrp", epochs=4, **switches))
  (pruned,) = seen
  after, before = (s.tasks[1].perturbation for s in (state, pruned))
  for name, p in before.items():
    for x, y in ((p.U, after[name].U), (p.V, after[name].V)):
      zero = np.asarray(x) == 0
      assert 0.2 < zero.mean() < 1
      np.testing.assert_array_equal(np.asarray(y) == 0, zero)
      assert (np.asarray(y) != np.asarray(x))[~zero].mean() > 0.9
  assert sizes.perturbed(state).paper == sizes.perturbed(pruned).paper


@pytest.mark.parametrize(
  ("switches", "says"),
  [
    ({"prune_epochs": 2}, "warmup_epochs . method.prune_epochs = 3 must be less than epochs = 3"),
    ({"prune_epochs": 1, "prune_scope": "all"}, "prune_epochs = 1 are after a task was pruned"),
    ({"prune_epochs": 1, "prune": "none"}, "prune_epochs = 1 are after a task was pruned"),
  ],
)
def test_epochs_after_pruning_that_do_not_fit_are_refused(switches, says, digits_config):
  with pytest.raises(UserError, match=says):
    resolve(digits_config("halrp", epochs=3, **{f"method.{k}": v for k, v in switches.items()}))


def test_the_bound_of_a_task_does_not_depend_on_their_number(digits_config):
  state = lenet_state(3, CAP)
  switches = {"prune_scope": "new", "prune_bound": 0.18}
  shared = prune(state, method_config(digits_config, **switches), num_tasks=10)  # 0.02 each
  own = method_config(digits_config, **switches, task_bound=0.02)
  for num_tasks in (3, 1000):
    jax.tree.map(np.testing.assert_array_equal, prune(state, own, num_tasks), shared)
  assert sizes.perturbed(shared).paper < sizes.perturbed(state).paper
  with pytest.raises(
    UserError, match="task_bound = 0.02 bounds each task when it is pruned: set method"
  ):
    method_config(digits_config, task_bound=0.02)


@pytest.mark.parametrize(
  ("switches", "bound"),
  [
    ({"prune_bound": 1.8}, 0.2),  # nine tasks
    ({"task_bound": 0.15, "sigma": "kept"}, 0.15),
    pytest.param({"task_bound": 0.2, "rank_rule": "flat"}, 0.2, marks=pytest.mark.slow),
  ],
)
def test_the_best_variant_fills_the_bound_of_a_task(digits_config, switches, bound):
  config = digits_config(
    **{"method.variant": "best"} | {f"method.{k}": v for k, v in switches.items()}
  )
  state, history, _ = learn_two(config)
  sizes_by_task = [sizes.perturbed_task(state, t) for t in range(2)]
  base = sizes_by_task[0].base
  p = state.tasks[1].perturbation
  column = {n: (q.R.size + q.V.shape[0]) / 4 + 1 for n, q in p.items()}
  assert bound - min(column.values()) / base <= sizes_by_task[1].paper / base <= bound
  for name, k in history["ranks"].items():
    assert p[name].U.dtype == p[name].V.dtype == np.int8
    assert np.abs(p[name].U[:, :k]).max(0).tolist() == [127] * k and not np.any(p[name].U[:, k:])


@pytest.mark.parametrize(
  ("switches", "says"),
  [
    ({"prune_bound": "none"}, "'bound' fills method.task_bound or method.prune_bound: set one"),
    (
      {"prune": "mixed"},
      "factors = 'int8' stores zeros as other values, so that pruning makes no task smaller",
    ),
    (
      {"rank_rule": "lora", "scales": False},
      "'lora' keeps nothing of the kernels that a long warm",
    ),
    ({"rank_rule": "eva"}, "'eva' has directions of sums over a window: set method.conv_form"),
  ],
)
def test_a_bound_that_can_not_be_filled_is_refused(digits_config, switches, says):
  config = digits_config(
    **{"method.variant": "best"} | {f"method.{k}": v for k, v in switches.items()}
  )
  with pytest.raises(UserError, match=says):
    learn_two(config)


@pytest.mark.parametrize("switches", [{"task_bound": 0.01}, {"prune_bound": 0.01}])
def test_a_bound_without_room_for_columns_is_noted_and_ends_nothing(digits_config, switches):
  own = {f"method.{k}": v for k, v in ({"variant": "best"} | switches).items()}
  state, history, events = learn_two(digits_config(**own, train_fraction=0.1))
  assert history["ranks"] == {"fc1": 0, "fc2": 0}
  (note,) = [e["note"] for e in events if e["event"] == "note"]
  assert "so that all ranks are 0: set a larger method.task_bound" in note
  assert not np.any(state.tasks[1].perturbation["fc1"].U)


def test_the_share_of_the_warm_up_leaves_an_epoch_for_fine_tuning(digits_config):
  best = {"method.variant": "best", "method.warmup_share": 1.0, "train_fraction": 0.1}
  _, _, events = learn_two(digits_config(**best, epochs=4))
  phases = [e["phase"] for e in events if e["event"] == "epoch"]
  assert phases == ["test/base"] * 4 + ["test/warmup"] * 3 + ["test/finetune"]
  with pytest.raises(
    UserError, match="the epochs of method.warmup_share = 1 must be less than epochs"
  ):
    resolve(digits_config(**best, epochs=1))


def test_the_best_variant_without_a_low_rank_part_has_no_budget(digits_config):
  config = digits_config(
    **{"method.variant": "best", "method.rank_rule": "none", "method.warmup_share": 0.0}
  )
  assert learn_two(config)[1]["ranks"] == {"fc1": 0, "fc2": 0}


@pytest.mark.parametrize("rule", sorted(lowrank.PRUNE_RULES))
def test_percentiles_see_no_padding(digits_config, rule):
  """Rank 5 of 100 columns: the padding must not pull the percentile down to zero."""
  m = method_config(digits_config, prune=rule, prune_rate="fixed", prune_bound=0.5)
  state = lenet_state(3, 5)
  values = [v for p in state.tasks[1:] for v in sizes.low_rank_values(p).values()]
  after = prune_all(state, m)
  kept = sum(
    int(jnp.count_nonzero(x))
    for p in after.tasks[1:]
    for q in p.perturbation.values()
    for x in (q.U, q.V)
  )
  total = sum(v.size for v in values)
  if rule == "none":
    assert kept == total
  elif rule == "absolute":
    assert kept == sum(int(np.sum(np.abs(v) > 1e-5)) for v in values)
  else:
    assert kept == pytest.approx(0.5 * total, rel=0.01)


def test_a_task_pruned_when_it_is_learned_ends_as_large_as_one_pruned_again_and_again(
  digits_config,
):
  """And never changes again, so that its BatchNorm statistics stay true."""
  m = method_config(digits_config, prune_bound=0.2, prune_scope="new")
  whole, state = lenet_state(10, CAP), lenet_state(1, CAP)
  for t in range(1, 10):
    before = state.tasks
    state = prune(state._replace(tasks=(*before, whole.tasks[t])), m)
    assert all(a is b for a, b in zip(state.tasks, before, strict=False))
  again = prune_all(whole, method_config(digits_config, prune_bound=0.2))
  assert sizes.perturbed(state).paper == pytest.approx(sizes.perturbed(again).paper, rel=1e-4)


def test_the_first_task_is_never_pruned(digits_config):
  m = method_config(digits_config, prune_rate="fixed", prune_bound=0.0)
  state = lenet_state(2, 5)
  assert prune_all(state, m).tasks[0] is state.tasks[0]


def learn_two(config):
  config = resolve(config)
  benchmark, _, method, _ = experiment.build(config)
  state, events = method.init(jax.random.key(0), benchmark), []
  store = Store("test", events.append)
  for t in range(2):
    state, history = method.learn(state, (benchmark.tasks[t],), jax.random.key(t), store)
  return state, history, events


@pytest.mark.parametrize(
  ("switches", "ranks"),
  [
    ({"rank_rule": "flat", "upper_rank": 7}, {"fc1": 7, "fc2": 7}),
    ({"rank_rule": "random", "upper_rank": 7}, {"fc1": 7, "fc2": 7}),
    ({"rank_rule": "none", "scales": False, "warmup_epochs": 0}, {"fc1": 0, "fc2": 0}),
    pytest.param({"rank_rule": "flat"}, {"fc1": 64, "fc2": 100}, marks=pytest.mark.slow),
    ({"alpha": 1.0}, {"fc1": 64, "fc2": 100}),  # the authors' code collapses to rank 1 here
    pytest.param({"alpha": 1.0, "upper_rank": 0}, {"fc1": 64, "fc2": 256}, marks=pytest.mark.slow),
    ({"alpha": 0.0, "upper_rank": 3}, {"fc1": 1, "fc2": 1}),
  ],
)
def test_rank_rules(digits_config, switches, ranks):
  config = digits_config(train_fraction=0.1, **{f"method.{k}": v for k, v in switches.items()})
  state, history, _ = learn_two(config)
  assert history["ranks"] == ranks
  assert {n: int(k) for n, k in state.tasks[1].rank.items()} == ranks


@pytest.mark.parametrize(
  ("switches", "exact"),
  [
    ({"svd_rank": 200}, True),  # all kept values are among the 64 of fc1 and the 200 of fc2
    ({"svd_rank": 3}, False),
    pytest.param({"svd_rank": 120, "rank_rule": "flat"}, True, marks=pytest.mark.slow),
    pytest.param({"svd_rank": 20, "rank_rule": "flat"}, False, marks=pytest.mark.slow),
  ],
)
def test_randomised_ranks_are_exact_or_say_that_they_are_not(digits_config, switches, exact):
  common = {"alpha": 0.6, "upper_rank": 30}
  runs = []
  for more in ({}, {"svd": "randomized"}):
    overrides = {f"method.{k}": v for k, v in (common | switches | more).items()}
    runs.append(learn_two(digits_config(**overrides)))
  (_, want, _), (_, got, events) = runs
  assert want["ranks_exact"] and got["ranks_exact"] == exact
  if exact:
    assert got["ranks"] == want["ranks"]
  else:
    assert max(got["ranks"].values()) == switches["svd_rank"]
  (event,) = [e for e in events if e["event"] == "ranks" and e["phase"] == "test"]
  assert event["ranks_exact"] == exact


def test_eva_starts_along_the_inputs_of_each_layer(digits_config):
  """V of fc1 are the principal directions of the task's training images, U is zero."""
  overrides = {"rank_rule": "eva", "upper_rank": 6, "warmup_epochs": 0, "scales": False}
  config = digits_config(
    learning_rate=1e-12, epochs=1, **{f"method.{k}": v for k, v in overrides.items()}
  )
  state, history, _ = learn_two(config)
  ranks = history["ranks"]
  assert sum(ranks.values()) == 12 and max(ranks.values()) <= 12
  p = state.tasks[1].perturbation["fc1"]
  task = experiment.build(resolve(config))[0].tasks[1]
  image, _ = batches.load_batch(task.train, task.inputs, np.arange(len(task.train.index)))
  _, _, directions = np.linalg.svd(np.asarray(image).reshape(len(image), -1), full_matrices=False)
  k = ranks["fc1"]
  cosines = np.abs(np.sum(np.asarray(p.V)[:, :k] * directions[:k].T, 0))
  np.testing.assert_allclose(cosines, 1, atol=1e-3)
  assert np.allclose(p.U, 0, atol=1e-6) and not np.any(np.asarray(p.V)[:, k:])
  assert (np.asarray(p.R) == 1).all() and (np.asarray(p.S) == 1).all()


@pytest.mark.parametrize("private", ["norm", "head"])
def test_parameters_that_are_not_private_stay_the_first_tasks(private, digits_config):
  overrides = {"method.private": private, "method.batch_norm": "running"}
  config = digits_config(network="lenet", train_fraction=0.1, **overrides)
  state, _, _ = learn_two(config)
  first, second = (traverse_util.flatten_dict(p.rest, sep="/") for p in state.tasks)
  changed = {n for n, x in second.items() if not np.array_equal(x, first[n])}
  head, norms = {n for n in changed if n.startswith("head/")}, {n for n in changed if "bn" in n}
  assert head == {"head/kernel", "head/bias"} and changed == head | norms
  assert bool(norms) == (private == "norm")
  fewer = sizes.perturbed(state, sizes.Owned(private)).dense < sizes.perturbed(state).dense
  assert fewer == (private == "head")  # all of LeNet's other parameters are BatchNorm's
  same = jax.tree.map(np.array_equal, state.tasks[1].stats, state.tasks[0].stats)
  assert all(jax.tree.leaves(same)) == (private == "head")


def test_a_private_head_needs_statistics_that_are_not_measured_again(digits_config):
  config = resolve(digits_config(network="lenet", **{"method.private": "head"}))
  with pytest.raises(UserError, match="set method.batch_norm=frozen or running"):
    experiment.build(config)


def test_pearl_keeps_a_share_of_each_layers_own_energy(digits_config):
  """The smallest ranks that exceed the share, found here from the residuals' singular values."""
  rule = {"method.rank_rule": "pearl", "method.scales": False, "method.prune": "none"}
  config = digits_config(**rule, **{"method.alpha": 0.7, "epochs": 3})
  seen, decompose = [], lowrank.decompose
  with pytest.MonkeyPatch.context() as patch:

    def watching(*args):
      found = decompose(*args)
      jax.debug.callback(lambda x: seen.append(np.asarray(x, np.float64)), found.sigma)
      return found

    patch.setattr(lowrank, "decompose", watching)
    with building_anew():
      _, history, _ = learn_two(config)
  wanted = [int(np.argmax(np.cumsum(x**2) > 0.7 * np.sum(x**2))) + 1 for x in seen]
  assert sorted(wanted) == sorted(history["ranks"].values()) and len(set(wanted)) > 1


def test_lora_starts_at_the_base_with_random_directions(digits_config):
  rule = {"method.rank_rule": "lora", "method.scales": False, "method.upper_rank": 5}
  config = digits_config(**rule, **{"method.warmup_epochs": 0, "learning_rate": 1e-12})
  state, history, _ = learn_two(config)
  assert set(history["ranks"].values()) == {5}
  for p in state.tasks[1].perturbation.values():
    assert np.abs(p.U).max() < 1e-6 and np.linalg.matrix_rank(np.asarray(p.V)) == 5
    assert (np.asarray(p.R) == 1).all() and (np.asarray(p.S) == 1).all()


def test_lrp_ignores_the_importance(digits_config):
  """With singular values alone the choice differs from the Hessian-aware one."""
  chosen = {
    rule: learn_two(digits_config(**{"method.rank_rule": rule}))[1]["ranks"]
    for rule in ("importance", "lrp")
  }
  assert chosen["importance"] != chosen["lrp"]


def test_columns_beyond_the_rank_are_zero_after_a_whole_task(digits_config):
  config = digits_config(**{"method.l1": 1e-3, "method.prune": "none", "epochs": 4})
  state, history, _ = learn_two(config)
  for name, p in state.tasks[1].perturbation.items():
    k = history["ranks"][name]
    assert k < p.U.shape[1]
    assert not np.any(p.U[:, k:]) and not np.any(p.V[:, k:])
    assert np.any(p.U[:, :k]) and np.any(p.V[:, :k])


def test_phases_are_those_of_algorithm_1(digits_config):
  config = digits_config(train_fraction=0.1, **{"epochs": 5, "method.warmup_epochs": 2})
  _, _, events = learn_two(config)
  phases = [e["phase"] for e in events if e["event"] == "epoch"]
  assert phases == ["test/base"] * 5 + ["test/warmup"] * 2 + ["test/finetune"] * 3


def test_more_kept_importance_means_a_better_start(digits_config):
  """The first fine-tuning epoch starts nearer to the warm-up with a higher alpha."""
  first_loss = {}
  for alpha in (0.0, 1.0):
    config = digits_config(**{"method.alpha": alpha, "epochs": 4, "method.warmup_epochs": 3})
    _, _, events = learn_two(config)
    first_loss[alpha] = events[-1]["loss"]
  assert first_loss[1.0] < first_loss[0.0]


@pytest.mark.parametrize(
  "variant", ["code", "paper", pytest.param("published", marks=pytest.mark.slow)]
)
def test_variants_learn(digits_config, variant):
  config = resolve(digits_config(**{"method.variant": variant, "epochs": 6}))
  benchmark, _, method, _ = experiment.build(config)
  state = method.init(jax.random.key(0), benchmark)
  for t in range(3):
    state, _ = method.learn(state, (benchmark.tasks[t],), jax.random.key(t), QUIET)
  task = benchmark.tasks[2]
  (accuracy,) = evaluate(lambda _, x: method.predict(state, 2, x), (task,), "test", 100)
  assert accuracy > 80
  assert config.method.importance == ("mean" if variant == "code" else "sum")


def test_the_paper_variant_keeps_and_trains_sigma(digits_config):
  config = digits_config(**{"method.variant": "paper", "epochs": 3})
  state, history, _ = learn_two(config)
  p = state.tasks[1].perturbation["fc1"]
  k = history["ranks"]["fc1"]
  assert np.all(p.sigma[:k]) and not np.any(p.sigma[k:])
  assert not np.all(np.diff(p.sigma[:k]) <= 0) or not np.allclose(
    np.linalg.norm(p.U[:, :k], axis=0), 1, atol=1e-3
  )
