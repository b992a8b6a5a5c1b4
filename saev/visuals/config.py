"""Config of `visuals.py`. Imports no torch."""

import dataclasses
import typing as tp

import beartype
import tyro

from saev import errors, fields, launch
from saev.data import config as data_config

Similarity = tp.Literal["saved", "plain", "dot", "cosine", "distance"]
MOST_ROWS = 50
"""Most latents in a figure."""
SortBy = tp.Literal["id", "freq", "mean", "max", "n-images"]


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Sae:
    """Latents of a sparse autoencoder."""

    ckpt: fields.Path = ""
    """Checkpoint (sae.pt). --ckpt is short for it."""

    def __post_init__(self) -> None:
        fields.settle(self, "scorer.")


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Fitted:
    """Prototypes that protoeval.py fitted: random activations, centroids, principal components."""

    path: fields.Path = ""
    """Their file (scorers/*.bin)."""
    similarity: Similarity = "saved"
    """Score of prototype p for activation x, with mean activation m. plain: x . p. dot: (x - m) . (p - m).
    cosine: cos(x - m, p - m). distance: -|x - p|^2. saved: as the file says."""

    def __post_init__(self) -> None:
        fields.settle(self, "scorer.")


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Units:
    """The ViT's own units: each dimension of its activations."""

    deviations: float = 2.0
    """A unit fires where its value is more than this many standard deviations above its mean."""

    def __post_init__(self) -> None:
        fields.settle(self, "scorer.", deviations="[0, 100]")


Scorer = Sae | Fitted | Units


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Visuals:
    """Makes a gallery: what each latent, prototype or unit fires on, as files for a browser."""

    images: data_config.ImageFolder | data_config.Cub200 = dataclasses.field(
        default_factory=data_config.ImageFolder
    )
    """The images that were dumped."""
    scorer: Scorer = dataclasses.field(default_factory=Sae)
    """What to show. `scorer:NAME --help` shows the flags of each."""
    ckpt: fields.Path = ""
    """Checkpoint (sae.pt) of the SAE to show."""
    data: data_config.Shards = dataclasses.field(default_factory=data_config.Shards)
    """The activations to show. Image patches are always used; --data.patches is ignored."""
    dump_to: fields.Path = "visuals"
    """Folder of the gallery (index.html). An existing gallery is replaced once the new one is complete."""
    log_freq_range: tuple[float, float] = (-1000.0, 1000.0)
    """Show only latents with log10(fraction of patches on which they fire) in this range."""
    log_value_range: tuple[float, float] = (-1000.0, 1000.0)
    """Show only latents with log10(mean |value| where they fire) in this range."""
    include_latents: tp.Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--latents"])] = ()
    """Show only these latents, whether or not they fire. The other filters are ignored."""
    sort_by: SortBy = "id"
    """Order of the latents. All but id: largest first."""
    top_k: int | None = None
    """Show only this many latents, in this order. Default: all that fire."""
    n_images: int = 20
    """Top images per latent."""
    n_group: int = 6
    """Further images per latent from each quarter of the images that fire it, and as many at random."""
    image_view: int = 100
    """Images, evenly spaced in the data set, for which the gallery shows the latents on every patch."""
    thumb_side: int = 224
    """Longest side of the pictures in pixels."""
    figure: tuple[int, ...] = ()
    """Draw the top images of these latents into the file --out, from the gallery in --dump-to. If there is
    none, it is made first."""
    figure_images: int = 8
    """Images per latent in the figure. Up to 5 fit the column of a paper."""
    out: fields.Path = "figure.pdf"
    """The figure's file (.pdf, .svg or .png)."""
    seed: int = 0
    """Seed of all samples of images and patches."""
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
            include_latents="[0, 1e9]",
            top_k="[1, 1e9]",
            n_images="[1, 1e4]",
            n_group="[0, 1e3]",
            image_view="[0, 1e6]",
            thumb_side="[16, 2048]",
            figure="[0, 1e9]",
            figure_images="[1, 20]",
            seed="[0, 4294967296)",
        )
        for name in ("log_freq_range", "log_value_range"):
            low, high = getattr(self, name)
            if low > high:
                raise errors.UserError(
                    f"--{name.replace('_', '-')} {low} {high}: the first must not exceed the second."
                )
        if len(self.figure) > MOST_ROWS:
            raise errors.UserError(
                f"--figure names {len(self.figure)} latents. A figure holds at most {MOST_ROWS}."
            )
        given = self.scorer.ckpt if isinstance(self.scorer, Sae) else "another scorer"
        if self.ckpt and given not in ("", self.ckpt):
            raise errors.UserError("--ckpt and --scorer name two scorers. Pass one of them.")

    @property
    def shown(self) -> Scorer:
        """The scorer, with --ckpt filled in."""
        return Sae(self.ckpt) if self.ckpt else self.scorer

    @property
    def source(self) -> str:
        """Path of the scorer's file; "" for the ViT's units."""
        match self.shown:
            case Sae(ckpt=path) | Fitted(path=path):
                return path
            case _:
                return ""
