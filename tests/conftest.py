"""Fixtures that several test files use. N images, L layers, T tokens, D d_vit."""

import atexit
import collections
import collections.abc
import contextlib
import fcntl
import functools
import importlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import unittest.mock

import forked
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
# Before torch is imported, and for the processes that tests start: several of them share the cores, and threads that
# spin while they wait for each other took a third of the whole run's processor time.
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # see IN_THREADS
if (
    sys.dont_write_bytecode
):  # as in containers: each process that a test starts would compile torch and timm anew
    os.environ["PYTHONDONTWRITEBYTECODE"] = ""
    os.environ["PYTHONPYCACHEPREFIX"] = str(ROOT / ".pytest_cache" / "pycache")
if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # as nohup's children have it: Ctrl-C could not be tested
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # the same: nor could a closed terminal
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


LONGEST = (
    "test_slurm",
    "test_slurm_commands",
    "test_slurm_stages",
    "test_training_resume",
    "test_demo",
    "test_training",
    "test_faults",
    "test_dump_faults",
)
LONGEST += ("test_dump_resume", "test_memory", "test_nn_triton_interpreted")
"""Files that take more than 20 s, the longest ones first."""


IN_THREADS = (
    "test_codes",
    "test_compare",
    "test_nn_architectures",
    "test_nn_sae",
    "test_nn_sparse",
    "test_precision",
    "test_protoeval_logistic",
    "test_protoeval_patches",
    "test_protoeval_probe",
    "test_protoeval_several",
    "test_scorers",
    "test_scorers_kmeans",
    "test_visuals",
)
"""Files about functions that run kernels in threads (`saev.compiled.in_threads`): these have one for each core. A training and
a table with any number of threads are in test_golden. All else takes a tenth less processor time in one thread, because
several processes share the cores."""


LIBRARIES = (
    "timm",
    "open_clip",
    "sklearn.metrics",
    "onnx.reference",
    "hypothesis.strategies",
    "playwright.sync_api",
)
"""What tests import, in addition to `forked.PRELOADED`."""


def pytest_configure(config: pytest.Config) -> None:
    """All functions of saev check their arguments' types and shapes, not only those that do so for users.

    `-m "not slow"` leaves this out: it doubles the time.
    """
    if is_checked(config):
        importlib.import_module("checking")


def is_checked(config: pytest.Config) -> bool:
    return config.option.markexpr != "not slow"


def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    """pytest's processes are forks of one that has imported what they need, which takes each of them many seconds, in
    a fresh clone half a minute.

    In a fresh clone, another process meanwhile compiles the libraries that come last, on a core that has nothing to do yet.
    """
    compiling = subprocess.Popen([sys.executable, "-c", f"import {', '.join(LIBRARIES)}"])
    atexit.register(compiling.wait)
    modules = [".".join(fpath.relative_to(ROOT).with_suffix("").parts) for fpath in ROOT.glob("saev/**/*.py")]
    also = (*["checking"] * is_checked(config), *sorted(m for m in modules if "__" not in m), *LIBRARIES)
    fork = functools.partial(forked.Popen, also=also, spawns=True)
    unittest.mock.patch.object(subprocess, "Popen", fork).start()  # with which xdist starts them
    os.environ[forked.SHARES] = str(os.getpid())


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process for each core, and two that mostly wait for Slurm's jobs, if there is a Slurm."""
    return len(os.sched_getaffinity(0)) + 2 * (shutil.which("sbatch") is not None)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> collections.abc.Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Each process imports all files. In a fresh clone, all wait while one compiles a file."""
    with contextlib.ExitStack() as stack:
        if isinstance(collector, pytest.Module):
            fcntl.flock(stack.enter_context(collector.path.open()), fcntl.LOCK_EX)
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, then those with many slow tests, so that no core is left with one at the end."""
    n_slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    place = {name: i - len(LONGEST) for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (place.get(item.path.stem, 0), -n_slow[item.path]))


def pytest_collection_finish() -> None:
    """torch.testing.assert_close need not import DTensor, and with it torch's compiler, to find out that our tensors are
    none: that takes seconds of each process."""
    if "torch" in sys.modules:
        importlib.import_module("torch.testing._comparison")._HAS_DTENSOR = False


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.fixture(scope="module", autouse=True)
def threads(request: pytest.FixtureRequest) -> collections.abc.Iterator[None]:
    if request.path.stem not in IN_THREADS:
        yield
        return
    import torch  # not before pytest_configure

    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undrawn() -> collections.abc.Iterator[None]:
    """Charts are composed, but their files hold no picture: half of the time of a small evaluation."""
    from saev import helpers  # not before pytest_configure
    from saev.report import figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", lambda figure, fpath: helpers.write_text(fpath, str(figure)))
        yield


