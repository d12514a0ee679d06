"""Starts from parameters that were trained elsewhere, checked against a network by name and shape.

  params, stats = pretrained.load("efficientnet_lite0.safetensors", model, (224, 224, 3))

The parameters are in a .safetensors file, in an .npz file of big_vision, or in a folder that Orbax
wrote. Their names are those of another library (`convert.SOURCES`), or the paths of our own network
("block1/attn/query/kernel"; dots in place of slashes are accepted), with the parameters alone or
{"params", "batch_stats"}. A head that is missing, or is for another number of classes, is
initialized.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
from flax import traverse_util

from halrp_jax import models
from halrp_jax.keys import Config
from halrp_jax.methods import halrp
from halrp_jax.runs import checkpoint, convert, remote
from halrp_jax.training import contract, networks
from halrp_jax.training.setup import Start
from halrp_jax.types import Benchmark, Framing, Params, State, Task, UserError, brief
from halrp_jax.weights import trees

_Flat = dict[str, Any]  # arrays by path, such as "params/fc1/kernel"
_SIZES = ("features", "channels", "width")  # fields in which networks of one class differ
_COLLECTIONS = ("params", "batch_stats")
_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")


class Base(NamedTuple):
  """A network that was trained elsewhere."""

  start: Start  # its parameters, from which new networks start
  source: str | None  # a key of `convert.SOURCES`; None: the names are those of our network
  left_out: tuple[str, ...]  # names of the file's arrays that are not used, each with the reason

  @property
  def preprocessing(self) -> convert.Preprocessing | None:
    """Returns how images are prepared for the network, or None if it is not known."""
    return None if self.source is None else convert.SOURCES[self.source].preprocessing


def load(
  path: str, model: nn.Module, image_shape: tuple[int, int, int], key: jax.Array | None = None
) -> tuple[Params, Params]:
  """Reads parameters and BatchNorm statistics of a network.

  Args:
    path: path of a .safetensors or .npz file or an Orbax folder.
    model: the network.
    image_shape: [H, W, C] of its input.
    key: random key for the head, if the file has none that fits; None: `jax.random.key(0)`.

  Returns:
    The parameters and the statistics, with the dtypes of the network.

  Raises:
    UserError: if the file can't be read, or has missing or unexpected arrays, or other shapes.
  """
  base = read(path, model, image_shape, key)
  return base.start.params, base.start.stats


def read(
  path: str,
  model: nn.Module,
  image_shape: tuple[int, int, int],
  key: jax.Array | None = None,
  source: str = "auto",
) -> Base:
  """Reads a network that was trained elsewhere.

  Args:
    path: see `load`.
    model: the network.
    image_shape: [H, W, C] of its input. Position embeddings are interpolated to it.
    key: see `load`.
    source: a key of `convert.SOURCES`, or "auto": the names of the arrays tell.

  Raises:
    UserError: as `load`, and if the network does not compute what the file's does.
  """
  key = jax.random.key(0) if key is None else key
  init: Callable = functools.partial(networks.initialize, model, image_shape=image_shape)
  shapes = jax.eval_shape(lambda key: dict(zip(_COLLECTIONS, init(key), strict=True)), key)
  expected = _flatten(shapes)
  found, left_out = _read(pathlib.Path(path))
  network = _network_name(model)
  own = convert.find_source(path, found, network, source)
  if own is None:
    found = _with_collections(found)
  else:
    _require_options(path, own, network, model, found)
    patch = getattr(model, "patch", 0)
    grid = (image_shape[0] // patch, image_shape[1] // patch) if patch else None
    found, known, unexpected = convert.convert(
      own, found, {n: x.shape for n, x in expected.items()}, grid
    )
    left_out += [f"{n} ({own} has it, the network does not need it)" for n in known]
    found |= {n: np.zeros(0) for n in unexpected}
  found, replaced, is_fresh = _with_head(
    found, expected, lambda: jax.jit(lambda k: init(k)[0][trees.HEAD])(key)
  )
  left_out += [f"{n} {x.shape} (the tasks have another head)" for n, x in replaced.items()]
  _check(path, found, expected, network, image_shape)
  arrays = {n: jnp.asarray(found[n], x.dtype) for n, x in expected.items()}
  tree = {"batch_stats": {}} | traverse_util.unflatten_dict(arrays, sep="/")
  params, stats = (tree[name] for name in _COLLECTIONS)
  return Base(Start(params, stats, not is_fresh), own, tuple(left_out))


def open_base(config: Config, benchmark: Benchmark) -> Base:
  """Reads the network that `config.base` names.

  Args:
    config: resolved.
    benchmark: its image shape and widest task are used.

  Raises:
    UserError: as `read`.
  """
  model = models.of_config(config, benchmark.max_classes)
  path = remote.local_path("base", config.base)
  return _opened(str(path), digest(config.base), model, benchmark.image_shape, config.base_source)


@functools.lru_cache(maxsize=1)
def _opened(
  path: str, digest: str, model: nn.Module, image_shape: tuple[int, int, int], source: str
) -> Base:
  """Reads a base. The last one is cached, so that the runs of a sweep share a compiled method."""
  return read(path, model, image_shape, source=source)


def framed(config: Config) -> Config:
  """Returns a config with the framing of the user's photographs that its base asks for.

  The keys `data.framing`, `data.crop` and `data.interpolation` keep what they are set to. Without a
  base of a known source a photograph is used whole.

  Raises:
    UserError: if the base can't be read, or is for another network.
  """
  given = config.data
  if config.benchmark != "custom":
    return config
  path = remote.local_path("base", config.base) if config.base else None
  source = None if path is None else _source_of(path, config)
  card = None if source is None else convert.SOURCES[source].preprocessing
  framing = given.framing
  if framing == "auto":
    framing = "central" if card or given.crop else "whole"
  chosen = Framing(0.0)
  if framing == "central":
    chosen = Framing(card.crop, card.interpolation) if card else Framing(1.0)
    chosen = chosen._replace(crop=given.crop or chosen.crop)
  if given.interpolation != "auto":
    chosen = chosen._replace(interpolation=given.interpolation)
  return with_framing(config, chosen)


def with_framing(config: Config, framing: Framing) -> Config:
  """Returns a config whose keys `data.framing`, `crop` and `interpolation` stand for `framing`."""
  values = {"framing": "central" if framing.crop else "whole"} | framing._asdict()
  return dataclasses.replace(config, data=dataclasses.replace(config.data, **values))


def _source_of(path: pathlib.Path, config: Config) -> str | None:
  """Returns the source of a base by the names of its arrays, which are not read; None: our own."""
  names: list[str] = []
  try:
    if path.suffix == ".npz":
      with np.load(path, allow_pickle=False) as archive:
        names = archive.files
    elif path.is_file():
      with safetensors.safe_open(path, "numpy") as file:
        names = list(file.keys())
  except Exception:
    _read(path)  # has the error message for whatever is wrong with the file
  network, source = _network_name(models.of_config(config, 1)), config.base_source
  return convert.find_source(str(path), dict.fromkeys(names, np.zeros(0)), network, source)


def digest(text: str) -> str:
  """Returns the SHA-256 of the file or folder that `config.base` names, in hexadecimal digits.

  Raises:
    UserError: if it can't be read.
  """
  path, found = remote.local_path("base", text), hashlib.sha256()
  try:
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
      found.update(file.read_bytes())
  except OSError as e:
    raise UserError(f"base={text}: can't be read ({e.strerror or e})") from e
  return found.hexdigest()


def prepared(benchmark: Benchmark, base: Base, config: Config) -> Benchmark:
  """Returns a benchmark whose images are normalised as those that `base` was trained on.

  If that is not known, or `data.normalise` is off, the images stay as they are. A note says which
  arrays of the file are not used.
  """
  notes = benchmark.notes
  if left_out := list(base.left_out):
    more = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
    notes += (f"base={config.base}: not used: {left_out[0]}{more}",)
  card = base.preprocessing
  if card is None or not config.data.normalise:
    return benchmark._replace(notes=notes)
  mean, std = (jnp.asarray(x, jnp.float32) for x in (card.mean, card.std))
  tasks = tuple(
    task._replace(inputs=task.inputs._replace(mean=mean, std=std)) for task in benchmark.tasks
  )
  return benchmark._replace(tasks=tasks, notes=notes)


def _network_name(model: nn.Module) -> str:
  """Returns the name of a network, a key of `models.NETWORKS`, or its class's name."""
  for name, build in models.NETWORKS.items():
    default = build(num_classes=1)
    if type(default) is type(model) and all(
      getattr(default, k, None) == getattr(model, k, None) for k in _SIZES
    ):
      return name
  return type(model).__name__


