"""Reads the models that `export.write` has written as arrays."""

import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from halrp_jax import models
from halrp_jax.data import formats
from halrp_jax.deploy.export_folder import (
  BASE,
  Arrays,
  Card,
  file_of,
  named,
  read_card,
  require_arrays,
  stem_of,
  take,
  unpack,
)
from halrp_jax.deploy.inputs import require_images, require_index, require_path
from halrp_jax.runs import cards, checkpoint, pretrained, remote
from halrp_jax.training import batches, contract, networks
from halrp_jax.types import Array, Params, Task, UserError, brief
from halrp_jax.weights import kinds, lowrank, trees


class Model(NamedTuple):
  """The network of a task, read from files."""

  card: Card
  network: nn.Module
  variables: dict[str, Params]  # "params" and "batch_stats", as in Flax
  classify: Callable[[Array], jax.Array]  # uint8 images [B, H, W, C] -> probabilities [B, K]
  # path of an image file, or an image uint8 [h, w] or [h, w, 3] of any size -> uint8 [H, W, C],
  # resized and cropped as the images that the task was trained on
  stored: Callable[[str | os.PathLike[str] | np.ndarray], np.ndarray]

  def classify_photographs(
    self, photographs: Iterable[str | os.PathLike[str] | np.ndarray]
  ) -> jax.Array:
    """Returns the probabilities [B, K] of photographs, files or arrays as `stored` takes them.

    Raises:
      UserError: if a photograph can't be read.
    """
    return self.classify(np.stack([self.stored(x) for x in photographs]))

  @property
  def class_names(self) -> list[str]:
    """Returns the names of the K classes."""
    return self.card["task"]["class_names"]


class _Structure(NamedTuple):
  """The network of a task as its card describes it."""

  network: nn.Module
  task: Task  # without images
  shapes: dict[str, tuple[int, ...]]  # of all arrays, by name
  kernels: tuple[str, ...]  # names of the arrays that the base holds
  matrices: contract.Shapes  # (I, J) of their layers


def load(folder: str | os.PathLike[str], task: int, base: str | None = None) -> Model:
  """Reads a task that `write` has written as arrays, merged or not.

  Args:
    folder: the folder that was written.
    task: id of the task.
    base: the pretrained network's file, as `config.base` names it, for a task that was written
      without its base.

  Raises:
    UserError: if a file is missing or damaged, has missing or unexpected arrays, or belongs to
      another base; or if an argument is of another type. `Model.classify` raises it if the images
      have another shape or dtype.
  """
  path = require_path(folder, "export.load")
  require_index(task, None, "export.load: id of a task")
  stem = stem_of(task)
  card = read_card(path, stem)
  try:
    structure = _structure(card, path / stem)
  except (KeyError, TypeError, ValueError, AttributeError) as e:
    raise UserError(f"{path / stem}.json: was changed or damaged ({brief(e)})") from e
  arrays = jax.tree.map(jnp.asarray, _read_network(path, stem, card, structure, base))
  variables: dict[str, Params] = {"params": {}, "batch_stats": {}}
  variables |= traverse_util.unflatten_dict(arrays, sep="/")
  network, inputs = structure.network, structure.task.inputs

  @jax.jit
  def compute(image: jax.Array) -> jax.Array:
    x = batches.prepare_images(image, inputs)
    return jax.nn.softmax(jnp.asarray(network.apply(variables, x, train=False)))

  def classify(image: Array) -> jax.Array:
    require_images(image, ("B", *card["image_shape"]), f"{path / stem}: classify")
    return compute(image)

  def stored(photograph: str | os.PathLike[str] | np.ndarray) -> np.ndarray:
    height, width, channels = card["image_shape"]
    shape, framing = (height, width, channels), structure.task.framing
    if isinstance(photograph, np.ndarray):
      return formats.photograph(photograph, shape, framing)
    return formats.read_photo(require_path(photograph, "photograph"), shape, framing)[0]

  return Model(card, network, variables, classify, stored)


