"""Image lists and the transform."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import open_clip
import PIL.Image
import pytest
import timm.data
import torch
import torchvision.transforms

from saev import errors
from saev.data import config, images

BICUBIC = torchvision.transforms.InterpolationMode.BICUBIC


def save(fpath: pathlib.Path, size: tuple[int, int] = (9, 7), mode: str = "RGB") -> None:
    fpath.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    pixels = PIL.Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8))
    pixels.convert(mode).save(fpath)


def test_image_folder_is_sorted_and_labelled_by_its_first_folder(tmp_path: pathlib.Path) -> None:
    for name in ("b/2.png", "b/deep/1.JPG", "a/10.jpeg", "a/9.png", "top.png", ".hidden/3.png", "a/.4.png"):
        save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    assert images.list_images(config.ImageFolder(str(tmp_path))) == [
        ("a/10.jpeg", "a"),
        ("a/9.png", "a"),
        ("b/2.png", "b"),
        ("b/deep/1.JPG", "b"),
        ("top.png", ""),
    ]


def test_roots_without_images(tmp_path: pathlib.Path) -> None:
    for root, match in (
        ("", "--data.root is missing"),
        (str(tmp_path / "x"), "no such directory"),
        (str(tmp_path), "no images found"),
    ):
        with pytest.raises(errors.UserError, match=match):
            images.list_images(config.ImageFolder(root))


@pytest.fixture
def cub(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "images.txt").write_text("7 002.B/x.jpg\n3 001.A/y.jpg\n5 001.A/z.jpg\n")
    (tmp_path / "train_test_split.txt").write_text("3 1\n5 0\n7 1\n")
    return tmp_path


def test_cub_keeps_the_order_of_images_txt_and_joins_the_split_by_id(cub: pathlib.Path) -> None:
    def paths(split: str) -> list[str]:
        return [r.path for r in images.list_images(config.Cub200(str(cub), split))]

    assert paths("all") == ["002.B/x.jpg", "001.A/y.jpg", "001.A/z.jpg"]
    assert paths("train") == ["002.B/x.jpg", "001.A/y.jpg"]
    assert paths("test") == ["001.A/z.jpg"]
    assert images.image_root(config.Cub200(str(cub))) == cub / "images"


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("images.txt", "7 a.jpg\nb.jpg\n", r"images\.txt:2: 'b\.jpg' is not 'ID NAME'"),
        ("images.txt", "7 a.jpg\n7 b.jpg\n", r"images\.txt:2"),
        (
            "train_test_split.txt",
            "3 1\n",
            r"train_test_split\.txt: 2 images have no line \(first: ids 7, 5\)",
        ),
        ("train_test_split.txt", "3\n", r"train_test_split\.txt:1"),
    ],
)
def test_bad_cub_lines_are_named(cub: pathlib.Path, name: str, text: str, match: str) -> None:
    (cub / name).write_text(text)
    with pytest.raises(errors.UserError, match=match):
        images.list_images(config.Cub200(str(cub), "train"))


def test_a_folder_that_is_not_cub(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match=r"images\.txt: missing"):
        images.list_images(config.Cub200(str(tmp_path)))


@pytest.mark.parametrize("size", [(300, 200), (201, 333), (224, 224), (57, 41), (256, 1000), (999, 257)])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (224, 224), (37, 32)])
def test_transform_equals_torchvision(
    size: tuple[int, int], resize: int, crop: int, tmp_path: pathlib.Path
) -> None:
    save(tmp_path / "x.png", size)
    img = images.open_rgb(tmp_path / "x.png")
    mean, std = (0.48, 0.45, 0.40), (0.26, 0.26, 0.27)
    geometry = [torchvision.transforms.Resize(resize, BICUBIC), torchvision.transforms.CenterCrop(crop)]
    tail = [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize(mean, std)]
    got = images.Transform((crop, crop), resize, False, "bicubic", mean, std)(img)
    assert torch.equal(got, torchvision.transforms.Compose(geometry + tail)(img))
    squashed = images.Transform((crop, crop), crop, True, "bicubic", mean, std)(img)
    squash = torchvision.transforms.Resize((crop, crop), BICUBIC)
    assert torch.equal(squashed, torchvision.transforms.Compose([squash, *tail])(img))


@pytest.mark.parametrize("size", [(300, 200), (201, 333), (57, 41), (999, 57)])
def test_transforms_to_inputs_that_are_not_square(size: tuple[int, int]) -> None:
    """The image just covers `resize`, as timm's and open_clip's own classes have it; squash goes to `resize` exactly."""
    rng = np.random.default_rng(0)
    img = PIL.Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8))
    for resize, crop in (((64, 96), (64, 96)), ((73, 54), (64, 48)), ((40, 161), (32, 160))):
        transform = images.Transform(crop, resize, False, "bicubic", (0.5,) * 3, (0.5,) * 3)
        for lib in (timm.data.transforms, open_clip.transform):
            cover = lib.ResizeKeepRatio(
                resize, interpolation="bicubic" if lib is timm.data.transforms else BICUBIC
            )
            want = torchvision.transforms.CenterCrop(crop)(cover(img))
            assert np.array_equal(transform.geometry(img), want)
        squash = images.Transform(crop, resize, True, "bicubic", (0.5,) * 3, (0.5,) * 3)
        want = torchvision.transforms.Resize(resize, BICUBIC)(img)
        want = torchvision.transforms.CenterCrop(crop)(want)
        assert np.array_equal(squash.geometry(img), want)
        assert images.Transform.from_dict(json.loads(json.dumps(squash.to_dict()))) == squash


def test_transform_files_of_older_dumps_load() -> None:
    text = '{"size": [224, 224], "resize": 256, "squash": false, "interpolation": "bicubic", "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}'
    transform = images.Transform.from_dict(json.loads(text))
    assert (transform.size, transform.resize) == ((224, 224), 256)
    assert json.dumps(transform.to_dict()) == text


@pytest.mark.parametrize("interpolation", list(images.INTERPOLATIONS))
@pytest.mark.parametrize("size", [(2000, 40), (33, 900), (5000, 150), (1, 300), (400, 7)])
def test_only_the_crop_of_a_long_photo_is_resized(
    size: tuple[int, int], interpolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the whole photo resized, then cropped. Noise overshoots, so that the order of Pillow's two passes shows: either is right."""
    rng = np.random.default_rng(0)
    img = PIL.Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    resample = images.INTERPOLATIONS[interpolation]
    monkeypatch.setattr(images, "MAX_WHOLE", 1)
    for resize, crop in ((36, (32, 32)), ((40, 50), (32, 48))):
        transform = images.Transform(crop, resize, False, interpolation, (0.5,), (0.5,))
        whole = transform._resized(*size)
        assert np.prod(whole) > 4 * np.prod(transform._cover())
        left, top = round((whole[0] - crop[1]) / 2.0), round((whole[1] - crop[0]) / 2.0)
        got = np.asarray(transform.geometry(img), int)
        differences = []
        for between in ((whole[0], img.height), (img.width, whole[1])):
            want = img.resize(between, resample).resize(whole, resample)
            want = want.crop((left, top, left + crop[1], top + crop[0]))
            differences.append(np.abs(got - np.asarray(want, int)))
        if interpolation == "nearest":  # a pixel on an edge may fall to either side
            assert min((d > 0).mean() for d in differences) < 0.25
        else:
            assert min(d.max() for d in differences) <= 2


