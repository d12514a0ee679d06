"""Files are whole or not there, and what can't be read is said in one line."""

import json
import os
import pathlib
import sys
import threading

import pytest

from halrp_jax import files
from halrp_jax.data import cache
from halrp_jax.devices import compile_cache
from halrp_jax.types import UserError, result_of


def test_what_is_written_is_read_again(tmp_path):
  path = tmp_path / "x.json"
  for content in ({"a": [1, None, "ü"]}, {}):
    files.write_json(path, content)
    assert files.read_json(path) == content == json.loads(path.read_text(encoding="utf-8"))
  files.write_text(tmp_path / "x.txt", "ü \udcff\n")  # a file's name may hold such a byte
  assert (tmp_path / "x.txt").read_text(encoding="utf-8") == "ü \\udcff\n"
  files.write_bytes(tmp_path / "x", b"\x00\xff")
  assert (tmp_path / "x").read_bytes() == b"\x00\xff"
  assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "x.json", "x.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file(tmp_path, error):
  path = tmp_path / "x"
  files.write_bytes(path, b"old")
  with pytest.raises(error), files.replacing(path) as temporary:
    temporary.write_bytes(b"half of the n")
    raise error
  with pytest.raises(ValueError, match="not JSON compliant"):
    files.write_json(path, float("nan"))
  assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_meet(tmp_path):
  path = tmp_path / "x"
  with files.replacing(path) as first:
    first.write_bytes(b"first")
    files.write_bytes(path, b"second")
    assert path.read_bytes() == b"second"
  assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
  for path in (tmp_path / "nowhere" / "x", tmp_path):
    with pytest.raises(OSError) as caught:
      files.write_bytes(path, b"x")
    assert caught.value.filename == str(path) and caught.value.strerror in str(caught.value)


def test_a_pipe_is_not_replaced(tmp_path):
  path, received = tmp_path / "pipe", []
  os.mkfifo(path)
  reader = threading.Thread(target=lambda: received.append(path.read_bytes()))
  reader.start()
  files.write_bytes(path, b"content")
  reader.join(10)
  assert received == [b"content"] and path.is_fifo()


def test_old_temporary_files_are_deleted(tmp_path):
  path, left = tmp_path / "x", []
  for seconds in (1, None):  # the second is being written
    with files.replacing(path) as temporary:
      temporary.write_bytes(b"x")
      os.link(temporary, tmp_path / f".{len(left)}{temporary.suffix}")
      left.append(tmp_path / f".{len(left)}{temporary.suffix}")
    os.utime(left[-1], seconds and (seconds, seconds))
  files.delete_left_behind(tmp_path)
  assert sorted(tmp_path.iterdir()) == sorted([left[1], path])


@pytest.mark.parametrize(
  ("content", "says"),
  [
    ("{", "can't be read (Expecting property name"),
    ("[1]", "can't be read (not a JSON object)"),
    ("[" * 100_000, "can't be read (nested too deeply)"),
    (b"\xff", "can't be read ('utf-8' codec can't decode"),
    (None, "can't be read (Is a directory)"),
  ],
)
def test_what_can_not_be_read_is_one_line(tmp_path, content, says):
  path = tmp_path / "x.json"
  if content is None:
    path.mkdir()
  else:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(UserError) as caught:
    files.read_json(path, "missing", "write it again")
  text = str(caught.value)
  assert text.startswith(f"{path}: {says}") and text.endswith("; write it again")
  with pytest.raises((OSError, ValueError)):
    files.load_json(path)


def test_a_missing_file_has_a_message_of_its_own(tmp_path):
  with pytest.raises(UserError, match="^give the folder of a run$"):
    files.read_json(tmp_path / "x", "give the folder of a run")
  with pytest.raises(UserError, match=r"x: can't be read \(No such file or directory\)$"):
    files.read_json(tmp_path / "x")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other folders")
def test_the_cache_is_in_the_users_folder(monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
  assert files.cache_folder() == pathlib.Path("/somewhere/halrp_jax")
  monkeypatch.setenv("HOME", "/home/somebody")
  for monkey in (monkeypatch.delenv, lambda name: monkeypatch.setenv(name, "")):
    monkey("XDG_CACHE_HOME")
    assert files.cache_folder() == pathlib.Path("/home/somebody/.cache/halrp_jax")


@pytest.mark.parametrize("answer", [RuntimeError("no home"), pathlib.Path("~/.cache/halrp_jax")])
def test_without_a_home_there_is_no_cache(monkeypatch, answer):
  def user_cache_path(*_, **__):
    return result_of(answer)

  monkeypatch.setattr(files.platformdirs, "user_cache_path", user_cache_path)
  assert files.cache_folder() is None
  assert cache.folder("") is None and compile_cache.use("") is None
  assert (cache.images("", "key", (2, 2), lambda out: out.fill(7)) == 7).all()
