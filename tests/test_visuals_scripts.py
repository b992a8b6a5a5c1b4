"""The gallery's data files: text that JavaScript's parser and JSON's read alike, and numbers as they were."""

import base64
import json
import pathlib

import numpy as np
import pytest
import xxhash

from saev import errors
from saev.formats import jsonfile, scripts


def test_text_cannot_end_the_script(tmp_path: pathlib.Path) -> None:
    name = "</script><script>alert('1')</script> \u2028 & \u202e \"quoted\""
    scripts.write(tmp_path, "latents/000", {"name": name})
    text = (tmp_path / "data/latents/000.js").read_text()
    assert text.startswith('saev.put("latents/000", {') and text.endswith('");\n')
    assert not set("<>&\u2028") & set(text)
    body = text[text.index("{") : text.rindex("}") + 1]
    assert json.loads(body) == {"name": name}
    assert text[text.rindex("}") + 1 :] == f', "{xxhash.xxh3_128_hexdigest(body.encode())}");\n'
    assert scripts.read(tmp_path, "latents/000", "") == {"name": name}


def test_each_damaged_byte_is_found(tmp_path: pathlib.Path) -> None:
    scripts.write(tmp_path, "stats", {"name": "gull", "n": scripts.packed([1, 2], "u2")})
    fpath = tmp_path / "data/stats.js"
    data = fpath.read_bytes()
    for i in range(len(data)):
        fpath.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        with pytest.raises(errors.UserError, match=r"^\S+stats\.js: .* Do it\.$"):
            scripts.read(tmp_path, "stats", "Do it.")
        fpath.write_bytes(data[:i])
        with pytest.raises(errors.UserError, match=r"^\S+stats\.js: .* Do it\.$"):
            scripts.read(tmp_path, "stats", "Do it.")


def test_a_file_of_an_older_version_is_read(tmp_path: pathlib.Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/stats.js").write_text('saev.put("stats", {"name":"gull"});\n')
    assert scripts.read(tmp_path, "stats", "") == {"name": "gull"}


@pytest.mark.parametrize(
    ("kind", "values"),
    [("u1", [0, 255]), ("u2", [[1, 65535]]), ("u4", [2**32 - 1]), ("i4", [-1, 5]), ("f4", [0.5, np.nan])],
)
def test_packed_numbers_return(kind: str, values: list) -> None:
    out = json.loads(jsonfile.dumps(scripts.packed(values, kind)))
    back = np.frombuffer(base64.b64decode(out["b"]), "<" + kind)
    assert out["n"] == list(np.shape(values))
    np.testing.assert_array_equal(back.reshape(np.shape(values)), np.asarray(values, back.dtype))
    np.testing.assert_array_equal(scripts.unpacked(out, "", ""), np.asarray(values, back.dtype))


@pytest.mark.parametrize("kind", list(scripts.TYPES))
def test_parts_of_a_column_are_packed_alone(kind: str) -> None:
    values_n = np.arange(20).astype(scripts.TYPES[kind])
    for values in (values_n, values_n[::2], values_n[:0]):
        column = scripts.Column(values, kind)
        for start, stop in ((0, len(values)), (len(values) // 3, len(values) // 2), (0, 0)):
            assert column.part(start, stop) == scripts.packed(values[start:stop], kind)


@pytest.mark.parametrize(("kind", "value"), [("u1", 256), ("u2", -1), ("u4", 0.5), ("i4", np.nan)])
def test_numbers_that_do_not_fit_are_refused(kind: str, value: float) -> None:
    with np.errstate(invalid="ignore"), pytest.raises(OverflowError, match=f"do not fit in {kind}"):
        scripts.packed([value], kind)


@pytest.mark.parametrize(
    "change", [{"n": [3]}, {"b": "?"}, {"b": "AAA="}, {"t": "f8"}, {"t": None}, {"n": None}]
)
def test_damaged_numbers_are_one_line(change: dict) -> None:
    out = json.loads(jsonfile.dumps(scripts.packed([1, 2], "u2"))) | change
    with pytest.raises(errors.UserError, match="^x: its numbers cannot be read .* Do it.$"):
        scripts.unpacked(out, "x", "Do it.")
