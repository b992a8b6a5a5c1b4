"""metrics.jsonl: one JSON object of named numbers per line, with a checksum of the line's values.

Older lines have no checksum and only numbers. One without a checksum but with a string is damaged.
"""

import collections.abc
import json

import msgspec

from saev.formats import jsonfile

Metrics = dict[str, float | int | None]


def line(metrics: collections.abc.Mapping[str, object]) -> str:
    """Returns a line without the newline. NaN and infinities become null."""
    plain = json.loads(jsonfile.dumps(dict(metrics)))
    return jsonfile.dumps(plain | {jsonfile.CHECKSUM: jsonfile.checksum(plain)})


def parse(text: str | bytes) -> Metrics | None:
    """Returns a line's metrics, or None if it is damaged or truncated."""
    try:
        obj = jsonfile.parse_line(text, dict[str, float | int | str | None])
    except (ValueError, RecursionError, msgspec.MsgspecError):
        return None
    recorded = obj.pop(jsonfile.CHECKSUM, None)
    if recorded is None:  # written by an older version
        is_right = not any(isinstance(value, str) for value in obj.values())
    else:
        is_right = recorded == jsonfile.checksum(obj)
    return obj if is_right else None
