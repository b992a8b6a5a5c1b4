"""Photos of every mode and fault, read as 8-bit RGB."""

import io
import os
import pathlib
import struct

import numpy as np
import PIL.features
import PIL.Image
import pytest

from saev import errors
from saev.data import images, pixels

GREY16 = np.array([[0, 65535, 257 * 7, 257 * 100 + 128, 257 * 100 + 129, 300]], np.uint16)
GREY8 = [0, 255, 7, 100, 101, 1]
"""GREY16 / 257, rounded."""


def opened(tmp_path: pathlib.Path, data: bytes) -> np.ndarray:
    (tmp_path / "x").write_bytes(data)
    return np.asarray(images.open_rgb(tmp_path / "x"))


def encoded(img: PIL.Image.Image, fmt: str, **kwargs: object) -> bytes:
    buffer = io.BytesIO()
    img.save(buffer, fmt, **kwargs)
    return buffer.getvalue()


def tiff(pixels_HW: np.ndarray, **tags: int) -> bytes:
    """A little-endian TIFF of one uncompressed strip, by hand: Pillow writes few of the kinds that it reads."""
    data = np.ascontiguousarray(pixels_HW).tobytes()
    numbers = {"width": 256, "height": 257, "bits": 258, "compression": 259, "photometric": 262}
    numbers |= {"offset": 273, "samples": 277, "rows": 278, "n_bytes": 279, "format": 339}
    height, width = pixels_HW.shape[:2]
    values = {"width": width, "height": height, "bits": 8 * pixels_HW.itemsize, "compression": 1}
    values |= {"photometric": 1, "offset": 8, "samples": 1, "rows": height, "n_bytes": len(data)}
    values |= tags
    data += bytes(len(data) % 2)
    directory = b"".join(
        struct.pack("<HHII", numbers[name], 4, 1, value)
        for name, value in sorted(values.items(), key=lambda item: numbers[item[0]])
    )
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    return head + data + struct.pack("<H", len(values)) + directory + bytes(4)


# ---- modes ----


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_grey_is_scaled(tmp_path: pathlib.Path, fmt: str) -> None:
    img = PIL.Image.fromarray(GREY16)
    lossless = {"irreversible": False} if fmt == "JPEG2000" else {}
    got_HW3 = opened(tmp_path, encoded(img, fmt, **lossless))
    assert got_HW3[0].tolist() == [[v] * 3 for v in GREY8]


def test_16_bit_tiffs_of_other_kinds(tmp_path: pathlib.Path) -> None:
    big_endian = PIL.Image.frombytes("I;16B", (6, 1), GREY16.astype(">u2").tobytes())
    assert opened(tmp_path, encoded(big_endian, "TIFF"))[0, :, 0].tolist() == GREY8
    assert opened(tmp_path, tiff(GREY16))[0, :, 0].tolist() == GREY8
    white_is_zero = opened(tmp_path, tiff(GREY16, photometric=0))
    assert white_is_zero[0, :, 0].tolist() == [255 - v for v in GREY8]


def test_12_bit_tiffs_end_at_4095(tmp_path: pathlib.Path) -> None:
    values = [0, 4095, 2048, 16]
    packed = sum(v << (12 * (3 - i)) for i, v in enumerate(values)).to_bytes(6, "big")
    data = tiff(np.frombuffer(packed, np.uint8)[None], width=4, bits=12)
    assert opened(tmp_path, data)[0, :, 0].tolist() == [0, 255, 128, 1]


def test_pgm_of_12_bits_ends_at_its_own_maximum(tmp_path: pathlib.Path) -> None:
    data = b"P5 3 1 4095\n" + np.array([0, 4095, 2048], ">u2").tobytes()
    assert opened(tmp_path, data)[0, :, 0].tolist() == [0, 255, 128]


def test_16_bit_colour_keeps_its_high_bytes(tmp_path: pathlib.Path) -> None:
    rgb_3 = np.array([65535, 257 * 7, 0], ">u2")
    assert opened(tmp_path, b"P6 1 1 65535\n" + rgb_3.tobytes())[0, 0].tolist() == [255, 7, 0]


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (tiff(np.zeros((2, 2), np.float32), format=3), "mode F of signed or float samples"),
        (tiff(np.zeros((2, 2), np.int16), format=2), "mode I of signed or float samples"),
        (tiff(np.zeros((2, 2), np.int32), format=2), "mode I of signed or float samples"),
        (tiff(np.zeros((2, 2), np.int8), format=2), "mode L of signed or float samples"),
        (tiff(np.zeros((2, 2), np.uint32)), "mode I of TIFF has no defined white"),
        (b"Pf 2 2 -1.0\n" + bytes(16), "mode F has no defined white"),
    ],
)
def test_modes_without_a_defined_white_are_refused_by_name(
    tmp_path: pathlib.Path, data: bytes, match: str
) -> None:
    with pytest.raises(pixels.BadImage, match=match):
        opened(tmp_path, data)


