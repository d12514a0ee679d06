"""Names of other libraries' networks: which array of a file is which array of ours.

`SOURCES` has a table of rules for every source. A rule maps the path of one of our layers to the
name of the source's layer; `convert` looks up every array that our network needs and changes its
axes. What the original network computes beside its arrays is part of the card of the source:
options of our network, and how images are prepared.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from halrp_jax.types import Array, UserError

Arrays = Mapping[str, Array]
Rule = tuple[str, str | Callable[[re.Match], str]]  # pattern of our layer, name of the source's


class Preprocessing(NamedTuple):
  """How the images of a pretrained network are prepared: resized, cropped, normalised."""

  mean: tuple[float, ...]  # [3] of pixels from 0 to 1
  std: tuple[float, ...]  # [3]
  interpolation: str  # "bicubic" or "bilinear"
  crop: float  # share of the shorter side that the central square keeps


class Source(NamedTuple):
  """Where a file of parameters comes from: its names, and the card of its network."""

  networks: tuple[str, ...]  # names of our networks that it serves
  mark: str  # pattern of a name that only files of this source and of `alike` have
  rules: tuple[Rule, ...]  # the first whose array the file has is used
  leaves: Mapping[str, str]  # our name of an array within its layer: the source's
  separator: str  # between layer and array
  unused: str  # pattern of names that our network has no use for
  options: Mapping[str, str | float]  # of our network, that make it compute the same
  preprocessing: Preprocessing


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_TORCH = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}
_FLAX = {"kernel": "kernel", "scale": "scale", "bias": "bias"}
_STAGE_BLOCKS = (1, 2, 2, 3, 3, 4, 1)  # of EfficientNet-Lite0


def _numbered(name: str) -> Callable[[re.Match], str]:
  """Builds the name of a layer in EfficientNet's n-th block, from (stage, index within it)."""
  return lambda m: f"_blocks.{sum(_STAGE_BLOCKS[: int(m[1])]) + int(m[2])}.{name}"


_BLOCK = r"stage(\d+)_(\d+)/"
_LUKEMELAS_LITE0: tuple[Rule, ...] = (
  ("conv_stem", "_conv_stem"),
  ("bn_stem", "_bn0"),
  *(
    (_BLOCK + ours, _numbered(name))
    for ours, name in (
      ("expand", "_expand_conv"),
      ("bn_expand", "_bn0"),
      ("depthwise", "_depthwise_conv"),
      ("bn_depthwise", "_bn1"),
      ("project", "_project_conv"),
      ("bn_project", "_bn2"),
    )
  ),
  ("conv_head", "_conv_head"),
  ("bn_head", "_bn1"),
  ("head", "_fc"),
)
_TIMM_LITE0: tuple[Rule, ...] = (
  ("conv_stem", "conv_stem"),
  ("bn_stem", "bn1"),
  # the blocks of the first stage do not expand, so their layers have other numbers
  (r"stage0_(\d+)/depthwise", r"blocks.0.\1.conv_dw"),
  (r"stage0_(\d+)/bn_depthwise", r"blocks.0.\1.bn1"),
  (r"stage0_(\d+)/project", r"blocks.0.\1.conv_pw"),
  (r"stage0_(\d+)/bn_project", r"blocks.0.\1.bn2"),
  (_BLOCK + "expand", r"blocks.\1.\2.conv_pw"),
  (_BLOCK + "bn_expand", r"blocks.\1.\2.bn1"),
  (_BLOCK + "depthwise", r"blocks.\1.\2.conv_dw"),
  (_BLOCK + "bn_depthwise", r"blocks.\1.\2.bn2"),
  (_BLOCK + "project", r"blocks.\1.\2.conv_pwl"),
  (_BLOCK + "bn_project", r"blocks.\1.\2.bn3"),
  ("conv_head", "conv_head"),
  ("bn_head", "bn2"),
  ("head", "classifier"),
)
_TORCH_RESNET: tuple[Rule, ...] = (
  ("conv1", "conv1"),
  ("bn1", "bn1"),
  (r"stage(\d+)_(\d+)/(conv\d|bn\d)", r"layer\1.\2.\3"),
  (r"stage(\d+)_(\d+)/shortcut", r"layer\1.\2.downsample.0"),
  (r"stage(\d+)_(\d+)/bn_shortcut", r"layer\1.\2.downsample.1"),
  ("head", "fc"),
)
_TIMM_VIT: tuple[Rule, ...] = (
  ("token", "cls_token"),
  ("positions", "pos_embed"),
  ("patches", "patch_embed.proj"),
  (r"block(\d+)/norm(\d)", r"blocks.\1.norm\2"),
  (r"block(\d+)/attention/(?:query|key|value)", r"blocks.\1.attn.qkv"),
  (r"block(\d+)/attention/out", r"blocks.\1.attn.proj"),
  (r"block(\d+)/fc(\d)", r"blocks.\1.mlp.fc\2"),
  ("norm", "fc_norm"),  # with pool=mean; `misfits` tells the two apart
  ("norm", "norm"),
  ("head", "head"),
)
_ENCODER = r"Transformer/encoderblock_\1/"
# big_vision and, with other numbers of the parts of a block, its forerunner vision_transformer
_BIG_VISION_VIT: tuple[Rule, ...] = (
  ("token", "cls"),
  ("positions", "pos_embedding"),
  ("positions", "Transformer/posembed_input/pos_embedding"),
  ("patches", "embedding"),
  (r"block(\d+)/norm1", _ENCODER + "LayerNorm_0"),
  (r"block(\d+)/norm2", _ENCODER + "LayerNorm_1"),
  (r"block(\d+)/norm2", _ENCODER + "LayerNorm_2"),
  (r"block(\d+)/attention/(\w+)", _ENCODER + r"MultiHeadDotProductAttention_0/\2"),
  (r"block(\d+)/attention/(\w+)", _ENCODER + r"MultiHeadDotProductAttention_1/\2"),
  *(
    (rf"block(\d+)/fc{i + 1}", f"{_ENCODER}MlpBlock_{n}/Dense_{i}") for i in (0, 1) for n in (0, 3)
  ),
  ("norm", "Transformer/encoder_norm"),
  ("head", "head"),
)
_LITE0, _RESNET, _VIT = ("efficientnet_lite0",), ("resnet50",), ("vit_ti16", "vit_s16", "vit_b16")
_COUNTERS = r".*num_batches_tracked"

