"""What the methods demand of a network, checked before anything is learned.

A network is a Linen module `__call__(x [B, H, W, C], train) -> logits [B, K]` with float32
parameters, whose last layer is `nn.Dense(K, name="head")`; variables that are no parameters are in
"batch_stats", random numbers come from "dropout".
"""

import inspect
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from halrp_jax.types import Params, State, UserError
from halrp_jax.weights import kinds, perturb, proof, trees

Shapes = dict[str, tuple[int, int]]  # (I, J) by layer

_CALL = "def __call__(self, x, train=False): return super().__call__"
_CAST = 'jax.tree.map(lambda x: x.astype("float32"), params)'


def check_call(model) -> None:
  """Raises UserError if `model` is no Linen module that is told whether it is trained."""
  proof.check_module(model)
  taken = inspect.signature(type(model).__call__).parameters
  if "train" not in taken and all(p.kind is not p.VAR_KEYWORD for p in taken.values()):
    raise UserError(
      f"{_name(model)}.__call__ takes no argument `train`, which says if the network is trained; "
      f"give it one, or subclass it: {_CALL}(x, ...), with `deterministic=not train` if it has that"
    )


def is_own(model) -> bool:
  """Whether this is one of `models`, which the tests hold to all of this: it isn't traced again."""
  return type(model).__module__.startswith("halrp_jax.models.")


def check(model, image_shape: tuple[int, ...], num_classes: int) -> dict[str, Params]:
  """Traces a network, computing nothing, and checks what it takes, holds and returns.

  Args:
    model: the network.
    image_shape: [H, W, C] of its input.
    num_classes: of the task that has most.

  Returns:
    Its variables, as shapes and dtypes.

  Raises:
    UserError: if a demand isn't met; it says how to meet it.
  """
  check_call(model)
  name, image = _name(model), _image(image_shape)
  key = jax.eval_shape(lambda: jax.random.key(0))
  with proof.explained(name):
    logits, variables = jax.eval_shape(
      lambda key, x: model.init_with_output({"params": key}, x, train=False), key, image
    )
  variables = nn.meta.unbox(dict(variables))
  check_params(variables.get("params", {}), num_classes, name)
  if not hasattr(logits, "shape"):
    raise UserError(
      f"{name} returns a {type(logits).__name__}, expected one array of logits [B, K]; "
      f"subclass it: {_CALL}(x, train)[0]"
    )
  width = variables["params"][trees.HEAD]["kernel"].shape[-1]
  if logits.shape != (num := image.shape[0], width) or logits.dtype != jnp.float32:
    raise UserError(
      f"{name} returns {logits.dtype} {list(logits.shape)} for {num} images, expected float32 "
      f"logits [{num}, {width}], what its layer {trees.HEAD!r} gives"
    )

  def train_step(kept, key, image):
    rngs = {"dropout": key}
    return model.apply(kept, image, train=True, rngs=rngs, mutable=["batch_stats"])

  kept = {k: variables[k] for k in ("params", "batch_stats") if k in variables}
  with proof.explained(
    f'{name} in training, with "batch_stats" and random numbers "dropout" alone'
  ):
    jax.eval_shape(train_step, kept, key, image)
  return kept


def check_params(params: Params, num_classes: int, whose: str = "the network") -> None:
  """Raises UserError if parameters aren't float32, or have no head for `num_classes` classes."""
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    if x.dtype != jnp.float32:
      raise UserError(
        f"{whose}: the parameter {jax.tree_util.keystr(path, simple=True, separator='/')} is "
        f"{x.dtype}, expected float32: cast them, {_CAST}, and give the layers "
        "param_dtype=float32 (dtype may stay)"
      )
  head = params.get(trees.HEAD) if isinstance(params, Mapping) else None
  if not isinstance(head, Mapping) or getattr(head.get("kernel"), "ndim", 0) != 2:
    known = ", ".join(map(str, params)) if isinstance(params, Mapping) else type(params).__name__
    raise UserError(
      f"{whose} has no layer {trees.HEAD!r} (its parts: {known or 'none'}): call its last layer "
      f'nn.Dense(num_classes, name="{trees.HEAD}"), at the top of the network'
    )
  if (width := head["kernel"].shape[-1]) < num_classes:
    raise UserError(
      f"{whose}: its layer {trees.HEAD!r} has {width} outputs, and a task has {num_classes} "
      f"classes: it needs at least {num_classes}"
    )


