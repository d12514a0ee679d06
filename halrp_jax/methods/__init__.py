"""The continual-learning methods by name.

Each method is one module with

  Config                        its config keys `method.*`: a dataclass of fields made by `keys`
  VARIANTS                      optional: {variant: {key: value}}, values for keys that are None
  check(config) -> list[str]    optional: errors in a run's config that concern several keys
  TaskState                     the state of a task: a NamedTuple with at least `stats` and
                                `num_classes`
  make(config, setup) -> types.Method    builds the method; `config` is its `Config`

To add one, write a file beside this one, import it here and add a line to `METHODS`, and to
`_PLAIN_LAYERS` if it applies.
"""

# pyright: reportMissingParameterType=error, reportMissingTypeArgument=error

import functools
from types import ModuleType

import flax.linen as nn

from halrp_jax import models
from halrp_jax.devices import parallel
from halrp_jax.keys import Config, MethodConfig
from halrp_jax.methods import (
  apd,
  apdfix,
  be,
  bmkp,
  bn,
  clr,
  ewc,
  gpm,
  halrp,
  ibpwf,
  inflora,
  iru,
  l2,
  mtl,
  prd,
  sdlora,
  stl,
  wsn,
)
from halrp_jax.training import contract, evaluate, networks, population
from halrp_jax.training.setup import Setup, Start
from halrp_jax.types import Benchmark, Method, Params, State, UserError

METHODS: dict[str, ModuleType] = {
  "halrp": halrp,
  "stl": stl,
  "mtl": mtl,
  "l2": l2,
  "ewc": ewc,
  "bn": bn,
  "be": be,
  "clr": clr,
  "wsn": wsn,
  "gpm": gpm,
  "apdfix": apdfix,
  "apd": apd,
  "bmkp": bmkp,
  "prd": prd,
  "iru": iru,
  "ibpwf": ibpwf,
  "inflora": inflora,
  "sdlora": sdlora,
}

# Methods that support only Dense and ordinary 2-D convolutions (`contract.check_plain`): they need
# kernels [.., J] whose last axis indexes the outputs of the layer.
_PLAIN_LAYERS = {"apd", "apdfix", "bmkp", "clr", "gpm", "ibpwf", "iru"}


def make(
  config: Config,
  model: nn.Module,
  benchmark: Benchmark,
  layout: parallel.Layout | None = None,
  base: Start | None = None,
) -> Method:
  """Builds the method that `config.method.name` names, ready to learn and to predict.

  Args:
    config: config of the run.
    model: the network.
    benchmark: its number of tasks, image shape and widest task are used.
    layout: how the devices are used; by default made from `config.parallel`.
    base: parameters that new networks start from; None: random ones.

  Raises:
    UserError: if the network does not meet the requirements of the method (`contract`).
  """
  _check_network(config.method.name, model, benchmark)
  if config.method.batch_norm == "frozen":
    _check_frozen(model, benchmark)
  setup = setup_of(config, model, benchmark, layout, base)
  # Two networks of a user's own may be equal and behave differently. The method of simultaneous
  # runs keeps copies of their images and the kind of loop over batches that it chose.
  is_shared = contract.is_own(model) and config.parallel != "replicas"
  return (_make if is_shared else _make.__wrapped__)(config.method, setup)


@functools.lru_cache(maxsize=1)
def _make(config: MethodConfig, setup: Setup) -> Method:
  """Builds the method. The last one built is cached, together with its compiled functions.

  Runs that differ only in seed and in the order of the same tasks share it.
  """
  method = _complete(config, setup)
  if setup.batch_norm == "population" or models.evaluates_with_batch(setup.model):
    if not contract.is_own(setup.model):
      population.require_measurable(setup.model, setup.image_shape)
    stored_model = models.with_stored_statistics(setup.model)
    stored_method = (
      method
      if stored_model is setup.model
      else _complete(config, setup._replace(model=stored_model))
    )
    logits_fn = stored_method.logits
    assert logits_fn is not None  # `_complete` sets it
    learn = population.wrap_learn(method, logits_fn, setup.evaluation_batch_size)
    method = method._replace(learn=learn)
  return method._replace(predict=evaluate.make_predict(method))


def setup_of(
  config: Config,
  model: nn.Module,
  benchmark: Benchmark,
  layout: parallel.Layout | None = None,
  base: Start | None = None,
) -> Setup:
  """Returns what a method is made from besides its own config; arguments as for `make`."""
  return Setup(
    model=model,
    image_shape=benchmark.image_shape,
    num_tasks=len(benchmark.tasks),
    max_classes=benchmark.max_classes,
    epochs=config.epochs,
    batch_size=config.batch_size,
    evaluation_batch_size=config.images_per_evaluation,
    learning_rate=config.learning_rate,
    train_fraction=config.train_fraction,
    batch_norm=config.method.batch_norm,
    loop=config.loop,
    protocol=config.protocol,
    checkpoint=config.checkpoint,
    layout=layout or parallel.make_layout(config.parallel),
    base=base,
    base_training=config.base_training,
  )


def _complete(config: MethodConfig, setup: Setup) -> Method:
  """Returns the method as its module builds it, with `logits` derived from `network`."""
  method: Method = METHODS[config.name].make(config, setup)
  if method.logits is not None:
    return method
  assert method.network is not None, f"{config.name} has neither logits nor network"
  return method._replace(logits=evaluate.logits_of(setup.model, method.network))


def restore(name: str, state: State) -> State:
  """Converts task states that older versions stored as dicts to the method's `TaskState`.

  Other task states are returned unchanged.

  Args:
    name: name of the method.
    state: method state as it was read.
  """
  task_state = METHODS[name].TaskState

  def convert(task: Params) -> Params:
    return task_state(**({"stats": {}} | task)) if isinstance(task, dict) else task

  return State(state.shared, tuple(map(convert, state.tasks)))


def _check_network(name: str, model: nn.Module, benchmark: Benchmark) -> None:
  """Raises UserError if a user's own network can't be used with the method called `name`.

  Networks of `halrp_jax.models` need no check. HALRP and BE check the network themselves.
  """
  is_own = contract.is_own(model)
  if name in ("halrp", "be") or (is_own and (models.is_plain(model) or name not in _PLAIN_LAYERS)):
    return
  variables = contract.check(model, benchmark.image_shape, benchmark.max_classes)
  if name in _PLAIN_LAYERS:
    contract.check_plain(model, variables, benchmark.image_shape, name)
  if name == "mtl" and not hasattr(model, "num_classes"):
    raise UserError(
      f"mtl widens the head: {type(model).__name__} needs a field num_classes, the head's width"
    )


def _check_frozen(model: nn.Module, benchmark: Benchmark) -> None:
  """Raises UserError if the BatchNorm of a user's own network would change in training."""
  if contract.is_own(model) or getattr(model, "frozen", False):
    return
  if networks.statistics_of(model, benchmark.image_shape):
    raise UserError(
      f"method.batch_norm = 'frozen': {type(model).__name__} has BatchNorm that training changes: "
      "give it a field `frozen` that stops this, and set it, or set method.batch_norm=running"
    )


def variant_defaults(method_config: dict[str, object]) -> dict[str, object]:
  """Returns the values that `method.variant` gives to config keys that are None.

  Args:
    method_config: the keys `method.*` and their values.

  Returns:
    Values by key; {} for a method without variants.
  """
  variants = getattr(METHODS[str(method_config["name"])], "VARIANTS", {})
  chosen = method_config.get("variant")
  return variants.get(chosen, {}) if isinstance(chosen, str) else {}
