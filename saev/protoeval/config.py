"""Config of `protoeval.py`. Imports no torch."""

import dataclasses
import typing as tp

import beartype
import tyro

from saev import errors, fields, launch
from saev.data import config as data_config
from saev.data.traits import config as traits_config
from saev.scorers import config as scorers_config

Split = tp.Literal["train", "test"]


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class ProtoEval:
    """Chooses the best prototype for each trait on train images and measures it on test images."""

    scorer: scorers_config.Scorer = dataclasses.field(default_factory=scorers_config.Random)
    """The prototypes. `scorer:NAME --help` shows the flags of each."""
    cub_root: fields.Path = fields.shared("")
    """The CUB_200_2011 folder. Short for labels:cub --labels.root."""
    labels: traits_config.Labels = fields.neither(traits_config.Cub)
    """Which images have which traits. `labels:NAME --help` shows the flags of each. The sources of a sweep
    share one pass over the activations."""
    train_data: data_config.Shards = fields.shared(data_config.Shards)
    """Activations with the train images. They may include the test images; other images need --force."""
    test_data: data_config.Shards = fields.shared(data_config.Shards)
    """Activations with the test images. Default: --train-data."""
    fit_data: data_config.Shards = fields.neither(data_config.Shards)
    """Activations to fit the scorer on, without labels, with all their images. Default: the train images."""
    n_prototypes: tuple[int, ...] = (128, 512, 2048, 8192)
    """Numbers of prototypes to compare."""
    n_train: tuple[int, ...] = fields.stream((16, 64, 256, 1024, -1))
    """Numbers of train images that prototypes are chosen on. -1: all."""
    min_certainty: int = fields.stream(3)
    """CUB: least certainty of a positive annotation: 1 not visible, 2 guessing, 3 probably, 4 definitely."""
    annotations: data_config.Annotations = fields.stream("any")
    """CUB: how several annotations of an image and trait count. any: the trait is present if one of them says
    so with enough certainty. last: only the last line counts."""
    no_positives: tp.Literal["leave-out", "zero"] = fields.stream("leave-out")
    """How traits without a positive test image count. leave-out: not in any mean. zero: as AP 0."""
    swap_splits: bool = fields.stream(False)
    """Choose and fit on the test images and measure on the train images, as some published tables do."""
    seed: int = fields.stream(0)
    """Seed for fitting scorers and for drawing train images."""
    n_seeds: int = fields.stream(1)
    """Draws of each number of train images. The table has the mean and spread over draws."""
    n_boot: int = fields.stream(1000)
    """Bootstrap resamples of the test images, for 95% intervals of mAPs and paired differences. 0: none."""
    several: tuple[int, ...] = fields.stream(())
    """Also fit a sparse logistic model of each trait on at most this many prototypes, chosen on train
    images (such as 5 20). Each number is a row of the table."""
    key_depth: int = fields.stream(0)
    """Also grow a decision tree of at most this depth for each trait, and write the trees as dichotomous keys
    (keys.md). 0: none."""
    memory_gb: float = fields.shared(4.0)
    """Memory for activations and scores, in GB (less if 256 images need less). An evaluation needs about 0.9
    GB + this + the prototypes + a memory-mapped file of all scores. The total is logged at the start."""
    gallery: fields.Path = fields.neither("")
    """A gallery of one of the scorers, made by visuals.py. Each trait's best prototypes, and the test images
    that they retrieve, are written into it, in place of earlier ones."""
    patch_labels: fields.Path = fields.shared("")  # their content decides
    """labels.bin of `python -m saev.labels`: also write the patch table, which says where prototypes
    score high. Pass the name alone (labels.bin) if each of several shard directories has one."""
    audit: tuple[int, ...] = fields.stream(())
    """With --patch-labels: rank prototypes by an L1-logistic model of the image labels, and report how many
    of the first B localise a class of patches. Pass values of B, such as 10 25 50 100 (docs/audit.md)."""
    report: fields.Path = fields.neither("")
    """Join all results below this folder into one report, without evaluating anything."""
    plot: fields.Path = fields.neither("")
    """With --report: also write its chart to this file (.pdf, .svg or .png)."""
    check: bool = fields.neither(False)
    """Print statistics of the labels (with --train-data, also of their join with the activations), without
    evaluating anything."""
    force: bool = fields.neither(False)
    """Accept implausible labels, and activations of images without labels (these images are ignored)."""
    dump_to: fields.Path = fields.shared("results")
    """Folder for results directories. A results directory's name is a hash of the configs."""
    scorers_to: fields.Path = fields.neither("scorers")
    """Folder for fitted scorers, which later commands reuse."""
    device: str = fields.shared("auto")
    """auto (cuda if there is a GPU, else cpu), cpu, cuda, cuda:1, ..."""
    sweep: fields.Path = fields.neither("")
    """TOML file of parameters, such as several scorers, in which each list is a grid axis. Flags on the
    command line override it."""
    dry_run: bool = fields.neither(False)
    """Print the configs without evaluating."""
    slurm: tp.Annotated[launch.SlurmConfig, tyro.conf.arg(name="")] = fields.neither(launch.of_user)
    """Where to run."""

    def __post_init__(self) -> None:
        for name in ("test_data", "fit_data"):
            data = getattr(self, name)
            if not data.shard_root and data != data_config.Shards():
                flag = name.replace("_", "-")
                raise errors.UserError(
                    f"--{flag}.*: flags were given without --{flag}.shard-root. Pass it too, or leave them "
                    "out to use the train data."
                )
        fields.settle(
            self,
            n_prototypes="[1, 1e7]",
            min_certainty="[1, 4]",
            seed="[0, 4294967296)",
            n_seeds="[1, 1e4]",
            n_boot="[0, 1e6]",
            several="[1, 1000]",
            key_depth="[0, 20]",
            memory_gb="(0, 1e5]",
            audit="[1, 1e5]",
        )
        self._check_audit()
        if self.cub_root and self.labels not in (traits_config.Cub(), traits_config.Cub(self.cub_root)):
            raise errors.UserError(
                f"--cub-root {self.cub_root}: other labels are given too. Pass --cub-root or labels:NAME."
            )
        if not self.n_prototypes:
            raise errors.UserError("--n-prototypes is empty. Pass numbers of at least 1.")
        if not self.n_train or any(n < 1 and n != -1 for n in self.n_train):
            raise errors.UserError(f"--n-train {self.n_train}: pass numbers of at least 1, or -1 for all.")

    def _check_audit(self) -> None:
        if self.audit and not self.patch_labels:
            raise errors.UserError(
                "--audit: needs patch labels. Pass --patch-labels with the labels.bin that "
                "`python -m saev.labels` printed."
            )
        masks = self.source
        if self.audit and isinstance(masks, traits_config.Masks):
            name = f"labels-{masks.label_name}.bin" if masks.label_name else "labels.bin"
            if self.patch_labels.rpartition("/")[2] == name:
                raise errors.UserError(
                    f"--audit: --patch-labels {self.patch_labels} also gives the image labels "
                    "(labels:masks), but prototypes must not be ranked by the labels that they are audited "
                    "on. Pass other image labels, such as labels:class-folders."
                )

    @property
    def test(self) -> data_config.Shards:
        return self.test_data if self.test_data.shard_root else self.train_data

    @property
    def sides(self) -> tuple[tuple[Split, data_config.Shards], ...]:
        """(split, activations) that prototypes are chosen on, then those that they are measured on."""
        sides: tuple[tuple[Split, data_config.Shards], ...] = (
            ("train", self.train_data),
            ("test", self.test),
        )
        return sides[::-1] if self.swap_splits else sides

    @property
    def source(self) -> traits_config.Labels:
        """The labels, also if --cub-root is given."""
        return traits_config.Cub(self.cub_root) if self.cub_root else self.labels

    @property
    def protocol(self) -> tuple[object, ...]:
        """Settings, besides the labels' files, that determine what is measured on which images."""
        return (self.min_certainty, self.annotations, self.no_positives, self.swap_splits)

    @property
    def models(self) -> dict[str, str]:
        """Rows of several prototypes: number of prototypes, or "key" -> what follows the scorer's name."""
        noun = "latent" if isinstance(self.scorer, scorers_config.Sae) else "prototype"
        named = {str(n): f"{n} {noun}{'s' * (n > 1)}" for n in self.several}
        return named | ({"key": "key"} if self.key_depth else {})

    @property
    def fit(self) -> data_config.Shards:
        return self.fit_data if self.fit_data.shard_root else self.train_data