def _structure(card: Card, file: pathlib.Path) -> _Structure:
  """Returns the network that a card describes; raises almost anything if the card is damaged.

  Args:
    card: card of a task.
    file: its path without suffix.

  Raises:
    UserError: if the file is a program.
  """
  if card["kind"] == "program":
    raise UserError(
      f"{file}.stablehlo is a program: jax.export.deserialize reads it, with the packages jax and "
      "flatbuffers"
    )
  task = cards.to_task(card["task"], tuple(card["image_shape"]))
  about, input_shape = card["network"], tuple(card["input_shape"])
  precision = about.get("precision", "float32")  # cards of older versions do not have it
  network = models.make(about["name"], about["num_classes"], about["batch_norm"], precision)
  params, stats = jax.eval_shape(
    lambda key: networks.initialize(network, key, input_shape), jax.random.key(0)
  )
  if models.evaluates_with_batch(network):  # files of older versions have no statistics then
    stats = {}
  tree = {"params": params, "batch_stats": stats}
  shapes: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")
  kernels = tuple(f"params/{name}/kernel" for name in trees.layer_names(params))
  matrices = contract.guessed_matrix_shapes(params)
  return _Structure(network, task, {k: x.shape for k, x in shapes.items()}, kernels, matrices)


def _read_network(
  path: pathlib.Path, stem: str, card: Card, structure: _Structure, base: str | None
) -> Arrays:
  """Reads and checks the arrays of a task's whole network, composed with the base if need be."""
  file, arrays = _read_arrays(path, stem, card)
  if card["kind"] != "merged":
    if base is None:
      shared = _read_base(path, card, structure, file)
    else:
      shared = _read_pretrained(base, card, arrays, structure, file)
    return _compose(shared, arrays, card, structure, file)
  require_arrays(arrays, structure.shapes, file)
  _require_hash(arrays, card, file)
  return arrays


def _read_base(
  path: pathlib.Path, task_card: Card, structure: _Structure, file: pathlib.Path
) -> Arrays:
  """Reads the arrays of the base; raises UserError if the task's `file` is of another base."""
  origin, expected_hash = task_card.get("pretrained"), str(task_card.get("base"))
  if origin and not (path / f"{BASE}.json").exists():
    raise UserError(
      f"{file}: was written without its base: give the file of the pretrained network, "
      f"export.load(..., base={str(origin['name'])!r}), with SHA-256 {origin['sha256']}"
    )
  card = read_card(path, BASE)
  base, arrays = _read_arrays(path, BASE, card)
  more = {k for k in arrays if k in structure.shapes and not k.startswith(f"params/{trees.HEAD}/")}
  expected = {name: structure.shapes[name] for name in (*structure.kernels, *more)}
  require_arrays(arrays, expected, base)
  _require_hash(arrays, card, base)
  if card["hash"] != expected_hash:
    raise UserError(
      f"{file}: belongs to the base {expected_hash[:16]}, and {base} is {card['hash'][:16]}"
    )
  return arrays


def _read_pretrained(
  base: str, card: Card, arrays: Arrays, structure: _Structure, file: pathlib.Path
) -> Arrays:
  """Reads what a task needs of a pretrained network.

  Args:
    base: the file, as `config.base` names it.
    card: card of the task.
    arrays: what the task adds.
    structure: the network.
    file: of the task, for error messages.

  Raises:
    UserError: if it is another file than the one that the run started from.
  """
  origin = card.get("pretrained")
  if not origin:
    raise UserError(
      f"{file}: its base is {BASE} beside it, not a pretrained network's file: leave out base="
    )
  if (found := pretrained.digest(base)) != origin["sha256"]:
    raise UserError(
      f"base={base}: its SHA-256 is {found}, and {file} belongs to {origin['name']} with "
      f"{origin['sha256']}"
    )
  height, width, channels = card["input_shape"]
  read = pretrained.read(
    str(remote.local_path("base", base)),
    structure.network,
    (height, width, channels),
    source=str(origin["source"]),
  )
  whole = named({"params": read.start.params, "batch_stats": read.start.stats})
  shared = {k: x for k, x in whole.items() if k in structure.kernels or k not in arrays}
  if checkpoint.fingerprint(shared) != card.get("base"):
    raise UserError(
      f"base={base}: this machine makes other numbers of it than the one that wrote {file}: "
      "export the base too"
    )
  return shared


