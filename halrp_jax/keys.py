"""Every config key: type, default, range, meaning. The keys of a method stand in its own file.

The sections of a config are frozen dataclasses. Their fields carry all that --help, the checks and
docs/configuration.md say of a key (`spec`); a test holds the document to them. A field whose
default is None is a switch: `config.resolve` fills in what `method.variant` says.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from halrp_jax.types import UserError


class Key(NamedTuple):
  default: Any
  expected: str  # the words of the error message
  accepts: Callable[[Any], bool]
  meaning: str


# --- kinds of keys --------------------------------------------------------------------


def _field(default, expected: str, accepts: Callable[[Any], bool], meaning: str):
  key = Key(default, expected, accepts, meaning)
  return dataclasses.field(default=default, metadata={"key": key})


def one_of(default, values: tuple[str, ...], meaning: str):
  """Returns a field that holds one of some texts."""
  return _field(default, "one of " + ", ".join(values), lambda x: x in values, meaning)


def flag(default, meaning: str):
  """Returns a field that holds true or false."""
  return _field(default, "true or false", lambda x: isinstance(x, bool), meaning)


def text(default, meaning: str):
  """Returns a field that holds any text."""
  return _field(default, "a text", lambda x: isinstance(x, str), meaning)


def number(default, low, high, meaning: str, open_low: bool = False):
  """Returns a field that holds a number from `low` (above it if `open_low`) to `high`."""

  def accepts(x):
    above = _is_number(x) and (low < x if open_low else low <= x)
    return above and (high is None or x <= high)

  return _field(default, f"a number {_range_text(low, high, open_low)}", accepts, meaning)


def number_or_none(default, low, meaning: str):
  """Returns a field that holds a number of at least `low`, or the text "none"."""

  def accepts(x):
    return x == "none" or (_is_number(x) and x >= low)

  return _field(default, f"a number >= {low}, or none", accepts, meaning)


def whole(default, low, high, meaning: str):
  """Returns a field that holds a whole number from `low` to `high`."""

  def accepts(x):
    return _is_number(x) and isinstance(x, int) and low <= x and (high is None or x <= high)

  return _field(default, f"a whole number {_range_text(low, high, False)}", accepts, meaning)


def _is_number(x) -> bool:
  return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _range_text(low, high, open_low) -> str:
  return f"{'>' if open_low else '>='} {low}" + ("" if high is None else f" and <= {high}")


# --- the keys of every run ------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
  """The keys `protocol.*`: what all methods share."""

  shuffle: bool = flag(True, "new order of the training images in every epoch")
  schedule: str = one_of(
    "epoch",
    ("code", "epoch", "constant", "plateau"),
    "learning rate per step: 0.95 per epoch; code: 0.95 per 50,000 / T * train_fraction * "
    "(1 - validation_fraction) images as the authors' program has it; constant; plateau: cut where "
    "the validation loss stops falling",
  )
  patience: int = whole(6, 1, None, "schedule=plateau: epochs without a lower validation loss")
  plateau_factor: float = number(
    0.5, 0, 1, "schedule=plateau: what the rate is then multiplied by", True
  )
  stop_rate: float = number(
    1e-5, 0, None, "schedule=plateau: training ends below this learning rate"
  )
  optimizer: str = one_of("adam", ("adam", "sgd"), "Adam, or stochastic gradient descent")
  momentum: float = number(0.0, 0, 1, "optimizer=sgd: its momentum")
  gradient_scale: float = number(
    10.0, 0, None, "factor on every gradient before Adam", open_low=True
  )
  validation_fraction: float = number(
    0.2, 0, 0.9, "share of the training images that are held out for validation"
  )
  keep: str = one_of(
    "last",
    ("last", "best", "best_loss"),
    "weights of the last epoch, of the highest validation accuracy, of the lowest validation loss",
  )
  evaluate_on: str = one_of(
    "test",
    ("test", "validation"),
    "images the accuracies are of; validation: the test images are nowhere in the run (`tune`)",
  )
  last_batch: str = one_of(
    "train", ("train", "drop"), "what happens to the last, smaller batch of an epoch"
  )
  fraction_per_class: bool = flag(
    True, "train_fraction of every class; false: of all images of a task together"
  )
  augment: str = one_of(
    "none",
    ("none", "crop_flip"),
    "crop_flip: training images are padded by 4 zeros, cropped at random, half of them mirrored",
  )
  order_source: str = one_of(
    "paper", ("paper", "code"), "whose task orders the letters and seed numbers mean"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """The keys `data.*`."""

  source: str = one_of(
    "original",
    ("original", "tfds"),
    "original files, or what TFDS has prepared in data_dir (as array_record)",
  )
  cache: str = text(
    "", "folder for decoded images, or off; default: halrp_jax/data in the user's cache folder"
  )
  normalise: bool = flag(True, "pixels are normalised; false: the network gets them from 0 to 255")
  mnist_size: int = _field(
    32,
    "28 or 32",
    lambda x: _is_number(x) and isinstance(x, int) and x in (28, 32),
    "pmnist: resized to 32 x 32 x 3 (the authors' program), or 28 x 28 x 1 as it is",
  )
  tiny_test: str = one_of(
    "held_out",
    ("held_out", "official"),
    "tinyimagenet: images tested on: a held-out tenth of the training images (the authors' program "
    "and the published numbers), or the official validation set (the paper's text)",
  )
  tasks: str = text("", "custom, source=tfds: names of the TFDS sets, with commas")
  image_size: int = whole(32, 8, 1024, "custom: height and width that other sizes are resized to")
  test_fraction: float = number(
    0.2, 0, 0.9, "custom: share of every class that is tested on, without a test set", True
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
  """The keys `checkpoint.*`."""

  every_epochs: int = whole(1, 1, None, "epochs between two checkpoints inside a phase, at least")
  every_seconds: float = number(30.0, 0, None, "seconds between two of them, at least")
  strict: bool = flag(
    False, "a damaged checkpoint stops the run instead of falling back, with a warning"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
  """The keys `method.*` that every method has."""

  name: str  # a key of `methods.METHODS`
  batch_norm: str = one_of(
    "population",
    ("population", "running", "batch", "own"),
    "statistics that BatchNorm evaluates with: those of the task's training images, computed once "
    "and held; running ones; those of the test batch (no model for single images); as the paper's "
    "network of that name does",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig(MethodConfig):
  """Those of the methods that train a plain network, at first or always."""

  l2: float = number(0.0, 0, None, "L2 coefficient on the kernels of the features")
  l2_half: bool = flag(True, "the L2 term is l2/2 |W|^2 (the authors' code), not l2 |W|^2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """The config of a run, resolved: every key has its type and is in its range."""

  benchmark: str = text("digits", "which tasks (--list names them)")
  data_dir: str = text("", "folder with the original data files")
  order: str = text(
    "0",
    "task order: a letter A to E or a seed number 0 to 4 as in the paper, natural, or ids; tasks "
    "that are not named are left out",
  )
  seed: int = whole(0, 0, 2**31 - 1, "root of every random choice")
  train_fraction: float = number(
    1.0, 0, 1, "share of each task's training images used", open_low=True
  )
  network: str = text("mlp", "which network (--list names them)")
  epochs: int = whole(20, 1, None, "n: epochs per task, warm-up included")
  batch_size: int = whole(128, 1, None, "images per optimizer step")
  evaluation_batch_size: int = whole(
    0, 0, None, "images per evaluation batch, on whose statistics some networks depend; 0: as above"
  )
  learning_rate: float = number(1e-3, 0, None, "of Adam at the start of each phase", open_low=True)
  loop: str = one_of(
    "auto",
    ("auto", "scan", "steps"),
    "scan: many steps are one jitted loop; steps: a Python loop over jitted steps; auto: scan, on "
    "the CPU only where the network has no plain convolution",
  )
  parallel: str = one_of(
    "auto",
    ("auto", "none", "sharded", "pmap", "replicas"),
    "sharded: each device has its part of every batch; pmap: so too, by jax.pmap; none: one device "
    "computes; replicas: of the runs that `sweep --vectorize` learns at once each device has some, "
    "alone as none; auto: sharded where there are several",
  )
  precision: str = one_of(
    "float32",
    ("float32", "bfloat16"),
    "of the network's products and activations; parameters, statistics, SVD and scores are float32",
  )
  deterministic: bool = flag(
    False,
    "GPU: only kernels that give the same bits every time (XLA's --xla_gpu_deterministic_ops), "
    "which may be slower; on the CPU it is always so",
  )
  allow_partial: bool = flag(False, "go on with less data than the protocol needs, and say so")
  protocol: Protocol
  data: Data
  checkpoint: Checkpoint
  method: MethodConfig  # of the method that `method.name` names

  @property
  def images_per_evaluation(self) -> int:
    """Returns how many images an evaluation batch has."""
    return self.evaluation_batch_size or self.batch_size

  def steps_per_epoch(self, num_images: int) -> int:
    """Returns the optimizer steps in one epoch over some training images."""
    full, rest = divmod(num_images, self.batch_size)
    return full + (rest > 0 and self.protocol.last_batch == "train")

  def to_dict(self) -> dict[str, Any]:
    """Returns the config by sections, as JSON has it."""
    return dataclasses.asdict(self)


SECTIONS = {"protocol": Protocol, "data": Data, "checkpoint": Checkpoint}
NEUTRAL_KEYS = (  # change no result, the last two the rounding (pmap: what dropout draws) at most
  "data_dir",
  "data.cache",
  "checkpoint.every_epochs",
  "checkpoint.every_seconds",
  "checkpoint.strict",
  "deterministic",
  "parallel",
)


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a nested config by dotted names."""
  nested = {k: v for k, v in config.items() if isinstance(v, Mapping)}
  plain = {k: v for k, v in config.items() if k not in nested}
  return plain | {f"{k}.{j}": x for k, v in nested.items() for j, x in v.items()}


