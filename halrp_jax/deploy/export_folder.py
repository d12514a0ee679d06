"""The folder that `export` writes into: names of files, cards, and packing of sparse matrices."""

import json
import pathlib
import re
from collections.abc import Collection
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from halrp_jax import files
from halrp_jax.types import Params, UserError, brief

SCHEMA = 1
FORMATS = ("safetensors", "orbax", "stablehlo")
BASE = "base"  # name of the base's files without suffix
Arrays = dict[str, np.ndarray]  # by the names that export.py lists
Card = dict[str, Any]  # a JSON object
_OUR_FILES = re.compile(r"(base|task\d{2,})(|\.json|\.safetensors|\.stablehlo)")


def stem_of(task_id: int) -> str:
  """Returns the name of a task's files without suffix, such as "task03"."""
  return f"task{task_id:02d}"


def file_of(folder: pathlib.Path, stem: str, format: str) -> pathlib.Path:
  """Returns the path of the file, or of the Orbax folder, that a card describes."""
  return folder / (stem if format == "orbax" else f"{stem}.{format}")


def named(tree: Params) -> Arrays:
  """Returns the leaves of a pytree of dicts by their paths."""
  return {k: np.asarray(x) for k, x in traverse_util.flatten_dict(tree, sep="/").items()}


def read_card(folder: pathlib.Path, stem: str) -> Card:
  """Reads the card of a file.

  Args:
    folder: folder of the export.
    stem: name of the file without suffix.

  Raises:
    UserError: if the card is missing, damaged or of another schema.
  """
  file = folder / f"{stem}.json"
  try:
    card = files.load_json(file)
    if card["schema"] != SCHEMA:
      raise UserError(
        f"{file}: has schema {card['schema']!r}, expected {SCHEMA}; export the run again"
      )
    if card["format"] not in FORMATS or not isinstance(card["hash"], str):
      raise ValueError("its format or hash is not valid")
    return card
  except FileNotFoundError as e:
    known = ", ".join(sorted(p.stem for p in folder.glob("*.json"))) or "no cards"
    raise UserError(f"{file}: not found; {folder} holds {known}") from e
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise UserError(
      f"{file}: was changed or damaged, or can't be read ({brief(e)}); export the run again to "
      "another folder"
    ) from e


def require_one_model(folder: pathlib.Path, format: str, own: dict[str, Card]) -> None:
  """Checks that the files in a folder are of the same model and form as those to be written.

  The form is the format together with the kind in the card. Files of another model or form are
  never replaced, even if the export would replace all of them: if it were interrupted, the folder
  would hold a mixture.

  Args:
    folder: folder of the export.
    format: format of the files to be written, one of `FORMATS`.
    own: name of each file of the model without suffix -> entries that its card must have.

  Raises:
    UserError: names the first file of another model or form.
  """
  own = json.loads(json.dumps(own))  # tuples become lists, as in the cards
  for path in sorted(folder.iterdir()):
    if not (match := _OUR_FILES.fullmatch(path.name)):
      continue
    stem, suffix = match.groups()
    if suffix == ".json":
      card = read_card(folder, stem)
      form = card["format"], card.get("kind")
      if stem in own and form != (format, own[stem]["kind"]):
        _refuse(path, f"was written with --format={form[0]} (kind: {form[1]})")
      if "state" in own.get(stem, {}) and "state" not in card:
        _refuse(path, "is of an older version, which did not record its model")
      if stem not in own or any(card.get(k) != x for k, x in own[stem].items()):
        _refuse(path, "is of another model, or of this one before it learned more")
    elif stem not in own or path != file_of(folder, stem, format):
      _refuse(path, "is not a file of this model in this format")


def _refuse(path: pathlib.Path, why: str) -> NoReturn:
  """Raises the error of a folder that holds a file of another model or form."""
  raise UserError(
    f"--out={path.parent}: {path.name}, which is there, {why}; a folder holds one model in one "
    "form: choose another folder"
  )


# --- matrices, most of whose entries may be zero ---------------------------------------


def pack(name: str, x: np.ndarray) -> Arrays:
  """Returns a matrix as named arrays, stored dense or sparse, whichever takes fewer bytes.

  Dense: NAME is the matrix. Sparse: NAME.values has its non-zero entries row by row, and NAME.mask
  a bit per entry (numpy.packbits) that says whether it is non-zero.
  """
  is_nonzero = x != 0
  values, mask = x[is_nonzero], np.packbits(is_nonzero)
  if values.nbytes + mask.nbytes < x.nbytes:
    return {f"{name}.values": values, f"{name}.mask": mask}
  return {name: np.ascontiguousarray(x)}


def unpack(arrays: Arrays, name: str, shape: tuple[int, int], file: object) -> np.ndarray:
  """Inverts `pack`, and removes the matrix from `arrays`.

  Args:
    arrays: arrays of a file.
    name: name of the matrix.
    shape: shape of the matrix.
    file: where the arrays are from, for the error messages.

  Raises:
    UserError: if arrays are missing, or values, mask and shape don't fit together.
  """
  if name in arrays:
    return arrays.pop(name)
  values, mask = (take(arrays, f"{name}.{part}", file) for part in ("values", "mask"))
  size = shape[0] * shape[1]
  if mask.dtype != np.uint8 or mask.shape != (-(-size // 8),):
    expected = f"uint8 {(-(-size // 8),)}"
    raise UserError(f"{file}: {name}.mask is {mask.dtype} {mask.shape}, expected {expected}")
  is_nonzero = np.unpackbits(mask)[:size].astype(bool).reshape(shape)
  count = int(is_nonzero.sum())
  if values.shape != (count,):
    raise UserError(f"{file}: {name}.values has {values.size} entries, but its mask has {count}")
  x = np.zeros(shape, values.dtype)
  x[is_nonzero] = values
  return x


def take(arrays: Arrays, name: str, file: object) -> np.ndarray:
  """Removes an array from `arrays` and returns it; raises UserError if it is missing."""
  if name not in arrays:
    raise UserError(f"{file}: {name} is missing")
  return arrays.pop(name)


def require_arrays(
  found: Arrays,
  expected: dict[str, tuple[int, ...]],
  file: object,
  int8: Collection[str] = (),
) -> None:
  """Checks names, shapes and dtypes of the arrays of a file.

  Args:
    found: the arrays.
    expected: name -> shape. The dtype may be any floating-point type.
    file: where the arrays are from, for the error messages.
    int8: names of arrays that may be int8, too.

  Raises:
    UserError: names the first array that is missing, unexpected, or of another shape or dtype.
  """
  if missing := sorted(expected.keys() - found.keys()):
    raise UserError(f"{file}: {missing[0]}{_more(missing)} is missing")
  if surplus := sorted(found.keys() - expected.keys()):
    raise UserError(
      f"{file}: unexpected {surplus[0]}{_more(surplus)}: the network has no such array"
    )
  for name, shape in expected.items():
    if found[name].shape != shape:
      raise UserError(f"{file}: {name} is {found[name].shape}, expected {shape}")
    if name in int8 and found[name].dtype == np.int8:
      continue
    if not jnp.issubdtype(found[name].dtype, jnp.floating):
      raise UserError(f"{file}: {name} is {found[name].dtype}, expected floating point")


def _more(names: list[str]) -> str:
  """Returns " (and N more)" for the names after the first, or ""."""
  return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