@pytest.mark.parametrize("size", [(2000, 40), (40, 2000)])
def test_long_photos_without_noise_are_as_the_libraries_have_them(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_WHOLE", 1)
    rng = np.random.default_rng(0)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
    img = coarse.resize(size, PIL.Image.Resampling.BICUBIC)
    transform = images.Transform((32, 32), 36, False, "bicubic", (0.5,), (0.5,))
    want = torchvision.transforms.CenterCrop(32)(torchvision.transforms.Resize(36, BICUBIC)(img))
    got = transform.geometry(img)
    assert np.abs(np.asarray(got, int) - np.asarray(want, int)).max() <= 1


@pytest.mark.slow
def test_long_photos_take_the_memory_of_their_crop() -> None:
    """A child process with 1 GB of address space more than it starts with; the whole of these would take 12 GB and 6 GB."""
    code = """
import pathlib, resource, PIL.Image
from saev.data import images
now = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**30,) * 2)
for size in ((60_000, 1), (1, 20_000), (1, 2_000_000), (2_000_000, 3)):
    for squash in (False, True):
        transform = images.Transform((224, 224), 224, squash, "bicubic", (.5,), (.5,))
        img = transform.geometry(PIL.Image.new("RGB", size, (9, 99, 199)))
        assert img.size == (224, 224) and img.getextrema() == ((9, 9), (99, 99), (199, 199))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sizes_are_bounded_before_any_work() -> None:
    fields = images.Transform((32, 32), 36, False, "bicubic", (0.5,), (0.2,)).to_dict()
    for changes in ({"resize": 60_000}, {"size": [32, 60_000], "resize": 60_000}, {"resize": -1}):
        with pytest.raises(errors.UserError, match="sides must be from 1 to 8192 pixels"):
            images.Transform.from_dict(fields | changes)
    with pytest.raises(errors.UserError, match="--img-size 60000: must be at most 4,096"):
        config.Vit(img_size=60_000)


def test_transform_survives_json_and_refuses_nonsense() -> None:
    transform = images.Transform((32, 32), 36, False, "bilinear", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert images.Transform.from_dict(json.loads(json.dumps(transform.to_dict()))) == transform
    for changes in ({"size": "big"}, {"extra": 1}):
        with pytest.raises(errors.UserError, match=r"transform\.json: not a transform"):
            images.Transform.from_dict(transform.to_dict() | changes)
    with pytest.raises(errors.UserError, match=r"transform\.json: not a transform .not a JSON object"):
        images.Transform.from_dict([1])
    with pytest.raises(errors.UserError, match="interpolation 'cubic' is not supported"):
        images.Transform.from_dict(transform.to_dict() | {"interpolation": "cubic"})
    for resize in (36, (64, 36), (36, 100)):
        with pytest.raises(errors.UserError, match="cannot crop"):
            images.Transform((64, 64), resize, False, "bilinear", (0.5,), (0.2,))
