"""Config of `visuals.py`. Imports no torch."""

import dataclasses
import typing as tp

import beartype
import tyro

from saev import errors, fields, launch
from saev.data import config as data_config


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Visuals:
    """Shows, for each chosen latent of a sparse autoencoder, the images that fire it most, with heat maps."""

    images: data_config.ImageFolder | data_config.Cub200 = dataclasses.field(
        default_factory=data_config.ImageFolder
    )
    """The images that were dumped."""
    ckpt: fields.Path = ""
    """Checkpoint (sae.pt)."""
    data: data_config.Shards = dataclasses.field(default_factory=data_config.Shards)
    """The activations to show; whatever --data.patches says, the image patches are used."""
    dump_to: fields.Path = "visuals"
    """Folder of the gallery (index.html). An older gallery there is replaced once the new one is complete."""
    log_freq_range: tuple[float, float] = (-6.0, -1.0)
    """Latents are eligible if log10 of the share of patches they fire on lies in this range, ..."""
    log_value_range: tuple[float, float] = (-6.0, 6.0)
    """... and log10 of their mean size |f| when firing lies in this one."""
    n_latents: int = 64
    """How many of the eligible latents to show, drawn at random."""
    latents: tuple[int, ...] = ()
    """Show exactly these latents instead."""
    n_images: int = 20
    """Images per latent. In all a gallery takes about 0.75 GB, and the larger of 32 bytes x d_vit x latents and 1.1 GB (less for small dictionaries): it says how much at its start."""
    seed: int = 0
    """Seed of the draw."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""
    dry_run: bool = False
    """Print the config and stop."""
    slurm: tp.Annotated[launch.SlurmConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=launch.SlurmConfig
    )
    """Where to run."""

    def __post_init__(self) -> None:
        fields.settle(
            self,
            log_freq_range="[-1000, 1000]",
            log_value_range="[-1000, 1000]",
            n_latents="[1, 1e6]",
            latents="[0, 1e9]",
            n_images="[1, 1e4]",
            seed="[0, 4294967296)",
        )
        for name in ("log_freq_range", "log_value_range"):
            low, high = getattr(self, name)
            if low > high:
                raise errors.UserError(
                    f"--{name.replace('_', '-')} {low} {high}: the first must not exceed the second."
                )
