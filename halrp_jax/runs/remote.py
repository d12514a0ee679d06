"""Files that are given by address: https://...#sha256=HEX, or hf://ORG/NAME/FILE@REVISION.

Downloads go to the user's cache folder. A file of the web is kept only if its checksum is the one
in the address; huggingface-hub verifies its own.
"""

import pathlib
import re
import urllib.parse

from halrp_jax import files
from halrp_jax.types import UserError, brief

_HEX = re.compile(r"sha256=([0-9a-f]{64})")
_HUB = re.compile(r"hf://([^/@]+/[^/@]+)/([^@]+)@([\w.\-/]+)")


def local_path(key: str, text: str) -> pathlib.Path:
  """Returns the path of a file, which is downloaded first if `text` is an address.

  Args:
    key: the config key or option that gave it, for error messages.
    text: a path, or an address.

  Raises:
    UserError: if an address is incomplete, or the file can't be downloaded or is another one.
  """
  scheme = text.partition("://")[0] if "://" in text else ""
  if scheme == "hf":
    return _of_hub(key, text)
  if scheme in ("https", "http"):
    return _of_web(key, text)
  if scheme:
    raise UserError(
      f"{key}={text}: {scheme}:// is not known; give a path, https://...#sha256=HEX, or "
      "hf://ORG/NAME/FILE@REVISION"
    )
  return pathlib.Path(text).expanduser()


def _of_web(key: str, text: str) -> pathlib.Path:
  """Downloads a file whose address ends with its SHA-256."""
  import pooch  # takes half a second to import

  url, _, fragment = text.partition("#")
  host = urllib.parse.urlsplit(url).hostname
  if url.startswith("http://") and host not in ("localhost", "127.0.0.1"):
    raise UserError(f"{key}={text}: use https://; over http:// others can read along")
  if (match := _HEX.fullmatch(fragment)) is None:
    raise UserError(f"{key}={text}: end the address with the file's checksum: {url}#sha256=HEX")
  root = files.cache_folder()
  if root is None:
    raise UserError(f"{key}={text}: there is no cache folder to download to; give a local file")
  name = pathlib.PurePosixPath(urllib.parse.urlsplit(url).path).name
  pooch.get_logger().setLevel("WARNING")
  try:
    found = pooch.retrieve(
      url, known_hash=f"sha256:{match[1]}", fname=name, path=root / "bases" / match[1][:16]
    )
  except Exception as e:  # requests, urllib3, pooch and the operating system raise many types
    raise UserError(f"{key}={text}: could not be downloaded ({brief(e)})") from e
  return pathlib.Path(found)


def _of_hub(key: str, text: str) -> pathlib.Path:
  """Downloads a file of the Hugging Face Hub at a fixed revision."""
  if (match := _HUB.fullmatch(text)) is None:
    raise UserError(f"{key}={text}: expected hf://ORG/NAME/FILE@REVISION, with a commit or a tag")
  try:
    import huggingface_hub  # pyright: ignore[reportMissingImports] (the extra [hub])
  except ImportError as e:
    raise UserError(
      f"{key}={text}: needs the package huggingface-hub: pip install 'halrp-jax[hub]'"
    ) from e
  repository, file, revision = match.groups()
  try:
    return pathlib.Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
  except Exception as e:  # the library, its HTTP client and the operating system raise many types
    raise UserError(f"{key}={text}: could not be downloaded ({brief(e)})") from e
