"""Writes the model of a run to files for other programs, and reads them. No pickle.

  DIR/base.safetensors, base.json        what all tasks share, once: the frozen kernels, and with
                                         method.private=norm or head other parameters too
  DIR/task03.safetensors, task03.json    what task 3 adds to them, or its whole network (merged)
  DIR/task03.stablehlo, task03.json      the whole program of task 3: uint8 images -> probabilities

The JSON is the card of the file beside it: classes, normalisation, how photographs are resized and
cropped, network, ranks, accuracy, the hashes of its arrays, of the task's state and of the base it
belongs to; for a program also the packages that are needed to run it. The training config is not
written. A folder holds one model in one format. With format=orbax the .safetensors files are Orbax
folders of the same names without suffix. Tasks that perturb a pretrained network as it was
published can be written without the base; `load` then gets the file of that network, whose SHA-256
is in the card. The names of the arrays are

  params/LAYER/.., batch_stats/LAYER/..    as in Flax
  perturbation/LAYER/R, S, sigma, rank, U, V    cut to the rank (weights/lowrank.py); U and V are
    left out at rank 0
  perturbation/LAYER/U.values, U.mask    in place of U where that is smaller: its non-zero entries
    row by row, and a bit for every entry (numpy.packbits) that says whether it is non-zero; V too

A head has as many outputs as its task has classes.
"""

import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

import halrp_jax
from halrp_jax import files, models
from halrp_jax.data import formats
from halrp_jax.deploy import saved
from halrp_jax.deploy.export_folder import (
  BASE,
  FORMATS,
  SCHEMA,
  Arrays,
  Card,
  file_of,
  pack,
  read_card,
  require_arrays,
  require_one_model,
  stem_of,
  take,
  unpack,
)
from halrp_jax.deploy.inputs import require_images, require_index, require_path
from halrp_jax.runs import cards, checkpoint, identity, pretrained, remote
from halrp_jax.training import batches, contract, networks, population
from halrp_jax.types import Array, Network, Params, Task, UserError, brief
from halrp_jax.weights import kinds, lowrank, trees

_PLATFORMS = ("cpu", "cuda", "tpu")
_IDENTITY = ("kind", "state", "task", "network", "input_shape")  # card entries that name the model
_PROGRAM_NEEDS = ("jax", "flatbuffers")  # packages; `pip install jax` does not install the second


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


# --- writing --------------------------------------------------------------------------


def write(
  run: saved.Saved,
  folder: str,
  positions: list[int],
  format: str,
  merged: bool,
  without_base: bool = False,
) -> Iterator[tuple[str, int]]:
  """Writes tasks of a run, and the base if they need it.

  Args:
    run: a run opened by `saved.open_run`.
    folder: is made if it doesn't exist; files in it must be of the same model and form.
    positions: positions of the tasks, in the order of training.
    format: one of `FORMATS`.
    merged: whether to write whole networks; otherwise the base once and what each task adds.
    without_base: whether to leave out the base, which then is the pretrained network's file.

  Yields:
    Name without suffix, and size in bytes, of every file when it is written.

  Raises:
    UserError: if the method has no such form, or the folder can't be used.
  """
  _require_form(run, format, merged)
  origin = _origin(run)
  if without_base:
    _require_origin(run, origin, format, merged)
  is_program = format == "stablehlo"
  adds_to_base = not is_program and not merged
  path = pathlib.Path(folder)
  try:
    path.mkdir(parents=True, exist_ok=True)
    kind = "program" if is_program else "merged" if merged else "perturbation"
    task_cards = [_task_card(run, t) | {"kind": kind} for t in range(len(run.learned))]
    own: dict[str, Card] = {
      stem_of(task.id): {k: card[k] for k in _IDENTITY}
      for task, card in zip(run.learned, task_cards, strict=True)
    }
    base: Arrays = {}
    if adds_to_base:
      base = _shared(run)
      own[BASE] = {"kind": BASE, "hash": checkpoint.fingerprint(base)}
    require_one_model(path, format, own)
    if adds_to_base and not without_base:
      card = _card(run, run.benchmark.max_classes) | {"kind": BASE}
      yield BASE, _write_arrays(path, BASE, base, card, format)
    for t in positions:
      stem, card = stem_of(run.learned[t].id), task_cards[t]
      if is_program:
        yield stem, _write_program(path, stem, _serialized(program(run, t)), card)
      elif merged:
        yield stem, _write_arrays(path, stem, _merged(run, t), card, format)
      else:
        card |= {"base": own[BASE]["hash"]} | ({"pretrained": origin} if origin else {})
        added = {k: x for k, x in _added(run, t).items() if not _is_in(base, k, x)}
        yield stem, _write_arrays(path, stem, added, card, format)
  except OSError as e:
    raise UserError(f"--out={folder}: {e.strerror or e}") from e


