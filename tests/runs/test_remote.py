"""Files by address are downloaded whole and verified, or not at all."""

import functools
import hashlib
import http.server
import threading

import pytest

from halrp_jax import files
from halrp_jax.runs import remote
from halrp_jax.types import UserError

CONTENTS = b"a file of parameters"
DIGEST = hashlib.sha256(CONTENTS).hexdigest()


@pytest.fixture
def address(tmp_path, monkeypatch):
  """The address of a file on a server of this machine; downloads go to a folder of the test."""
  (tmp_path / "site").mkdir()
  (tmp_path / "site" / "base.safetensors").write_bytes(CONTENTS)
  monkeypatch.setattr(files, "cache_folder", lambda: tmp_path / "cache")

  class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
      pass

  handler = functools.partial(Quiet, directory=tmp_path / "site")
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/base.safetensors"
    server.shutdown()


def test_a_file_is_downloaded_once_and_verified(address, tmp_path):
  path = remote.local_path("base", f"{address}#sha256={DIGEST}")
  assert path.read_bytes() == CONTENTS and path.is_relative_to(tmp_path / "cache")
  (tmp_path / "site" / "base.safetensors").unlink()
  assert remote.local_path("base", f"{address}#sha256={DIGEST}") == path


def test_a_wrong_checksum_leaves_no_file(address, tmp_path):
  with pytest.raises(UserError, match=r"^base=http.*could not be downloaded"):
    remote.local_path("base", f"{address}#sha256={'0' * 64}")
  assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("https://example.com/x.safetensors", "end the address with the file's checksum"),
    ("https://example.com/x.safetensors#sha256=12", "end the address with the file's checksum"),
    ("http://example.com/x.safetensors#sha256=" + "0" * 64, "use https://"),
    ("s3://bucket/x", "s3:// is not known"),
    ("hf://org/name/file", "expected hf://ORG/NAME/FILE@REVISION"),
  ],
)
def test_incomplete_addresses_are_refused(text, said):
  with pytest.raises(UserError, match=said):
    remote.local_path("base", text)


def test_a_path_stays_a_path(tmp_path):
  assert remote.local_path("base", str(tmp_path)) == tmp_path
