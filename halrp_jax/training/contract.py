"""Checks of what the methods require of a network, made before anything is learned.

A network is a Linen module `__call__(x [B, H, W, C], train) -> logits [B, K]` with float32
parameters, whose last layer is `nn.Dense(K, name="head")`. Its variables other than parameters are
in "batch_stats", and its random numbers come from "dropout".
"""

import inspect
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from halrp_jax.types import Params, State, UserError
from halrp_jax.weights import kinds, outputs, perturb, proof, trees

Shapes = dict[str, tuple[int, int]]  # shape (I, J) of each layer's kernel as a matrix, by path

_CALL = "def __call__(self, x, train=False): return super().__call__"
_CAST = 'jax.tree.map(lambda x: x.astype("float32"), params)'


def check_call(model: nn.Module) -> None:
  """Raises UserError if `model` is no Linen module, or its call has no argument `train`."""
  proof.check_module(model)
  parameters = inspect.signature(type(model).__call__).parameters
  if "train" not in parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
    raise UserError(
      f"{_name(model)}.__call__ takes no argument `train`, which says if the network is trained; "
      f"add it, or subclass the network: {_CALL}(x, ...), with `deterministic=not train` if it has "
      "that argument"
    )


def is_own(model: nn.Module) -> bool:
  """Returns whether the network is one of `halrp_jax.models`, which the tests check already."""
  return type(model).__module__.startswith("halrp_jax.models.")


def check(model: nn.Module, image_shape: tuple[int, ...], num_classes: int) -> dict[str, Params]:
  """Traces a network without computing it, and checks its arguments, variables and output.

  Args:
    model: the network.
    image_shape: [H, W, C] of its input.
    num_classes: number of classes of the widest task.

  Returns:
    The shapes and dtypes of its variables.

  Raises:
    UserError: if a requirement is not met; it says how to meet it.
  """
  check_call(model)
  name, image = _name(model), _two_images(image_shape)
  key = jax.eval_shape(lambda: jax.random.key(0))
  with proof.as_user_errors(name):
    logits, variables = jax.eval_shape(
      lambda key, x: model.init_with_output({"params": key}, x, train=False), key, image
    )
  variables = nn.meta.unbox(dict(variables))
  check_params(variables.get("params", {}), num_classes, name)
  width = variables["params"][trees.HEAD]["kernel"].shape[-1]
  expected = (num := image.shape[0]), width
  if not hasattr(logits, "shape"):
    raise UserError(
      f"{name} returns a {type(logits).__name__}, expected one array of logits [B, K]: choose it "
      f"with perturb.select_output(model, {outputs.example(logits, expected)}); for {num} images "
      f"its outputs are {outputs.describe(logits)}"
    )
  if logits.shape != expected or logits.dtype != jnp.float32:
    raise UserError(
      f"{name} returns {logits.dtype} {list(logits.shape)} for {num} images, expected float32 "
      f"logits [{num}, {width}], the output of its layer {trees.HEAD!r}"
    )

  def train_step(variables, key, image):
    rngs = {"dropout": key}
    return model.apply(variables, image, train=True, rngs=rngs, mutable=["batch_stats"])

  variables = {k: variables[k] for k in ("params", "batch_stats") if k in variables}
  with proof.as_user_errors(
    f'{name} in training, with "batch_stats" and random numbers "dropout" alone'
  ):
    jax.eval_shape(train_step, variables, key, image)
  return variables


def check_params(params: Params, num_classes: int, owner: str = "the network") -> None:
  """Raises UserError if parameters are not float32, or have no head for `num_classes` classes.

  Args:
    params: parameters of a network.
    num_classes: smallest width of the head.
    owner: the network or file that they are from, for error messages.
  """
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    if x.dtype != jnp.float32:
      raise UserError(
        f"{owner}: the parameter {jax.tree_util.keystr(path, simple=True, separator='/')} is "
        f"{x.dtype}, expected float32: cast the parameters, {_CAST}, and give the layers "
        "param_dtype=float32 (their dtype may stay)"
      )
  head = params.get(trees.HEAD) if isinstance(params, Mapping) else None
  if not isinstance(head, Mapping) or getattr(head.get("kernel"), "ndim", 0) != 2:
    known = ", ".join(map(str, params)) if isinstance(params, Mapping) else type(params).__name__
    raise UserError(
      f"{owner} has no layer {trees.HEAD!r} (its parts: {known or 'none'}): call its last layer "
      f'nn.Dense(num_classes, name="{trees.HEAD}"), at the top of the network'
    )
  if (width := head["kernel"].shape[-1]) < num_classes:
    raise UserError(
      f"{owner}: its layer {trees.HEAD!r} has {width} outputs, and a task has {num_classes} "
      f"classes: it needs at least {num_classes}"
    )