def _require_form(run: saved.Saved, format: str, merged: bool) -> None:
  """Raises UserError if the run's method can't be written in a form."""
  if format not in FORMATS:
    raise UserError(f"--format={format}: one of {', '.join(FORMATS)}")
  name = run.config.method.name
  if format == "stablehlo":
    return
  if merged and run.method.network is None:
    raise UserError(f"{name}: no ordinary network predicts like its tasks; use --format=stablehlo")
  if not merged and not hasattr(run.state.tasks[0], "perturbation"):
    raise UserError(f"{name} has no perturbations of a base: use --merge")


def _origin(run: saved.Saved) -> Card | None:
  """Returns name, SHA-256 and source of the pretrained network whose kernels the tasks perturb.

  None: there is none, or the first task has trained its kernels.
  """
  config = run.config
  digest = identity.read_standing(run.path).get("base")
  if not config.base or config.base_training == "all" or not digest:
    return None
  name = config.base.partition("#")[0].replace("\\", "/").rpartition("/")[2]
  return {"name": name, "sha256": digest, "source": config.base_source}


def _require_origin(run: saved.Saved, origin: Card | None, format: str, merged: bool) -> None:
  """Raises UserError if tasks can't be written without a base."""
  if merged or format == "stablehlo":
    raise UserError(
      "--without_base leaves out the base that tasks add to, which --merge and "
      "--format=stablehlo do not write: leave it out"
    )
  if origin is None:
    raise UserError(
      f"--without_base: the kernels of {run.path} are not those of a file: it needs base=FILE with "
      "base_training=head, none or perturb; leave out --without_base to write the base too"
    )


def _shared(run: saved.Saved) -> Arrays:
  """Returns the arrays of the base: the kernels, and what all tasks have in common besides."""
  shared, stats = trees.join(run.state.shared["kernels"], {}), {}
  private = getattr(run.config.method, "private", "all")
  first = run.state.tasks[0]
  if private != "all":
    rest, _ = trees.split_private(first.rest, private == "norm")
    shared = trees.join(run.state.shared["kernels"], rest)
  if private == "head" or run.config.method.batch_norm == "frozen":
    stats = first.stats
  return _named({"params": shared, "batch_stats": stats})


def _is_in(base: Arrays, name: str, x: np.ndarray) -> bool:
  """Returns whether the base has an array under this name with the same bits."""
  return name in base and base[name].dtype == x.dtype and base[name].tobytes() == x.tobytes()


def _named(tree: Params) -> Arrays:
  """Returns the leaves of a pytree of dicts by their paths."""
  return {k: np.asarray(x) for k, x in traverse_util.flatten_dict(tree, sep="/").items()}


def _cut_head(params: Params, num_classes: int) -> Params:
  """Removes the head's outputs beyond a task's own classes, which have no meaning."""
  head = jax.tree.map(lambda x: x[..., :num_classes], params[trees.HEAD])
  return params | {trees.HEAD: head}


def _network_of(run: saved.Saved, t: int) -> Network | None:
  """Returns the plain network of a task, or None if the method has none."""
  if run.method.network is None:
    return None
  params, stats = run.method.network(run.method.served(run.state), run.state.tasks[t])
  return Network(_cut_head(params, run.learned[t].num_classes), stats)


def _merged(run: saved.Saved, t: int) -> Arrays:
  """Returns the arrays of a task's whole network."""
  network = _network_of(run, t)
  assert network is not None  # `_require_form` has checked it
  return _named({"params": network.params, "batch_stats": _measured(run, t, network.stats)})


