"""Reads the data files of a gallery: JSON between `saev.put("NAME", ` and `, "CHECKSUM");`, packed numbers."""

import base64
import json
import pathlib
import re
import typing as tp

import numpy as np


def load(dpath: pathlib.Path | str, name: str) -> tp.Any:
    text = (pathlib.Path(dpath) / "data" / f"{name}.js").read_text("utf-8")
    start = f'saev.put("{name}", '
    value, end = json.JSONDecoder().raw_decode(text, len(start))
    assert text.startswith(start) and re.fullmatch(r', "[0-9a-f]{32}"\);\n', text[end:])
    return unpacked(value)


def unpacked(value: tp.Any) -> tp.Any:
    if isinstance(value, dict) and value.keys() == {"t", "n", "b"}:
        return np.frombuffer(base64.b64decode(value["b"]), f"<{value['t']}").reshape(value["n"])
    if isinstance(value, dict):
        return {key: unpacked(one) for key, one in value.items()}
    return [unpacked(one) for one in value] if isinstance(value, list) else value


def latents(dpath: pathlib.Path | str) -> list[tp.Any]:
    """All rows."""
    names = sorted((pathlib.Path(dpath) / "data" / "latents").iterdir())
    return [one for fpath in names for one in load(dpath, f"latents/{fpath.stem}")["latents"]]


def images(dpath: pathlib.Path | str) -> list[tp.Any]:
    names = sorted((pathlib.Path(dpath) / "data" / "images").iterdir())
    return [one for fpath in names for one in load(dpath, f"images/{fpath.stem}")["images"]]


def heat(group: tp.Any, i: int, n_patches: int) -> np.ndarray:
    """(P,) heat of a group's i-th image."""
    out_P = np.zeros(n_patches, np.int64)
    part = slice(group["start"][i], group["start"][i + 1])
    out_P[group["patch"][part]] = group["heat"][part]
    return out_P
