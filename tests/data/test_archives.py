"""The originals: found, read in place, fetched; whatever is wrong with them is one clear line."""

import gzip
import hashlib
import http.server
import io
import stat
import tarfile
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy import io as scipy_io

from halrp_jax import data
from halrp_jax.data import cache, formats, sources
from halrp_jax.types import UserError

from . import originals

# --- finding ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["mnist", "MNIST/raw"])
def test_folders_by_our_name_and_by_others(tmp_path, place):
  originals.mnist(tmp_path, place)
  files = sources.find(str(tmp_path), "mnist")
  assert files.path == tmp_path / place and len(files.names) == 4


def test_the_folder_itself_only_under_its_own_name(tmp_path):
  """FashionMNIST's files have MNIST's names: a folder of another name says nothing."""
  originals.mnist(tmp_path, "fashion_mnist")
  assert sources.find(str(tmp_path / "fashion_mnist"), "fashion_mnist")
  with pytest.raises(sources.Missing):
    sources.find(str(tmp_path / "fashion_mnist"), "mnist")


def test_what_is_missing_is_named_with_its_source(tmp_path):
  with pytest.raises(sources.Missing) as e:
    sources.find(str(tmp_path), "cifar100")
  for text in (
    "cifar-100-binary.tar.gz",
    "https://www.cs.toronto.edu",
    "sha256:58a81",
    "--download",
  ):
    assert text in str(e.value)
  with pytest.raises(sources.Missing, match="get it by hand.*no published checksum"):
    sources.find(str(tmp_path), "notmnist")


# --- archives that no honest author made --------------------------------------------------


def tar_with(path, member, contents=b"x"):
  with tarfile.open(path, "w:gz") as tar:
    good = tarfile.TarInfo("cifar-100-binary/train.bin")
    good.size = 1
    tar.addfile(good, io.BytesIO(b"x"))
    member.size = member.size or (len(contents) if member.isfile() else 0)
    tar.addfile(member, io.BytesIO(contents) if member.isfile() else None)


def member(name, kind=tarfile.REGTYPE, link=""):
  info = tarfile.TarInfo(name)
  info.type, info.linkname = kind, link
  return info


@pytest.mark.parametrize(
  "bad",
  [
    member("/etc/halrp"),
    member("../outside"),
    member("cifar-100-binary/../../outside"),
    member("cifar-100-binary/link", tarfile.SYMTYPE, "/etc/passwd"),
    member("cifar-100-binary/link", tarfile.SYMTYPE, "../../outside"),
    member("cifar-100-binary/link", tarfile.LNKTYPE, "../outside"),
    member("cifar-100-binary/fifo", tarfile.FIFOTYPE),
    member("cifar-100-binary/device", tarfile.CHRTYPE),
  ],
  ids=lambda m: f"{m.name}-{m.type.decode()}",
)
def test_a_tar_that_reaches_out_is_refused(tmp_path, bad):
  tar_with(tmp_path / "cifar-100-binary.tar.gz", bad)
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(UserError, match="refused, since"):
    sources.find(str(tmp_path), "cifar100")
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["/etc/halrp", "../outside", "a/../../b", "C:/halrp", "..\\up"])
def test_a_zip_that_reaches_out_is_refused(tmp_path, name):
  path = tmp_path / "tiny-imagenet-200.zip"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr(name, b"x")
  with pytest.raises(UserError, match="refused, since"):
    sources.find(str(tmp_path), "tiny_imagenet")
  assert sorted(tmp_path.rglob("*")) == [path]


def test_a_link_inside_a_zip_is_refused(tmp_path):
  with zipfile.ZipFile(tmp_path / "tiny-imagenet-200.zip", "w") as archive:
    info = zipfile.ZipInfo("tiny-imagenet-200/wnids.txt")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(info, "/etc/passwd")
  with pytest.raises(UserError, match="is a link or a device"):
    sources.find(str(tmp_path), "tiny_imagenet")


def test_implausible_sizes_are_refused_unread(tmp_path):
  """Its directory declares two gigabytes, a gigabyte for each of two entries."""
  with zipfile.ZipFile(tmp_path / "tiny-imagenet-200.zip", "w", zipfile.ZIP_DEFLATED) as archive:
    for i in range(2):
      archive.writestr(f"tiny-imagenet-200/{i}", bytes(1000))
      archive.infolist()[i].file_size = 1_010_000_000  # the directory is written last
  with pytest.raises(UserError, match="it declares 2,0.* bytes, expected at most 2,000,000,000"):
    sources.find(str(tmp_path), "tiny_imagenet")


