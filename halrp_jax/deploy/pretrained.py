"""Parameters that others have trained, checked against a model's by name and shape.

  params, stats = pretrained.load("vit.safetensors", model, (32, 32, 3))

From a .safetensors file, arrays named by their paths in the model ("block1/attn/query/kernel", dots
for slashes are fine), or a folder that Orbax wrote. Either may hold the parameters alone or
{"params", "batch_stats"}. A head that is missing, or is for other classes, starts fresh.
"""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import safetensors.numpy
from flax import traverse_util

from halrp_jax.keys import Config
from halrp_jax.methods import halrp
from halrp_jax.runs import checkpoint
from halrp_jax.training import contract, networks
from halrp_jax.types import Benchmark, Params, State, Task, UserError, brief
from halrp_jax.weights import trees


def load(
  path: str, model, image_shape: tuple[int, int, int], key: jax.Array | None = None
) -> tuple[Params, Params]:
  """Reads params and stats of a model; all but the head are as in the file.

  Args:
    path: a .safetensors file, or an Orbax folder.
    model: the Linen module.
    image_shape: [H, W, C] of its input.
    key: of a fresh head.

  Raises:
    UserError: if the file can't be read, or lacks arrays of the model's, or holds others.
  """
  fresh = networks.initialize(model, jax.random.key(0) if key is None else key, image_shape)
  wanted = _flat(dict(zip(("params", "batch_stats"), fresh, strict=True)))
  found = _read(pathlib.Path(path))
  head = f"params/{trees.HEAD}/"
  of_head = [n for n in wanted if n.startswith(head)]
  if any(n not in found or found[n].shape != wanted[n].shape for n in of_head):
    found = {n: x for n, x in found.items() if not n.startswith(head)}
    found |= {n: wanted[n] for n in of_head}
  for names, what in (
    (wanted.keys() - found.keys(), "lacks"),
    (found.keys() - wanted.keys(), "holds"),
  ):
    if names:
      first, more = min(names), f" and {len(names) - 1} more" if len(names) > 1 else ""
      raise UserError(f"{path}: {what} {first}{more}, unlike {type(model).__name__}")
  for name, x in wanted.items():
    if found[name].shape != x.shape:
      raise UserError(f"{path}: {name} is {found[name].shape}, expected {x.shape}")
  taken = {n: jnp.asarray(found[n], x.dtype) for n, x in wanted.items()}
  tree = {"batch_stats": {}} | traverse_util.unflatten_dict(taken, sep="/")
  return tree["params"], tree["batch_stats"]


def _flat(tree) -> dict:
  return traverse_util.flatten_dict(tree, sep="/")


def _read(path: pathlib.Path) -> dict:
  """Arrays by path, beginning with the collection."""
  try:
    if path.is_dir():
      found = _flat(checkpoint.load_plain(path))
    else:
      found = safetensors.numpy.load(path.read_bytes())
  except checkpoint.Damaged as e:
    raise UserError(str(e)) from e
  except Exception as e:  # safetensors raises kinds of its own
    raise UserError(f"{path}: can't be read ({brief(e)})") from e
  found = {n.replace(".", "/"): x for n, x in found.items()}
  whole = any(n.startswith("params/") for n in found)
  return found if whole else {f"params/{n}": x for n, x in found.items()}


def base_state(
  config: halrp.Config | Config, task: Task, params: Params, stats: Params, model=None
) -> State:
  """Returns the state after the first task, whoever trained its network (`load`).

  HALRP learns the next tasks on it as on any other: `Method.learn(state, (task,), key, store)`.

  Args:
    config: resolved; the method's part of it is enough.
    task: the first task.
    params: of the network, its head among them.
    stats: its running statistics, {} if it has none.
    model: the network. Without it the kernels' shapes have to tell how they are matrices
      (`kinds.guessed_matrix_shape`); `Method.learn` refuses the state if they told it wrong.

  Raises:
    UserError: if the network or its parameters are not what a method demands (`contract`).
  """
  params = nn.meta.unbox(params)
  contract.check_params(params, task.num_classes)
  shapes = contract.guessed_matrix_shapes(params)
  if model is not None:
    image_shape = Benchmark("", (task,), "", False).image_shape
    shapes = contract.make_matrix_shapes(model, image_shape, task.num_classes)(params)
    contract.check_same(model, image_shape, params)
  own = config.method if isinstance(config, Config) else config
  return halrp.first_state(own, task, params, stats, shapes)
