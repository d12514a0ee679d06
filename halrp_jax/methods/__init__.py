"""The systems by name. Each is one module with

  Config          its own config keys (`method.*`): a dataclass of fields made by `keys`
  VARIANTS        optional: {variant: {key: value}}, what a key left None means
  check(config)   optional: errors that concern several keys of a run's config, a list of lines
  TaskState       what it keeps of a task: a NamedTuple with at least `stats` and `num_classes`
  make(config, setup) -> types.Method     config: its own

To add one: a file beside this one and a line in `METHODS`.
"""

from halrp_jax import models
from halrp_jax.devices import parallel
from halrp_jax.keys import Config
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
  iru,
  l2,
  mtl,
  prd,
  stl,
  wsn,
)
from halrp_jax.training import contract, evaluate, population
from halrp_jax.training.setup import Setup
from halrp_jax.types import Benchmark, Method, State, UserError

METHODS = {
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
}

# whose rules need the kernel [.., J] of every layer to have its inputs before and its outputs last
_PLAIN_LAYERS = {"apd", "apdfix", "bmkp", "clr", "gpm", "ibpwf", "iru", "wsn"}


def make(
  config: Config, model, benchmark: Benchmark, layout: parallel.Layout | None = None
) -> Method:
  """Builds the method that `config.method.name` names, ready to learn and to predict.

  Without a layout, that of `config.parallel` is made.

  Raises:
    UserError: if the network is not what the method demands (`contract`).
  """
  _check_network(config.method.name, model, benchmark)
  setup = setup_of(config, model, benchmark, layout)
  method = _complete(config, setup)
  if config.method.batch_norm == "population" or models.evaluates_with_batch(model):
    if not contract.is_own(model):
      population.require_measurable(model, benchmark.image_shape)
    fixed = models.with_stored_statistics(model)
    logits_fn = (
      method if fixed is model else _complete(config, setup._replace(model=fixed))
    ).logits
    learn = population.keep(method, logits_fn, setup.evaluation_batch_size)
    method = method._replace(learn=learn)
  return method._replace(predict=evaluate.make_predict(method))


def setup_of(
  config: Config, model, benchmark: Benchmark, layout: parallel.Layout | None = None
) -> Setup:
  """Returns what a method is made from, beside its own config."""
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
  )


def _complete(config: Config, setup: Setup) -> Method:
  """Returns what the method's file gives, with `logits`."""
  method = METHODS[config.method.name].make(config.method, setup)
  if method.logits:
    return method
  return method._replace(logits=evaluate.logits_of(setup.model, method.network))


def restore(name: str, state: State) -> State:
  """Returns a state that was read, where older versions kept dicts in place of `TaskState`."""
  kind = METHODS[name].TaskState

  def typed(task):
    return kind(**({"stats": {}} | task)) if isinstance(task, dict) else task

  return State(state.shared, tuple(map(typed, state.tasks)))


def _check_network(name: str, model, benchmark: Benchmark) -> None:
  """Refuses a network of somebody else's that the method can't work with."""
  if contract.is_own(model) or name in ("halrp", "be"):  # which do it themselves
    return
  variables = contract.check(model, benchmark.image_shape, benchmark.max_classes)
  if name in _PLAIN_LAYERS:
    contract.check_plain(model, variables, benchmark.image_shape, name)
  if name == "mtl" and not hasattr(model, "num_classes"):
    raise UserError(
      f"mtl widens the head: {type(model).__name__} needs a field num_classes, the head's width"
    )


def variant_defaults(method_config: dict) -> dict:
  """What the keys left None mean under `method.variant`; empty for methods without variants."""
  variants = getattr(METHODS[method_config["name"]], "VARIANTS", {})
  chosen = method_config.get("variant")
  return variants.get(chosen, {}) if isinstance(chosen, str) else {}
