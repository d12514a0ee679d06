"""The network of the first task, from which the later tasks start.

The key `base_training` says what becomes of a network that was trained elsewhere:

| value   | the first task                      | base of the later tasks |
|---------|-------------------------------------|-------------------------|
| all     | trains all parameters               | its network             |
| head    | trains its head                     | the pretrained network  |
| none    | trains nothing                      | the pretrained network  |
| perturb | is learned as the later ones are,   | the pretrained network  |
|         | for which nothing here is called    |                         |
"""

from collections.abc import Callable

import jax

from halrp_jax.training import networks
from halrp_jax.training.fit import Fit, make_fit
from halrp_jax.training.setup import Setup
from halrp_jax.types import Params, Store, Task, UserError
from halrp_jax.weights import trees

LearnFirst = Callable[[Task, jax.Array, Store], tuple[Params, Params]]


def make(setup: Setup, l2: float, fit_all: Fit | None = None) -> LearnFirst:
  """Builds `learn_first(task, key, store) -> params, stats` as `Setup.base_training` says.

  Args:
    setup: settings of the run.
    l2: coefficient of |W|^2 over the kernels of all layers except the head, if all are trained.
    fit_all: `fit` of the plain network if the method has compiled it already.

  Raises:
    UserError: if the base has no head or other statistics than `base_training` needs.
  """
  _check(setup)
  initialize = networks.make_initialize(setup)
  fit_all = fit_all or make_fit(setup, *networks.plain_network(setup.model))
  fit_head = make_fit(setup, *networks.head_network(setup.model))

  def learn_first(task, key, store):
    init_key, fit_key = jax.random.split(key)
    params, stats = initialize(init_key)
    epochs, store = setup.epochs, store.child("base")
    if setup.base_training == "all":
      return fit_all(params, stats, {"l2": l2}, task, fit_key, epochs, store)
    if setup.base_training == "head":
      head = {trees.HEAD: params[trees.HEAD]}
      head, _ = fit_head(head, stats, {"params": params}, task, fit_key, epochs, store)
      return params | head, stats
    assert setup.base is not None and setup.base_training == "none"
    return setup.base.params, stats

  return learn_first


def _check(setup: Setup) -> None:
  """Raises UserError if head or statistics of the base do not fit `base_training`."""
  if setup.base_training == "all" or setup.base is None:
    return
  if setup.base_training == "none" and not setup.base.has_head:
    raise UserError(
      f"base_training = 'none' needs a base with a head of {setup.max_classes} outputs, and base "
      "has none: set base_training=head"
    )
  if setup.base.stats and setup.batch_norm == "population":
    raise UserError(
      f"base_training = {setup.base_training!r} keeps the BatchNorm statistics of base: set "
      "method.batch_norm=frozen or running, which do too"
    )
