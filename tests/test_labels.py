"""Patch labels: mini-CUB's part masks are the oracle. P patches, H x W pixels, N images."""

import dataclasses
import json
import logging
import pathlib
import re
import typing as tp

import numpy as np
import PIL.Image
import pytest

from saev import errors, provenance
from saev.data import config as data_config
from saev.data import images
from saev.demo import minicub
from saev.formats import patchlabels, shards
from saev.labels import config, masks, run

HALF = (0.5, 0.5, 0.5)
TRANSFORMS = {
    "crop": images.Transform((224, 224), 224, False, "bicubic", HALF, HALF),
    "crop of a larger image": images.Transform((224, 224), 256, False, "bilinear", HALF, HALF),
    "crop of a box": images.Transform((160, 224), (176, 224), False, "bicubic", HALF, HALF),
    "squash": images.Transform((224, 224), 224, True, "bicubic", HALF, HALF),
    "squash, wide": images.Transform((112, 224), (112, 224), True, "bicubic", HALF, HALF),
    "pad": images.Transform((224, 224), 224, False, "bicubic", HALF, HALF, "pad", 8),
    "pad with a rest": images.Transform((230, 230), 230, False, "bicubic", HALF, HALF, "pad", 8),
    "flexible": images.Transform((224, 224), 224, False, "bicubic", HALF, HALF, "flexible", 8),
}
SIDE = 8
SHAPES = {"square": (256, 256), "portrait": (180, 256), "landscape": (256, 150), "tall": (101, 256)}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """Part masks of 12 birds."""
    dpath = tmp_path_factory.mktemp("parts") / "parts"
    minicub.draw(None, parts=dpath, n_imgs=12)
    return [np.asarray(PIL.Image.open(fpath), np.int32) for fpath in sorted(dpath.rglob("*.png"))]


