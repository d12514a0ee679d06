"""All config keys of a run, except those of single methods: type, default, range, meaning.

The sections of a config are frozen dataclasses. Each field is made by one of the functions below
and carries all that --help, the checks and docs/configuration.md say about the key (`spec`);
tests/test_keys.py compares the document with the fields. The keys of a method are declared in the
method's module in the same way. A field whose default is None takes the value that
`method.variant` stands for (`config.resolve`).
"""

# pyright: reportMissingParameterType=error, reportMissingTypeArgument=error

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard, cast

from halrp_jax.types import Json, UserError


class Key(NamedTuple):
  """One config key as --help, the checks and the documents need it."""

  default: Any
  expected: str  # which values are accepted, for error messages: "a number >= 0"
  accepts: Callable[[object], bool]
  meaning: str


# --- functions that make fields ---------------------------------------------------------
# Each returns dataclasses.field(...). For a type checker the result is a value of the field's type,
# as it is for dataclasses.field itself.


def _field(default: object, expected: str, accepts: Callable[[object], bool], meaning: str) -> Any:  # noqa: ANN401 (see above)
  """Returns a dataclass field that carries a `Key`."""
  key = Key(default, expected, accepts, meaning)
  return dataclasses.field(default=default, metadata={"key": key})


def one_of(default: str | None, values: tuple[str, ...], meaning: str) -> str:
  """Returns a field that accepts one of several texts."""
  return _field(default, "one of " + ", ".join(values), lambda x: x in values, meaning)


def flag(default: bool | None, meaning: str) -> bool:
  """Returns a field that accepts true or false."""
  return _field(default, "true or false", lambda x: isinstance(x, bool), meaning)


def text(default: str, meaning: str) -> str:
  """Returns a field that accepts any text."""
  return _field(default, "a text", lambda x: isinstance(x, str), meaning)


def number(
  default: float | None, low: float, high: float | None, meaning: str, open_low: bool = False
) -> float:
  """Returns a field that accepts a number from `low` to `high`.

  Args:
    default: value of the key if nothing sets it; None: the value that `method.variant` stands for.
    low: lower limit.
    high: upper limit; None: there is none.
    meaning: what the key means, for --help and docs/configuration.md.
    open_low: whether `low` itself is refused.
  """

  def accepts(x: object) -> bool:
    return _is_number(x) and (low < x if open_low else low <= x) and (high is None or x <= high)

  return _field(default, f"a number {_range_text(low, high, open_low)}", accepts, meaning)


def number_or(word: str, default: float | str | None, low: float, meaning: str) -> float | str:
  """Returns a field that accepts a number of at least `low`, or one word."""

  def accepts(x: object) -> bool:
    return x == word or (_is_number(x) and x >= low)

  return _field(default, f"a number >= {low}, or {word}", accepts, meaning)


def whole(default: int | None, low: int, high: int | None, meaning: str) -> int:
  """Returns a field that accepts a whole number from `low` to `high`; see `number`."""

  def accepts(x: object) -> bool:
    return _is_number(x) and isinstance(x, int) and low <= x and (high is None or x <= high)

  return _field(default, f"a whole number {_range_text(low, high, False)}", accepts, meaning)


def _is_number(x: object) -> TypeGuard[int | float]:
  """Returns whether a value is a finite number. True and False are none."""
  return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _range_text(low: float, high: float | None, open_low: bool) -> str:
  """Returns a range in words for error messages, such as ">= 0 and <= 1"."""
  return f"{'>' if open_low else '>='} {low}" + ("" if high is None else f" and <= {high}")