def spec(section: type) -> dict[str, Key]:
  """Returns the keys of a section, a dataclass whose fields are made by the functions above."""
  return {f.name: f.metadata["key"] for f in dataclasses.fields(section) if "key" in f.metadata}


def keys_of(method: type[MethodConfig] | None = None) -> dict[str, Key]:
  """Returns all keys of a run by their dotted names; without a method, those of every run."""
  sections = SECTIONS | ({"method": method} if method else {})
  dotted = {f"{name}.{k}": key for name, cls in sections.items() for k, key in spec(cls).items()}
  return spec(Config) | dotted


def nearest(name: str, known) -> str:
  """Returns " (did you mean X?)", or "" if no name is near."""
  match = difflib.get_close_matches(name, list(known), 1)
  return f" (did you mean {match[0]}?)" if match else ""


def errors(flat: Mapping[str, Any], keys: Mapping[str, Key]) -> list[str]:
  """Returns a line per key that is unknown, missing or out of range, of dotted name -> value."""
  lines = [f"{k} is not a config key{nearest(k, keys)}" for k in flat if k not in keys]
  for name, key in keys.items():
    if name not in flat:
      lines.append(f"{name} is missing: {key.meaning}")
    elif not key.accepts(flat[name]):
      lines.append(f"{name} must be {key.expected}, got {flat[name]!r}")
  return lines


def require(lines: list[str]) -> None:
  """Raises UserError with all the lines if there are any."""
  if lines:
    raise UserError("; ".join(lines))


def table(keys: Mapping[str, Key]) -> str:
  """Returns the keys as a Markdown table."""
  rows = ["| key | default | values | meaning |", "|---|---|---|---|"]
  for name, key in keys.items():
    default = "as the variant" if key.default is None else f"`{key.default!r}`"
    cells = (f"`{name}`", default, key.expected, key.meaning)
    rows.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
  return "\n".join(rows)
