"""Starts from parameters that were trained elsewhere, checked against a network by name and shape.

  params, stats = pretrained.load("vit.safetensors", model, (32, 32, 3))

The parameters are in a .safetensors file, whose arrays have the names of their paths in the network
("block1/attn/query/kernel"; dots in place of slashes are accepted), or in a folder that Orbax
wrote. Either holds the parameters alone or {"params", "batch_stats"}. A head that is missing, or is
for another number of classes, is initialized.
"""

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import safetensors.numpy
from flax import traverse_util

from halrp_jax.keys import Config
from halrp_jax.methods import halrp
from halrp_jax.runs import checkpoint
from halrp_jax.training import contract, networks
from halrp_jax.types import Array, Benchmark, Params, State, Task, UserError, brief
from halrp_jax.weights import trees

_Flat = dict[str, Array]  # by path, such as "params/fc1/kernel"


def load(
  path: str, model: nn.Module, image_shape: tuple[int, int, int], key: jax.Array | None = None
) -> tuple[Params, Params]:
  """Reads parameters and BatchNorm statistics of a network.

  Args:
    path: path of a .safetensors file or an Orbax folder.
    model: the network.
    image_shape: [H, W, C] of its input.
    key: random key for the head, if the file has none that fits; None: `jax.random.key(0)`.

  Returns:
    The parameters and the statistics, with the dtypes of the network.

  Raises:
    UserError: if the file can't be read, or has missing or unexpected arrays, or other shapes.
  """
  fresh = networks.initialize(model, jax.random.key(0) if key is None else key, image_shape)
  expected = _flatten(dict(zip(("params", "batch_stats"), fresh, strict=True)))
  found = _with_head(_read(pathlib.Path(path)), expected)
  name = type(model).__name__
  for names, problem in (
    (expected.keys() - found.keys(), "missing"),
    (found.keys() - expected.keys(), "unexpected"),
  ):
    if names:
      first, more = min(names), f" (and {len(names) - 1} more)" if len(names) > 1 else ""
      raise UserError(f"{path}: {problem} array {first}{more} for {name}")
  for n, x in expected.items():
    if found[n].shape != x.shape:
      raise UserError(f"{path}: {n} is {found[n].shape}, expected {x.shape}")
  arrays = {n: jnp.asarray(found[n], x.dtype) for n, x in expected.items()}
  tree = {"batch_stats": {}} | traverse_util.unflatten_dict(arrays, sep="/")
  return tree["params"], tree["batch_stats"]


def _with_head(found: _Flat, expected: _Flat) -> _Flat:
  """Returns the arrays with the head of `expected`, unless they have one of the same shapes."""
  prefix = f"params/{trees.HEAD}/"
  head = {n: x for n, x in expected.items() if n.startswith(prefix)}
  if all(n in found and found[n].shape == x.shape for n, x in head.items()):
    return found
  return {n: x for n, x in found.items() if not n.startswith(prefix)} | head


def _flatten(tree: dict[str, Any]) -> _Flat:
  """Returns the leaves of nested dicts by their paths."""
  flat: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")
  return flat


def _read(path: pathlib.Path) -> _Flat:
  """Reads arrays by their paths, which begin with "params" or "batch_stats"."""
  try:
    if path.is_dir():
      found = _flatten(checkpoint.load_plain(path))
    else:
      found = safetensors.numpy.load(path.read_bytes())
  except checkpoint.Damaged as e:
    raise UserError(str(e)) from e
  except Exception as e:  # safetensors raises exceptions of its own
    raise UserError(f"{path}: can't be read ({brief(e)})") from e
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