def test_a_gzip_bomb_is_refused(tmp_path):
  originals.mnist(tmp_path)
  bomb = gzip.compress(bytes(10**8), 9)
  (tmp_path / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(bomb)
  with pytest.raises(UserError, match="decompresses to more than 60,000,000 bytes"):
    data.BENCHMARKS["pmnist"].read(originals.config_of("pmnist", tmp_path))


# --- formats ------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "contents",
  [
    b"",
    b"\0\0\x08",
    b"\0\0\x08\x03" + b"\xff" * 12,  # 2^96 pixels declared
    originals.idx(np.zeros((2, 3), np.uint8)),
    originals.idx(np.zeros((2, 3, 3), np.uint8))[:-1],
    gzip.compress(originals.idx(np.zeros((2, 3, 3), np.uint8)))[:-9],
    b"<html>404</html>",
  ],
  ids=lambda contents: f"{len(contents)} bytes",
)
def test_a_wrong_idx_file_is_refused(contents):
  with pytest.raises(UserError, match="^some file: "):
    formats.idx(contents, "some file", 3)


def test_idx_plain_and_zipped():
  want = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
  for contents in (originals.idx(want), gzip.compress(originals.idx(want))):
    np.testing.assert_array_equal(formats.idx(contents, "f", 3), want)


def test_svhn_digits_and_labels(tmp_path):
  originals.svhn(tmp_path)
  contents = (tmp_path / "svhn" / "train_32x32.mat").read_bytes()
  image, label = formats.svhn(contents, "f")
  stored = scipy_io.loadmat(io.BytesIO(contents))
  assert label.tolist()[:11] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
  np.testing.assert_array_equal(image[3], stored["X"][..., 3])


@pytest.mark.parametrize(
  "arrays",
  [
    {"X": np.zeros((32, 32, 3, 2), np.uint8)},
    {"X": np.zeros((28, 32, 3, 2), np.uint8), "y": np.ones(2)},
    {"X": np.zeros((32, 32, 3, 2)), "y": np.ones(2)},
    {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.ones(3)},
  ],
)
def test_a_wrong_mat_file_is_refused(arrays):
  out = io.BytesIO()
  scipy_io.savemat(out, arrays)
  with pytest.raises(UserError, match="^f: "):
    formats.svhn(out.getvalue(), "f")


def encoded(image, format="PNG", **options):
  out = io.BytesIO()
  image.save(out, format, **options)
  return out.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGB", "1", "P", "LA", "RGBA"])
def test_pictures_of_every_mode_become_what_is_asked_for(mode):
  contents = encoded(Image.new(mode, (5, 4)))
  for want in ("L", "RGB"):
    image = formats.picture(contents, "f", want, (5, 4))
    assert image.mode == want and image.size == (5, 4)


def test_odd_pictures():
  assert formats.picture(encoded(Image.new("CMYK", (5, 4)), "JPEG"), "f", "RGB", None).mode == "RGB"
  wide = Image.fromarray(np.full((4, 5), 0x8000, np.uint16))
  assert np.asarray(formats.picture(encoded(wide), "f", "L", None))[0, 0] == 0x80  # not white
  frames = [Image.new("L", (5, 4), c) for c in (10, 200)]
  animated = encoded(frames[0], save_all=True, append_images=frames[1:])
  assert np.asarray(formats.picture(animated, "f", "L", None))[0, 0] == 10  # the first frame


def huge_png():
  """Declares 10^10 pixels and has none of them."""
  contents = bytearray(encoded(Image.new("L", (5, 4))))
  contents[16:24] = (100_000).to_bytes(4, "big") * 2
  return bytes(contents)


@pytest.mark.parametrize(
  "contents",
  [
    b"",
    b"GIF89a" + bytes(20),
    encoded(Image.new("L", (5, 4)))[:-20],
    encoded(Image.new("RGB", (50, 40)), "JPEG")[:200],
    encoded(Image.new("L", (5, 4)), "BMP"),
    huge_png(),
    encoded(Image.new("L", (4, 5))),
  ],
  ids=lambda contents: f"{len(contents)} bytes",
)
def test_a_wrong_picture_is_refused_by_name(contents):
  with pytest.raises(UserError, match="^some/picture.png: "):
    formats.picture(contents, "some/picture.png", "L", (5, 4))


# --- cache --------------------------------------------------------------------------------


class Decode:
  def __init__(self, value=7):
    self.calls, self.value = 0, value

  def __call__(self, out):
    self.calls += 1
    out[:] = self.value


