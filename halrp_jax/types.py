"""The types that all parts share: tasks and their images, methods, states, sizes, errors.

A run calls `Method.learn` once per group of tasks and hands the state from call to call. This
module imports no other module of the package at run time.
"""

# pyright: reportMissingParameterType=error, reportMissingTypeArgument=error

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:  # reports are drawn without JAX, and devices is above this module
  import jax
  import numpy as np

  from halrp_jax.devices.replicas import Gang

  Array = jax.Array | np.ndarray
else:
  Array = Any
Params = Any  # a pytree of arrays
Json = dict[str, Any]  # a JSON object
_T = TypeVar("_T")

# The files and folders in a run's folder. SCHEMA is the version of record.json.
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
# The JAX flags that change numbers, with JAX's default values.
JAX_FLAGS = {
  "jax_enable_x64": False,
  "jax_default_prng_impl": "threefry2x32",
  "jax_threefry_partitionable": True,
  "jax_random_seed_offset": 0,
  "jax_high_dynamic_range_gumbel": False,
  "jax_default_matmul_precision": None,
}


class UserError(Exception):
  """A mistake in config, data, arguments or environment. Shown as one line; exit code 2."""


class UserErrors(UserError):
  """Several mistakes found at once. The text is the first one; `lines` holds all of them."""

  def __init__(self, lines: Iterable[str]) -> None:
    self.lines = tuple(lines)
    more = len(self.lines) - 1
    super().__init__(self.lines[0] + (f" (and {more} more; check_data lists them)" if more else ""))


class InUse(UserError):
  """Another process is working in the run's folder. Not a mistake: the folder is busy."""


def one_line(text: object) -> str:
  """Returns str(text) on one line, with unprintable characters (terminal commands) escaped."""
  line = " ".join(str(text).split())
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def brief(error: BaseException) -> str:
  """Returns a library's error message on one line of at most 200 characters, without addresses."""
  said = re.sub(r"<[\w.]+ (object )?at 0x[0-9a-fA-F]+>", "", str(error))
  said = one_line(said) or type(error).__name__
  return said if len(said) <= 200 else said[:200] + " ..."


class Split(NamedTuple):
  """Images of one task for training, validation or testing, as rows of a shared array."""

  image: Array  # uint8 [N, H, W, C], the same array object in every split of a benchmark
  # int32 [n], rows of `image`; the name hides tuple.index, which nothing uses
  index: Array  # pyright: ignore[reportIncompatibleMethodOverride]
  label: Array  # int32 [n], class within the task, 0..K-1
  # int32 [n], which task an image belongs to if several are learned jointly; None: a single task
  owner: Array | None = None


class Inputs(NamedTuple):
  """Turns stored uint8 images into network inputs: x / 255, permute, resize, (x - mean) / std.

  C is the number of channels of the input. The stored image may have fewer channels, because a
  permutation can name the same value several times.
  """

  mean: Array  # float32 [C]
  std: Array  # float32 [C]
  permutation: Array | None  # int32 [H*W*C], indices into the flattened image; None: no permutation
  # float32 [H', H] and [W', W], the weights of the stored rows and columns in those of the input
  # (`data.tasks.resizing`); [B, H', H] and [B, W', W], those of each image; None: the stored size
  resize: tuple[Array, Array] | None = None


class Framing(NamedTuple):
  """How a photograph of any size becomes a stored image."""

  crop: float = 0.0  # share of the shorter side that a central square keeps; 0: all is squeezed in
  interpolation: str = "bilinear"  # or "bicubic"


class Task(NamedTuple):
  """One task of a benchmark: its classes, images and splits."""

  id: int  # the benchmark's own number of the task, independent of the order of training
  name: str
  class_names: tuple[str, ...]
  inputs: Inputs
  train: Split
  valid: Split
  test: Split
  own_test: bool = True  # whether the data set itself defines the test images
  data_hash: str = ""  # hash of all images and labels, before anything is drawn (data/content.py)
  split_hash: str = ""  # hash of the splits train, valid and test, in this order
  framing: Framing = Framing()  # of its photographs, and of those that are predicted

  @property
  def num_classes(self) -> int:
    """Returns the number of classes of the task."""
    return len(self.class_names)


class Benchmark(NamedTuple):
  """A sequence of tasks in the order of training."""

  name: str
  tasks: tuple[Task, ...]
  split_hash: str  # SHA-256 of images, indices and labels; the same for every order of the tasks
  partial: bool  # whether there are fewer images or tasks than the protocol asks for
  notes: tuple[str, ...] = ()  # messages for the user: what was converted or left out

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Returns the shape [H, W, C] of one network input."""
    (height, width, _), inputs = self.tasks[0].train.image.shape[1:], self.tasks[0].inputs
    if inputs.resize is not None:
      height, width = (len(weights) for weights in inputs.resize)
    return height, width, len(inputs.mean)

  @property
  def max_classes(self) -> int:
    """Returns the number of classes of the task that has the most."""
    return max(task.num_classes for task in self.tasks)


class Size(NamedTuple):
  """The size of the model after the tasks learned so far: counts of numbers, not bytes."""

  base: int  # parameters of the first task's network with its head: the unit of `increment`
  dense: int  # all numbers needed to predict for all tasks, biases and BatchNorm statistics too
  nonzero: int  # those of `dense` that are not zero
  mask_bits: int  # bits needed to say which numbers of `dense` are not zero
  training_only: int  # numbers needed for training alone: Fisher information, bases, teachers
  paper: int  # the paper's count: without biases and BatchNorm statistics of later tasks

  @property
  def increment(self) -> float:
    """Returns the growth over the base by the paper's count, as a fraction of the base."""
    return self.paper / self.base - 1