def source_rectangles(
    transform: images.Transform, width: int, height: int
) -> tp.Iterator[tuple[int, slice, slice]]:
    """(patch, rows, columns) of the photo that each patch shows, by arithmetic, and a pixel more on each side."""
    rows, columns = (side // SIDE for side in transform.size)
    if transform.fit != "cover":
        yield from whole_rectangles(transform, width, height, rows, columns)
        return
    cover = (transform.resize,) * 2 if isinstance(transform.resize, int) else transform.resize
    if transform.squash:
        scales = cover[0] / height, cover[1] / width
    else:
        scales = (max(cover[0] / height, cover[1] / width),) * 2
    tops = [
        (side * scale - seen) / 2
        for side, scale, seen in zip((height, width), scales, transform.size, strict=True)
    ]
    for patch in range(rows * columns):
        corners = [
            (i * SIDE + top) / scale
            for i, top, scale in zip(divmod(patch, columns), tops, scales, strict=True)
        ]
        spans = [
            slice(max(0, int(corner) - 1), int(np.ceil(corner + SIDE / scale)) + 1)
            for corner, scale in zip(corners, scales, strict=True)
        ]
        yield patch, *spans


def whole_rectangles(
    transform: images.Transform, width: int, height: int, rows: int, columns: int
) -> tp.Iterator[tuple[int, slice, slice]]:
    """The same where the whole photo is shown. Patches that hold a border are left out."""
    scale, first = [min(rows * SIDE / height, columns * SIDE / width)] * 2, [0, 0]
    if transform.fit == "flexible":
        rows, columns = images.flexible_grid(rows * columns, height / width)
        scale = [rows * SIDE / height, columns * SIDE / width]
    else:  # the border's upper and left parts are whole patches
        spare = [
            n * SIDE - round(side * s)
            for n, side, s in zip((rows, columns), (height, width), scale, strict=True)
        ]
        first = [int(pixels / 2 / SIDE) for pixels in spare]
    for row in range(rows):
        for column in range(columns):
            starts = [(i - i0) * SIDE / s for i, i0, s in zip((row, column), first, scale, strict=True)]
            ends = [start + SIDE / s for start, s in zip(starts, scale, strict=True)]
            if min(starts) < 0 or ends[0] > height + 0.01 or ends[1] > width + 0.01:
                continue
            spans = [
                slice(max(0, int(a) - 1), int(np.ceil(b)) + 1) for a, b in zip(starts, ends, strict=True)
            ]
            yield row * columns + column, *spans


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_patches_inside_a_part_have_its_label(name: str, shape: str, parts: list[np.ndarray]) -> None:
    transform, (width, height) = TRANSFORMS[name], SHAPES[shape]
    view = run.View(transform, transform.size[0] // SIDE * (transform.size[1] // SIDE))
    rectangles, n_inside = [*source_rectangles(transform, width, height)], 0
    for mask_HW in parts:
        left, top = (256 - width) // 2, (256 - height) // 2
        mask_HW = np.ascontiguousarray(mask_HW[top : top + height, left : left + width])
        labels = [view.labels(mask_HW, rule) for rule in (None, 0)]
        for patch, rows, columns in rectangles:
            part, other = mask_HW[rows, columns].min(), mask_HW[rows, columns].max()
            if part == other:
                assert [label_P[patch] for label_P in labels] == [part, part]
                n_inside += part > 0
    assert n_inside > 25


def test_masks_cover_the_parts_that_are_drawn(tmp_path: pathlib.Path) -> None:
    """A part's mask covers pixels of its colour."""
    bird = minicub.Bird(0, {g: v[0] for g, v in minicub.GROUPS.items()} | {"has_size": "large"}, None)
    img, mask = minicub.picture(bird, np.random.default_rng(1))
    pixels, ids = np.asarray(img, float), np.asarray(mask)
    for part, color in (("wing", "blue"), ("breast", "red"), ("crown", "black"), ("bill", "black")):
        median = np.median(pixels[ids == minicub.ID[part]], axis=0)
        assert np.abs(median - minicub.PALETTE[color]).max() < 60, part
    assert set(np.unique(ids)) == {i for name, i in minicub.ID.items() if name != "leaf"}


PLAIN = images.Transform((4, 4), 4, True, "bicubic", HALF, HALF)


@pytest.mark.parametrize(
    ("patch", "majority", "foreground"),
    [
        ([0, 0, 0, 0], 0, 0),
        ([0, 0, 0, 2], 0, 2),
        ([0, 0, 2, 2], 0, 2),
        ([3, 0, 2, 2], 2, 2),
        ([3, 3, 2, 2], 2, 2),
        ([3, 3, 2, 0], 3, 3),
        ([-1, -1, 2, 2], 2, 2),
        ([-1, -1, -1, 2], -1, 2),
        ([-1, -1, -1, 0], -1, 0),
        ([-1, -1, -1, -1], -1, -1),
    ],
)
def test_rules(patch: list[int], majority: int, foreground: int) -> None:
    """The last of four patches of 2 x 2 pixels."""
    mask_HW = np.ones((4, 4), np.int32)
    mask_HW[2:, 2:] = np.reshape(patch, (2, 2))
    view = run.View(PLAIN, 4)
    assert view.labels(mask_HW).tolist() == [1, 1, 1, majority]
    assert view.labels(mask_HW, 0).tolist() == [1, 1, 1, foreground]


# ---- the command ----


@pytest.fixture
def cfg(make_shards, tmp_path: pathlib.Path) -> config.Labels:
    """Five images of 4 x 4 pixels in patches of 2 x 2. The mask of image i has id i on the left and 9 on the right."""
    dpath, _ = make_shards(n_imgs=5, n_patches=4, transform=PLAIN.to_dict())
    for i, record in enumerate(shards.ShardDir.open(dpath).records):
        for name, value in (("imgs", 0), ("masks", [[i, i, 9, 9]] * 4)):
            fpath = (tmp_path / name / record.path).with_suffix(".jpg" if name == "imgs" else ".png")
            fpath.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(np.broadcast_to(np.array(value, np.uint8), (4, 4)).copy()).save(fpath)
    (tmp_path / "names.txt").write_text("".join(f"{i}\tclass {i}\n" for i in (0, 1, 2, 3, 4, 9)))
    source = config.Index(str(tmp_path / "masks"), names=str(tmp_path / "names.txt"))
    return config.Labels(str(dpath), data_config.ImageFolder(str(tmp_path / "imgs")), source)


def opened(cfg: config.Labels) -> shards.ShardDir:
    return shards.ShardDir.open(cfg.shard_root)


def test_labels_are_read_as_they_were_made(cfg: config.Labels, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "saev"):
        assert run.main(cfg) == f"{cfg.shard_root}/labels.bin"
    found = patchlabels.read(opened(cfg))
    np.testing.assert_array_equal(found.id_NP, [[i, 9, i, 9] for i in range(5)])
    assert found.classes == {i: f"class {i}" for i in (0, 1, 2, 3, 4, 9)} and found.ignore == 255
    assert found.made["rule"] == "majority"
    assert found.made["code"] == provenance.record()
    assert "class 9: 50.00% of the patches" in caplog.text and "0 of 20 patches have no label" in caplog.text
    assert (pathlib.Path(cfg.shard_root) / "labels.bin").read_bytes() == found.id_NP.tobytes()


def test_a_second_source_and_ids_without_names(cfg: config.Labels) -> None:
    run.main(cfg)
    plain = config.Index(tp.cast(config.Index, cfg.masks).root, ignore=(9,))
    run.main(dataclasses.replace(cfg, masks=plain, name="plain"))
    found = patchlabels.read(opened(cfg), "plain")
    np.testing.assert_array_equal(found.id_NP, [[i, 255, i, 255] for i in range(5)])
    assert found.classes == {i: str(i) for i in range(5)}
    with pytest.raises(
        errors.UserError, match=r"labels-x.bin: no such file. It has: \(without a name\), plain."
    ):
        patchlabels.read(opened(cfg), "x")


def test_ids_above_254_take_two_bytes(cfg: config.Labels, tmp_path: pathlib.Path) -> None:
    for fpath in (tmp_path / "masks").rglob("*.png"):
        PIL.Image.fromarray(np.full((4, 4), 300, np.uint16)).save(fpath)
    run.main(dataclasses.replace(cfg, masks=config.Index(str(tmp_path / "masks"))))
    found = patchlabels.read(opened(cfg))
    assert found.id_NP.dtype == np.uint16 and (found.id_NP == 300).all() and found.ignore == 65535


def test_a_corrupt_image_has_no_labels(cfg: config.Labels, make_shards, tmp_path: pathlib.Path) -> None:
    dpath, _ = make_shards(n_imgs=5, n_patches=4, transform=PLAIN.to_dict(), skip=(2,))
    (tmp_path / "masks/class2/0002.png").unlink()  # nobody looks for it
    run.main(dataclasses.replace(cfg, shard_root=str(dpath)))
    found = patchlabels.read(shards.ShardDir.open(dpath))
    assert (found.id_NP == 255).all(axis=1).tolist() == [False, False, True, False, False]


def save(fpath: pathlib.Path, pixels: object, dtype: type = np.uint8) -> None:
    PIL.Image.fromarray(np.array(pixels, dtype)).save(fpath)


Change = tp.Callable[[pathlib.Path, config.Labels], config.Labels | None]
MASK = "masks/class1/0001.png"
BAD: dict[str, tuple[Change, str]] = {
    "another size": (
        lambda d, c: save(d / MASK, np.zeros((4, 5))),
        r"0001.png: has 5 x 4 pixels, but class1/0001.jpg has 4 x 4. Pass the masks of these images",
    ),
    "unknown id": (
        lambda d, c: save(d / MASK, np.full((4, 4), 7)),
        r"0001.png: has the id 7, which .*names.txt does not name. Add it there, or pass --masks.ignore 7",
    ),
    "no mask": (
        lambda d, c: (d / MASK).unlink(),
        r"0001.png: no such mask. Check the --masks flags, or pass --missing ignore",
    ),
    "colours": (
        lambda d, c: save(d / MASK, np.zeros((4, 4, 3))),
        r"0001.png: its pixels are colours \(RGB\), not ids",
    ),
    "not an image": (
        lambda d, c: (d / MASK).write_text("x") and None,
        r"0001.png: cannot be read as a mask \(not an image format that Pillow decodes\)",
    ),
    "truncated": (
        lambda d, c: (d / MASK).write_bytes((d / MASK).read_bytes()[:-20]) and None,
        r"0001.png: cannot be read as a mask",
    ),
    "no image": (
        lambda d, c: (d / "imgs/class1/0001.jpg").unlink(),
        r"0001.jpg: no such image. Pass the folder that was dumped as --images.root",
    ),
    "all ignored": (
        lambda d, c: dataclasses.replace(c, masks=config.Index(str(d / "masks"), ignore=(0, 1, 2, 3, 4, 9))),
        r"no patch got a label",
    ),
    "no names": (
        lambda d, c: (d / "names.txt").write_text("id name\n") and None,
        r"names.txt: names no class",
    ),
    "names": (
        lambda d, c: (d / "names.txt").write_text("0 a\nx b\n") and None,
        r"names.txt:2: 'x b' is not an id and a name",
    ),
    "one id twice": (
        lambda d, c: (d / "names.txt").write_text("0 a\n0 b\n") and None,
        r"names.txt: id 0 has two names \(a, b\)",
    ),
    "no root": (lambda d, c: dataclasses.replace(c, masks=config.Index()), r"--masks.root is missing"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what: str, cfg: config.Labels, tmp_path: pathlib.Path) -> None:
    run.main(cfg)
    before = patchlabels.read(opened(cfg))
    change, message = BAD[what]
    changed = change(tmp_path, cfg) or cfg
    with pytest.raises(errors.UserError, match=message) as caught:
        run.main(changed)
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(patchlabels.read(opened(cfg)).id_NP, before.id_NP)


def test_images_without_a_mask_may_be_ignored(cfg: config.Labels, tmp_path: pathlib.Path) -> None:
    (tmp_path / MASK).unlink()
    run.main(dataclasses.replace(cfg, missing="ignore"))
    assert (patchlabels.read(opened(cfg)).id_NP == 255).all(axis=1).tolist() == [
        False,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "text",
    [
        '{"0": "a b", "2": "c"}',
        '{"a b": 0, "c": 2}',
        "0\ta b\n2\tc\n",
        "0 a b\n2 c\n",
        "0,a b\n\n2, c",
        "Idx\tRatio\tTrain\tName\n0\t0.1\t50\ta b\n2\t.2\t7\tc\n",
        "﻿0;a b\r\n2;c\r\n",
    ],
)
def test_files_of_names(text: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "names").write_text(text, "utf-8")
    assert masks._names(tmp_path / "names") == {0: "a b", 2: "c"}


# ---- files ----


def test_damaged_labels_are_refused(cfg: config.Labels, make_shards) -> None:
    run.main(cfg)
    bin_fpath, json_fpath = patchlabels.paths(pathlib.Path(cfg.shard_root))
    data, header = bin_fpath.read_bytes(), json_fpath.read_text()
    for bad in (data[:-1], data + b"\0", bytes([data[0] ^ 1]) + data[1:]):
        bin_fpath.write_bytes(bad)
        with pytest.raises(errors.UserError, match=r"labels.bin: differs from its checksum. Run the same"):
            patchlabels.read(opened(cfg))
    bin_fpath.write_bytes(data)
    json_fpath.write_text(header.replace("class 9", "class 8"))
    with pytest.raises(errors.UserError, match=r"labels.json: .*Run the same `python -m saev.labels`"):
        patchlabels.read(opened(cfg))
    json_fpath.unlink()
    with pytest.raises(errors.UserError, match=r"labels.json is missing"):
        patchlabels.read(opened(cfg))
    other, _ = make_shards(n_imgs=5, n_patches=4, d_vit=16)
    for fpath, content in ((bin_fpath, data), (json_fpath, header.encode())):
        (other / fpath.name).write_bytes(content)
    with pytest.raises(errors.UserError, match=r"labels.json: was made for another dump"):
        patchlabels.read(shards.ShardDir.open(other))


def test_protocol_2_has_bytes_without_names(make_shards) -> None:
    dpath, _ = make_shards(n_imgs=3, n_patches=2)
    for name in ("images.jsonl", "transform.json", "complete.json"):
        (dpath / name).unlink()
    found = shards.ShardDir.open_unchecked(dpath)
    (dpath / "labels.bin").write_bytes(bytes([0, 3, 3, 7, 0, 0]))
    labels = patchlabels.read(found)
    assert labels.id_NP.tolist() == [[0, 3], [3, 7], [0, 0]] and labels.classes == {0: "0", 3: "3", 7: "7"}
    assert labels.ignore == -1
    (dpath / "labels.bin").write_bytes(bytes(5))
    with pytest.raises(errors.UserError, match=r"labels.bin: has 5 bytes; 3 images of 2 patches need 6"):
        patchlabels.read(found)


# ---- COCO ----


def coco(cfg: config.Labels, tmp_path: pathlib.Path, **changed: object) -> config.Labels:
    """A file with a large polygon on the left, a small one within it, and run lengths in the upper right patch."""
    paths = [record.path for record in opened(cfg).records]
    content: dict[str, tp.Any] = {
        "info": {"year": 2026},
        "images": [{"id": 10 + i, "file_name": p, "width": 4, "height": 4} for i, p in enumerate(paths)],
        "categories": [{"id": 1, "name": "bird"}, {"id": 5, "name": "bill"}, {"id": 6, "name": "sky"}],
        "annotations": [
            {"image_id": 10, "category_id": 5, "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]], "iscrowd": 0},
            {"image_id": 10, "category_id": 1, "segmentation": [[0, 0, 1, 0, 1, 3, 0, 3]]},
            {"image_id": 11, "category_id": 6, "segmentation": {"size": [4, 4], "counts": [8, 2, 2, 2, 2]}},
        ],
    }
    fpath = tmp_path / "coco.json"
    fpath.write_text(json.dumps(content | changed))
    return dataclasses.replace(cfg, masks=config.Coco(str(fpath)))


def test_polygons_and_run_lengths(cfg: config.Labels, tmp_path: pathlib.Path) -> None:
    run.main(coco(cfg, tmp_path))
    found = patchlabels.read(opened(cfg))
    assert found.id_NP.tolist() == [[5, 0, 1, 0], [0, 6, 0, 0]] + [[0] * 4] * 3
    assert found.classes == {0: "background", 1: "bird", 5: "bill", 6: "sky"}


def test_images_are_found_by_their_file_names(cfg: config.Labels, tmp_path: pathlib.Path) -> None:
    names = [{"id": 10 + i, "file_name": f"{i:04}.jpg", "width": 4, "height": 4} for i in range(5)]
    run.main(coco(cfg, tmp_path, images=names))
    assert patchlabels.read(opened(cfg)).id_NP[0].tolist() == [5, 0, 1, 0]


def annotation(segmentation: object, category: int = 1) -> dict[str, object]:
    return {"annotations": [{"image_id": 10, "category_id": category, "segmentation": segmentation}]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (annotation([[0, 0, 1, 1]]), "has a polygon of 4 numbers"),
        (annotation({"size": [4, 4], "counts": [3]}), "run lengths that do not fill the image"),
        (annotation({"size": [4, 4], "counts": "PPYo0"}), "has compressed run lengths. Write polygons"),
        (annotation([[0, 0, 1, 0, 1, 1]], 2), "has category 2, which `categories` does not name"),
        ({"images": []}, re.escape("class0/0000.jpg in `images` of ")),
        (
            {"images": [{"id": 10, "file_name": "0000.jpg", "width": 4, "height": 3}]},
            "0000.jpg has 4 x 3 pixels there, but the photo has 4 x 4",
        ),
        ({"categories": [{"id": -1, "name": "x"}]}, "category id -1"),
        ({"annotations": 3}, "is not a COCO-style file"),
    ],
)
def test_bad_polygons_are_named(
    changed: dict[str, object], message: str, cfg: config.Labels, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(errors.UserError, match=message):
        run.main(coco(cfg, tmp_path, **changed))
    assert not list(pathlib.Path(cfg.shard_root).glob("labels*"))
