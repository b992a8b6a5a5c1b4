"""Checksums of the pieces of a shard, so that a reader of a part of the shard can verify it.

A piece is a run of neighbouring patches of one image and layer, about PIECE_BYTES long; [CLS] is a separate
piece. The metadata determine the pieces. acts000000.xxh3 holds the XXH3 checksum (64 bits, big-endian) of
each piece of acts000000.bin, in file order. Padding belongs to no piece.
"""

import bisect
import itertools
import math
import typing as tp

import numpy as np
import xxhash

from saev.formats.metadata import Metadata

PIECE_BYTES = 64 * 2**10
"""Approximate size. Longer pieces slow down small reads (they are read whole); shorter ones cost memory."""
SUM_BYTES = 8
"""Size of a piece's checksum."""


class Piece(tp.NamedTuple):
    """Bytes start ... stop - 1 of a shard file."""

    start: int
    stop: int

    def __str__(self) -> str:
        return f"bytes {self.start:,} to {self.stop - 1:,}"


class Pieces:
    """Divides the shards of a directory into pieces, numbered in file order within each shard.

    n_patches: patches per piece. The last piece of an image and layer may hold fewer.
    """

    def __init__(self, metadata: Metadata):
        n_patches, n_cls = metadata.n_patches_per_img, int(metadata.cls_token)
        n_pieces = max(1, round(n_patches * metadata.token_bytes / PIECE_BYTES))
        self.n_patches = math.ceil(n_patches / n_pieces)
        starts = [0] * n_cls + list(range(n_cls, metadata.n_tokens, self.n_patches))
        self._starts = [token * metadata.token_bytes for token in starts]
        self._row_bytes = metadata.n_tokens * metadata.token_bytes  # of one image and layer
        self._n_per_row = len(starts)
        self.max_bytes = self.n_patches * metadata.token_bytes
        """Size of the longest piece."""
        self.n_per_img = len(metadata.layers) * self._n_per_row
        self.start_n = np.array([*self._starts, self._row_bytes])
        """First byte of each piece of an image and layer, and the end of the last, for compiled code."""

    def start(self, i: int) -> int:
        """Returns the offset of a piece. For the piece after the last, it is the end of the images."""
        row, i = divmod(i, self._n_per_row)
        return row * self._row_bytes + self._starts[i]

    def around(self, offset: int, length: int) -> range:
        """Returns the pieces that hold these bytes."""
        return range(self._at(offset), self._at(offset + length - 1) + 1)

    def _at(self, offset: int) -> int:
        row, at = divmod(offset, self._row_bytes)
        return row * self._n_per_row + bisect.bisect_right(self._starts, at) - 1

    def sums(self, data: memoryview, pieces: range) -> bytes:
        """Returns the checksums of consecutive pieces with the bytes `data`."""
        first = self.start(pieces.start)
        cuts = [self.start(i) - first for i in pieces]
        return b"".join(
            xxhash.xxh3_64_digest(data[a:b])
            for a, b in itertools.pairwise([*cuts, self.start(pieces.stop) - first])
        )

    def differing(self, have: bytes, want: bytes, first: int = 0) -> list[Piece]:
        """Returns the pieces from `first` on whose checksums differ. Neighbours are merged."""
        out: list[Piece] = []
        for at in range(0, len(want), SUM_BYTES):
            if have[at : at + SUM_BYTES] != want[at : at + SUM_BYTES]:
                i = first + at // SUM_BYTES
                start = self.start(i)
                if out and out[-1].stop == start:
                    start = out.pop().start
                out.append(Piece(start, self.start(i + 1)))
        return out
