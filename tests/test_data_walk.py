"""Which files of a folder are photos."""

import logging
import os
import pathlib
import socket

import numpy as np
import PIL.Image
import pytest

from saev import errors
from saev.data import config, images, pixels, walk


def touch(root: pathlib.Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def test_every_suffix_of_a_format_that_pillow_decodes(tmp_path: pathlib.Path) -> None:
    known = pixels.suffixes()
    assert {".jfif", ".jpe", ".avif", ".pgm", ".jp2", ".tga", ".mpo", ".qoi"} <= set(known)
    assert not {".pdf", ".eps", ".ps", ".mpg", ".h5", ".wmf"} & set(known)
    names = sorted(f"a/x{suffix}" for suffix in known)
    touch(tmp_path, *names, "a/y.pdf", "a/y.HEIC", "a/z.heic", "a/README")
    paths, passed = walk.walk(str(tmp_path))
    assert paths == names
    assert passed == {".heic": 2, ".pdf": 1, "no suffix": 1}
    assert walk.describe(passed) == "2 .heic, 1 .pdf, 1 no suffix"


def test_unusual_suffixes_are_decoded(tmp_path: pathlib.Path) -> None:
    """By content, whatever the name says."""
    rng = np.random.default_rng(0)
    img = PIL.Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8))
    formats = {"jfif": "JPEG", "avif": "AVIF", "jp2": "JPEG2000", "tga": "TGA", "qoi": "QOI"}
    formats |= {"pcx": "PCX", "dib": "DIB", "sgi": "SGI", "mpo": "MPO", "jpg": "WEBP"}
    formats |= {"dds": "DDS", "icns": "ICNS", "ppm": "PPM", "apng": "PNG"}
    for suffix, name in formats.items():
        img.save(tmp_path / f"x.{suffix}", name)
        got = images.open_rgb(tmp_path / f"x.{suffix}")
        assert got.mode == "RGB"
        if name in ("TGA", "QOI", "PCX", "DIB", "SGI", "DDS", "PPM", "PNG"):
            assert np.array_equal(got, img)


def test_system_folders_and_hidden_files_are_passed_over_and_counted(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "a/x.jpg", "a/@eaDir/x.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/a/._x.jpg")
    touch(tmp_path, "a/._x.jpg", ".ipynb_checkpoints/x.jpg", "#recycle/x.jpg", "a/Thumbs.db")
    touch(tmp_path, "#1/x.jpg", "$RECYCLE.BIN/x.jpg", "lost+found/x.jpg")
    with caplog.at_level(logging.INFO, "saev"):
        records = images.list_images(config.ImageFolder(str(tmp_path)))
    assert [r.path for r in records] == ["#1/x.jpg", "a/x.jpg"]
    assert caplog.messages == [f"{tmp_path}: 2 photos; ignored: 7 hidden or system entries, 1 .db"]


def test_links_are_followed_but_not_in_circles(tmp_path: pathlib.Path) -> None:
    touch(tmp_path, "a/x.jpg", "b/y.jpg", "elsewhere/z.jpg")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "to_a").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "b" / "link.jpg").symlink_to(tmp_path / "elsewhere" / "z.jpg")
    paths, passed = walk.walk(str(tmp_path))
    assert paths == [
        *("a/to_b/link.jpg", "a/to_b/y.jpg", "a/x.jpg", "b/link.jpg"),
        *("b/to_a/x.jpg", "b/y.jpg", "elsewhere/z.jpg"),
    ]
    assert passed == {walk.LOOPS: 6}


def test_fifos_and_sockets_are_passed_over(tmp_path: pathlib.Path) -> None:
    touch(tmp_path, "x.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("pipe.jpg")
    (tmp_path / "null.png").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.jpg"))
        assert walk.walk(str(tmp_path)) == (["x.jpg"], {walk.SPECIAL: 4})


def test_an_absent_disk_stops_the_listing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/x.jpg", "b/y.jpg")
    (tmp_path / "cats").symlink_to(tmp_path / "unmounted" / "cats")
    with pytest.raises(errors.UserError, match="cats: broken link .No such file"):
        walk.walk(str(tmp_path))
    (tmp_path / "cats").unlink()
    scandir = os.scandir

    def failing(path: str) -> object:
        if str(path).endswith("b/"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(errors.UserError, match="b/: cannot be listed .Permission denied"):
        walk.walk(str(tmp_path))


def test_a_folder_without_photos_says_what_it_holds(tmp_path: pathlib.Path) -> None:
    touch(tmp_path, "a.txt", "b.txt", "c.heic")
    with pytest.raises(errors.UserError, match="no images found .ignored: 2 .txt, 1 .heic."):
        images.list_images(config.ImageFolder(str(tmp_path)))
