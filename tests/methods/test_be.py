"""The claim of BE: it is HALRP at rank 0."""

import jax
import numpy as np

from halrp_jax import methods
from halrp_jax.config import resolve
from halrp_jax.runs import experiment
from halrp_jax.training import networks
from halrp_jax.training.fit import make_fit
from halrp_jax.weights import lowrank

from .test_methods import QUIET


def test_it_is_halrp_at_rank_0(digits_config):
  """HALRP's network, whose low-rank columns are all zero, learns BE's second task."""
  config = resolve(digits_config("be"))
  benchmark, model, method, _ = experiment.build(config)
  state = method.init(jax.random.key(0), benchmark)
  keys = [jax.random.key(t) for t in range(2)]
  for t in range(2):
    state, _ = method.learn(state, (benchmark.tasks[t],), keys[t], QUIET)
  kernels, (first, second) = state.shared["kernels"], state.tasks
  init_key, fit_key = jax.random.split(keys[1])
  fresh, _ = networks.initialize(model, init_key, benchmark.image_shape)
  start = {
    "perturbation": {n: lowrank.identity(w, 5, fold=True) for n, w in kernels.items()},
    "rest": networks.fresh_head(first.rest, fresh),
  }
  setup = methods.setup_of(config, model, benchmark)
  fit = make_fit(setup, networks.perturbed_network(model), lambda *args: 0.0)
  args = (start, first.stats, state.shared, benchmark.tasks[1], fit_key, config.epochs)
  got, _ = fit(*args, QUIET)
  for name, p in got["perturbation"].items():
    np.testing.assert_allclose(p.R, second.perturbation[name].R, atol=1e-4)
    np.testing.assert_allclose(p.S, second.perturbation[name].S, atol=1e-4)
    assert not np.any(p.U) and not np.any(p.V)
    assert np.abs(p.R - 1).max() > 1e-2 and np.abs(p.S - 1).max() > 1e-2
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), got["rest"], second.rest)
