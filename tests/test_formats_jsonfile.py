"""One reader for JSON: what does not fit its schema is one line that names the file."""

import json
import math
import os
import typing as tp

import msgspec
import pytest

from saev import errors
from saev.formats import jsonfile


class Pet(msgspec.Struct):
    name: str
    age: tp.Annotated[int, msgspec.Meta(ge=0, le=200)]


def test_a_good_file_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"name": "Zoë", "age": 3, "more": [1]}', "utf-8")
    assert jsonfile.read(tmp_path / "a.json", Pet, "Do it again.") == Pet("Zoë", 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"name": "x", "age": 3', "cannot be read"),
        (b'{"name": "\xff", "age": 3}', "utf-8"),
        (b"[" * 100_000, "too deeply nested"),
        (b'{"name": null, "age": 3}', "Expected `str`, got `null`"),
        (b'{"name": "x", "age": true}', "Expected `int`, got `bool`"),
        (b'{"name": "x", "age": 1000000000000000000}', "Expected `int` <= 200"),
        (b'{"name": "x", "age": NaN}', "NaN is not JSON"),
        (b'{"name": "x", "name": "y", "age": 3}', "the key 'name' is repeated"),
        (b'{"name": "x", "age": 1e999}', "1e999 is out of range"),
        (b"[1, 2]", "Expected `object`, got `array`"),
        (b"", "cannot be read"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, data, message):
    fpath = tmp_path / "a.json"
    fpath.write_bytes(data)
    with pytest.raises(errors.UserError) as caught:
        jsonfile.read(fpath, Pet, "Do it again.")
    text = str(caught.value)
    assert text.startswith(f"{fpath}: cannot be read (") and text.endswith("). Do it again.")
    assert message in text and "\n" not in text


def test_a_fifo_and_a_huge_file_are_refused_before_they_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(errors.UserError, match="not a regular file"):
        jsonfile.read(tmp_path / "fifo", Pet, "Do it again.")
    with (tmp_path / "huge").open("wb") as fd:
        fd.truncate(2**40)
    with pytest.raises(errors.UserError, match="1,099,511,627,776 bytes long"):
        jsonfile.read(tmp_path / "huge", Pet, "Do it again.")


def test_numbers_that_are_none_are_written_as_null():
    obj = {"a": math.nan, "b": [math.inf, -math.inf, 0.1], "c": "ü"}
    for indent in (0, 4):
        text = jsonfile.dumps(obj, indent)
        assert json.loads(text) == {"a": None, "b": [None, None, 0.1], "c": "ü"}
    assert "\n" not in jsonfile.dumps(obj)


def test_a_schema_may_be_any_type(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}', "utf-8")
    bounded = tp.Annotated[int, msgspec.Meta(ge=1)]
    for schema in (dict[str, int], dict[str, bounded], dict[str, int] | None):
        assert jsonfile.read(tmp_path / "a.json", schema, "") == {"a": 1}


def test_bytes_of_a_file_name_that_are_not_utf8_come_back():
    path = os.fsdecode(b"caf\xe9/\xff.jpg")
    obj = {"path": path, "bad": [math.nan, 0.5]}
    for indent in (0, 4):
        text = jsonfile.dumps(obj, indent)
        assert text.isascii()
        got = jsonfile.parse(text.encode(), dict[str, tp.Any], "x", "Do it again.")
        assert got == {"path": path, "bad": [None, 0.5]}


VALUES = {"name": "x", "age": 3, "share": 0.1, "none": math.nan, "deep": {"a": [1, None, "é"]}}
"""What is sealed below."""


def test_every_flipped_bit_of_a_sealed_file_is_refused_or_harmless(tmp_path):
    fpath = tmp_path / "a.json"
    fpath.write_text(jsonfile.seal(VALUES))
    good, data = jsonfile.read_sealed(fpath, dict, "Do it again."), fpath.read_bytes()
    assert good == {**VALUES, "none": None}
    n_refused = 0
    for place in range(8 * len(data)):
        bad = bytearray(data)
        bad[place // 8] ^= 1 << place % 8
        fpath.write_bytes(bad)
        try:
            assert jsonfile.read_sealed(fpath, dict, "Do it again.", old=True) == good
        except errors.UserError as err:
            n_refused += str(err).startswith(f"{fpath}: ") and "\n" not in str(err)
    assert n_refused > 7.5 * len(data)  # another letter's case in \\u00e9 is harmless


def test_a_sealed_file_may_be_reformatted_but_not_edited(tmp_path):
    fpath = tmp_path / "a.json"
    obj = json.loads(jsonfile.seal({"name": "x", "age": 3}))
    fpath.write_text(json.dumps(obj))
    assert jsonfile.read_sealed(fpath, Pet, "Do it again.") == Pet("x", 3)
    for edited in (
        obj | {"age": 4},
        obj | {"xxh3_128": None},
        {k: v for k, v in obj.items() if k != "xxh3_128"},
        {k: v for k, v in obj.items() if k != "sealed"},
    ):
        fpath.write_text(json.dumps(edited))
        with pytest.raises(errors.UserError, match=r"values changed since they were written.*Do it again"):
            jsonfile.read_sealed(fpath, Pet, "Do it again.", old=True)


def test_half_a_character_in_a_sealed_file_is_one_line(tmp_path):
    fpath = tmp_path / "a.json"
    fpath.write_text(jsonfile.seal({"name": 3, "age": "\ud800"}))
    with pytest.raises(errors.UserError, match=r"a\.json: cannot be read .*Do it again\."):
        jsonfile.read_sealed(fpath, Pet, "Do it again.")


def test_an_older_file_without_a_checksum_is_read_where_that_is_allowed(tmp_path):
    (tmp_path / "a.json").write_text('{"name": "x", "age": 3}')
    assert jsonfile.read_sealed(tmp_path / "a.json", Pet, "", old=True) == Pet("x", 3)
    with pytest.raises(errors.UserError, match="values changed since they were written"):
        jsonfile.read_sealed(tmp_path / "a.json", Pet, "Do it again.")
