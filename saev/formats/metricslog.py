"""metrics.jsonl: one JSON object a line, numbers by their names, with the checksum of the line's own values.

Lines of older versions have no checksum, and no other text either: a line with a text under another name is damaged.
"""

import collections.abc
import json

import beartype
import msgspec

from saev.formats import jsonfile

Metrics = dict[str, float | int | None]


@beartype.beartype
def line(metrics: collections.abc.Mapping[str, object]) -> str:
    """A line, without the newline. NaN and infinities become null."""
    plain = json.loads(jsonfile.dumps(dict(metrics)))
    return jsonfile.dumps(plain | {jsonfile.CHECKSUM: jsonfile.checksum(plain)})


@beartype.beartype
def parse(text: str | bytes) -> Metrics | None:
    """A line's metrics; None where it is damaged or cut."""
    try:
        obj = jsonfile.parse_line(text, dict[str, float | int | str | None])
    except (ValueError, RecursionError, msgspec.MsgspecError):
        return None
    said = obj.pop(jsonfile.CHECKSUM, None)
    if said is None:  # as older versions wrote it
        is_right = not any(isinstance(value, str) for value in obj.values())
    else:
        is_right = said == jsonfile.checksum(obj)
    return obj if is_right else None
