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
        (b'{"name": "x", "name": "y", "age": 3}', "the key 'name' comes twice"),
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
