"""A run's model as files for other programs, and back again. No training config, no pickle.

  DIR/base.safetensors, base.json        the frozen kernels, once
  DIR/task03.safetensors, task03.json    what task 3 adds to them, or its whole network (merged)
  DIR/task03.stablehlo, task03.json      its whole program: uint8 images -> probabilities

The JSON is the card of the file beside it: classes, normalisation, network, ranks, accuracy, the
hashes of its arrays, of the state and of the base it belongs to; of a program also the packages
that running it needs. A folder holds one model in one format. With format=orbax the .safetensors
are Orbax folders of the same names. Arrays are named

  params/LAYER/.., batch_stats/LAYER/..    as in Flax; the base has params/LAYER/kernel
  perturbation/LAYER/R, S, sigma, rank, U, V    cut to the rank (weights/lowrank.py); U and V are
    left out at rank 0
  perturbation/LAYER/U.values, U.mask    in place of U where that is smaller: the entries that are
    not zero, row by row, and a bit for every entry (numpy.packbits) that says where they are

A head is as wide as its task's classes.
"""

import hashlib
import os
import pathlib
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

import halrp_jax
from halrp_jax import files, models
from halrp_jax.deploy import saved
from halrp_jax.deploy.export_folder import (
  BASE,
  FORMATS,
  SCHEMA,
  Arrays,
  file_of,
  pack,
  read_card,
  require,
  require_one_model,
  stem_of,
  take,
  unpack,
)
from halrp_jax.deploy.inputs import require_images, require_index
from halrp_jax.runs import cards, checkpoint, experiment
from halrp_jax.training import batches, networks, population
from halrp_jax.types import Params, UserError, brief
from halrp_jax.weights import lowrank, trees

_PLATFORMS = ("cpu", "cuda", "tpu")
_IDENTITY = ("kind", "state", "task", "network", "input_shape")  # of a card: whose file it is
_PROGRAM_NEEDS = ("jax", "flatbuffers")  # packages; `pip install jax` alone lacks the second


class Model(NamedTuple):
  """A task's network, loaded."""

  card: dict
  network: object  # the Flax module
  variables: dict[str, Params]  # ordinary {"params", "batch_stats"}
  classify: Callable  # uint8 images [B, H, W, C] -> probabilities [B, K]

  @property
  def class_names(self) -> list[str]:
    return self.card["task"]["class_names"]


# --- writing --------------------------------------------------------------------------


def write(run: saved.Saved, folder: str, positions: list[int], format: str, merged: bool):
  """Writes tasks of a run, and what they need. Yields (name, bytes) of every file as it is done.

  Args:
    run: from `saved.open_run`.
    folder: made if it isn't there; what is there must be of this run's model and of the same form.
    positions: of the tasks, in the order of training.
    format: one of `FORMATS`.
    merged: whole networks; otherwise the base once and what each task adds.

  Raises:
    UserError: if the method has no such form, or the folder can't be used.
  """
  if format not in FORMATS:
    raise UserError(f"--format={format}: one of {', '.join(FORMATS)}")
  name, place = run.config.method.name, pathlib.Path(folder)
  if format != "stablehlo" and merged and run.method.network is None:
    raise UserError(
      f"{name}: no ordinary network predicts what its tasks do; use --format=stablehlo"
    )
  compact = format != "stablehlo" and not merged
  if compact and not hasattr(run.state.tasks[0], "perturbation"):
    raise UserError(f"{name} keeps no perturbations of a base: use --merge")
  try:
    place.mkdir(parents=True, exist_ok=True)
    kind = "program" if format == "stablehlo" else "merged" if merged else "perturbation"
    cards_ = [_task_card(run, t) | {"kind": kind} for t in range(len(run.learned))]
    own = {
      stem_of(task.id): {k: card[k] for k in _IDENTITY}
      for task, card in zip(run.learned, cards_, strict=True)
    }
    if compact:
      arrays = _named({"params": trees.join(run.state.shared["kernels"], {})})
      own[BASE] = {"kind": BASE, "hash": checkpoint.fingerprint(arrays)}
    require_one_model(place, format, own)
    if compact:
      card = _card(run, run.benchmark.max_classes) | {"kind": BASE}
      yield BASE, _write_arrays(place, BASE, arrays, card, format)
    for t in positions:
      stem, card = stem_of(run.learned[t].id), cards_[t]
      if format == "stablehlo":
        yield stem, _write_program(place, stem, _serialized(program(run, t)), card)
      elif merged:
        yield stem, _write_arrays(place, stem, _merged(run, t), card, format)
      else:
        card |= {"base": own[BASE]["hash"]}
        yield stem, _write_arrays(place, stem, _added(run, t), card, format)
  except OSError as e:
    raise UserError(f"--out={folder}: {e.strerror or e}") from e


