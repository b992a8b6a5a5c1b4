"""Config of `protoeval.py`. Imports no torch."""

import dataclasses
import typing as tp

import beartype
import tyro

from saev import errors, fields, launch
from saev.data import config as data_config
from saev.scorers import config as scorers_config

Split = tp.Literal["train", "test"]


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class ProtoEval:
    """Chooses the best prototype for each CUB attribute on train images and reports its average precision on test images."""

    scorer: (
        scorers_config.Random | scorers_config.KMeans | scorers_config.Pca | scorers_config.Sae
    ) = dataclasses.field(default_factory=scorers_config.Random)
    """Where the prototypes come from."""
    cub_root: fields.Path = fields.shared("")
    """The CUB_200_2011 folder."""
    train_data: data_config.Shards = fields.shared(data_config.Shards)
    """Activations that hold the train images (and may hold the test images; others are refused without --force)."""
    test_data: data_config.Shards = fields.shared(data_config.Shards)
    """Activations that hold the test images; may be the same directory. Left out: the train data's."""
    fit_data: data_config.Shards = fields.neither(data_config.Shards)
    """Activations to fit the scorer on (without labels), all of their images. Left out: the train images alone."""
    n_prototypes: tuple[int, ...] = (128, 512, 2048, 8192)
    """Numbers of prototypes to compare."""
    n_train: tuple[int, ...] = fields.stream((16, 64, 256, 1024, -1))
    """Numbers of train images used for choosing; -1, or more than there are, for all."""
    min_certainty: int = fields.stream(3)
    """A trait counts as present from this certainty on: 1 not visible, 2 guessing, 3 probably, 4 definitely."""
    annotations: data_config.Annotations = fields.stream("any")
    """Of several annotations of an image and trait: any: the trait is present if one of them says so with enough certainty. last: the last line counts."""
    no_positives: tp.Literal["leave-out", "zero"] = fields.stream("leave-out")
    """A trait without a positive test image has no AP. leave-out: it is left out of all means. zero: it counts as AP 0."""
    swap_splits: bool = fields.stream(False)
    """Choose (and fit) on CUB's test images and measure on its train images, for tables that were made this way round."""
    seed: int = fields.stream(0)
    """Seed of the fitted scorers and of the drawn train images."""
    n_seeds: int = fields.stream(1)
    """Draws of each number of train images; the table gives the mean over them and its spread."""
    n_boot: int = fields.stream(1000)
    """Bootstrap resamples of the test images, for 95% intervals of each mAP and of its difference to random activations. 0: none."""
    memory_gb: float = fields.shared(4.0)
    """Bound of the activations and scores in memory, in GB, beside the prototypes. In all an evaluation takes about 0.9 GB, this (less where 256 images take less), the prototypes and the file of all scores: it says how much at its start."""
    gallery: fields.Path = fields.neither("")
    """Gallery that visuals.py made of the SAE: traits.md then links each trait's latent to its images."""
    report: fields.Path = fields.neither("")
    """Evaluate nothing: join all results below this folder into one report."""
    check: bool = fields.neither(False)
    """Evaluate nothing: print what the labels (and, where --train-data is given, their join with the activations) look like."""
    force: bool = fields.neither(False)
    """Go on although the labels look wrong, or the activations hold images without labels (these are left out)."""
    dump_to: fields.Path = fields.shared("results")
    """Where the results directory (named by the hash of the configs) goes."""
    scorers_to: fields.Path = fields.neither("scorers")
    """Shared directory of fitted scorers; none is fitted twice."""
    device: str = fields.shared("auto")
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""
    sweep: fields.Path = fields.neither("")
    """TOML file of parameters, such as several scorers; each list is a grid axis. Typed flags win over it."""
    dry_run: bool = fields.neither(False)
    """Print the configs and stop."""
    slurm: tp.Annotated[launch.SlurmConfig, tyro.conf.arg(name="")] = fields.neither(
        launch.SlurmConfig
    )
    """Where to run."""

    def __post_init__(self) -> None:
        for name in ("test_data", "fit_data"):
            data = getattr(self, name)
            if not data.shard_root and data != data_config.Shards():
                flag = name.replace("_", "-")
                raise errors.UserError(
                    f"--{flag}.*: flags were given without --{flag}.shard-root. Pass that too, or leave them out to take the train data."
                )
        fields.settle(
            self,
            n_prototypes="[1, 1e7]",
            min_certainty="[1, 4]",
            seed="[0, 4294967296)",
            n_seeds="[1, 1e4]",
            n_boot="[0, 1e6]",
            memory_gb="(0, 1e5]",
        )
        if not self.n_prototypes:
            raise errors.UserError("--n-prototypes is empty: pass numbers of at least 1.")
        if not self.n_train or any(n < 1 and n != -1 for n in self.n_train):
            raise errors.UserError(
                f"--n-train {self.n_train}: pass numbers of at least 1, or -1 for all."
            )

    @property
    def test(self) -> data_config.Shards:
        return self.test_data if self.test_data.shard_root else self.train_data

    @property
    def sides(self) -> tuple[tuple[Split, data_config.Shards], ...]:
        """The split that prototypes are chosen on, and the one that they are measured on, with their activations."""
        sides: tuple[tuple[Split, data_config.Shards], ...] = (
            ("train", self.train_data),
            ("test", self.test),
        )
        return sides[::-1] if self.swap_splits else sides

    @property
    def protocol(self) -> tuple[object, ...]:
        """What is measured on which images, beside the labels' files."""
        return (self.min_certainty, self.annotations, self.no_positives, self.swap_splits)

    @property
    def fit(self) -> data_config.Shards:
        return self.fit_data if self.fit_data.shard_root else self.train_data