_TF_LITE0 = Source(
  _LITE0,
  r"conv_stem\.weight",
  _TIMM_LITE0,
  _TORCH,
  ".",
  _COUNTERS,
  {"padding": "tensorflow", "epsilon": 1e-3},
  Preprocessing(*_HALF, "bicubic", 0.875),
)
_TORCHVISION_RESNET50 = Source(
  _RESNET,
  r"layer1\.0\.conv1\.weight",
  _TORCH_RESNET,
  _TORCH,
  ".",
  _COUNTERS,
  {},
  Preprocessing(*_IMAGENET, "bilinear", 0.875),
)

SOURCES: dict[str, Source] = {
  "lukemelas": _TF_LITE0._replace(
    mark=r"_conv_stem\.weight",
    rules=_LUKEMELAS_LITE0,
    preprocessing=Preprocessing((127 / 255,) * 3, (128 / 255,) * 3, "bicubic", 0.875),
  ),
  "timm/tf_efficientnet_lite0": _TF_LITE0,
  "timm/efficientnet_lite0": _TF_LITE0._replace(
    options={"padding": "even", "epsilon": 1e-5},
    preprocessing=Preprocessing(*_IMAGENET, "bicubic", 0.875),
  ),
  "torchvision": _TORCHVISION_RESNET50,
  "timm/resnet50": _TORCHVISION_RESNET50._replace(
    preprocessing=Preprocessing(*_IMAGENET, "bicubic", 0.95)
  ),
  "timm/vit": Source(
    _VIT,
    r"patch_embed\.proj\.weight",
    _TIMM_VIT,
    _TORCH,
    ".",
    "",
    {"gelu": "exact"},
    Preprocessing(*_HALF, "bicubic", 0.9),
  ),
  "big_vision": Source(
    _VIT,
    r"(.*/)?Transformer/encoder_norm/scale",
    _BIG_VISION_VIT,
    _FLAX,
    "/",
    r"pre_logits/.*",
    {"gelu": "tanh"},
    Preprocessing(*_HALF, "bicubic", 0.9),  # as timm, which converted these files
  ),
}


def find_source(path: str, found: Arrays, network: str, asked: str = "auto") -> str | None:
  """Returns the name of the source that a file of parameters is from, or None if it is ours.

  Args:
    path: of the file, for error messages.
    found: its arrays by name.
    network: name of the network that they are for, a key of `models.NETWORKS`.
    asked: a key of `SOURCES`, or "auto": the names of the arrays tell.

  Raises:
    UserError: if the arrays are those of another network, or fit sources that compute differently.
  """
  marked = [
    name for name, s in SOURCES.items() if any(re.fullmatch(s.mark, array) for array in found)
  ]
  fitting = [name for name in marked if network in SOURCES[name].networks]
  if asked != "auto":
    if asked not in fitting:
      fits = " or ".join(fitting) or "none"
      raise UserError(
        f"{path}: base_source={asked}, but its names are those of base_source={fits} for "
        f"network={network}"
      )
    return asked
  if marked and not fitting:
    known = sorted({n for name in marked for n in SOURCES[name].networks})
    raise UserError(
      f"{path}: its arrays are those of {' or '.join(known)}, not of network={network}"
    )
  if len({tuple(SOURCES[name].options.items()) for name in fitting}) > 1:
    raise UserError(
      f"{path}: its names fit networks that pad and normalise differently: set base_source="
      + " or base_source=".join(fitting)
    )
  return fitting[0] if fitting else None


def required_options(source: str, options: Mapping[str, object]) -> dict[str, str | float]:
  """Returns the options that a network must have for a source, where `options` has other ones."""
  return {k: v for k, v in SOURCES[source].options.items() if options.get(k) != v}


