"""Config of `python -m saev.compare`. Imports no torch."""

import dataclasses
import typing as tp

import beartype
import tyro

from saev import errors, fields, launch
from saev.data import config as data_config


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Compare:
    """Matches latents of two dictionaries (or all pairs of several) by their values on the same images."""

    scorer: fields.Path = fields.neither("")  # its content decides
    """The first dictionary: an SAE's checkpoint (sae.pt), a fitted scorer (scorers/NAME.bin), or `units` (the
    ViT's own units: each dimension of its activations)."""
    data: data_config.Shards = fields.neither(data_config.Shards)
    """The first dictionary's activations."""
    other: fields.Path = fields.neither("")
    """The second dictionary."""
    other_data: data_config.Shards = fields.neither(data_config.Shards)
    """The second dictionary's activations, of the same images (joined by path). Default: --data.
    --other-data.layer alone: another layer of the same shards."""
    runs: tuple[fields.Path, ...] = fields.neither(())
    """Compare all pairs of these instead: checkpoints, fitted scorers, run directories, folders of
    runs, or units. Each SAE is run on the layer of --data that it was trained on."""
    per: tp.Literal["auto", "patch", "image"] = "auto"
    """Compare values of patches or of images. patch needs equal grids of patches over the same part of the
    image. auto: patch where that holds, else image."""
    pool: tp.Literal["max", "mean"] = "max"
    """A latent's value on an image: the maximum or the mean over its patches."""
    n_images: int = 0
    """Number of images to compare on, drawn at random from those that all sides have. 0: all."""
    thresholds: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    """Correlations for the tables: the share of latents with a match that is at least as good."""
    candidates: int = 32
    """One-to-one matching in dictionaries of more than 4,096 latents considers only this many partners of
    each latent, the most correlated ones."""
    seed: int = 0
    """Seed for drawing the images and for permuting them."""
    memory_gb: float = fields.neither(4.0)
    """Memory for sums of products and for codes, in GB. Codes of all images are kept in files."""
    gallery: fields.Path = fields.neither("")
    """The first dictionary's gallery, made by visuals.py. Its page then shows the matches."""
    other_gallery: fields.Path = fields.neither("")
    """The second dictionary's gallery, whose pictures --gallery then shows beside its own."""
    dump_to: fields.Path = fields.neither("compare")
    """Folder for results directories. A results directory's name is a hash of everything that determines
    its contents."""
    device: str = fields.neither("auto")
    """auto (cuda if there is a GPU, else cpu), cpu, cuda, cuda:1, ... for encoding. Codes are compared on
    the CPU."""
    dry_run: bool = fields.neither(False)
    """Print the config without comparing."""
    slurm: tp.Annotated[launch.SlurmConfig, tyro.conf.arg(name="")] = fields.neither(launch.of_user)
    """Where to run."""

    def __post_init__(self) -> None:
        fields.settle(
            self,
            n_images="[0, 1e9]",
            thresholds="[0, 1]",
            candidates="[1, 1024]",
            seed="[0, 4294967296)",
            memory_gb="(0, 1e5]",
        )
        if not self.thresholds:
            raise errors.UserError("--thresholds is empty. Pass numbers from 0 to 1.")

    def check(self) -> None:
        """Checks that flags go together.

        Raises:
            UserError: no dictionaries are named, or flags of two dictionaries are given with --runs.
        """
        if self.runs and (self.scorer or self.other):
            raise errors.UserError("--runs takes all dictionaries: leave out --scorer and --other.")
        if self.runs and (self.gallery or self.other_gallery):
            raise errors.UserError(
                "--gallery shows matches of two dictionaries. Pass --scorer and --other, not --runs."
            )
        if self.other_gallery and not self.gallery:
            raise errors.UserError("--other-gallery needs --gallery, the gallery that shows the matches.")
        if not self.runs and not (self.scorer and self.other):
            raise errors.UserError(
                "name two dictionaries with --scorer and --other (sae.pt, scorers/NAME.bin or units), or "
                "several with --runs."
            )

    @property
    def second_data(self) -> data_config.Shards:
        """The second dictionary's activations."""
        if self.other_data.shard_root:
            return self.other_data
        if self.other_data == data_config.Shards():
            return self.data
        roots = {"shard_root": self.data.shard_root, "more_roots": self.data.more_roots}
        return dataclasses.replace(self.other_data, **roots, partial=self.data.partial)
