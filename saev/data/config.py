"""Configs of the dump and of the loaders. Imports no torch, so that `--help` answers at once."""

import dataclasses
import typing as tp

import beartype
import tyro

from saev import errors, fields, launch

Family = tp.Literal["clip", "siglip", "dinov2", "dinov3", "mae", "timm"]
Patches = tp.Literal["image", "cls", "all"]
Resize = tp.Literal["crop", "squash", "pad", "flexible"]
"""How a photo becomes the ViT's input (docs/images-and-weights.md)."""
Annotations = tp.Literal["any", "last"]
"""Which annotations count if an image and trait have several."""

MAX_PROCESSES = 256
"""Most processes on one machine."""
MAX_IMG_SIZE = 4096
"""Gives 65,536 patches of 16 pixels, more than any ViT can attend to."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """A folder of images with one subfolder per label. If subfolders nest, the first level is the label."""

    root: fields.Path = ""
    """Folder with the images."""

    def __post_init__(self) -> None:
        fields.settle(self, "data.")


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Cub200:
    """CUB-200-2011, with images in the order of images.txt."""

    root: fields.Path = ""
    """The CUB_200_2011 folder, which holds images.txt."""
    split: tp.Literal["all", "train", "test"] = "all"
    """Images to dump, according to train_test_split.txt."""

    def __post_init__(self) -> None:
        fields.settle(self, "data.")


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Vit:
    """A vision transformer and its weights."""

    vit_family: Family = "clip"
    """clip, siglip: open_clip's models. dinov2, dinov3, mae: the authors' models. timm: any ViT of timm."""
    vit_ckpt: fields.Path = "ViT-L-14/openai"
    """Model. clip and siglip: ARCH/PRETRAINED, hf-hub:ORG/NAME, or local-dir:FOLDER for a downloaded hub
    model. Others: the model's name (dinov2_vitl14_reg, dinov3_vitl16, mae_vit_base_patch16)."""
    vit_weights: fields.Path = "hub"
    """Weights: 'hub', 'random' (seeded by --vit-seed), or a local .safetensors, .pt, .pth or TorchScript file
    in the format of the model's authors, open_clip, timm or training code."""
    vit_seed: int = 0
    """Seed for --vit-weights random."""
    img_size: int | tuple[int, int] | None = None
    """Side of the input image in pixels, or its height and width: multiples of the patch size. Default: 224
    for dinov2, 256 for dinov3, else the default of the model's library."""
    d_vit: int | None = None
    """Width of the residual stream. Default: inferred from the model. If given, it is checked against it."""
    n_patches_per_img: int | None = None
    """Patches per image. Default: inferred from the model. If given, it is checked against it."""
    resize: Resize | None = None
    """crop: the centre of the photo. squash: all of it, in the input's aspect ratio. pad: all of it, with
    borders of the mean colour. flexible: all of it, in the grid of about as many patches that distorts it
    least. Patches that show nothing of the photo are ignored by all commands. Default: the model's own, crop
    or squash."""
    autocast: tp.Literal["off", "bfloat16"] = "off"
    """bfloat16: run the ViT under bfloat16 autocast: faster on GPUs, less precise. Its activations are
    float32 in both cases."""

    def __post_init__(self) -> None:
        sizes = {"d_vit": "[1, 1e6]", "n_patches_per_img": "[1, 1e6]", "img_size": f"[1, {MAX_IMG_SIZE}]"}
        fields.settle(self, vit_seed="[0, 4294967296)", **sizes)


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Dump:
    """Runs a pretrained ViT on images and writes the activations of chosen layers to shards."""

    vit: tp.Annotated[Vit, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Vit)
    """The model."""
    data: ImageFolder | Cub200 = dataclasses.field(default_factory=ImageFolder)
    """The images."""
    vit_layers: tuple[int, ...] = (-2,)
    """Layers to record. Layer i is the residual stream after block i, counted from 0, or from the end if
    negative."""
    dump_to: fields.Path = "shards"
    """Folder for shard directories. A shard directory's name is a hash of its metadata."""
    max_patches_per_shard: int = 2_400_000
    """Most tokens x layers in a shard file."""
    dtype: tp.Literal["float32", "float16", "bfloat16"] = "float32"
    """How activations are stored. 16-bit types take half the space. Loaders return float32."""
    vit_batch_size: int = 64
    """Images per forward pass. A dump needs about 0.85 GB + the ViT's weights + memory in proportion to this.
    The total is logged at the start."""
    n_workers: int = 4
    """Threads that decode images, in each job."""
    n_jobs: int = 1
    """Jobs among which the shards are divided: Slurm array tasks, or local processes without --slurm-acct.
    The bytes do not depend on it."""
    skip_corrupt: bool = False
    """Skip images that cannot be decoded, and record them in complete.json. A file that cannot be read still
    stops the dump."""
    device: str = "auto"
    """auto (cuda if there is a GPU, else cpu), cpu, cuda, cuda:1, ..."""
    dry_run: bool = False
    """Print the config without dumping."""
    slurm: tp.Annotated[launch.SlurmConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=launch.of_user
    )
    """Where to run."""

    def __post_init__(self) -> None:
        if not self.vit_layers:
            raise errors.UserError("--vit-layers is empty. Name at least one layer.")
        if len(set(self.vit_layers)) < len(self.vit_layers):
            raise errors.UserError(f"--vit-layers {self.vit_layers}: names a layer twice.")
        fields.settle(
            self,
            vit_layers="[-1e4, 1e4]",
            max_patches_per_shard="[1, 1e12]",
            vit_batch_size="[1, 65536]",
            n_workers="[1, 1024]",
            n_jobs="[1, 10000]",
        )
        if self.n_jobs > MAX_PROCESSES and not self.slurm.is_on:
            raise errors.UserError(
                f"--n-jobs {self.n_jobs}: one machine runs at most {MAX_PROCESSES} processes. Lower it, "
                "or pass --slurm-acct."
            )


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class DumpJob:
    """One job of a dump. It writes the shards with number % n_jobs == job_i."""

    dump: Dump
    job_i: int = 0


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Shards:
    """Activations to read: one layer, or all, of one or more shard directories."""

    shard_root: fields.Path = ""
    """Shard directory (with metadata.json), as printed by `python -m saev.data`."""
    layer: int | tp.Literal["all"] = -1
    """Recorded layer to read. Negative numbers count from the last recorded layer. all: every layer."""
    patches: Patches = "image"
    """image: patch tokens. cls: the [CLS] token. all: both."""
    more_roots: tuple[fields.Path, ...] = ()
    """More shard directories of the same ViT, read as one stream with the first."""
    partial: bool = False
    """Allow an unfinished dump, and read its complete shards."""
    exclude_patch_labels: tuple[str, ...] = ()
    """Leave out patches of these classes, such as background: names in the labels.json beside the shards
    (`python -m saev.labels`). Patches without a label stay."""

    def __post_init__(self) -> None:
        fields.settle(self, "data.", layer="[-1e4, 1e4]")