def _require_options(
  path: str, source: str, network: str, model: nn.Module, found: convert.Arrays
) -> None:
  """Raises UserError if a network's options make it compute something else than the source's."""
  given = {k: getattr(model, k) for k in convert.SOURCES[source].options}
  if other := convert.required_options(source, given):
    options = ",".join(f"{k}={v}" for k, v in other.items())
    raise UserError(f"{path}: {source} computes with {options}: set network={network},{options}")
  if wrong := convert.misfits(source, found, getattr(model, "pool", None)):
    raise UserError(f"{path}: {wrong} in network={network}")
  heads = getattr(model, "num_heads", None)
  standard = models.options(network).get("num_heads") if network in models.NETWORKS else heads
  if heads != standard:
    raise UserError(
      f"{path}: {network} has {standard} heads of attention, but num_heads={heads}: leave it out"
    )


def _check(
  path: str,
  found: _Flat,
  expected: _Flat,
  network: str,
  image_shape: tuple[int, int, int],
) -> None:
  """Raises UserError if arrays are missing or unexpected, or have other shapes."""
  for names, problem in (
    (expected.keys() - found.keys(), "missing"),
    (found.keys() - expected.keys(), "unexpected"),
  ):
    if names:
      first, more = min(names), f" (and {len(names) - 1} more)" if len(names) > 1 else ""
      raise UserError(f"{path}: {problem} array {first}{more} for network={network}")
  wrong = [n for n, x in expected.items() if found[n].shape != x.shape]
  if not wrong:
    return
  first, more = wrong[0], f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
  shape, other = found[first].shape, expected[first].shape
  hint = ""
  if len(shape) == 4 and shape[:2] == other[:2] and shape[3] == other[3]:
    hint = f": the file's network takes {shape[2]} channels, the images have {image_shape[2]}"
  raise UserError(f"{path}: {first} is {shape}, expected {other} for network={network}{more}{hint}")