def _measured(run: saved.Saved, t: int, stats: Params) -> Params:
  """Returns BatchNorm statistics, or {} if an older version has not stored them."""
  return {} if t in population.unmeasured(run.state) else stats


def _added(run: saved.Saved, t: int) -> Arrays:
  """Returns the arrays that a task of HALRP or BE adds to the base."""
  learned = run.state.tasks[t]
  rest = _cut_head(learned.rest, int(learned.num_classes))
  arrays = _named({"params": rest, "batch_stats": _measured(run, t, learned.stats)})
  for layer, p in learned.perturbation.items():
    name = f"perturbation/{layer}"
    rank = int(getattr(learned, "rank", {}).get(layer, p.U.shape[1]))
    arrays |= {f"{name}/R": np.asarray(p.R), f"{name}/S": np.asarray(p.S)}
    arrays[f"{name}/rank"] = np.array([rank], np.int32)
    if rank:
      arrays |= pack(f"{name}/U", np.asarray(p.U)[:, :rank])
      arrays |= pack(f"{name}/V", np.asarray(p.V)[:, :rank])
    if rank and p.sigma is not None:
      arrays[f"{name}/sigma"] = np.asarray(p.sigma)[:rank]
  return arrays


def program(run: saved.Saved, t: int) -> jax.export.Exported:
  """Exports the prediction of a task as a program.

  Args:
    run: a run opened by `saved.open_run`.
    t: position of a learned task.

  Returns:
    uint8 images [b, H, W, C] -> probabilities [b, K], for any number b of images, on CPU, CUDA and
    TPU.
  """
  task = run.learned[t]
  model = models.make(
    run.config.network, task.num_classes, _batch_norm(run, t), run.config.precision
  )
  network, predict = _network_of(run, t), saved.predict_fn(run, t)

  def classify(image: jax.Array) -> jax.Array:
    x = batches.prepare_images(image, task.inputs)
    if network is None:
      return jax.nn.softmax(predict(run.state, t, x))
    variables = {"params": network.params, "batch_stats": network.stats}
    return jax.nn.softmax(jnp.asarray(model.apply(variables, x, train=False)))

  (b,) = jax.export.symbolic_shape("b")
  image = jax.ShapeDtypeStruct((b, *task.train.image.shape[1:]), jnp.uint8)
  return jax.export.export(jax.jit(classify), platforms=_PLATFORMS)(image)


# --- cards ----------------------------------------------------------------------------


def _card(run: saved.Saved, num_classes: int) -> Card:
  """Returns the entries that all cards of a run have."""
  return {
    "schema": SCHEMA,
    "halrp_jax": halrp_jax.__version__,
    "method": run.config.method.name,
    "network": {
      "name": run.config.network,
      "num_classes": num_classes,
      "batch_norm": run.config.method.batch_norm,
      "precision": run.config.precision,
    },
    "input_shape": list(run.benchmark.image_shape),
  }


def _batch_norm(run: saved.Saved, t: int) -> str:
  """Returns the kind of statistics that BatchNorm evaluates a task's file with."""
  if t in population.unmeasured(run.state):
    return "batch"
  trained = models.of_config(run.config, run.benchmark.max_classes)
  of_images = run.config.method.batch_norm == "population" or models.evaluates_with_batch(trained)
  return "population" if of_images else "running"


def _task_card(run: saved.Saved, t: int) -> Card:
  """Returns the card of a task, without the entries on its file."""
  task = run.learned[t]
  row = run.results["accuracy"][len(run.learned) - 1]
  ranks = getattr(run.state.tasks[t], "rank", None)
  card = _card(run, task.num_classes)
  return card | {
    "network": card["network"] | {"batch_norm": _batch_norm(run, t)},
    "image_shape": list(map(int, task.train.image.shape[1:])),
    "task": cards.of_task(task),
    "ranks": ranks and {name: int(k) for name, k in ranks.items()},
    "test_accuracy_percent": row[t],
    "depends_on_batch": t in population.unmeasured(run.state),
    "state": checkpoint.fingerprint((run.state.shared, run.state.tasks[t])),
  }


# --- files ----------------------------------------------------------------------------