def _compose(
  base: Arrays, arrays: Arrays, card: Card, structure: _Structure, file: pathlib.Path
) -> Arrays:
  """Returns the arrays of an ordinary network from the base's arrays and what a task adds."""
  rest, composed = dict(arrays), {}
  for name in structure.kernels:
    layer = name.removeprefix("params/").removesuffix("/kernel")
    num_in, num_out = structure.matrices[layer]
    is_unfolded = card.get("conv_form") == "unfolded"  # older cards do not say
    rows = base[name].size // num_out if is_unfolded else num_in
    p = _take_perturbation(rest, layer, num_in, num_out, rows, file)
    composed[name] = np.asarray(kinds.compose(jnp.asarray(base[name]), p))
  common = {k: x for k, x in base.items() if k not in composed and k not in rest}
  expected = structure.shapes.keys() - composed.keys() - common.keys()
  require_arrays(rest, {k: structure.shapes[k] for k in sorted(expected)}, file)
  _require_hash(arrays, card, file)
  return composed | common | rest


def _take_perturbation(
  arrays: Arrays, layer: str, num_in: int, num_out: int, rows: int, file: pathlib.Path
) -> lowrank.Perturbation:
  """Removes the perturbation of a layer from the arrays of a task and returns it, checked.

  Args:
    arrays: what the task adds to the base.
    layer: path of the layer.
    num_in: I of its kernel as a matrix.
    num_out: J.
    rows: M, of V (`lowrank.low_rank_shape`).
    file: of the task, for error messages.
  """
  name = f"perturbation/{layer}"
  stored_rank = take(arrays, f"{name}/rank", file)
  if stored_rank.shape != (1,) or stored_rank.dtype != np.int32:
    raise UserError(
      f"{file}: {name}/rank is {stored_rank.dtype} {stored_rank.shape}, expected int32 (1,)"
    )
  rank = int(stored_rank[0])
  found = {key: take(arrays, f"{name}/{key}", file) for key in "RS"}
  expected: dict[str, tuple[int, ...]] = {"R": (num_out,), "S": (num_in,)}
  for key, size in (("U", num_out), ("V", rows)):
    zeros = np.zeros((size, 0), np.float32)
    found[key] = unpack(arrays, f"{name}/{key}", (size, rank), file) if rank else zeros
    expected[key] = (size, rank)
  sigma = arrays.pop(f"{name}/sigma", None) if rank else None
  if sigma is not None:
    found["sigma"], expected["sigma"] = sigma, (rank,)
  # without Sigma, U and V in int8 would have no scale
  require_arrays(found, expected, f"{file}: {name}", int8="UV" if sigma is not None else ())
  p = {key: jnp.asarray(x) for key, x in found.items()}
  return lowrank.Perturbation(p["R"], p["S"], p["U"], p.get("sigma"), p["V"])


def _require_hash(arrays: Arrays, card: Card, file: pathlib.Path) -> None:
  """Raises UserError if the arrays of a file don't have the hash in its card."""
  if checkpoint.fingerprint(arrays) != card["hash"]:
    raise UserError(f"{file}: was changed after it was written (its card has another hash)")


def _read_arrays(path: pathlib.Path, stem: str, card: Card) -> tuple[pathlib.Path, Arrays]:
  """Reads the file beside a card; returns its path and its arrays."""
  file = file_of(path, stem, card["format"])
  try:
    if card["format"] == "orbax":
      return file, named(checkpoint.load_plain(file))
    return file, safetensors.numpy.load(file.read_bytes())
  except FileNotFoundError as e:
    raise UserError(f"{file}: not found") from e
  except checkpoint.Damaged as e:
    raise UserError(str(e)) from e
  except Exception as e:  # safetensors raises exceptions of its own
    raise UserError(f"{file}: can't be read ({brief(e)})") from e
