"""Where the original files are: a folder or an archive below `data_dir`."""

import pathlib
import tarfile

from halrp_jax.types import UserError


def read_members(
  data_dir: str, folder: str, archive: str, names: tuple[str, ...]
) -> dict[str, bytes]:
  """Contents of files of a data set, from its extracted folder or from its tar archive.

  Args:
    data_dir: the user's folder; the extracted folder itself is accepted too.
    folder: name of the extracted folder, which is also the prefix inside the archive.
    archive: name of the archive beside it.
    names: file names.

  Raises:
    UserError: if a file is missing or can't be read; the line says what was looked for.
  """
  if not data_dir:
    raise UserError(f"data_dir is not set: give the folder that holds {folder}/ or {archive}")
  root = pathlib.Path(data_dir).expanduser()
  try:
    for place in (root / folder, root):
      if (place / names[0]).is_file():
        return {name: _read(place / name) for name in names}
    if (root / archive).is_file():
      return _read_archive(root / archive, folder, names)
  except OSError as e:
    raise UserError(f"data_dir={data_dir}: {e.filename or root}: {e.strerror or e}") from e
  python_version = folder.replace("binary", "python")
  if (root / python_version).exists() or (root / f"{python_version}.tar.gz").exists():
    raise UserError(
      f"data_dir={data_dir}: found the python version, which is a pickle and is not read; "
      f"get the binary version, {archive}"
    )
  raise UserError(
    f"data_dir={data_dir}: found neither {folder}/{names[0]} nor {archive}; "
    "put the original archive or its extracted folder there"
  )


def _read(path: pathlib.Path) -> bytes:
  if not path.is_file():
    raise UserError(f"{path}: missing; extract the original archive again")
  return path.read_bytes()


def _read_archive(path: pathlib.Path, folder: str, names: tuple[str, ...]) -> dict[str, bytes]:
  try:
    with tarfile.open(path) as tar:
      contents = {}
      for name in names:
        member = tar.extractfile(f"{folder}/{name}")
        if member is None:
          raise UserError(f"{path}: {folder}/{name} is not a file; download it again")
        contents[name] = member.read()
      return contents
  except KeyError as e:
    raise UserError(f"{path}: {e.args[0]}; it is not the archive that was expected") from e
  except (tarfile.TarError, EOFError, ValueError) as e:
    raise UserError(f"{path}: damaged or truncated ({e}); download it again") from e