def _write_arrays(path: pathlib.Path, stem: str, arrays: Arrays, card: Card, format: str) -> int:
  """Writes arrays and their card into a folder; returns the bytes of the file or Orbax folder."""
  file = file_of(path, stem, format)
  if format == "orbax":
    checkpoint.save_plain(file, traverse_util.unflatten_dict(arrays, sep="/"))
    size = sum(p.stat().st_size for p in file.rglob("*") if p.is_file())
  else:
    size = _replace(file, safetensors.numpy.save(arrays))
  card |= {"format": format, "bytes": size, "hash": checkpoint.fingerprint(arrays)}
  files.write_json(path / f"{stem}.json", card)
  return size


def _serialized(exported: jax.export.Exported) -> bytes:
  """Returns a program as bytes; raises UserError if flatbuffers is not installed."""
  try:
    return bytes(exported.serialize())
  except ImportError as e:
    raise UserError(
      f"--format=stablehlo needs the package flatbuffers ({brief(e)}), also wherever the programs "
      "are run: pip install flatbuffers"
    ) from e


def _write_program(path: pathlib.Path, stem: str, contents: bytes, card: Card) -> int:
  """Writes a program and its card into a folder; returns the bytes of the program."""
  size = _replace(file_of(path, stem, "stablehlo"), contents)
  digest = hashlib.sha256(contents).hexdigest()
  card |= {"format": "stablehlo", "bytes": size, "hash": digest}
  card |= {"needs": {name: metadata.version(name) for name in _PROGRAM_NEEDS}}
  files.write_json(path / f"{stem}.json", card)
  return size


def _replace(file: pathlib.Path, contents: bytes) -> int:
  """Writes the whole file, or leaves an older one as it is; returns its size."""
  files.delete_left_behind(file.parent)
  files.write_bytes(file, contents)
  return len(contents)


# --- reading --------------------------------------------------------------------------


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
  whole = _named({"params": read.start.params, "batch_stats": read.start.stats})
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
    p = _take_perturbation(rest, layer, structure.matrices[layer], file)
    composed[name] = np.asarray(kinds.compose(jnp.asarray(base[name]), p))
  common = {k: x for k, x in base.items() if k not in composed and k not in rest}
  expected = structure.shapes.keys() - composed.keys() - common.keys()
  require_arrays(rest, {k: structure.shapes[k] for k in sorted(expected)}, file)
  _require_hash(arrays, card, file)
  return composed | common | rest


def _take_perturbation(
  arrays: Arrays, layer: str, shape: tuple[int, int], file: pathlib.Path
) -> lowrank.Perturbation:
  """Removes the perturbation of a layer from the arrays of a task and returns it, checked."""
  name = f"perturbation/{layer}"
  num_in, num_out = shape
  stored_rank = take(arrays, f"{name}/rank", file)
  if stored_rank.shape != (1,) or stored_rank.dtype != np.int32:
    raise UserError(
      f"{file}: {name}/rank is {stored_rank.dtype} {stored_rank.shape}, expected int32 (1,)"
    )
  rank = int(stored_rank[0])
  found = {key: take(arrays, f"{name}/{key}", file) for key in "RS"}
  expected: dict[str, tuple[int, ...]] = {"R": (num_out,), "S": (num_in,)}
  for key, size in (("U", num_out), ("V", num_in)):
    zeros = np.zeros((size, 0), np.float32)
    found[key] = unpack(arrays, f"{name}/{key}", (size, rank), file) if rank else zeros
    expected[key] = (size, rank)
  sigma = arrays.pop(f"{name}/sigma", None) if rank else None
  if sigma is not None:
    found["sigma"], expected["sigma"] = sigma, (rank,)
  require_arrays(found, expected, f"{file}: {name}")
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
      return file, _named(checkpoint.load_plain(file))
    return file, safetensors.numpy.load(file.read_bytes())
  except FileNotFoundError as e:
    raise UserError(f"{file}: not found") from e
  except checkpoint.Damaged as e:
    raise UserError(str(e)) from e
  except Exception as e:  # safetensors raises exceptions of its own
    raise UserError(f"{file}: can't be read ({brief(e)})") from e
