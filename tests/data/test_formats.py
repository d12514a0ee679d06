"""Images of the user's: what a file says of its pixels is obeyed, and what is done is said."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from halrp_jax.data import formats
from halrp_jax.types import UserError

ROWS, COLUMNS = 12, 20
SHOWN = np.zeros((ROWS, COLUMNS, 3), np.uint8)
SHOWN[:6, :10] = (255, 0, 0)


def encoded(image, kind, **options) -> bytes:
  out = io.BytesIO()
  image.save(out, kind, **options)
  return out.getvalue()


def read(contents: bytes, mode="RGB"):
  image, done = formats.photo(contents, "x", mode)
  return np.asarray(image), formats.conversions(np.array([done]))


def gradient(bits=16):
  return (np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) * 17 << (bits - 12)).astype(np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF", "JPEG"])
def test_formats(kind):
  options = {"lossless": True} if kind == "WEBP" else {}
  got, _ = read(encoded(Image.fromarray(SHOWN), kind, **options))
  assert np.abs(got.astype(int) - SHOWN).mean() <= (8 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF lzw"])
@pytest.mark.parametrize(
  ("orientation", "stored"),
  [
    (3, SHOWN[::-1, ::-1]),
    (6, np.rot90(SHOWN)),
    (8, np.rot90(SHOWN, -1)),
    (5, SHOWN.transpose(1, 0, 2)),
  ],
)
def test_orientation(kind, orientation, stored):
  """In EXIF, or in a TIFF's own tag."""
  exif = Image.Exif()
  exif[0x0112] = orientation
  kind, _, compression = kind.partition(" ")
  options = {"PNG": {}, "WEBP": {"lossless": True}}.get(kind, {"quality": 100})
  options = {"compression": f"tiff_{compression}"} if compression else options
  contents = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
  got, said = read(contents)
  assert got.shape == SHOWN.shape
  assert np.abs(got.astype(int) - SHOWN).mean() < 4
  assert "1 rotated or mirrored as their EXIF orientation says" in said


def test_damaged_exif_does_no_harm():
  exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 20
  got, said = read(encoded(Image.fromarray(SHOWN), "PNG", exif=exif))
  np.testing.assert_array_equal(got, SHOWN)
  assert said == ""


def palette_with_holes():
  image = Image.fromarray(SHOWN).quantize(4)
  return image, {"transparency": image.getpixel((COLUMNS - 1, ROWS - 1))}


def key_colour():
  return Image.fromarray(SHOWN), {"transparency": (0, 0, 0)}


def alpha():
  opaque = np.where(SHOWN.any(2), 255, 0).astype(np.uint8)
  return Image.fromarray(np.dstack([SHOWN, opaque])), {}


@pytest.mark.parametrize("make", [palette_with_holes, key_colour, alpha])
@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_transparency_is_put_on_white(make, kind):
  image, options = make()
  if kind != "PNG":
    image, options = alpha()[0], {"lossless": True} if kind == "WEBP" else {}
  got, said = read(encoded(image, kind, **options))
  np.testing.assert_array_equal(got, np.where(SHOWN.any(2, keepdims=True), SHOWN, 255))
  assert "1 with transparency, put on white" in said


def test_half_transparent_grey():
  grey = np.dstack([np.zeros((4, 4)), np.full((4, 4), 51)]).astype(np.uint8)
  for mode in ("L", "RGB"):
    assert (read(encoded(Image.fromarray(grey), "PNG"), mode)[0] == 204).all()
  opaque = Image.fromarray(SHOWN).convert("RGBA")
  assert read(encoded(opaque, "PNG"))[1] == ""  # nothing was done


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_sixteen_bits_are_scaled(kind, mode):
  got, said = read(encoded(Image.fromarray(gradient()), kind), mode)
  np.testing.assert_array_equal(got if mode == "L" else got[..., 1], gradient() >> 8)
  assert "1 with 16 bits, scaled to 8" in said


def chunk(kind: bytes, contents: bytes) -> bytes:
  checksum = struct.pack(">I", zlib.crc32(kind + contents))
  return struct.pack(">I", len(contents)) + kind + contents + checksum


def test_sixteen_bits_with_colours_and_with_a_transparent_grey():
  rows = b"".join(b"\0" + struct.pack(">3H", 0x1234, 0x8001, 0xFFFF) * 2 for _ in range(2))
  head = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
  start = b"\x89PNG\r\n\x1a\n"
  file = start + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
  got, said = read(file)
  assert (got == (0x12, 0x80, 0xFF)).all() and "16 bits" in said
  head = struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0)
  rows = zlib.compress(b"\0" + struct.pack(">2H", 0x1234, 0x1235))
  parts = (b"IHDR", head), (b"tRNS", struct.pack(">H", 0x1234)), (b"IDAT", rows), (b"IEND", b"")
  got, _ = read(start + b"".join(chunk(*part) for part in parts), "L")
  assert got.tolist() == [[255, 0x12]]


