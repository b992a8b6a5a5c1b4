"""The images of the activations that labels are joined to."""

import collections.abc

from saev import errors
from saev.data import activations

Acts = collections.abc.Mapping[str, activations.Activations]
"""The given activations by split. Both may be the same."""


def images(acts: Acts, needs: str) -> dict[str, tuple[activations.Activations, int]]:
    """The images of the given activations by path, train activations first: where they are, and their numbers
    there. Those that the dump recorded as corrupt are included.

    Raises:
        UserError: there are no activations, or two images have one path.
    """
    if "train" not in acts:
        raise errors.UserError(f"--train-data.shard-root is missing: {needs} are those of the dump.")
    out: dict[str, tuple[activations.Activations, int]] = {}
    for stream in dict.fromkeys(acts[split] for split in ("train", "test") if split in acts):
        numbers = sorted({*stream.image_is_N.tolist(), *stream.skipped_is})
        mine = {stream.records[i].path.removeprefix("./"): (stream, i) for i in numbers}
        if len(mine) < len(numbers):
            raise errors.UserError(
                f"{stream.given}: holds {len(numbers) - len(mine)} images twice (equal paths). Leave out one "
                "of its shard directories."
            )
        out |= {path: place for path, place in mine.items() if path not in out}
    return out