def _with_head(
  found: _Flat, expected: _Flat, draw: Callable[[], Params]
) -> tuple[_Flat, _Flat, bool]:
  """Returns the arrays with a fresh head, unless they have one of the shapes of `expected`.

  Args:
    found: arrays by path.
    expected: shapes by path.
    draw: returns the parameters of a fresh head.

  Returns:
    The arrays, the head that was replaced, {} if none was, and whether the head is fresh.
  """
  prefix = f"params/{trees.HEAD}/"
  shapes = {n: x.shape for n, x in expected.items() if n.startswith(prefix)}
  if all(n in found and found[n].shape == shape for n, shape in shapes.items()):
    return found, {}, False
  head = {prefix + n: x for n, x in _flatten(draw()).items()}
  replaced = {n: x for n, x in found.items() if n.startswith(prefix)}
  return {n: x for n, x in found.items() if n not in replaced} | head, replaced, True


def _flatten(tree: dict[str, Any]) -> _Flat:
  """Returns the leaves of nested dicts by their paths."""
  flat: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")
  return flat


def _read(path: pathlib.Path) -> tuple[_Flat, list[str]]:
  """Reads arrays by their names; returns them, and a line on their dtype if it is converted.

  Raises:
    UserError: if the file can't be read. Pickles are refused: reading one can run any program.
  """
  if path.suffix in _PICKLES:
    raise UserError(
      f"{path}: is a pickle, which can run any program when it is read; convert it once: "
      f'python -c "import torch, safetensors.torch as s; s.save_file(torch.load({str(path)!r}, '
      f'weights_only=True), {str(path.with_suffix(".safetensors"))!r})"'
    )
  try:
    if path.is_dir():
      found = _flatten(checkpoint.load_plain(path))
    elif path.suffix == ".npz":
      with np.load(path, allow_pickle=False) as archive:
        # NumPy reads a bfloat16 as two bytes without a type
        found = {n: archive[n] for n in archive.files}
        found = {n: x.view(jnp.bfloat16) if x.dtype == "V2" else x for n, x in found.items()}
    else:
      found = dict(safetensors.flax.load(path.read_bytes()))
  except checkpoint.Damaged as e:
    raise UserError(str(e)) from e
  except Exception as e:  # safetensors and NumPy raise exceptions of their own
    raise UserError(f"{path}: can't be read ({brief(e)})") from e
  halves = sorted({str(x.dtype) for x in found.values()} & {"float16", "bfloat16"})
  return found, [f"no array, but {' and '.join(halves)} becomes float32"] if halves else []


def _with_collections(found: _Flat) -> _Flat:
  """Returns arrays by their paths in our network, which begin with "params" or "batch_stats"."""
  found = {n.replace(".", "/"): x for n, x in found.items()}
  has_collections = any(n.startswith("params/") for n in found)
  return found if has_collections else {f"params/{n}": x for n, x in found.items()}


def base_state(
  config: halrp.Config | Config,
  task: Task,
  params: Params,
  stats: Params,
  model: nn.Module | None = None,
) -> State:
  """Returns the state of HALRP after a first task whose network was trained elsewhere.

  HALRP learns the next tasks on it as on any other state: `Method.learn(state, (task,), key,
  store)`.

  Args:
    config: resolved; the method's part of it is enough.
    task: the first task.
    params: parameters of the network, with its head.
    stats: its BatchNorm statistics, {} if it has none.
    model: the network. Without it the shape of each kernel as a matrix is guessed from the
      parameters (`kinds.guessed_matrix_shape`); `Method.learn` refuses the state if a guess is
      wrong.

  Raises:
    UserError: if the network or its parameters do not fulfil training/contract.py.
  """
  params = nn.meta.unbox(params)
  contract.check_params(params, task.num_classes)
  if model is None:
    shapes = contract.guessed_matrix_shapes(params)
  else:
    image_shape = Benchmark("", (task,), "", False).image_shape
    shapes = contract.make_matrix_shapes(model, image_shape, task.num_classes)(params)
    contract.check_same(model, image_shape, params)
  own = config.method if isinstance(config, Config) else config
  if not isinstance(own, halrp.Config):
    raise UserError(f"base_state: method.name is {own.name!r}, expected 'halrp'")
  return halrp.first_state(own, task, params, stats, shapes)
