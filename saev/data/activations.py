"""Reads activations from acts*.bin: tokens of chosen layers from one or more shard directories.

Images are addressed by their position among the readable images, without skipped ones.
`Activations.image_is_N` maps positions to image numbers, which count all images of all directories.

Shape letters: A images of all directories, N those in the stream, T chosen tokens, X those of all layers
(layer after layer), D d_vit.
"""

import collections.abc
import copy
import functools
import itertools
import typing as tp

import beartype
import numpy as np
import torch
import xxhash
from jaxtyping import Bool, Float32, Int32, Int64, Shaped, jaxtyped

from saev import errors, fields, helpers
from saev.data import config, layout
from saev.data.extents import RANDOM as RANDOM
from saev.data.extents import Extent, File, Files
from saev.formats import patchlabels, shards, space, staging

SERIAL = 2**14
"""Values that torch converts at a time in one thread."""


class _Part(tp.NamedTuple):
    """One shard directory of the stream."""

    dir: shards.ShardDir
    layer_is: tuple[int, ...]
    """Positions of the chosen layers among the recorded layers."""
    first_image: int
    first: int
    """Position of its first image of the stream."""
    image_is_N: Int64[np.ndarray, " N"]
    """Numbers, within the directory, of its images in the stream."""


class Activations:
    """Chosen layers and tokens of shard directories, as one stream. A stage opens them once.

    Args:
        cfg: the directories, layers and tokens.
        flag: their flag on the command line, for messages.
        among: other activations, whose open directories are reused.

    Raises:
        UserError: see `shards.ShardDir.open`; also a layer that was not recorded, [CLS] of a model without
            it, or directories that do not fit together.
    """

    def __init__(
        self, cfg: config.Shards, flag: str = "--data", among: collections.abc.Iterable["Activations"] = ()
    ):
        if not cfg.shard_root:
            raise errors.UserError(
                f"{flag}.shard-root is missing: pass the directory that `python -m saev.data` printed."
            )
        self.cfg = cfg
        self.flag = flag
        self.root = cfg.shard_root
        self.roots = (cfg.shard_root, *cfg.more_roots)
        roots = [staging.local(root, cfg.partial, flag) for root in self.roots]
        is_open = {(part.dpath, acts.cfg.partial): part for acts in among for part in acts.dirs}
        self.dirs = [
            is_open.get((fields.path(root), cfg.partial))
            or shards.ShardDir.open(root, partial=cfg.partial, flag=flag)
            for root in roots
        ]
        self.metadata = self.dirs[0].metadata
        self.layers = _layers(self.dirs, cfg.layer, flag)
        self.tokens = _token_slice(self.dirs[0], cfg.patches, flag)
        self.n_tokens = self.tokens.stop - self.tokens.start
        self.d_vit = self.metadata.d_vit
        self.dtype = self.metadata.dtype
        self.token_bytes = self.metadata.token_bytes
        self.pieces = self.dirs[0].pieces
        self.space, *others = (self._space_of(part.metadata) for part in self.dirs)
        for part, other in zip(self.dirs[1:], others, strict=True):
            self.space.check_same(
                other, whose=self.given, flag=f"{flag}.more-roots {part.dpath}", patches=False
            )
        _check_stored_alike(self.dirs, flag)
        self.photos = layout.Photos(self.dirs)
        self.n_all = sum(part.metadata.n_imgs for part in self.dirs)
        self.chosen: tuple[int, ...] | None = None
        self._files = Files(self.dirs)
        self._is_kept_AT = _both(self._shown(), self._not_excluded())
        self._choose(None)

    @staticmethod
    def open(
        data: "config.Shards | Activations",
        flag: str = "--data",
        among: collections.abc.Iterable["Activations"] = (),
    ) -> "Activations":
        """Opens a config's activations. Returns open activations unchanged."""
        return data if isinstance(data, Activations) else Activations(data, flag, among)

    def only(self, image_is: collections.abc.Collection[int]) -> "Activations":
        """A stream of only these images, by number. It shares this stream's directories."""
        out = copy.copy(self)
        for cached in ("fingerprint", "n_kept_N"):
            out.__dict__.pop(cached, None)
        out._choose(tuple(sorted(image_is)))
        return out

    def advised(self, advice: int, flags: int = 0) -> "Activations":
        """The same stream, whose files are opened in another way (see `extents.Files`)."""
        out = copy.copy(self)
        out._files = Files(self.dirs, advice, flags)
        return out

    def _space_of(self, m: shards.Metadata) -> space.Space:
        is_cls = self.n_tokens == 1 and m.cls_token and self.first_patch < 0
        patches = "cls" if is_cls else "all" if self.first_patch < 0 else "image"
        described = {"vit_family": m.vit_family, "vit_ckpt": m.vit_ckpt}
        return space.Space.of(described | {"layers": self.layers, "patches": patches}, m.d_vit)

    def _shown(self) -> Bool[np.ndarray, "A T"] | None:
        """Whether each token of each image shows some of its photo, or is [CLS]. None: all do."""
        shown_AP = self.photos.shown_AP if self.first_patch + self.n_tokens else None
        lead = (-min(0, self.first_patch), 0)
        return None if shown_AP is None else np.pad(shown_AP, ((0, 0), lead), constant_values=True)

    def classes(self, name: str, number: dict[str, int]) -> Int32[np.ndarray, "A T"]:
        """The class of each token of each image, by image number, from the labels of `python -m saev.labels`.

        Classes are numbered by name (`patchlabels.numbered`), so that all streams number them alike.

        Args:
            name: of the labels, if they have one.

        Raises:
            UserError: a directory has no such labels, they are damaged or of another dump, or only [CLS] is
                read.
        """
        if self.first_patch + self.n_tokens <= 0:
            raise errors.UserError(
                f"{self.flag}.patches cls: [CLS] has no patch label. Pass {self.flag}.patches image."
            )
        class_AP = np.concatenate([patchlabels.numbered(part, name, number) for part in self.dirs])
        n_lead = -min(0, self.first_patch)
        return np.pad(class_AP, ((0, 0), (n_lead, 0)), constant_values=patchlabels.NONE)

    def _not_excluded(self) -> Bool[np.ndarray, "A T"] | None:
        """Whether each token of each image is of no class of --exclude-patch-labels. None: all are."""
        if not (excluded := self.cfg.exclude_patch_labels):
            return None
        number: dict[str, int] = {}
        class_AT = self.classes("", number)
        if unknown := [name for name in excluded if name not in number]:
            raise errors.UserError(
                f"{self.flag}.exclude-patch-labels {unknown[0]}: no such class. The labels' classes are "
                f"{', '.join([*number][:20])}."
            )
        return ~np.isin(class_AT, [number[name] for name in excluded])

    def _choose(self, image_is: tuple[int, ...] | None) -> None:
        """Restricts the stream to these images; None means all."""
        self.chosen = image_is
        self._parts: list[_Part] = []
        images, first_image, first = [], 0, 0
        for part in self.dirs:
            layer_is = tuple(part.metadata.layers.index(layer) for layer in self.layers)
            image_is_N = part.image_is_N
            if image_is is not None:
                image_is_N = image_is_N[np.isin(image_is_N + first_image, image_is)]
            self._parts.append(_Part(part, layer_is, first_image, first, image_is_N))
            images.append(image_is_N + first_image)
            first_image += part.metadata.n_imgs
            first += len(image_is_N)
        self._firsts = [part.first for part in self._parts]
        self.image_is_N: Int64[np.ndarray, " N"] = np.concatenate(images)
        if not len(self.image_is_N):
            raise errors.UserError(f"{self.root}: holds no image that could be read.")
        self.is_kept_NT = None if self._is_kept_AT is None else self._is_kept_AT[self.image_is_N]
        """Whether a token of an image is in the stream: no padding, no excluded class. None: all are."""
        if self.is_kept_NT is not None and not self.is_kept_NT.any():
            raise errors.UserError(
                f"{self.flag}.exclude-patch-labels {' '.join(self.cfg.exclude_patch_labels)}: leaves no "
                "patch of these images. Leave out fewer classes."
            )

    @property
    def given(self) -> str:
        """Flag and directory, for messages."""
        return f"{self.flag}.shard-root {self.root}"

    @property
    def n_imgs(self) -> int:
        """Number of readable images."""
        return len(self.image_is_N)

    def only_layer(self, what: str) -> int:
        """Returns the only chosen layer.

        Raises:
            UserError: several layers are chosen (--data.layer all).
        """
        if len(self.layers) > 1:
            raise errors.UserError(
                f"{self.flag}.layer all: {what} one layer at a time. Pass one of {self.layers}."
            )
        return self.layers[0]

    def only_whole(self, what: str) -> None:
        """Refuses streams without the patches of some classes. (Padding is not part of an image.)

        Raises:
            UserError: --data.exclude-patch-labels was given.
        """
        if self.cfg.exclude_patch_labels:
            raise errors.UserError(
                f"{self.flag}.exclude-patch-labels: {what} whole images. Leave the flag out here."
            )

    def kept(self, image_i_N: Int64[np.ndarray, " N"]) -> Bool[np.ndarray, "N X"] | None:
        """Whether each token of images, by number, is in the stream. None: all are."""
        if self.is_kept_NT is None:
            return None
        positions_N = np.searchsorted(self.image_is_N, image_i_N)
        return np.tile(self.is_kept_NT[positions_N], (1, len(self.layers)))

    @functools.cached_property
    def n_kept_N(self) -> Int64[np.ndarray, " N"]:
        """Tokens of each image that are in the stream, in one layer."""
        if self.is_kept_NT is None:
            return np.full(self.n_imgs, self.n_tokens)
        return self.is_kept_NT.sum(axis=1)

    @property
    def n_per_img(self) -> int:
        """X: tokens of an image over all chosen layers."""
        return len(self.layers) * self.n_tokens

    def __len__(self) -> int:
        """Number of activations in the stream."""
        return int(self.n_kept_N.sum()) * len(self.layers)

    @property
    def n_lead(self) -> int:
        """Chosen tokens before the patches: 1 if [CLS] is read together with them, else 0."""
        return int(self.first_patch < 0 and self.n_tokens > 1)

    @property
    def first_patch(self) -> int:
        """patch_i of the first chosen token; -1 means [CLS]."""
        return self.tokens.start - int(self.metadata.cls_token)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the stream's content: activations, images and their order, layers and tokens."""
        parts = [part.fingerprint for part in self.dirs]
        chosen: list[object] = [] if self.chosen is None else [self.chosen]
        if self.is_kept_NT is not None:
            chosen.append(xxhash.xxh3_128_hexdigest(np.packbits(self.is_kept_NT).data))
        return helpers.hash_of([parts, self.layers, self.tokens.start, self.tokens.stop, *chosen])

    @property
    def skipped_is(self) -> list[int]:
        """Numbers of the images that the dump recorded as corrupt (--skip-corrupt)."""
        return [
            part.first_image + skipped.image_i
            for part in self._parts
            for sidecar in part.dir.sidecars.values()
            for skipped in sidecar.skipped
        ]

    @functools.cached_property
    def records(self) -> list[shards.Record]:
        """Path and label by image number, including images that could not be read.

        Raises:
            UserError: see `shards.ShardDir.records`.
        """
        first, *others = (part.records for part in self.dirs)
        return [*first, *itertools.chain(*others)] if others else first

    @property
    def is_listed(self) -> bool:
        """Whether paths are known. Some dumps of other tools have no list of images."""
        return all(part.images_fpath.exists() for part in self.dirs)

    def name_of(self, image_i: int) -> str:
        """An image's path, or its number if paths are unknown, for messages."""
        return self.records[image_i].path if self.is_listed else f"image {image_i}"

    def shard_positions(self) -> list[range]:
        """Positions of the images of each shard file."""
        out = []
        for part in self._parts:
            image_is_N = part.image_is_N
            bounds = [part.dir.metadata.imgs_in(i) for i in part.dir.shard_is]
            starts = np.searchsorted(image_is_N, [r.start for r in bounds]) + part.first
            stops = np.searchsorted(image_is_N, [r.stop for r in bounds]) + part.first
            out += [range(a, b) for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
        return out

    # ---- whole images ----

    @jaxtyped(typechecker=beartype.beartype)
    def read(self, start: int, stop: int) -> Float32[np.ndarray, "N X D"]:
        """Activations of the images at positions start ... stop - 1.

        Raises:
            UserError: a shard file disappeared or was truncated, or differs from its checksums.
        """
        shape = (stop - start, self.n_per_img, self.d_vit)
        out_NXD = np.empty(shape, shards.STORED[self.dtype])
        rows = out_NXD.data.cast("B") if out_NXD.size else memoryview(b"")
        runs_G = np.arange(start * self.n_per_img, stop * self.n_per_img, self.n_tokens)
        self._files.read(self.extents(runs_G, np.full_like(runs_G, self.n_tokens)), rows)
        return self.decoded(out_NXD)

    def decoded(self, stored: Shaped[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
        """Stored values as float32. float32 is not copied."""
        if self.dtype == "float32":
            return stored
        out = np.empty(stored.shape, np.float32)
        self.decode_to(stored, out)
        return out

    def decode_to(self, stored: Shaped[np.ndarray, "*shape"], out: Float32[np.ndarray, "*shape"]) -> None:
        """Inverts `shards.encode`. torch converts float16 thirty times as fast as NumPy.

        For steps larger than SERIAL, torch would start OpenMP, which does not survive a fork.
        """
        if self.dtype == "bfloat16":
            np.left_shift(stored, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
            return
        source, target = torch.from_numpy(stored).flatten(), torch.from_numpy(out).view(-1)
        for at in range(0, len(source), SERIAL):
            target[at : at + SERIAL].copy_(source[at : at + SERIAL])

    # ---- runs of tokens ----

    def located(self, index_G: Int64[np.ndarray, " G"]) -> Int64[np.ndarray, "G 3"]:
        """Directory, shard and offset in the shard's file of the stream's activations index_G."""
        position_G, x_G = np.divmod(index_G, self.n_per_img)
        layer_G, token_G = np.divmod(x_G, self.n_tokens)
        part_G = np.searchsorted(self._firsts, position_G, "right") - 1
        image_i_G = self.image_is_N[position_G]
        out_G3 = np.empty((len(index_G), 3), np.int64)
        out_G3[:, 0] = part_G
        for part_i in set(part_G.tolist()):
            part, mine_G = self._parts[part_i], np.flatnonzero(part_G == part_i)
            metadata = part.dir.metadata
            shard_g, local_g = np.divmod(image_i_G[mine_G] - part.first_image, metadata.imgs_per_shard)
            token_i_g = np.array(part.layer_is)[layer_G[mine_G]] * metadata.n_tokens + token_G[mine_G]
            out_G3[mine_G, 1] = shard_g
            out_G3[mine_G, 2] = local_g * metadata.img_bytes
            out_G3[mine_G, 2] += (self.tokens.start + token_i_g) * self.token_bytes
        return out_G3

    def extents(self, index_G: Int64[np.ndarray, " G"], n_G: Int64[np.ndarray, " G"]) -> list[Extent]:
        """Locates runs of n_G consecutive tokens that begin with the stream's activation index_G.

        A run must not leave its image and layer.
        """
        rows = zip(self.located(index_G).tolist(), (n_G * self.token_bytes).tolist(), strict=True)
        return [Extent(part_i, shard_i, offset, length) for (part_i, shard_i, offset), length in rows]

    def files(self, at_G3: Int64[np.ndarray, "G 3"]) -> tuple[list[File], Int64[np.ndarray, "G 2"]]:
        """Opens the shards of `located` activations: (files, descriptor and address of the checksums).

        The latter are valid as long as the files are referenced.

        Raises:
            UserError: a shard file disappeared.
        """
        _, first_n, file_i_G = np.unique(
            at_G3[:, 0] << 32 | at_G3[:, 1], return_index=True, return_inverse=True
        )
        files = [self._files.open(part_i, shard_i) for part_i, shard_i, _ in at_G3[first_n].tolist()]
        file_f2 = np.array([(file.fd, file.sums_address) for file in files], np.int64).reshape(-1, 2)
        return files, file_f2[file_i_G]

    def read_extents(self, some: list[Extent], into: memoryview) -> None:
        """As `extents.Files.read`."""
        self._files.read(some, into)


def _both(
    one: Bool[np.ndarray, "A T"] | None, two: Bool[np.ndarray, "A T"] | None
) -> Bool[np.ndarray, "A T"] | None:
    """Tokens that both keep. None: all."""
    return one if two is None else two if one is None else one & two


def _layers(dirs: list[shards.ShardDir], layer: int | tp.Literal["all"], flag: str) -> tuple[int, ...]:
    """The numbers of the chosen layers."""
    first = dirs[0].metadata.layers
    chosen = first if layer == "all" else (first[dirs[0].layer_i(layer, flag)],)
    for part in dirs[1:]:
        if layer == "all" and set(part.metadata.layers) != set(first):
            raise errors.UserError(
                f"{part.dpath}: recorded layers {part.metadata.layers}, but {dirs[0].dpath} {first}. "
                f"Pass one {flag}.layer that both have."
            )
        part.layer_i(chosen[0], flag)
    return chosen


def _check_stored_alike(dirs: list[shards.ShardDir], flag: str) -> None:
    """Checks that directories store the same tokens in the same type, and that none is named twice."""
    for name in ("n_patches_per_img", "cls_token", "dtype"):
        values = {getattr(part.metadata, name) for part in dirs}
        if len(values) > 1:
            raise errors.UserError(
                f"{flag}.more-roots: the directories differ in {name} "
                f"({', '.join(map(repr, sorted(values)))}). Pass dumps of one ViT."
            )
    if len({part.metadata.hash for part in dirs}) < len(dirs):
        raise errors.UserError(f"{flag}.more-roots: a shard directory is named twice.")


def _token_slice(part: shards.ShardDir, patches: config.Patches, flag: str) -> slice:
    n_cls, n_tokens = int(part.metadata.cls_token), part.metadata.n_tokens
    if patches == "cls" and not n_cls:
        raise errors.UserError(
            f"{part.dpath}: {part.metadata.vit_ckpt} has no [CLS] token. Pass {flag}.patches image."
        )
    return {"image": slice(n_cls, n_tokens), "cls": slice(0, n_cls), "all": slice(0, n_tokens)}[patches]


LARGEST = 1e15
"""Largest accepted activation. Sums of larger squares overflow float32."""


@jaxtyped(typechecker=beartype.beartype)
def check_finite(
    acts_BXD: Float32[np.ndarray, "B *X D"], image_i_B: Int64[np.ndarray, " B"], acts: Activations
) -> None:
    """Refuses NaN, infinite and huge activations. Every loader calls this for every batch.

    Args:
        image_i_B: each row's image.

    Raises:
        UserError: an activation is NaN, infinite or larger than LARGEST (the first image is named).
    """
    flat = acts_BXD.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        if np.dot(flat, flat) <= LARGEST**2:  # one fast pass; false for NaN
            return
    is_bad_B = ~(np.abs(acts_BXD) <= LARGEST).reshape(len(acts_BXD), -1).all(axis=1)
    if not is_bad_B.any():
        return
    image_i = image_i_B[is_bad_B].min()
    values = acts_BXD[image_i_B == image_i]
    where = f"{acts.dirs[0].dpath}: image {image_i} has"
    layers = ", ".join(map(str, acts.layers))
    if np.isfinite(values).all():
        raise errors.UserError(
            f"{where} activations up to {np.abs(values).max():.2g} at layer {layers}: squares of more "
            f"than {LARGEST:.0e} overflow float32. Check the ViT's weights, or record another layer."
        )
    raise errors.UserError(
        f"{where} NaN or infinite activations at layer {layers}. "
        "Delete its shard (and the shard's .json) and run the same dump again."
    )