def test_the_second_start_decodes_nothing(tmp_path):
  decode = Decode()
  for _ in range(2):
    image = cache.images(str(tmp_path), "key", (3, 4, 4, 1), decode)
    assert image.shape == (3, 4, 4, 1) and (image == 7).all()
  assert decode.calls == 1
  cache.images(str(tmp_path), "other key", (3, 4, 4, 1), decode)
  cache.images(str(tmp_path), "key", (2, 4, 4, 1), decode)
  assert decode.calls == 3


@pytest.mark.parametrize("suffix", [".npy", ".json"])
@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "delete"])
def test_a_damaged_entry_is_decoded_again(tmp_path, suffix, how):
  cache.images(str(tmp_path), "key", (30, 4, 4, 1), Decode())
  (path,) = tmp_path.glob(f"*{suffix}")
  contents = bytearray(path.read_bytes())
  if how == "flip":
    contents[len(contents) // 2] ^= 255
  elif how == "truncate":
    contents = contents[:-5]
  elif how == "empty":
    contents = b""
  path.unlink() if how == "delete" else path.write_bytes(contents)
  decode = Decode()
  assert (cache.images(str(tmp_path), "key", (30, 4, 4, 1), decode) == 7).all()
  assert decode.calls == 1
  cache.images(str(tmp_path), "key", (30, 4, 4, 1), decode)
  assert decode.calls == 1  # mended


def test_off_and_folders_that_can_not_be_written(tmp_path, monkeypatch):
  decode = Decode()
  for _ in range(2):
    assert (cache.images("off", "key", (2, 2), decode) == 7).all()
  assert decode.calls == 2
  with pytest.raises(UserError, match="data.cache=/proc/x: "):
    cache.images("/proc/x", "key", (2, 2), decode)
  monkeypatch.setenv("XDG_CACHE_HOME", "/proc/x")
  assert (cache.images("", "key", (2, 2), decode) == 7).all()  # the default is only a help


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
  def fail(out):
    raise UserError("the source is damaged")

  with pytest.raises(UserError, match="the source is damaged"):
    cache.images(str(tmp_path), "key", (2, 2), fail)

  def full(*args):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(cache.os, "posix_fallocate", full)
  with pytest.raises(UserError, match="No space left on device"):
    cache.images(str(tmp_path), "key", (2, 2), Decode())
  assert not list(tmp_path.iterdir())


# --- fetching -----------------------------------------------------------------------------

GOOD = b"the published bytes " * 1000


class Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *args):
    pass

  def do_GET(self):
    how = self.path.strip("/")
    if how == "missing":
      self.send_error(404)
      return
    body = {"html": b"<html>please log in</html>", "other": GOOD[::-1]}.get(how, GOOD)
    self.send_response(200)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body[: len(body) // 2] if how == "dropped" else body)
    if how == "dropped":
      self.connection.close()


@pytest.fixture(scope="module")
def server():
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


@pytest.fixture
def published(server, monkeypatch):
  """Makes one data set of one file whose server answers in some way."""

  def make(how, checksum=None):
    digest = checksum if checksum is not None else f"sha256:{hashlib.sha256(GOOD).hexdigest()}"
    remote = sources.Remote("file.bin", f"{server}/{how}", len(GOOD), digest)
    one = sources.Original(("set",), (remote,), "file.bin", 10**6)
    monkeypatch.setitem(sources.ORIGINALS, "mnist", one)

  return make


def test_a_file_is_fetched_once_and_verified(published, tmp_path):
  published("good")
  lines = []
  sources.download(str(tmp_path), ["mnist"], lines.append)
  assert (tmp_path / "set" / "file.bin").read_bytes() == GOOD and len(lines) == 1
  sources.download(str(tmp_path), ["mnist"], lines.append)
  assert len(lines) == 1


@pytest.mark.parametrize("how", ["missing", "html", "other", "dropped"])
def test_what_is_not_the_published_file_never_appears(published, tmp_path, how):
  published(how)
  with pytest.raises(
    UserError, match=f"--download: http.*{how}: the published file could not be downloaded"
  ):
    sources.download(str(tmp_path), ["mnist"], lambda line: None)
  assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_nothing_is_fetched_without_a_published_checksum(published, tmp_path):
  published("good", checksum="")
  with pytest.raises(UserError, match="nobody publishes a checksum of file.bin.*by hand"):
    sources.download(str(tmp_path), ["mnist"], lambda line: None)
  with pytest.raises(UserError, match="data_dir is not set"):
    sources.download("", ["mnist"], lambda line: None)
