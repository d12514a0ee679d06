"""The folder that `export` writes into: names of files, cards, whose they are."""

import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np

from halrp_jax import files
from halrp_jax.types import UserError, brief

SCHEMA = 1
FORMATS = ("safetensors", "orbax", "stablehlo")
BASE = "base"
Arrays = dict[str, np.ndarray]  # by name, as export.py lists them
_OURS = re.compile(r"(base|task\d{2,})(|\.json|\.safetensors|\.stablehlo)")


def stem_of(task_id: int) -> str:
  """Returns the name of a task's files without suffix."""
  return f"task{task_id:02d}"


def file_of(place: pathlib.Path, stem: str, format: str) -> pathlib.Path:
  """Returns the path of the file, or of the Orbax folder, beside a card."""
  return place / (stem if format == "orbax" else f"{stem}.{format}")


def read_card(place: pathlib.Path, stem: str) -> dict:
  """Reads the JSON beside a file; `stem` is "base" or "task" and two digits."""
  file = place / f"{stem}.json"
  try:
    card = files.load_json(file)
    if card["schema"] != SCHEMA:
      raise UserError(f"{file}: schema {card['schema']!r}, this version reads {SCHEMA}")
    if card["format"] not in FORMATS or not isinstance(card["hash"], str):
      raise ValueError("format or hash")
    return card
  except FileNotFoundError as e:
    known = ", ".join(sorted(p.stem for p in place.glob("*.json"))) or "none"
    raise UserError(f"{file}: not there; {place} holds {known}") from e
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise UserError(f"{file}: is not what was written ({brief(e)})") from e


def require_one_model(place: pathlib.Path, format: str, own: dict[str, dict]) -> None:
  """Refuses a folder with files that would not belong together with those to be written.

  Nothing there is replaced by another model or form, even if all of it would be: an export that is
  interrupted would leave a mixture.

  Args:
    place: the folder.
    format: of the files to be written.
    own: per file of the model, by its stem: what its card has to say.

  Raises:
    UserError: names the first file that is of another model, or written in another form.
  """
  own = json.loads(json.dumps(own))
  for path in sorted(place.iterdir()):
    if not (match := _OURS.fullmatch(path.name)):
      continue
    stem, suffix = match.groups()
    if suffix == ".json":
      card = read_card(place, stem)
      form = card["format"], card.get("kind")
      if stem in own and form != (format, own[stem]["kind"]):
        _refuse(path, f"is of --format={form[0]} ({form[1]})")
      if "state" in own.get(stem, {}) and "state" not in card:
        _refuse(path, "is of a version that did not write whose it is")
      if stem not in own or any(card.get(k) != x for k, x in own[stem].items()):
        _refuse(path, "is of another model, or of this one before it learned more")
    elif stem not in own or path != file_of(place, stem, format):
      _refuse(path, "does not belong to what is to be written")


def _refuse(path: pathlib.Path, why: str) -> None:
  raise UserError(
    f"--out={path.parent}: {path.name}, which is there, {why}; a folder holds one model in one "
    "format: choose another folder"
  )


# --- matrices, most of whose entries may be zero ---------------------------------------


def pack(name: str, x: np.ndarray) -> Arrays:
  """Returns a matrix dense, or its non-zeros and a bit per entry: whichever is smaller."""
  there = x != 0
  values, mask = x[there], np.packbits(there)
  if values.nbytes + mask.nbytes < x.nbytes:
    return {f"{name}.values": values, f"{name}.mask": mask}
  return {name: np.ascontiguousarray(x)}


def unpack(arrays: Arrays, name: str, shape: tuple[int, int], place: str) -> np.ndarray:
  """Inverts `pack`; takes the arrays out."""
  if name in arrays:
    return arrays.pop(name)
  values, mask = (take(arrays, f"{name}.{part}", place) for part in ("values", "mask"))
  size = shape[0] * shape[1]
  if mask.dtype != np.uint8 or mask.shape != (-(-size // 8),):
    raise UserError(f"{place}: {name}.mask is {mask.dtype} {mask.shape}, expected {size} bits")
  there = np.unpackbits(mask)[:size].astype(bool).reshape(shape)
  if values.shape != (there.sum(),):
    raise UserError(f"{place}: {name}.values has {values.size} entries, its mask {there.sum()}")
  x = np.zeros(shape, values.dtype)
  x[there] = values
  return x


def take(arrays: Arrays, name: str, place: str) -> np.ndarray:
  if name not in arrays:
    raise UserError(f"{place}: lacks {name}")
  return arrays.pop(name)


def require(found: Arrays, expected: dict[str, tuple], place) -> None:
  """Refuses missing and surplus arrays, and wrong shapes, by name."""
  if missing := sorted(expected.keys() - found.keys()):
    raise UserError(f"{place}: lacks {missing[0]}{_more(missing)}")
  if surplus := sorted(found.keys() - expected.keys()):
    raise UserError(f"{place}: holds {surplus[0]}{_more(surplus)}, which the network has not")
  for name, shape in expected.items():
    if found[name].shape != tuple(shape):
      raise UserError(f"{place}: {name} is {found[name].shape}, expected {tuple(shape)}")
    if not jnp.issubdtype(found[name].dtype, jnp.floating):
      raise UserError(f"{place}: {name} is {found[name].dtype}, expected floating point")


def _more(names: list) -> str:
  return f" and {len(names) - 1} more" if len(names) > 1 else ""
