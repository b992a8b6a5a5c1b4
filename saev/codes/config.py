"""Config of `python -m saev.codes`. Imports no torch."""

import dataclasses
import typing as tp

import beartype
import tyro

from saev import errors, fields, launch
from saev.data import config as data_config

Layout = tp.Literal["csr", "dense"]


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Codes:
    """Writes a scorer's codes of every patch, and their maximum and mean over each image, to files."""

    scorer: fields.Path = ""
    """SAE checkpoint (sae.pt) or fitted scorer (scorers/*.bin)."""
    data: data_config.Shards = dataclasses.field(default_factory=data_config.Shards)
    """The activations to encode."""
    dump_to: fields.Path = "codes"
    """Folder in which each command makes one, named by a hash of scorer, activations and flags."""
    dtype: tp.Literal["float16", "float32"] = "float32"
    """Type of the patches' codes. float16 takes 6 instead of 8 bytes per code. A code above 65,504 is then an
    error. Codes of images are float32."""
    top_n: int = 0
    """Keep only this many codes of each patch, the largest (CSR). 0: all. Codes of images are always computed
    from all of them."""
    image_codes: tp.Literal["auto", "csr", "dense"] = "auto"
    """How codes of images are stored. auto: CSR for SAEs, dense for other scorers."""
    max_patches_per_shard: int = 250_000
    """Most patches in a shard. After a kill, the same command encodes at most one shard again."""
    device: str = "auto"
    """auto (cuda if there is a GPU, else cpu), cpu, cuda, cuda:1, ..."""
    dry_run: bool = False
    """Print the config without encoding."""
    slurm: tp.Annotated[launch.SlurmConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=launch.of_user
    )
    """Where to run."""

    def __post_init__(self) -> None:
        fields.settle(self, top_n="[0, 1e6]", max_patches_per_shard="[1, 1e12]")
        if not self.dump_to:
            raise errors.UserError("--dump-to is empty. Pass a folder for the codes.")
