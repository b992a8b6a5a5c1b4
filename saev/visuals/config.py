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
    """Shows the top-activating images, with heat maps, for each chosen latent of a sparse autoencoder."""

    images: data_config.ImageFolder | data_config.Cub200 = dataclasses.field(
        default_factory=data_config.ImageFolder
    )
    """The images that were dumped."""
    ckpt: fields.Path = ""
    """Checkpoint (sae.pt)."""
    data: data_config.Shards = dataclasses.field(default_factory=data_config.Shards)
    """The activations to show. Image patches are always used; --data.patches is ignored."""
    dump_to: fields.Path = "visuals"
    """Folder of the gallery (index.html). An existing gallery is replaced once the new one is complete."""
    log_freq_range: tuple[float, float] = (-6.0, -1.0)
    """Show latents with log10(fraction of patches on which they fire) in this range."""
    log_value_range: tuple[float, float] = (-6.0, 6.0)
    """Show latents with log10(mean |f| where they fire) in this range."""
    n_latents: int = 64
    """Number of latents to show, drawn at random from those in both ranges."""
    latents: tuple[int, ...] = ()
    """Show these latents instead of drawn ones."""
    n_images: int = 20
    """Images per latent. A gallery needs about 0.75 GB of memory + the larger of 32 bytes x d_vit x latents
    and 1.1 GB (less for small dictionaries). The estimate is logged at the start."""
    seed: int = 0
    """Seed for drawing the latents."""
    device: str = "auto"
    """auto (cuda if there is a GPU, else cpu), cpu, cuda, cuda:1, ..."""
    dry_run: bool = False
    """Print the config without making a gallery."""
    slurm: tp.Annotated[launch.SlurmConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=launch.of_user
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