def _named(tree: Params) -> Arrays:
  return {k: np.asarray(x) for k, x in traverse_util.flatten_dict(tree, sep="/").items()}


def _cut_head(params: Params, num_classes: int) -> Params:
  """The outputs beyond a task's own classes mean nothing."""
  head = jax.tree.map(lambda x: x[..., :num_classes], params[trees.HEAD])
  return params | {trees.HEAD: head}


def _merged(run: saved.Saved, t: int) -> Arrays:
  params, stats = run.method.network(run.method.served(run.state), run.state.tasks[t])
  params = _cut_head(params, run.learned[t].num_classes)
  return _named({"params": params, "batch_stats": _measured(run, t, stats)})


def _measured(run: saved.Saved, t: int, stats: Params) -> Params:
  """Returns the statistics, or none where an older version kept none."""
  return {} if t in population.unmeasured(run.state) else stats


def _added(run: saved.Saved, t: int) -> Arrays:
  """Returns what a task of HALRP or BE adds to the base."""
  learned = run.state.tasks[t]
  rest = _cut_head(learned.rest, int(learned.num_classes))
  arrays = _named({"params": rest, "batch_stats": _measured(run, t, learned.stats)})
  for layer, p in learned.perturbation.items():
    start, rank = (
      f"perturbation/{layer}",
      int(getattr(learned, "rank", {}).get(layer, p.U.shape[1])),
    )
    arrays |= {f"{start}/R": np.asarray(p.R), f"{start}/S": np.asarray(p.S)}
    arrays[f"{start}/rank"] = np.array([rank], np.int32)
    if rank:
      arrays |= pack(f"{start}/U", np.asarray(p.U)[:, :rank])
      arrays |= pack(f"{start}/V", np.asarray(p.V)[:, :rank])
    if rank and p.sigma is not None:
      arrays[f"{start}/sigma"] = np.asarray(p.sigma)[:rank]
  return arrays


def program(run: saved.Saved, t: int):
  """`jax.export` of a task: uint8 images [b, H, W, C], b any number, -> probabilities [b, K]."""
  task = run.learned[t]
  network = models.make(
    run.config.network, task.num_classes, _batch_norm(run, t), run.config.precision
  )
  variables, predict = None, saved.predict_fn(run, t)
  if run.method.network is not None:
    params, stats = run.method.network(run.method.served(run.state), run.state.tasks[t])
    variables = {"params": _cut_head(params, task.num_classes), "batch_stats": stats}

  def classify(image):
    x = batches.prepare_images(image, task.inputs)
    if variables is None:
      return jax.nn.softmax(predict(run.state, t, x))
    return jax.nn.softmax(network.apply(variables, x, train=False))

  (b,) = jax.export.symbolic_shape("b")
  image = jax.ShapeDtypeStruct((b, *task.train.image.shape[1:]), jnp.uint8)
  return jax.export.export(jax.jit(classify), platforms=_PLATFORMS)(image)


# --- cards ----------------------------------------------------------------------------