MakeShards = collections.abc.Callable[..., tuple[pathlib.Path, np.ndarray]]


@pytest.fixture(scope="session", autouse=True)
def no_wandb() -> collections.abc.Iterator[None]:
    """No test talks to wandb's servers; one that wants wandb's files sets WANDB_MODE=offline itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> collections.abc.Iterator[None]:
    """No test reads or writes the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def as_older(dpath: pathlib.Path) -> pathlib.Path:
    """Makes a shard directory into one of a saev that knew no checksums of pieces, and returns it."""
    for fpath in [*dpath.glob("acts*.json"), dpath / "complete.json"]:
        fields = json.loads(fpath.read_text())
        for name in ("pieces", "files", "checksum"):
            del fields[name]
        fpath.write_text(json.dumps(fields, indent=2))
    for fpath in dpath.glob("acts*.xxh3"):
        fpath.unlink()
    return dpath


@pytest.fixture
def make_shards(tmp_path: pathlib.Path) -> MakeShards:
    """A function that writes a complete shard directory of its own and returns (its path, what it wrote as (N, L, T, D)).

    Without `acts` the activations are standard normal. Token 0 is [CLS] if `cls_token`, so T is n_patches + 1.
    The images `skip` are recorded as corrupt. `sizes` (of photos) and `transform` make it a dump with padding. Image i has path "class{i % 3}/{i:04}.jpg" and label "class{i % 3}".
    """
    from saev.formats import shards  # not before pytest_configure

    numbers = itertools.count()

    def make(
        *,
        n_imgs: int = 10,
        n_patches: int = 4,
        d_vit: int = 8,
        layers: tuple[int, ...] = (3, 7),
        cls_token: bool = True,
        per_shard: int = 3,
        acts: np.ndarray | None = None,
        seed: int = 0,
        dtype: str = "float32",
        name: str = "made-up",
        skip: tuple[int, ...] = (),
        transform: dict[str, object] | None = None,
        sizes: list[tuple[int, int]] | None = None,
    ) -> tuple[pathlib.Path, np.ndarray]:
        n_tokens = n_patches + cls_token
        if acts is None:
            shape = (n_imgs, len(layers), n_tokens, d_vit)
            acts = np.random.default_rng(seed).standard_normal(shape, np.float32)
        metadata = shards.Metadata(
            vit_family="timm",
            vit_ckpt=name,
            layers=layers,
            n_patches_per_img=n_patches,
            cls_token=cls_token,
            d_vit=d_vit,
            n_imgs=n_imgs,
            max_patches_per_shard=per_shard * n_tokens * len(layers),
            data={"root": "made-up", "__class__": "ImageFolder"},
            **shards.stored_as(dtype, sizes is not None),
        )
        records = [shards.Record(f"class{i % 3}/{i:04}.jpg", f"class{i % 3}") for i in range(n_imgs)]
        dump_to = tmp_path / f"shards{next(numbers)}"
        out = shards.ShardDir.create(dump_to, metadata, records, transform or {})
        for shard_i in range(metadata.n_shards):
            image_is = metadata.imgs_in(shard_i)
            with out.writing(shard_i) as writer:
                writer.skipped += [shards.Skipped(i, "corrupt") for i in image_is if i in skip]
                writer.sizes += sizes[image_is.start : image_is.stop] if sizes else []
                writer.write(np.ascontiguousarray(acts[image_is.start : image_is.stop], np.float32))
        return out.dpath, acts

    return make


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """Counts, from here on, what is opened and read: "streams" of activations, shard directories by path, and
    files that are read whole by name, such as "images.jsonl"."""
    from saev.data import activations  # not before pytest_configure
    from saev.formats import jsonfile, shards

    out: collections.Counter[str] = collections.Counter()
    init, read, whole = activations.Activations.__init__, jsonfile.read_bytes, shards.ShardDir.open_unchecked

    def counting(self: activations.Activations, *args: object) -> None:
        out["streams"] += 1
        init(self, *args)

    def looked(dpath: pathlib.Path | str) -> shards.ShardDir:
        out[str(dpath)] += 1
        return whole(dpath)

    def counted(fpath: pathlib.Path, *args: object) -> bytes:
        out[fpath.name] += 1
        return read(fpath, *args)

    monkeypatch.setattr(activations.Activations, "__init__", counting)
    monkeypatch.setattr(shards.ShardDir, "open_unchecked", looked)
    monkeypatch.setattr(jsonfile, "read_bytes", counted)
    return out
