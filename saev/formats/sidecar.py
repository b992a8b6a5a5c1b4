"""acts000000.json: the checksum of a shard and what was left out of it."""

import collections.abc
import contextlib
import dataclasses
import json
import pathlib
import typing as tp

import beartype

from saev import errors


class Skipped(tp.NamedTuple):
    """An image that could not be read; --skip-corrupt left its activations zero."""

    image_i: int
    error: str


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Sidecar:
    """The file's contents."""

    n_imgs: int
    xxh3_128: str
    skipped: tuple[Skipped, ...] = ()

    def dumps(self) -> str:
        fields = dataclasses.asdict(self) | {"skipped": [s._asdict() for s in self.skipped]}
        return json.dumps(fields, indent=2)

    @classmethod
    def loads(cls, fpath: pathlib.Path) -> "Sidecar":
        """Raises UserError when the file cannot be read."""
        with readable(fpath):
            obj = json.loads(fpath.read_text("utf-8"))
            skipped = tuple(Skipped(**s) for s in obj["skipped"])
            return cls(obj["n_imgs"], obj["xxh3_128"], skipped)


@contextlib.contextmanager
def readable(fpath: pathlib.Path) -> collections.abc.Iterator[None]:
    """Whatever a damaged JSON file makes Python raise becomes one UserError."""
    try:
        yield
    except (OSError, errors.UserError):
        raise
    except Exception as err:  # ValueError, KeyError, TypeError, beartype's own
        raise errors.UserError(
            f"{fpath}: cannot be read ({errors.first_line(err)}). Delete it and run the same `python -m saev.data` command again."
        ) from err
