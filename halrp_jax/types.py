"""The nouns of the project: data, method, size, state. Imports nothing of ours.

An experiment folds `Method.learn` over a tuple of tasks; everything else is bookkeeping.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:  # reports are drawn without JAX
  import jax
  import numpy as np

  Array = jax.Array | np.ndarray
else:
  Array = Any
Params = Any  # a pytree of arrays

# The files of a run's folder, and the version of the first.
RECORD, METRICS, CONFIG, TASKS, STANDING, LOCK, CHECKPOINTS = (
  "record.json",
  "metrics.jsonl",
  "config.json",
  "tasks.json",
  "standing.json",
  "lock",
  "checkpoints",
)
SCHEMA = 1
# JAX flags that change numbers, with the values JAX has by default
JAX_FLAGS = {
  "jax_enable_x64": False,
  "jax_default_prng_impl": "threefry2x32",
  "jax_threefry_partitionable": True,
  "jax_random_seed_offset": 0,
  "jax_high_dynamic_range_gumbel": False,
  "jax_default_matmul_precision": None,
}


class UserError(Exception):
  """Something the user can mend: config, data, arguments. Shown as one line, exit code 2."""


class UserErrors(UserError):
  """Several of them, found at once: the text is the first one, `lines` has all."""

  def __init__(self, lines):
    self.lines = tuple(lines)
    more = len(self.lines) - 1
    super().__init__(self.lines[0] + (f" (and {more} more; check_data lists them)" if more else ""))


class InUse(UserError):
  """A run's folder in which another process is at work: nothing is wrong, it is not free now."""


def one_line(text) -> str:
  """Returns a text on one line; what can't be printed, as a terminal's commands, is escaped."""
  line = " ".join(str(text).split())
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def brief(error: BaseException) -> str:
  """Returns a library's error message on one line of at most 200 characters, without addresses."""
  said = re.sub(r"<[\w.]+ (object )?at 0x[0-9a-fA-F]+>", "", str(error))
  said = one_line(said) or type(error).__name__
  return said if len(said) <= 200 else said[:200] + " ..."


class Split(NamedTuple):
  """Index set over the images that all splits of a benchmark share."""

  image: Array  # uint8 [N, H, W, C], the same array object in every split of a benchmark
  index: Array  # int32 [n] rows of `image`
  label: Array  # int32 [n] class within the task, 0..K-1
  owner: Array | None = None  # int32 [n] which of several tasks learned at once; None: one task


class Inputs(NamedTuple):
  """How stored uint8 images become network inputs: x / 255, permute, (x - mean) / std.

  C is the number of channels of the input. The stored image may have fewer: a permutation can name
  a value several times.
  """

  mean: Array  # float32 [C]
  std: Array  # float32 [C]
  permutation: Array | None  # int32 [H*W*C], rows of the flattened image; None: no permutation


class Task(NamedTuple):
  id: int  # the benchmark's own number for the task, whatever the order of training
  name: str
  class_names: tuple[str, ...]
  inputs: Inputs
  train: Split
  valid: Split
  test: Split
  own_test: bool = True  # the data set itself says which images are for testing
  data_hash: str = ""  # of all images and labels before any draw (data/content.py)
  split_hash: str = ""  # of the three splits, in their order

  @property
  def num_classes(self) -> int:
    return len(self.class_names)


class Benchmark(NamedTuple):
  name: str
  tasks: tuple[Task, ...]  # in the order of training
  split_hash: str  # SHA-256 of images, index sets and labels; the same for all orders
  partial: bool  # True if images or tasks are fewer than the protocol asks for
  notes: tuple[str, ...] = ()  # what was converted or left out, for people

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Returns [H, W, C] of the network's input."""
    height, width, _ = self.tasks[0].train.image.shape[1:]
    return height, width, len(self.tasks[0].inputs.mean)

  @property
  def max_classes(self) -> int:
    return max(task.num_classes for task in self.tasks)


class Size(NamedTuple):
  """Model size after the tasks learned so far, in numbers (mask_bits: in bits)."""

  base: int  # parameters of the network of the first task with its head; the unit of `increment`
  dense: int  # every number needed to predict for all tasks: also biases and running statistics
  nonzero: int  # those of `dense` that are not zero
  mask_bits: int  # bits that say where the non-zeros are
  training_only: int  # numbers kept for training alone: Fisher, bases, teachers
  paper: int  # the paper's count (spec a.9): no biases and no running statistics of later tasks

  @property
  def increment(self) -> float:
    """Returns the growth over the base as the paper counts it, a fraction."""
    return self.paper / self.base - 1


