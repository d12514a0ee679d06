"""Every config key: type, range, meaning. The keys of a method stand in its own file.

A key whose default is None is a switch: None means "as method.variant says". The table in
docs/configuration.md is printed from here (`table`), and a test holds the two together.
"""

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


def one_of(default, values: tuple[str, ...], meaning: str) -> Key:
  return Key(default, "one of " + ", ".join(values), lambda x: x in values, meaning)


def flag(default, meaning: str) -> Key:
  return Key(default, "true or false", lambda x: isinstance(x, bool), meaning)


def text(default, meaning: str) -> Key:
  return Key(default, "a text", lambda x: isinstance(x, str), meaning)


def _is_number(x, kinds) -> bool:
  return isinstance(x, kinds) and not isinstance(x, bool) and math.isfinite(x)


def _range_text(low, high, open_low) -> str:
  return f"{'>' if open_low else '>='} {low}" + ("" if high is None else f" and <= {high}")


def number(default, low, high, meaning: str, open_low: bool = False) -> Key:
  def accepts(x):
    above = low < x if open_low else low <= x
    return above and (high is None or x <= high)

  return Key(
    default,
    f"a number {_range_text(low, high, open_low)}",
    lambda x: _is_number(x, (int, float)) and accepts(x),
    meaning,
  )


def number_or_none(default, low, meaning: str) -> Key:
  return Key(
    default,
    f"a number >= {low}, or none",
    lambda x: x == "none" or (_is_number(x, (int, float)) and x >= low),
    meaning,
  )


def whole(default, low, high, meaning: str) -> Key:
  return Key(
    default,
    f"a whole number {_range_text(low, high, False)}",
    lambda x: _is_number(x, int) and low <= x and (high is None or x <= high),
    meaning,
  )


# --- the keys of every run ------------------------------------------------------------

KEYS = {
  "benchmark": text("digits", "which tasks (--list names them)"),
  "data_dir": text("", "folder with the original data files"),
  "order": text(
    "0",
    "task order: a letter A to E or a seed number 0 to 4 as in the paper, natural, or ids; tasks "
    "that are not named are left out",
  ),
  "seed": whole(0, 0, 2**31 - 1, "root of every random choice"),
  "train_fraction": number(1.0, 0, 1, "share of each task's training images used", open_low=True),
  "network": text("mlp", "which network (--list names them)"),
  "epochs": whole(20, 1, None, "n: epochs per task, warm-up included"),
  "batch_size": whole(128, 1, None, "images per optimizer step"),
  "evaluation_batch_size": whole(
    0, 0, None, "images per evaluation batch, on whose statistics some networks depend; 0: as above"
  ),
  "learning_rate": number(1e-3, 0, None, "of Adam at the start of each phase", open_low=True),
  "loop": one_of(
    "auto",
    ("auto", "scan", "steps"),
    "scan: many steps are one jitted loop; steps: a Python loop over jitted steps; auto: scan, on "
    "the CPU only where the network has no plain convolution",
  ),
  "parallel": one_of(
    "auto",
    ("auto", "none", "sharded", "pmap", "replicas"),
    "sharded: each device has its part of every batch; pmap: so too, by jax.pmap; none: one device "
    "computes; replicas: of the runs that `sweep --vectorize` learns at once each device has some, "
    "alone as none; auto: sharded where there are several",
  ),
  "precision": one_of(
    "float32",
    ("float32", "bfloat16"),
    "of the network's products and activations; parameters, statistics, SVD and scores are float32",
  ),
  "deterministic": flag(
    False,
    "GPU: only kernels that give the same bits every time (XLA's --xla_gpu_deterministic_ops), "
    "which may be slower; on the CPU it is always so",
  ),
  "allow_partial": flag(False, "go on with less data than the protocol needs, and say so"),
}
PROTOCOL_KEYS = {
  "shuffle": flag(True, "new order of the training images in every epoch"),
  "schedule": one_of(
    "epoch",
    ("code", "epoch", "constant", "plateau"),
    "learning rate per step: 0.95 per epoch; code: 0.95 per 50,000 / T * train_fraction * "
    "(1 - validation_fraction) images as the authors' program has it; constant; plateau: cut where "
    "the validation loss stops falling",
  ),
  "patience": whole(6, 1, None, "schedule=plateau: epochs without a lower validation loss"),
  "plateau_factor": number(
    0.5, 0, 1, "schedule=plateau: what the rate is then multiplied by", True
  ),
  "stop_rate": number(1e-5, 0, None, "schedule=plateau: training ends below this learning rate"),
  "optimizer": one_of("adam", ("adam", "sgd"), "Adam, or stochastic gradient descent"),
  "momentum": number(0.0, 0, 1, "optimizer=sgd: its momentum"),
  "gradient_scale": number(10.0, 0, None, "factor on every gradient before Adam", open_low=True),
  "validation_fraction": number(
    0.2, 0, 0.9, "share of the training images that are held out for validation"
  ),
  "keep": one_of(
    "last",
    ("last", "best", "best_loss"),
    "weights of the last epoch, of the highest validation accuracy, of the lowest validation loss",
  ),
  "evaluate_on": one_of(
    "test",
    ("test", "validation"),
    "images the accuracies are of; validation: the test images are nowhere in the run (`tune`)",
  ),
  "last_batch": one_of(
    "train", ("train", "drop"), "what happens to the last, smaller batch of an epoch"
  ),
  "fraction_per_class": flag(
    True, "train_fraction of every class; false: of all images of a task together"
  ),
  "augment": one_of(
    "none",
    ("none", "crop_flip"),
    "crop_flip: training images are padded by 4 zeros, cropped at random, half of them mirrored",
  ),
  "order_source": one_of(
    "paper", ("paper", "code"), "whose task orders the letters and seed numbers mean"
  ),
}