def test_fits_is_refused_where_its_values_have_no_white(tmp_path: pathlib.Path) -> None:
    cards = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": 2, "NAXIS2": 2}
    text = "".join(f"{k:8}= {v!s:>20}".ljust(80) for k, v in cards.items()) + "END"
    data = text.ljust(2880).encode() + bytes(2880)
    with pytest.raises(pixels.BadImage, match="mode I;16 of FITS has no defined white"):
        opened(tmp_path, data)


def test_colours(tmp_path: pathlib.Path) -> None:
    """One known pixel of each mode that holds colour."""
    red = PIL.Image.new("RGB", (2, 1), (255, 0, 0))
    for mode, fmt in (("CMYK", "TIFF"), ("YCbCr", "TIFF"), ("P", "PNG"), ("P", "GIF")):
        got = opened(tmp_path, encoded(red.convert(mode), fmt))[0, 0]
        np.testing.assert_allclose(got, [255, 0, 0], atol=2, err_msg=mode)
    lab = PIL.Image.new("LAB", (2, 1), (138, 209, 198))  # sRGB's red, by its definition
    np.testing.assert_allclose(opened(tmp_path, encoded(lab, "TIFF"))[0, 0], [255, 0, 0], atol=6)
    white = PIL.Image.new("LAB", (2, 1), (255, 128, 128))
    np.testing.assert_allclose(opened(tmp_path, encoded(white, "TIFF"))[0, 0], 255, atol=1)
    np.testing.assert_array_equal(np.asarray(pixels.to_rgb(red.convert("HSV")))[0, 0], [255, 0, 0])
    for mode, values in (("1", [0, 1]), ("L", [0, 200])):
        img = PIL.Image.new(mode, (2, 1))
        img.putpixel((1, 0), values[1])
        want = 255 if mode == "1" else 200
        assert opened(tmp_path, encoded(img, "PNG"))[0].tolist() == [[0] * 3, [want] * 3]


def test_cmyk_of_adobe_is_not_inverted(tmp_path: pathlib.Path) -> None:
    cyan = PIL.Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    np.testing.assert_allclose(opened(tmp_path, encoded(cyan, "JPEG"))[8, 8], [0, 255, 255], atol=3)


# ---- transparency ----


def spots(colour: tuple[int, ...], mode: str = "RGBA") -> PIL.Image.Image:
    """One colour everywhere, opaque on the left half alone."""
    img = PIL.Image.new(mode, (4, 2), (*colour, 0))
    img.paste((*colour, 255), (0, 0, 2, 2))
    return img


@pytest.mark.parametrize("fmt", ["PNG", "WEBP", "TIFF"])
def test_what_only_transparency_shows_is_kept(tmp_path: pathlib.Path, fmt: str) -> None:
    lossless = {"lossless": True, "exact": True} if fmt == "WEBP" else {}
    black_HW3 = opened(tmp_path, encoded(spots((0, 0, 0)), fmt, **lossless))
    assert black_HW3[0].tolist() == [[0] * 3] * 2 + [[255] * 3] * 2
    white_HW3 = opened(tmp_path, encoded(spots((255, 255, 255)), fmt, **lossless))
    assert white_HW3[0].tolist() == [[255] * 3] * 2 + [[0] * 3] * 2
    if fmt == "PNG":
        grey_HW3 = opened(tmp_path, encoded(spots((0,), "LA"), fmt))
        assert np.array_equal(grey_HW3, black_HW3)
        palette = spots((0, 0, 0)).quantize(4)
        assert palette.mode == "P"
        assert np.array_equal(opened(tmp_path, encoded(palette, fmt)), black_HW3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_colours_are_as_the_vit_libraries_have_them(tmp_path: pathlib.Path, mode: str) -> None:
    """They drop the transparency: `img.convert("RGB")`."""
    rng = np.random.default_rng(0)
    img = PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 4), np.uint8))
    img = img.quantize(64) if mode == "P" else img.convert(mode)
    want = img.convert("RGBA").convert("RGB")
    assert np.array_equal(opened(tmp_path, encoded(img, "PNG")), want)