class State(NamedTuple):
  """The state of a method: one pytree shared by all tasks, and the state of each task."""

  shared: dict[str, Params]
  tasks: tuple[Params, ...]  # `TaskState` of the method's file

  def append(self, task: Params, **shared: Params) -> "State":
    """Returns the state with one more task, and with some entries of `shared` renewed."""
    return State(self.shared | shared, (*self.tasks, task))


class Stopped(Exception):
  """The run was asked to stop, at a place where it can go on later."""


class Diverged(Exception):
  """The loss is not a number or infinite; the text says where and what to try."""


class Keep(NamedTuple):
  """What survives an interruption inside a task. By default nothing does."""

  read: Callable = lambda name, like=None: None  # -> what was written under that name, or None
  write: Callable = lambda name, tree: ""  # -> where it will be
  check: Callable = lambda: None  # raises Stopped if the run was asked to stop


def result_of(value):
  """Returns `value`, or raises it if it is an exception."""
  if isinstance(value, Exception):
    raise value
  return value


class Store(NamedTuple):
  """What a method may tell the outside world while it learns. `name` is a path of scopes.

  On a restart `learn` runs again from its top: what was kept is returned at once. Hence events that
  belong to a result are logged where it is made, inside `once`.
  """

  name: str  # such as "task03/warmup"
  log: Callable[[dict], None]  # one event: plain numbers and texts
  keep: Keep = Keep()
  gang: Any = None  # the `devices.replicas.Gang` of runs that are learned at once, or None

  def child(self, name: str) -> "Store":
    return self._replace(name=f"{self.name}/{name}")

  def once(self, name: str, fn: Callable[[], Params]) -> Params:
    """Returns fn(), or what it returned before the run was interrupted."""
    path = f"{self.name}/{name}"
    result = self.keep.read(path)
    if result is None:
      result = fn()
      self.keep.write(path, result)
    return result


def nothing_learned(key, benchmark) -> State:
  """Returns the state with no task, the default of `Method.init`."""
  return State(shared={}, tasks=())


def one_at_a_time(num_tasks: int) -> tuple[tuple[int, ...], ...]:
  """Returns every task alone, in order: the default of `Method.groups`."""
  return tuple((t,) for t in range(num_tasks))


class Network(NamedTuple):
  """A plain network, as `model.apply({"params": params, "batch_stats": stats}, ...)` takes it."""

  params: Params  # its head as wide as the widest task's
  stats: Params  # BatchNorm's statistics, {} if it has none


class Learn(Protocol):
  """Learns one or several tasks, and tells what else it found as plain numbers."""

  def __call__(
    self, state: State, tasks: tuple[Task, ...], key: Array, store: Store
  ) -> tuple[State, dict]: ...


class Method(NamedTuple):
  """The only protocol of the project. All functions are pure but for `store`.

  A method's file gives the first fields; `methods.make` derives the others and wraps `learn`, which
  then keeps the BatchNorm statistics of each new task (`training.population`). The state of a task
  is a NamedTuple of the method's file, `TaskState`, with at least `stats` and `num_classes`.
  """

  learn: Learn
  size: Callable[[State], Size]
  # (shared, tasks[t]) -> the plain network that predicts what task t does; None: none does
  network: Callable[[dict, Params], Network] | None = None
  # (shared, tasks[t], image [B, H, W, C]) -> logits [B, K], in evaluation; K of the widest task.
  # None: those of `network`
  logits: Callable[[dict, Params, Array], Array] | None = None
  serves: tuple[str, ...] = ()  # entries of `State.shared` that `network` and `logits` need
  init: Callable[..., State] = nothing_learned  # (key, benchmark) -> state with no task learned
  groups: Callable[[int], tuple[tuple[int, ...], ...]] = one_at_a_time  # learned together
  extensible: bool = True  # whether tasks can be added that the benchmark does not have
  predict: Callable[..., Array] | None = None  # (state, t, image) -> logits [B, K_t]; t static

  def served(self, state: State) -> dict:
    """Returns what of `State.shared` predictions need."""
    return {name: state.shared[name] for name in self.serves}