class State(NamedTuple):
  """The state of a method: one pytree shared by all tasks, and the state of each task."""

  shared: dict[str, Params]
  tasks: tuple[Params, ...]  # one `TaskState` of the method's module per task

  def append(self, task: Params, **shared: Params) -> "State":
    """Returns the state with one more task, and with the given entries of `shared` replaced."""
    return State(self.shared | shared, (*self.tasks, task))


class Stopped(Exception):
  """The run was asked to stop and can be resumed with the same command."""


class Diverged(Exception):
  """The loss became NaN or infinite. The text says where, and what to try."""


def _read_nothing(name: str, like: Params = None) -> Params:
  """Returns None: nothing was stored."""


def _write_nothing(name: str, tree: Params) -> str:
  """Stores nothing and returns no path."""
  return ""


def _never_stop() -> None:
  """Returns at once: nobody asks this run to stop."""


class ProgressStore(NamedTuple):
  """The progress store of a task: what survives an interruption. The default stores nothing."""

  # (name, like=None) -> the tree that was written under this name, or None
  read: Callable[..., Params] = _read_nothing
  write: Callable[[str, Params], str] = _write_nothing  # (name, tree) -> the path it is written to
  check: Callable[[], None] = _never_stop  # raises Stopped if the run was asked to stop


def result_of(value: _T | Exception) -> _T:
  """Returns `value`, or raises it if it is an exception."""
  if isinstance(value, Exception):
    raise value
  return value


class Store(NamedTuple):
  """What `Method.learn` uses to log events and to store progress.

  After an interruption `learn` runs again from its beginning, and results in the progress store are
  returned at once. Events that belong to a result must therefore be logged where the result is
  computed, inside `once`.
  """

  name: str  # a path of scopes, such as "task03/warmup"
  log: Callable[[Json], None]  # takes one event: a dict of plain numbers and texts
  progress: ProgressStore = ProgressStore()
  gang: "Gang | None" = None  # the threads of the runs that are learned at once, if there are any

  def child(self, name: str) -> "Store":
    """Returns a store whose name is a scope inside this one."""
    return self._replace(name=f"{self.name}/{name}")

  def once(self, name: str, fn: Callable[[], Params]) -> Params:
    """Returns fn(), or its stored result if it was computed before an interruption."""
    path = f"{self.name}/{name}"
    result = self.progress.read(path)
    if result is None:
      result = fn()
      self.progress.write(path, result)
    return result


def nothing_learned(key: Array, benchmark: Benchmark) -> State:
  """Returns an empty state: the default of `Method.init`."""
  return State(shared={}, tasks=())


def one_at_a_time(num_tasks: int) -> tuple[tuple[int, ...], ...]:
  """Returns one group per task, in order: the default of `Method.groups`."""
  return tuple((t,) for t in range(num_tasks))


class Network(NamedTuple):
  """Variables of a plain network: `model.apply({"params": params, "batch_stats": stats}, ...)`."""

  params: Params  # the head is as wide as the widest task's
  stats: Params  # BatchNorm statistics; {} if the network has none


# Further results of learning a task, as plain numbers for the record: `ranks` per layer,
# `ranks_exact` (whether they are those of the exact SVD) and `select_seconds`, where a method has
# them.
History = Json


class Learn(Protocol):
  """The function of a method that learns one task, or several tasks jointly."""

  def __call__(
    self, state: State, tasks: tuple[Task, ...], key: Array, store: Store
  ) -> tuple[State, History]:
    """Returns the new state, and further results for the record as plain numbers."""
    ...


class Method(NamedTuple):
  """One continual-learning method. All functions are pure, except for their use of `store`.

  A method's module gives the first fields. `methods.make` derives the others and wraps `learn`, so
  that it also stores the BatchNorm statistics of each new task (`training.population`). The state
  of a task is a NamedTuple of the method's module, `TaskState`, with at least the fields `stats`
  and `num_classes`.
  """

  learn: Learn
  size: Callable[[State], Size]
  # (shared, tasks[t]) -> the plain network that predicts for task t; None: there is no such network
  network: Callable[[dict[str, Params], Params], Network] | None = None
  # (shared, tasks[t], image [B, H, W, C]) -> logits [B, K] in evaluation mode, K the classes of the
  # widest task; None: those of `network`
  logits: Callable[[dict[str, Params], Params, Array], Array] | None = None
  serves: tuple[str, ...] = ()  # the entries of `State.shared` that `network` and `logits` need
  # (key, benchmark) -> the state before the first task
  init: Callable[..., State] = nothing_learned
  # number of tasks -> the groups of task indices that are learned jointly, in order
  groups: Callable[[int], tuple[tuple[int, ...], ...]] = one_at_a_time
  # (state, t) -> what task t has of `size`; the sum over all tasks is `size`. It depends on nothing
  # of `shared` but `serves`. None: the size is not a sum over tasks
  size_of: Callable[[State, int], Size] | None = None
  extensible: bool = True  # whether tasks that the benchmark does not have can be added
  # (state, t, image [B, H, W, C]) -> logits [B, K_t], with t a static int
  predict: Callable[..., Array] | None = None

  def served(self, state: State) -> dict[str, Params]:
    """Returns the entries of `State.shared` that predictions need."""
    return {name: state.shared[name] for name in self.serves}