# --- the keys of every run ------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
  """The keys `protocol.*`: how all methods are trained and evaluated."""

  shuffle: bool = flag(True, "the training images are shuffled in every epoch")
  schedule: str = one_of(
    "epoch",
    ("code", "epoch", "constant", "plateau"),
    "how the learning rate falls; epoch: by a factor of 0.95 per epoch; code: by a factor of 0.95 "
    "per 50,000 / T * train_fraction * (1 - validation_fraction) images, T the number of tasks, as "
    "in the authors' code; constant: not at all; plateau: by plateau_factor when the validation "
    "loss stops falling",
  )
  patience: int = whole(
    6, 1, None, "schedule=plateau: epochs without a lower validation loss before the rate falls"
  )
  plateau_factor: float = number(
    0.5, 0, 1, "schedule=plateau: factor by which the learning rate is multiplied", True
  )
  stop_rate: float = number(
    1e-5, 0, None, "schedule=plateau: training ends below this learning rate"
  )
  optimizer: str = one_of("adam", ("adam", "sgd"), "Adam, or stochastic gradient descent")
  momentum: float = number(0.0, 0, 1, "optimizer=sgd: momentum")
  head_rate: float = number(
    1.0, 0, None, "the learning rate of the head is learning_rate times this", open_low=True
  )
  gradient_scale: float = number(
    10.0,
    0,
    None,
    "factor by which every gradient is multiplied before the optimizer",
    open_low=True,
  )
  validation_fraction: float = number(
    0.2, 0, 0.9, "fraction of the training images that is held out for validation"
  )
  keep: str = one_of(
    "last",
    ("last", "best", "best_loss"),
    "weights that training ends with; last: those of the last epoch; best: of the epoch with the "
    "highest validation accuracy; best_loss: of the epoch with the lowest validation loss",
  )
  evaluate_on: str = one_of(
    "test",
    ("test", "validation", "unused"),
    "images on which accuracies are measured; validation: the run has no test images (used by "
    "`tune`); unused: nor has it; training images that train_fraction leaves out, at most as "
    "many as the task has test images",
  )
  last_batch: str = one_of(
    "train", ("train", "drop"), "whether the last, smaller batch of an epoch is used or dropped"
  )
  fraction_per_class: bool = flag(
    True, "train_fraction is taken of every class; false: of all images of a task together"
  )
  augment: str = one_of(
    "none",
    ("none", "crop_flip", "crop_resize_flip"),
    "crop_flip: training images are padded by 4 zeros and cropped at random, and half of them are "
    "mirrored; crop_resize_flip: a random part of each image (crop_area) is resized to the "
    "network's input, and half of them are mirrored",
  )
  crop_area: float = number(
    0.35,
    0,
    1,
    "augment=crop_resize_flip: least part of an image's area that is cut out; the area is uniform "
    "from there to 1, the ratio of width to height from 3/4 to 4/3",
    open_low=True,
  )
  order_source: str = one_of(
    "paper",
    ("paper", "code"),
    "whose task orders the letters and seed numbers of `order` stand for: those of the paper or "
    "those of the authors' code",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """The keys `data.*`: where the images come from and how they are prepared."""

  source: str = one_of(
    "original",
    ("original", "tfds"),
    "original: the original files of the data sets; tfds: what TensorFlow Datasets has prepared "
    "in data_dir (as array_record)",
  )
  cache: str = text(
    "", "folder for decoded images, or off; empty: halrp_jax/data in the user's cache folder"
  )
  residence: str = one_of(
    "auto",
    ("auto", "device", "host", "disk"),
    "where the images stay while a run trains; device: all on the device; host: in host memory, "
    "and disk: in the cache of decoded images, from which each batch is sent while earlier steps "
    "run; auto: device, but host if they take more than 1/4 of the device's memory (on the CPU, of "
    "the machine's), and disk if they take more than 1/2 of the machine's",
  )
  decode_processes: int = whole(
    0,
    0,
    None,
    "custom: processes that decode folders of images (needs the extra images); 0: a thread for "
    "each core",
  )
  normalise: bool = flag(True, "pixels are normalised; false: the network gets them from 0 to 255")
  mnist_size: int = _field(
    32,
    "28 or 32",
    lambda x: _is_number(x) and isinstance(x, int) and x in (28, 32),
    "pmnist: images are resized to 32 x 32 x 3 as in the authors' code, or left at 28 x 28 x 1",
  )
  tiny_test: str = one_of(
    "held_out",
    ("held_out", "official"),
    "tinyimagenet: test images; held_out: a tenth of the training images (the authors' code and "
    "the published numbers); official: the official validation set (the paper's text)",
  )
  tasks: str = text("", "custom with source=tfds: names of the TFDS data sets, separated by commas")
  image_size: int = _field(
    0,
    "0, or a whole number >= 8 and <= 1024",
    lambda x: _is_number(x) and isinstance(x, int) and (x == 0 or 8 <= x <= 1024),
    "height and width of the network's input, to which images of other sizes are resized (with "
    "custom those of folders, and with a base those of .npz files); 0: those of the benchmark's "
    "images, 32 for custom",
  )
  num_tasks: int = whole(
    0,
    0,
    10_000,
    "digits, pmnist, pmnist20, omniglot_rotation: number of tasks; 0: the benchmark's own. Orders "
    "that are seeds are then NumPy's permutations of so many",
  )
  framing: str = one_of(
    "auto",
    ("auto", "whole", "central"),
    "custom: how a photograph of a folder becomes a square; whole: all of it is squeezed in; "
    "central: it is resized by its shorter side and the central square is cut out; auto: central "
    "if `base` is of a known source, else whole",
  )
  crop: float = number(
    0.0,
    0,
    1,
    "framing=central: share of the resized shorter side that the square keeps; 0: as for the "
    "images of `base`, or 1",
  )
  interpolation: str = one_of(
    "auto",
    ("auto", "bilinear", "bicubic"),
    "custom: how photographs are resized; auto: framing=central as for `base`, else bilinear",
  )
  test_fraction: float = number(
    0.2, 0, 0.9, "custom: fraction of every class used for testing if there is no test set", True
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
  """The keys `checkpoint.*`: how often progress inside a task is stored."""

  every_epochs: int = whole(
    1, 1, None, "least number of epochs between two checkpoints inside a phase"
  )
  every_seconds: float = number(
    30.0, 0, None, "least number of seconds between two checkpoints inside a phase"
  )
  strict: bool = flag(
    False,
    "a damaged checkpoint stops the run; false: the run warns and resumes from an older one",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
  """The keys `method.*` that every method has."""

  name: str  # a key of `methods.METHODS`
  batch_norm: str = one_of(
    "population",
    ("population", "running", "batch", "frozen", "own"),
    "statistics that BatchNorm evaluates with; population: those of the task's training images, "
    "computed once after training; running: running averages; batch: those of the test batch (the "
    "model then can't classify single images); frozen: those of `base`, in training too; own: as "
    "the network does in the paper",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig(MethodConfig):
  """The keys `method.*` of the methods that train a plain network, at first or for every task."""

  l2: float = number(0.0, 0, None, "L2 coefficient on all kernels but the head's")
  l2_half: bool = flag(True, "the L2 term is l2/2 |W|^2 (the authors' code), not l2 |W|^2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """The resolved config of a run: every key has its type and is in its range."""

  benchmark: str = text("digits", "name of the benchmark (--list shows them)")
  data_dir: str = text("", "folder with the original data files")
  order: str = text(
    "0",
    "task order: a letter A to E or a seed number 0 to 4 as in the paper; natural; or task ids "
    "separated by commas, where tasks that are not listed are left out",
  )
  seed: int = whole(0, 0, 2**31 - 1, "seed of all random choices")
  train_fraction: float = number(
    1.0, 0, 1, "fraction of each task's training images that is used", open_low=True
  )
  network: str = text(
    "mlp",
    "name of the network (--list shows them), and options: NAME,OPTION=VALUE,... (a wrong one "
    "shows which there are)",
  )
  base: str = text(
    "",
    "parameters from which every new network starts: a .safetensors or .npz file, an Orbax "
    "folder, https://...#sha256=HEX, hf://ORG/NAME/FILE@REVISION, or empty for random ones; images "
    "are then normalised as for these parameters",
  )
  base_source: str = text(
    "auto", "whose names the arrays of `base` have; auto: they are recognised, unless two fit"
  )
  base_training: str = one_of(
    "all",
    ("all", "head", "none", "perturb"),
    "what the first task trains of `base`; head: the head alone; none: nothing, `base` has a head "
    "for the first task; perturb: the first task is learned as the later ones are, and changes "
    "nothing of `base`",
  )
  epochs: int = whole(20, 1, None, "n: epochs per task, warm-up included")
  batch_size: int = whole(128, 1, None, "images per optimizer step")
  evaluation_batch_size: int = whole(
    0,
    0,
    None,
    "images per evaluation batch, which changes the results of networks that evaluate with the "
    "batch's statistics; 0: batch_size",
  )
  evaluation: str = one_of(
    "changed",
    ("changed", "all"),
    "tasks that are tested after each task: changed: those whose predictions may have changed, the "
    "others keep their accuracy; all: all tasks learned so far",
  )
  learning_rate: float = number(
    1e-3, 0, None, "learning rate at the start of each phase of training", open_low=True
  )
  loop: str = one_of(
    "auto",
    ("auto", "scan", "steps"),
    "scan: one jitted loop runs many steps; steps: a Python loop over jitted steps; auto: scan, "
    "except for networks with plain convolutions on the CPU, which use steps",
  )
  parallel: str = one_of(
    "auto",
    ("auto", "none", "sharded", "pmap", "replicas"),
    "how several devices are used; sharded: each device computes a part of every batch; pmap: the "
    "same with jax.pmap; none: one device computes everything; replicas: the runs of `sweep "
    "--vectorize` are distributed over the devices, and a single run is computed as with none; "
    "auto: sharded if there are several devices, else none",
  )
  precision: str = one_of(
    "float32",
    ("float32", "bfloat16"),
    "number format of products and activations in the network; parameters, statistics, SVD and "
    "scores stay float32",
  )
  deterministic: bool = flag(
    False,
    "GPU: only kernels that give the same bits every time (XLA's --xla_gpu_deterministic_ops), "
    "which may be slower; CPUs always give the same bits",
  )
  allow_partial: bool = flag(
    False, "accept less data than the protocol asks for, and mark the results as partial"
  )
  protocol: Protocol
  data: Data
  checkpoint: Checkpoint
  method: MethodConfig  # the `Config` of the method that `method.name` names

  @property
  def images_per_evaluation(self) -> int:
    """Returns the number of images in an evaluation batch."""
    return self.evaluation_batch_size or self.batch_size

  def steps_per_epoch(self, num_images: int) -> int:
    """Returns the number of optimizer steps in one epoch over `num_images` training images."""
    full, rest = divmod(num_images, self.batch_size)
    return full + (rest > 0 and self.protocol.last_batch == "train")

  def to_dict(self) -> Json:
    """Returns the config as a dict of values and sections, ready for JSON."""
    return dataclasses.asdict(self)


SECTIONS: dict[str, type[Protocol | Data | Checkpoint]] = {
  "protocol": Protocol,
  "data": Data,
  "checkpoint": Checkpoint,
}
# Keys that do not change the results. The last two may change the rounding, and pmap the random
# numbers of dropout.
NEUTRAL_KEYS = (
  "data_dir",
  "data.cache",
  "data.residence",
  "data.decode_processes",
  "evaluation",
  "checkpoint.every_epochs",
  "checkpoint.every_seconds",
  "checkpoint.strict",
  "deterministic",
  "parallel",
)


# --- functions of keys and values -------------------------------------------------------


def flat(config: Mapping[str, object]) -> Json:
  """Returns the values of a config by dotted key: {"epochs": 20, "protocol.keep": "last", ...}."""
  plain = {k: v for k, v in config.items() if not isinstance(v, Mapping)}
  sections = {k: cast("Json", v) for k, v in config.items() if isinstance(v, Mapping)}
  return plain | {f"{k}.{j}": x for k, section in sections.items() for j, x in section.items()}


def spec(section: type) -> dict[str, Key]:
  """Returns the keys of a section: a dataclass whose fields are made by the functions above."""
  return {f.name: f.metadata["key"] for f in dataclasses.fields(section) if "key" in f.metadata}


def keys_of(method: type[MethodConfig] | None = None) -> dict[str, Key]:
  """Returns all keys of a run by dotted name; without a method, those that every run has."""
  sections: dict[str, type] = {**SECTIONS} | ({"method": method} if method else {})
  dotted = {f"{name}.{k}": key for name, cls in sections.items() for k, key in spec(cls).items()}
  return spec(Config) | dotted


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns " (did you mean X?)" with the known name most similar to `name`, or ""."""
  match = difflib.get_close_matches(name, list(known), 1)
  return f" (did you mean {match[0]}?)" if match else ""


def errors(flat: Mapping[str, object], keys: Mapping[str, Key]) -> list[str]:
  """Returns one message for each key that is unknown, missing or out of range.

  Args:
    flat: {dotted key: value}.
    keys: the keys that there are.
  """
  lines = [f"{k} is not a config key{nearest(k, keys)}" for k in flat if k not in keys]
  for name, key in keys.items():
    if name not in flat:
      lines.append(f"{name} is missing: {key.meaning}")
    elif not key.accepts(flat[name]):
      lines.append(f"{name} must be {key.expected}, got {flat[name]!r}")
  return lines


def require(messages: Sequence[str]) -> None:
  """Raises UserError with all the messages on one line, if there are any."""
  if messages:
    raise UserError("; ".join(messages))


def table(keys: Mapping[str, Key]) -> str:
  """Returns the keys as a Markdown table for docs/configuration.md."""
  rows = ["| key | default | values | meaning |", "|---|---|---|---|"]
  for name, key in keys.items():
    default = "as the variant" if key.default is None else f"`{key.default!r}`"
    cells = (f"`{name}`", default, key.expected, key.meaning)
    rows.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
  return "\n".join(rows)