def check_same(model: nn.Module, image_shape: tuple[int, ...], params: Params) -> None:
  """Raises UserError if names or shapes of `params` differ from a network's own parameters."""
  key, image = jax.random.key(0), _two_images(image_shape)
  drawn = jax.eval_shape(lambda x: model.init({"params": key}, x, train=False), image)
  expected = nn.meta.unbox(drawn)["params"]
  own, given = ({p: x.shape for p, x in _flat(tree).items()} for tree in (expected, params))
  for path in sorted(own.keys() | given.keys()):
    if own.get(path) != given.get(path):
      raise UserError(f"{path}: the network has {own.get(path)}, the parameters {given.get(path)}")


def check_state(state: State, shapes_of: Callable[[Params], Shapes]) -> None:
  """Raises UserError if a state's kernels differ from a network's, or are seen as other matrices.

  Args:
    state: a method state whose task states have a `perturbation` of the shared kernels.
    shapes_of: result of `make_matrix_shapes` for the network.
  """
  if not state.tasks:
    return
  first = state.tasks[0].perturbation
  shapes = shapes_of(trees.join(state.shared["kernels"], state.tasks[0].rest))
  for name in sorted(shapes.keys() | first.keys()):
    given = (first[name].S.size, first[name].R.size) if name in first else None
    if given != shapes.get(name):
      raise UserError(
        f"{name}: the state of the first task has a matrix {given} there, the network "
        f"{shapes.get(name)}: give base_state the network, base_state(..., model=model)"
      )


def make_matrix_shapes(
  model: nn.Module, image_shape: tuple[int, ...], max_classes: int
) -> Callable[[Params], Shapes]:
  """Checks a network, and builds a function that returns the shapes of its kernels as matrices.

  Args:
    model: the network.
    image_shape: [H, W, C] of its input.
    max_classes: number of classes of the widest task.

  Returns:
    (params) -> (I, J) of every layer with a kernel except the head, by path.

  Raises:
    UserError: as `check`, and if one of those layers can't be perturbed.
  """
  if is_own(model):
    return guessed_matrix_shapes
  variables = check(model, image_shape, max_classes)
  found = _find_layers(model, variables, image_shape)
  if any(not layer.is_sure for layer in found.values()):
    # tracing does not tell whether all layers can be perturbed: compute an example
    image = jax.random.normal(jax.random.key(0), _two_images(image_shape).shape)
    drawn = model.init({"params": jax.random.key(1)}, image, train=False)
    perturb.init(jax.random.key(2), model, drawn, image, rank=1, train=False)
  shapes = {name: layer.shape for name, layer in found.items()}
  return lambda params: shapes


def guessed_matrix_shapes(params: Params) -> Shapes:
  """Returns the shapes of all kernels except the head's as matrices, guessed from parameters.

  `kinds.guessed_matrix_shape` says how.
  """
  flat = _flat(params)
  return {name: kinds.guessed_matrix_shape(name, flat) for name in trees.layer_names(params)}


def check_plain(
  model: nn.Module, variables: dict[str, Params], image_shape: tuple[int, ...], method: str
) -> None:
  """Raises UserError if a layer with a kernel is neither Dense nor an ordinary 2-D convolution.

  Args:
    model: the network.
    variables: its variables, or their shapes and dtypes.
    image_shape: [H, W, C] of its input.
    method: name of the method that requires it.
  """
  for name, layer in _find_layers(model, variables, image_shape).items():
    if not layer.is_plain or not layer.is_sure:
      raise UserError(
        f"{name}: {method} supports only Dense and ordinary 2-D Conv layers whose kernels are "
        "their parameters; set method.name=halrp or stl for this network"
      )


def _find_layers(
  model: nn.Module, variables: Mapping[str, Params], image_shape: tuple[int, ...]
) -> dict[str, proof.Layer]:
  """Returns the properties of every layer with a kernel except the head, by path."""
  names = trees.layer_names(variables["params"])

  def run(variables: Params) -> Params:
    return model.apply(variables, jnp.zeros(_two_images(image_shape).shape), train=False)

  return proof.find_layers(run, names, variables)


def _two_images(image_shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
  """Returns the shape of a batch of two images as network input."""
  return jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)


def _flat(params: Params) -> dict[str, Params]:
  """Returns parameters by path."""
  return traverse_util.flatten_dict(params, sep="/")


def _name(model: nn.Module) -> str:
  """Returns the name of a network's class, for error messages."""
  return type(model).__name__
