import os
import subprocess
import sys
import time
import zlib

import pytest

from halrp_jax.devices import compile_cache
from halrp_jax.types import UserError

from ..conftest import ROOT


@pytest.fixture
def settings(monkeypatch):
  """What would be set in JAX; nothing is."""
  found = {}
  monkeypatch.setattr(compile_cache.jax.config, "update", found.__setitem__)
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  return found


def test_the_folder_is_the_users_own(tmp_path, settings):
  path = compile_cache.use(str(tmp_path / "cache"))
  assert settings["jax_compilation_cache_dir"] == str(path)
  assert path.parent == tmp_path / "cache" and path.stat().st_mode & 0o077 == 0


def test_off_and_jaxs_own_variable(tmp_path, settings, monkeypatch):
  assert compile_cache.use("off") is None
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
  assert compile_cache.use(str(tmp_path)) is None and not settings


def test_a_folder_that_others_can_write_is_refused(tmp_path, settings, monkeypatch):
  folder = tmp_path / "shared"
  folder.mkdir()
  folder.chmod(0o777)
  with pytest.raises(UserError, match="can be written by others"):
    compile_cache.use(str(folder))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  (tmp_path / "halrp_jax").mkdir()
  (tmp_path / "halrp_jax").chmod(0o777)
  assert compile_cache.use("") is None and not settings  # the default gives way silently


def test_a_folder_that_cannot_be_made(tmp_path, settings):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="--compile_cache="):
    compile_cache.use(str(tmp_path / "file"))


def test_the_second_start_compiles_nothing_and_learns_the_same(tmp_path):
  def start(name):
    arguments = ["--config.epochs=1", "--config.order=0,1", f"--workdir={tmp_path}/{name}"]
    command = [sys.executable, "-m", "halrp_jax.main", f"--config={ROOT}/configs/digits.py:stl"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([*command, *arguments], check=True, env=environment, capture_output=True)
    files = list((tmp_path / "cache").rglob("*-cache"))
    return len(files), (tmp_path / name / "record.json").read_text().split('"state_hash": ')[1][:70]

  first, second = start("a"), start("b")
  assert first == second and first[0] > 0


def test_what_was_cut_off_while_it_was_written_is_deleted(tmp_path, settings):
  """Once nobody can be writing it any more; each entry is looked at once."""
  path = compile_cache.use(str(tmp_path / "cache"))
  whole = zlib.compress(bytes(1000))
  entries = {"whole": whole, "cut": whole[:-9], "empty": b"", "new": whole[:-9]}
  entries["other"] = compile_cache._ZSTANDARD + b"what zstandard alone can read"
  for name, content in entries.items():
    (path / f"{name}-cache").write_bytes(content)
    if name != "new":
      os.utime(path / f"{name}-cache", (time.time() - 90,) * 2)
  (path / ".looked").unlink()
  compile_cache.use(str(tmp_path / "cache"))
  assert {p.name for p in path.glob("*-cache")} == {"whole-cache", "new-cache", "other-cache"}
  (path / "whole-cache").write_bytes(whole[:-9])
  os.utime(path / "whole-cache", (time.time() - 300,) * 2)  # long before the last look
  compile_cache.use(str(tmp_path / "cache"))
  assert (path / "whole-cache").exists()
