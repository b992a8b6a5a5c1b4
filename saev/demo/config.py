"""Config of the demo. Imports no torch."""

import dataclasses
import typing as tp

import beartype
import tyro

from saev import errors, fields, launch


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Demo:
    """Draws mini-CUB, dumps a ViT layer, trains an SAE, evaluates scorers, and shows the latents.

    A second run skips what is done.
    """

    dump_to: fields.Path = "demo"
    """Folder for everything the demo makes."""
    n_imgs: int = 640
    """Images of mini-CUB."""
    layer: int = 7
    """ViT layer to analyse (the packaged weights are best at layers 5 to 8)."""
    n_patches: int = 1_000_000
    """Activations to train the SAE on."""
    device: str = "auto"
    """auto (cuda if there is a GPU, else cpu), cpu, cuda, cuda:1, ..."""
    dry_run: bool = False
    """Print the config without running anything."""
    slurm: tp.Annotated[launch.SlurmConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=launch.of_user
    )
    """Where to run. As Slurm jobs, each step starts when those that it needs have ended."""

    def __post_init__(self) -> None:
        if not self.dump_to.isprintable():
            raise errors.UserError(
                f"--dump-to {self.dump_to!r}: a sweep file contains this path, so it must be printable UTF-8."
            )
        fields.settle(self, n_imgs="[40, 1e5]", layer="[-12, 11]", n_patches="[1, 1e13]")