def _card(run: saved.Saved, num_classes: int) -> dict:
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
  """Returns the kind of statistics that a task's file is evaluated with."""
  if t in population.unmeasured(run.state):
    return "batch"
  trained = experiment.network_of(run.config, run.benchmark.max_classes)
  of_images = run.config.method.batch_norm == "population" or models.evaluates_with_batch(trained)
  return "population" if of_images else "running"


def _task_card(run: saved.Saved, t: int) -> dict:
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


def _write_arrays(place: pathlib.Path, stem: str, arrays: Arrays, card: dict, format: str) -> int:
  """-> bytes of the file or folder"""
  file = file_of(place, stem, format)
  if format == "orbax":
    checkpoint.save_plain(file, traverse_util.unflatten_dict(arrays, sep="/"))
    size = sum(p.stat().st_size for p in file.rglob("*") if p.is_file())
  else:
    size = _replace(file, safetensors.numpy.save(arrays))
  card |= {"format": format, "bytes": size, "hash": checkpoint.fingerprint(arrays)}
  files.write_json(place / f"{stem}.json", card)
  return size


def _serialized(exported) -> bytes:
  try:
    return bytes(exported.serialize())
  except ImportError as e:
    raise UserError(
      f"--format=stablehlo needs the package flatbuffers ({brief(e)}), and so does whoever runs "
      "the programs: pip install flatbuffers"
    ) from e


def _write_program(place: pathlib.Path, stem: str, contents: bytes, card: dict) -> int:
  size = _replace(file_of(place, stem, "stablehlo"), contents)
  digest = hashlib.sha256(contents).hexdigest()
  card |= {"format": "stablehlo", "bytes": size, "hash": digest}
  card |= {"needs": {name: metadata.version(name) for name in _PROGRAM_NEEDS}}
  files.write_json(place / f"{stem}.json", card)
  return size


def _replace(file: pathlib.Path, contents: bytes) -> int:
  """Writes a file whole or not at all; returns its size."""
  files.delete_left_behind(file.parent)
  files.write_bytes(file, contents)
  return len(contents)


# --- reading --------------------------------------------------------------------------


def load(folder: str, task: int) -> Model:
  """A task that `write` wrote as arrays, of either form.

  Args:
    folder: where it is.
    task: its id.

  Raises:
    UserError: if a file is missing, damaged, lacks arrays or has others, the base is not the one
      that the task belongs to, or an argument is of another kind. `Model.classify`: if the images
      are of another kind.
  """
  if not isinstance(folder, str | os.PathLike):
    raise UserError(f"export.load: expected the path of a folder, given {folder!r}")
  require_index(task, None, "export.load: id of a task")
  place, stem = pathlib.Path(folder), stem_of(task)
  card = read_card(place, stem)
  try:
    kind, needed = card["kind"], card.get("base")
    if kind == "program":
      raise UserError(
        f"{place / stem}.stablehlo is a program: jax.export.deserialize reads it, with the "
        "packages jax and flatbuffers"
      )
    meta = cards.to_task(card["task"], tuple(card["image_shape"]))
    spec, input_shape = card["network"], tuple(card["input_shape"])
    how = spec["batch_norm"], spec.get("precision", "float32")  # older files have no precision
    network = models.make(spec["name"], spec["num_classes"], *how)
    params, stats = jax.eval_shape(
      lambda key: networks.initialize(network, key, input_shape), jax.random.key(0)
    )
  except (KeyError, TypeError, ValueError, AttributeError) as e:
    raise UserError(f"{place / stem}.json: is not what was written ({brief(e)})") from e
  stats = {} if models.evaluates_with_batch(network) else stats  # files of older versions
  shapes = traverse_util.flatten_dict({"params": params, "batch_stats": stats}, sep="/")
  expected = {k: x.shape for k, x in shapes.items()}
  file, arrays = _read_arrays(place, stem, card)
  if kind == "merged":
    require(arrays, expected, file)
    _require_hash(arrays, card, file)
  else:
    kernels = _read_base(place, needed, expected, params, file)
    arrays = _add(kernels, arrays, expected, file, card)
  variables = {"params": {}, "batch_stats": {}}
  variables |= traverse_util.unflatten_dict(jax.tree.map(jnp.asarray, arrays), sep="/")

  @jax.jit
  def compute(image):
    x = batches.prepare_images(image, meta.inputs)
    return jax.nn.softmax(network.apply(variables, x, train=False))

  def classify(image):
    require_images(image, ("B", *card["image_shape"]), f"{place / stem}: classify")
    return compute(image)

  return Model(card, network, variables, classify)


