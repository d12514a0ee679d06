"""Writes the model of a run to files for other programs; exported.py reads them. No pickle.

  DIR/base.safetensors, base.json        what all tasks share, once: the frozen kernels, with
                                         method.private=norm or head other parameters, and with
                                         method.batch_norm=frozen BatchNorm's statistics
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
    U and V may be int8; sigma then has the scales of the columns. V has a row for every input, or,
    if `conv_form` of the card is "unfolded", for every input at every position of the window
  perturbation/LAYER/U.values, U.mask    in place of U where that is smaller: its non-zero entries
    row by row, and a bit for every entry (numpy.packbits) that says whether it is non-zero; V too

A head has as many outputs as its task has classes.
"""

import hashlib
import pathlib
from collections.abc import Iterator
from importlib import metadata

import jax
import jax.export
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
  Card,
  file_of,
  named,
  pack,
  require_one_model,
  stem_of,
)
from halrp_jax.deploy.exported import Model as Model
from halrp_jax.deploy.exported import load as load
from halrp_jax.runs import cards, checkpoint, identity
from halrp_jax.training import batches, population
from halrp_jax.types import Network, Params, UserError, brief
from halrp_jax.weights import trees

_PLATFORMS = ("cpu", "cuda", "tpu")
_IDENTITY = ("kind", "state", "task", "network", "input_shape")  # card entries that name the model
_PROGRAM_NEEDS = ("jax", "flatbuffers")  # packages; `pip install jax` does not install the second


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
        form = getattr(run.config.method, "conv_form", "window_mean")
        card |= {"base": own[BASE]["hash"], "conv_form": form}
        card |= {"pretrained": origin} if origin else {}
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
  return named({"params": shared, "batch_stats": stats})


def _is_in(base: Arrays, name: str, x: np.ndarray) -> bool:
  """Returns whether the base has an array under this name with the same bits."""
  return name in base and base[name].dtype == x.dtype and base[name].tobytes() == x.tobytes()


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
  return named({"params": network.params, "batch_stats": _measured(run, t, network.stats)})


def _measured(run: saved.Saved, t: int, stats: Params) -> Params:
  """Returns BatchNorm statistics, or {} if an older version has not stored them."""
  return {} if t in population.unmeasured(run.state) else stats


def _added(run: saved.Saved, t: int) -> Arrays:
  """Returns the arrays that a task of HALRP or BE adds to the base."""
  learned = run.state.tasks[t]
  rest = _cut_head(learned.rest, int(learned.num_classes))
  arrays = named({"params": rest, "batch_stats": _measured(run, t, learned.stats)})
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