def misfits(source: str, found: Arrays, pool: str | None) -> str:
  """Returns how a network's `pool` contradicts a file, or "" if it does not.

  Args:
    source: a key of `SOURCES`.
    found: arrays of the file by name.
    pool: option of a ViT; None for other networks.
  """
  has_mean = "fc_norm.weight" in found
  if source != "timm/vit" or pool is None or has_mean == (pool == "mean"):
    return ""
  kind, right = ("mean pooling", "mean") if has_mean else ("the class token", "token")
  return f"it has the norm of {kind}: set pool={right}"


def convert(
  source: str,
  found: Arrays,
  shapes: Mapping[str, tuple[int, ...]],
  grid: tuple[int, int] | None = None,
) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
  """Renames the arrays of a file and changes their axes to those of our network.

  Args:
    source: a key of `SOURCES`.
    found: arrays of the file by name.
    shapes: shapes of our arrays by path, such as "params/head/kernel".
    grid: rows and columns of patches, to which position embeddings are interpolated.

  Returns:
    Our arrays by path, without those that the file does not have; the names of the file's arrays
    that are left out on purpose; the names of those that are unexpected.
  """
  card, converted, used = SOURCES[source], {}, set[str]()
  prefix = _prefix(source, found)
  for path, shape in shapes.items():
    layer, leaf = _layer_and_leaf(path)
    for name in _names(card, layer, leaf):
      if (array := found.get(prefix + name)) is not None:
        used.add(prefix + name)
        array = np.asarray(array)
        if leaf:
          array = _with_axes(array, layer, leaf, shape, card.leaves is _TORCH)
        else:
          array = array.reshape(-1) if len(shape) == 1 else array.reshape(-1, array.shape[-1])
        if layer == "positions" and grid and array.shape[-1:] == shape[-1:]:
          array = _interpolated(array, shape, grid)
        converted[path] = array
        break
  left = [n for n in found if n not in used]
  is_unused = [bool(card.unused and re.fullmatch(card.unused, n[len(prefix) :])) for n in left]
  return (
    converted,
    [n for n, is_known in zip(left, is_unused, strict=True) if is_known],
    [n for n, is_known in zip(left, is_unused, strict=True) if not is_known],
  )


def _prefix(source: str, found: Arrays) -> str:
  """Returns what stands in front of every name of a file, such as "params/"."""
  for name in found:
    if source == "big_vision" and (match := re.fullmatch(SOURCES[source].mark, name)):
      return match[1] or ""
  return ""


def _layer_and_leaf(path: str) -> tuple[str, str]:
  """Splits "params/block0/norm1/scale" into "block0/norm1" and "scale".

  A parameter of the network itself, such as "params/token", has no leaf.
  """
  _, _, rest = path.partition("/")
  layer, _, leaf = rest.rpartition("/")
  return (layer, leaf) if layer else (rest, "")


def _names(card: Source, layer: str, leaf: str) -> list[str]:
  """Returns the names that an array may have in a file, without the file's prefix."""
  names = []
  for pattern, template in card.rules:
    if match := re.fullmatch(pattern, layer):
      name = match.expand(template) if isinstance(template, str) else template(match)
      names.append(f"{name}{card.separator}{card.leaves[leaf]}" if leaf else name)
  return names


def _with_axes(
  array: np.ndarray, layer: str, leaf: str, shape: Sequence[int], is_torch: bool
) -> np.ndarray:
  """Returns an array of a file with the axes of ours; if they don't fit, with some other shape."""
  if not is_torch:
    return array
  own = layer.rpartition("/")[2]
  if own in ("query", "key", "value"):
    # the three projections of timm's attention are one matrix [3 F, F]
    part = ("query", "key", "value").index(own)
    array = np.split(array, 3)[part] if len(array) % 3 == 0 else array
  if array.ndim == 4:
    array = array.transpose(2, 3, 1, 0)  # OIHW -> HWIO
  elif array.ndim == 2 and leaf == "kernel":
    array = array.T
  is_projection = own in ("query", "key", "value", "out") and array.size == np.prod(shape)
  return array.reshape(shape) if is_projection else array


def _interpolated(positions: np.ndarray, shape: Sequence[int], grid: tuple[int, int]) -> np.ndarray:
  """Interpolates position embeddings [N, F] to another grid of patches.

  The embedding of a class token, the first one, stays as it is. Files that add the class token
  after the positions have none for it; it gets zeros.

  Args:
    positions: embeddings of a square grid, with or without that of a class token.
    shape: the shape wanted; its first number is that of `grid`, or one more with a class token.
    grid: rows and columns of patches.
  """
  has_token, features = shape[0] - grid[0] * grid[1], positions.shape[-1]
  side = int(len(positions) ** 0.5)
  given = len(positions) - side * side  # 1: the first one is the class token's
  if given not in (0, 1) or (given and not has_token):
    return positions
  token = positions[:given] if given else np.zeros((has_token, features), positions.dtype)
  square = positions[given:].reshape(side, side, features)
  if (side, side) != tuple(grid):
    square = jax.image.resize(square, (*grid, features), "bicubic", antialias=True)
  return np.concatenate([token[:has_token], np.asarray(square).reshape(-1, features)])
