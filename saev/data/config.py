"""Configs of the dump and of the loaders. Imports no torch, so that `--help` answers at once."""

import dataclasses
import typing as tp

import beartype
import tyro

from saev import errors, fields, launch

Family = tp.Literal["clip", "siglip", "dinov2", "dinov3", "mae", "timm"]
Patches = tp.Literal["image", "cls", "all"]
Annotations = tp.Literal["any", "last"]
"""What counts of several annotations of one image and trait."""

MAX_PROCESSES = 256
"""Of one machine."""
MAX_IMG_SIZE = 4096
"""65,536 patches of 16 pixels: attention over more is beyond any ViT."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """A folder of images, one subfolder per label (subfolders may nest; the first level is the label)."""

    root: fields.Path = ""
    """Folder to search for images."""

    def __post_init__(self) -> None:
        fields.settle(self, "data.")


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Cub200:
    """CUB-200-2011 as it is distributed: images in the order of images.txt."""

    root: fields.Path = ""
    """The CUB_200_2011 folder (the one with images.txt)."""
    split: tp.Literal["all", "train", "test"] = "all"
    """Which images to dump, by train_test_split.txt."""

    def __post_init__(self) -> None:
        fields.settle(self, "data.")


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Vit:
    """Which vision transformer, with which weights."""

    vit_family: Family = "clip"
    """clip, siglip: open_clip models. dinov2, dinov3, mae: the authors' names. timm: any timm ViT."""
    vit_ckpt: fields.Path = "ViT-L-14/openai"
    """clip, siglip: ARCH/PRETRAINED, hf-hub:ORG/NAME or local-dir:FOLDER (a copy of such a model's files). Others: the model's name (dinov2_vitl14_reg, dinov3_vitl16, mae_vit_base_patch16)."""
    vit_weights: fields.Path = "hub"
    """Where the weights come from: 'hub', 'random' (seeded by --vit-seed), or a local file (.safetensors, .pt, .pth, TorchScript) as the model's authors, open_clip, timm or training code save it."""
    vit_seed: int = 0
    """Seed of --vit-weights random."""
    img_size: int | tuple[int, int] | None = None
    """Input side in pixels, or height and width; multiples of the patch size. Left out: 224 for dinov2, 256 for dinov3, else what the model's library prescribes."""
    d_vit: int | None = None
    """Width of the residual stream. Left out: inferred. Given: checked against the model."""
    n_patches_per_img: int | None = None
    """Patches per image. Left out: inferred. Given: checked against the model."""
    autocast: tp.Literal["off", "bfloat16"] = "off"
    """bfloat16: run the ViT in bfloat16 autocast, which is faster on GPUs and rounds more; activations still come out as float32."""

    def __post_init__(self) -> None:
        sizes = {
            "d_vit": "[1, 1e6]",
            "n_patches_per_img": "[1, 1e6]",
            "img_size": f"[1, {MAX_IMG_SIZE}]",
        }
        fields.settle(self, vit_seed="[0, 4294967296)", **sizes)


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Dump:
    """Runs a pretrained ViT over images and writes the patch activations of chosen layers to shards."""

    vit: tp.Annotated[Vit, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Vit)
    """The model."""
    data: ImageFolder | Cub200 = dataclasses.field(default_factory=ImageFolder)
    """The images."""
    vit_layers: tuple[int, ...] = (-2,)
    """Layers to record: i is the residual stream after block i, counted from 0; negative counts from the end."""
    dump_to: fields.Path = "shards"
    """Where the shard directory (named by the hash of its metadata) is made."""
    max_patches_per_shard: int = 2_400_000
    """Tokens x layers per shard file."""
    dtype: tp.Literal["float32", "float16", "bfloat16"] = "float32"
    """How activations are stored. Half precision takes half the bytes; loaders give float32 again."""
    vit_batch_size: int = 64
    """Images per forward pass. In all a dump takes about 0.85 GB, the ViT's weights, and memory in proportion to this: it says how much at its start."""
    n_workers: int = 4
    """Threads that decode images (of each job)."""
    n_jobs: int = 1
    """Slurm array tasks (without --slurm-acct: local processes) among which the shards are divided. The bytes are the same."""
    skip_corrupt: bool = False
    """Leave images out whose bytes do not decode, and record them in complete.json. A file that cannot be read stops the dump all the same."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""
    dry_run: bool = False
    """Print the config and stop."""
    slurm: tp.Annotated[launch.SlurmConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=launch.SlurmConfig
    )
    """Where to run."""

    def __post_init__(self) -> None:
        if not self.vit_layers:
            raise errors.UserError("--vit-layers is empty: name at least one layer.")
        if len(set(self.vit_layers)) < len(self.vit_layers):
            raise errors.UserError(f"--vit-layers {self.vit_layers} names a layer twice.")
        fields.settle(
            self,
            vit_layers="[-1e4, 1e4]",
            max_patches_per_shard="[1, 1e12]",
            vit_batch_size="[1, 65536]",
            n_workers="[1, 1024]",
            n_jobs="[1, 10000]",
        )
        if self.n_jobs > MAX_PROCESSES and not self.slurm.slurm_acct:
            raise errors.UserError(
                f"--n-jobs {self.n_jobs}: at most {MAX_PROCESSES} processes on one machine. Lower it, or pass --slurm-acct."
            )


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class DumpJob:
    """One of the jobs that a dump is divided into: it writes the shards whose number leaves `job_i` when divided by n_jobs."""

    dump: Dump
    job_i: int = 0


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Shards:
    """Activations to read: one layer (or all) of one or more shard directories."""

    shard_root: fields.Path = ""
    """Shard directory, as printed by `python -m saev.data` (the one with metadata.json)."""
    layer: int | tp.Literal["all"] = -1
    """Recorded layer to read; negative counts from the end of the recorded layers. all: every recorded layer."""
    patches: Patches = "image"
    """image: the patch tokens. cls: the [CLS] token. all: both."""
    more_roots: tuple[fields.Path, ...] = ()
    """More shard directories of the same ViT, read after shard_root as one stream."""
    partial: bool = False
    """Read the complete shards of an interrupted dump too."""

    def __post_init__(self) -> None:
        fields.settle(self, "data.", layer="[-1e4, 1e4]")


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Subset(Shards):
    """Some images of shard directories, as a stream of its own. For code; there is no flag."""

    image_is: tuple[int, ...] = ()
    """Their numbers, which count every image of every directory."""

    def __post_init__(self) -> None:
        pass  # made from a settled config; the numbers may be millions