def tiff(samples: bytes, bits: int, photometric: int) -> bytes:
  """A grey TIFF in one strip."""
  tags = [
    (256, COLUMNS),
    (257, ROWS),
    (258, bits),
    (259, 1),
    (262, photometric),
    (273, 8),
    (277, 1),
    (278, ROWS),
    (279, len(samples)),
  ]
  head = b"II*\0" + struct.pack("<I", 8 + len(samples))
  entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
  return head + samples + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_a_tiff_of_twelve_bits_and_one_whose_white_is_zero():
  twelve = gradient(12)
  high, low = twelve[:, ::2].astype(int), twelve[:, 1::2].astype(int)
  packed = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], -1).astype(np.uint8)
  got, _ = read(tiff(packed.tobytes(), 12, 1), "L")
  np.testing.assert_array_equal(got, twelve >> 4)
  got, _ = read(tiff(gradient().astype("<u2").tobytes(), 16, 0), "L")
  np.testing.assert_array_equal(got, 255 - (gradient() >> 8))


@pytest.mark.parametrize("array", [np.zeros((4, 4), np.float32), np.zeros((4, 4), np.int32)])
def test_ranges_that_no_file_says_are_refused(array):
  with pytest.raises(UserError, match="TIFF: pixels .* of unknown range"):
    read(encoded(Image.fromarray(array), "TIFF"))


def test_what_is_done_is_counted():
  grey, colours = Image.fromarray(SHOWN[..., 0]), Image.fromarray(SHOWN)
  moving = encoded(colours, "GIF", save_all=True, append_images=[Image.new("RGB", (20, 12))])
  got, said = read(moving)
  np.testing.assert_array_equal(got, SHOWN)
  assert "1 with several frames, of which the first is used" in said
  assert "1 in CMYK or another colour space" in read(encoded(colours.convert("CMYK"), "JPEG"))[1]
  assert "1 with a palette" in read(encoded(colours.quantize(4), "PNG"))[1]
  assert "1 converted from grey to RGB" in read(encoded(grey, "PNG"))[1]
  assert (
    "1 converted from grey to RGB or from colour to grey" in read(encoded(colours, "BMP"), "L")[1]
  )
  assert read(encoded(grey.convert("1"), "PNG"), "L")[1] == read(encoded(colours, "PNG"))[1] == ""
  assert formats.conversions(np.array([1, 0, 129], np.uint8)) == (
    "of 3 images 2 rotated or mirrored as their EXIF orientation says, 1 resized"
  )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.05, 0.4, 0.8])
def test_truncated_files_are_bad(kind, share):
  noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
  contents = encoded(noise, kind)
  with pytest.raises(UserError, match="^x: not an image that can be read") as e:
    read(contents[: int(share * len(contents))])
  assert "0x" not in str(e.value) and "\n" not in str(e.value)
  if share > 0.5:
    assert f"({kind}: " in str(e.value)


@pytest.mark.parametrize(
  ("contents", "says"),
  [
    (b"", "an empty file"),
    (b"\n <!DOCTYPE html>", "HTML, SVG or XML"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
    (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC, AVIF or a video"),
    (b"%PDF-1.4", "PDF"),
    (
      b"II*\0" + b"\xff" * 8,
      "TIFF: (damaged at its beginning|Invalid dimensions)",
    ),  # by Pillow's version
    (b"RIFF\0\0\0\0WEBPVP8 \0\0\0\0", "WEBP: "),
    (bytes(1000), "none of PNG, JPEG, WebP, BMP, GIF, TIFF and PPM"),
  ],
)
def test_what_is_no_image_is_called_by_its_name(contents, says):
  with pytest.raises(UserError, match=says) as e:
    read(contents)
  assert " at 0x" not in str(e.value)


@pytest.mark.parametrize("size", [(8001, 8001), (30_000, 30_000)])
@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF"])
def test_bombs_are_refused(kind, size):
  small = bytearray(encoded(Image.new("1", (9, 9)), kind))
  if kind == "PNG":
    small[16:24] = struct.pack(">II", *size)
    small[29:33] = struct.pack(">I", zlib.crc32(small[12:29]))
  elif kind == "GIF":
    small[6:10] = struct.pack("<HH", *size)
  else:
    small = bytearray(tiff(bytes(8), 16, 1))
    for tag, value in zip((256, 257), size, strict=True):
      at = small.index(struct.pack("<HHI", tag, 4, 1)) + 8
      small[at : at + 4] = struct.pack("<I", value)
  with pytest.raises(UserError, match=f"{kind}: .* pixels"):
    read(bytes(small))