DATA_KEYS = {
  "source": one_of(
    "original",
    ("original", "tfds"),
    "original files, or what TFDS has prepared in data_dir (as array_record)",
  ),
  "cache": text(
    "", "folder for decoded images, or off; default: halrp_jax/data in $XDG_CACHE_HOME or ~/.cache"
  ),
  "normalise": flag(True, "pixels are normalised; false: the network gets them from 0 to 255"),
  "mnist_size": Key(
    32,
    "28 or 32",
    lambda x: _is_number(x, int) and x in (28, 32),
    "pmnist: resized to 32 x 32 x 3 (the authors' program), or 28 x 28 x 1 as it is",
  ),
  "tiny_test": one_of(
    "held_out",
    ("held_out", "official"),
    "tinyimagenet: images tested on: a held-out tenth of the training images (the authors' program "
    "and the published numbers), or the official validation set (the paper's text)",
  ),
  "tasks": text("", "custom, source=tfds: names of the TFDS sets, with commas"),
  "image_size": whole(32, 8, 1024, "custom: height and width that other sizes are resized to"),
  "test_fraction": number(
    0.2, 0, 0.9, "custom: share of every class that is tested on, without a test set", True
  ),
}
CHECKPOINT_KEYS = {
  "every_epochs": whole(1, 1, None, "epochs between two checkpoints inside a phase, at least"),
  "every_seconds": number(30.0, 0, None, "seconds between two of them, at least"),
  "strict": flag(
    False, "a damaged checkpoint stops the run instead of falling back, with a warning"
  ),
}
NEUTRAL_KEYS = (  # change no result, the last two the rounding (pmap: what dropout draws) at most
  "data_dir",
  "data.cache",
  "checkpoint.every_epochs",
  "checkpoint.every_seconds",
  "checkpoint.strict",
  "deterministic",
  "parallel",
)
SECTIONS = {"protocol": PROTOCOL_KEYS, "data": DATA_KEYS, "checkpoint": CHECKPOINT_KEYS}


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
  """A nested config by dotted names."""
  nested = {k: v for k, v in config.items() if isinstance(v, Mapping)}
  plain = {k: v for k, v in config.items() if k not in nested}
  return plain | {f"{k}.{j}": x for k, v in nested.items() for j, x in v.items()}


# every method has it
BATCH_NORM = {
  "batch_norm": one_of(
    "population",
    ("population", "running", "batch", "own"),
    "statistics that BatchNorm evaluates with: those of the task's training images, computed once "
    "and held; running ones; those of the test batch (no model for single images); as the paper's "
    "network of that name does",
  ),
}
# of the methods that train a plain network, at first or always
NETWORK_KEYS = BATCH_NORM | {
  "l2": number(0.0, 0, None, "L2 coefficient on the kernels of the features"),
  "l2_half": flag(True, "the L2 term is l2/2 |W|^2 (the authors' code), not l2 |W|^2"),
}


def keys_of(method_keys: Mapping[str, Key]) -> dict[str, Key]:
  """All keys of a run by their dotted names."""
  return (
    KEYS
    | {f"{s}.{k}": v for s, keys in SECTIONS.items() for k, v in keys.items()}
    | {f"method.{k}": v for k, v in method_keys.items()}
  )


def nearest(name: str, known) -> str:
  """ " (did you mean X?)" or nothing."""
  match = difflib.get_close_matches(name, list(known), 1)
  return f" (did you mean {match[0]}?)" if match else ""


def errors(flat: Mapping[str, Any], keys: Mapping[str, Key]) -> list[str]:
  """One line per key that is unknown, missing or out of range. `flat`: dotted name -> value."""
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
  """The keys as a Markdown table."""
  rows = ["| key | default | values | meaning |", "|---|---|---|---|"]
  for name, key in keys.items():
    default = "as the variant" if key.default is None else f"`{key.default!r}`"
    cells = (f"`{name}`", default, key.expected, key.meaning)
    rows.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
  return "\n".join(rows)