def test_premultiplied_colours_are_divided_again() -> None:
    img = PIL.Image.new("RGBA", (2, 1), (200, 100, 50, 128))
    img.putpixel((1, 0), (0, 0, 0, 255))
    got = np.asarray(pixels.to_rgb(img.convert("RGBa")))
    np.testing.assert_allclose(got[0, 0], [200, 100, 50], atol=2)


@pytest.mark.parametrize("fmt", ["GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_frame_is_taken(tmp_path: pathlib.Path, fmt: str) -> None:
    frames = [PIL.Image.new("RGB", (4, 4), c) for c in ((255, 0, 0), (0, 0, 255))]
    data = encoded(frames[0], fmt, save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(opened(tmp_path, data)[0, 0], [255, 0, 0], atol=3)


# ---- faults ----


def test_bytes_that_do_not_decode_are_bad_images(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    img = PIL.Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    cases = {"empty": (b"", "the file is empty"), "zeros": (bytes(999), "not an image format")}
    cases |= {"html": (b"<!DOCTYPE html><html>", "not an image format that Pillow decodes")}
    cases |= {"eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image format")}
    for fmt in ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "JPEG2000", "PPM"):
        data = encoded(img, fmt)
        cases[fmt] = (data[: len(data) // 2], "cannot be read as an image")
    for name, (data, match) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(pixels.BadImage, match=f"{name}: cannot be read as.*") as caught:
            images.open_rgb(tmp_path / name)
        assert match in str(caught.value)
        assert " object at 0x" not in str(caught.value)  # it would differ from run to run


@pytest.mark.parametrize("errno", [2, 5, 13, 24, 107, 116])  # ENOENT EIO EACCES EMFILE ENOTCONN ESTALE
def test_what_the_disk_refuses_is_no_bad_image(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, errno: int
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno, os.strerror(errno))

    monkeypatch.setattr(os, "open", refuse)
    match = f"x.png: cannot be read .{os.strerror(errno)}.. Check that the disk is mounted"
    with pytest.raises(errors.UserError, match=match) as caught:
        images.open_rgb(tmp_path / "x.png")
    assert not isinstance(caught.value, pixels.BadImage)


def test_a_disk_that_fails_in_the_middle(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").write_bytes(b"x" * 99)

    class Failing(io.FileIO):
        def read(self, *_: object) -> bytes:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(pixels, "open", lambda fd, _mode: Failing(fd), raising=False)
    with pytest.raises(errors.UserError, match="cannot be read .Input/output error") as caught:
        images.open_rgb(tmp_path / "x.png")
    assert not isinstance(caught.value, pixels.BadImage)


def test_files_that_are_no_photos_at_all(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "lfs.jpg").write_text(pointer)
    cases = {"pipe.jpg": "not a regular file", "folder.jpg": "not a regular file"}
    cases |= {"lfs.jpg": "a git-lfs pointer, not the photo. Run `git lfs pull`"}
    cases |= {"a\0b.jpg": "cannot be read .*null"}
    for name, match in cases.items():
        with pytest.raises(errors.UserError, match=match) as caught:
            images.open_rgb(tmp_path / name)
        assert not isinstance(caught.value, pixels.BadImage)


def test_sizes_are_bounded_before_decoding(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, 50_000, 50_000, 1, 24, *[0] * 6)
    for limit in (PIL.Image.MAX_IMAGE_PIXELS, None):
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(pixels.BadImage, match="2500000000 pixels|50000 x 50000 pixels; at"):
            opened(tmp_path, huge)
    with (tmp_path / "sparse.tif").open("wb") as fd:
        fd.truncate(2**30 + 1)
    with pytest.raises(pixels.BadImage, match="is 1,073,741,825 bytes long; the limit is"):
        images.open_rgb(tmp_path / "sparse.tif")


def test_memory_that_does_not_suffice_is_no_bad_image(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    for err in (MemoryError(), OSError("out of memory error when reading image file")):

        def load(_: object, err: Exception = err) -> None:
            raise err

        monkeypatch.setattr(PIL.Image.Image, "load", load)
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
        with pytest.raises(errors.UserError, match="not enough memory") as caught:
            images.open_rgb(tmp_path / "x.png")
        assert not isinstance(caught.value, pixels.BadImage)