def _read_base(place, needed: str, expected: dict, params, file) -> Arrays:
  """The kernels that a task's file belongs to."""
  card = read_card(place, BASE)
  base, kernels = _read_arrays(place, BASE, card)
  names = [f"params/{name}/kernel" for name in trees.layer_names(params)]
  require(kernels, {name: expected[name] for name in names}, base)
  _require_hash(kernels, card, base)
  if card["hash"] != needed:
    raise UserError(
      f"{file}: belongs to the base {str(needed)[:16]}, and {base} is {card['hash'][:16]}"
    )
  return kernels


def _add(kernels: Arrays, arrays: Arrays, expected: dict, file, card: dict) -> Arrays:
  """Base kernels and what a task adds -> the arrays of an ordinary network."""
  left, merged = dict(arrays), {}
  for name, kernel in kernels.items():
    layer = name.removeprefix("params/").removesuffix("/kernel")
    start = f"perturbation/{layer}"
    (num_in, num_out), dtype = kernel.shape[-2:], kernel.dtype
    rank = take(left, f"{start}/rank", file)
    if rank.shape != (1,) or rank.dtype != np.int32:
      raise UserError(f"{file}: {start}/rank is {rank.dtype} {rank.shape}, expected int32 (1,)")
    rank = int(rank[0])
    R, S = (take(left, f"{start}/{k}", file) for k in "RS")
    U, V, sigma = np.zeros((num_out, 0), dtype), np.zeros((num_in, 0), dtype), None
    if rank:
      U = unpack(left, f"{start}/U", (num_out, rank), file)
      V = unpack(left, f"{start}/V", (num_in, rank), file)
      sigma = left.pop(f"{start}/sigma", None)
    found = {"R": R, "S": S, "U": U, "V": V} | ({} if sigma is None else {"sigma": sigma})
    wanted = {"R": (num_out,), "S": (num_in,), "U": (num_out, rank), "V": (num_in, rank)}
    require(found, wanted | ({} if sigma is None else {"sigma": (rank,)}), f"{file}: {start}")
    p = lowrank.Perturbation(R, S, U, sigma, V)
    merged[name] = np.asarray(lowrank.compose(jnp.asarray(kernel), jax.tree.map(jnp.asarray, p)))
  require(left, {k: shape for k, shape in expected.items() if k not in kernels}, file)
  _require_hash(arrays, card, file)
  return merged | left


def _require_hash(arrays: Arrays, card: dict, file) -> None:
  if checkpoint.fingerprint(arrays) != card["hash"]:
    raise UserError(f"{file}: was changed after it was written (its hash is not its card's)")


def _read_arrays(place: pathlib.Path, stem: str, card: dict) -> tuple[pathlib.Path, Arrays]:
  file = file_of(place, stem, card["format"])
  try:
    if card["format"] == "orbax":
      return file, _named(checkpoint.load_plain(file))
    return file, safetensors.numpy.load(file.read_bytes())
  except FileNotFoundError as e:
    raise UserError(f"{file}: not there") from e
  except checkpoint.Damaged as e:
    raise UserError(str(e)) from e
  except Exception as e:  # safetensors raises kinds of its own
    raise UserError(f"{file}: can't be read ({brief(e)})") from e