def check_same(model, image_shape: tuple[int, ...], params: Params) -> None:
  """Raises UserError if `params` are not the parameters of a network, by name and shape."""
  key = jax.random.key(0)
  drawn = jax.eval_shape(lambda x: model.init({"params": key}, x, train=False), _image(image_shape))
  wanted = nn.meta.unbox(drawn)["params"]
  a, b = ({p: x.shape for p, x in _flat(tree).items()} for tree in (wanted, params))
  for path in sorted(a.keys() | b.keys()):
    if a.get(path) != b.get(path):
      raise UserError(f"{path}: the network has {a.get(path)}, the parameters {b.get(path)}")


def check_state(state: State, shapes_of: Callable[[Params], Shapes]) -> None:
  """Raises UserError if a state's kernels are not those of a network, or seen as other matrices.

  Args:
    state: its tasks hold a `perturbation` of the shared kernels.
    shapes_of: from `make_matrix_shapes` of the network.
  """
  first = state.tasks[0].perturbation
  shapes = shapes_of(trees.join(state.shared["kernels"], state.tasks[0].rest))
  for name in sorted(shapes.keys() | first.keys()):
    have = (first[name].S.size, first[name].R.size) if name in first else None
    if have != shapes.get(name):
      raise UserError(
        f"{name}: the first task's state has a matrix {have} there, the network "
        f"{shapes.get(name)}: give base_state the network, base_state(..., model=model)"
      )


def make_matrix_shapes(
  model, image_shape: tuple[int, ...], max_classes: int
) -> Callable[[Params], Shapes]:
  """Builds params -> (I, J) of every layer with a kernel but the head, and checks the network.

  Raises:
    UserError: as `check`, and if one of those layers can't be perturbed.
  """
  if is_own(model):
    return guessed_matrix_shapes
  variables = check(model, image_shape, max_classes)
  found = _layers(model, variables, image_shape)
  if any(not layer.is_sure for layer in found.values()):
    # tracing doesn't tell: the proof on numbers does
    image = jax.random.normal(jax.random.key(0), _image(image_shape).shape)
    drawn = model.init({"params": jax.random.key(1)}, image, train=False)
    perturb.init(jax.random.key(2), model, drawn, image, rank=1, train=False)
  shapes = {name: layer.shape for name, layer in found.items()}
  return lambda params: shapes


def guessed_matrix_shapes(params: Params) -> Shapes:
  """Returns (I, J) of every layer with a kernel but the head, as far as the parameters tell."""
  flat = _flat(params)
  return {name: kinds.guessed_matrix_shape(name, flat) for name in trees.layer_names(params)}


def check_plain(
  model, variables: dict[str, Params], image_shape: tuple[int, ...], who: str
) -> None:
  """Raises UserError if a layer with a kernel is neither Dense nor an ordinary 2-D convolution."""
  for name, layer in _layers(model, variables, image_shape).items():
    if not layer.is_plain or not layer.is_sure:
      raise UserError(
        f"{name}: {who} knows Dense and ordinary 2-D Conv layers alone, whose kernels are their "
        "parameters; method.name=halrp or stl takes this network"
      )


def _layers(model, variables, image_shape):
  names = trees.layer_names(variables["params"])

  def run(variables):
    return model.apply(variables, jnp.zeros(_image(image_shape).shape), train=False)

  return proof.find_layers(run, names, variables)


def _image(image_shape) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)


def _flat(params) -> dict:
  return traverse_util.flatten_dict(params, sep="/")


def _name(model) -> str:
  return type(model).__name__
