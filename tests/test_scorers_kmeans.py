"""K-means against scikit-learn and closed forms. B activations, D d_vit, K centres."""

import collections
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import forked
import numpy as np
import pytest
import scipy.stats
import sklearn.cluster
import torch

from saev import errors, scorers
from saev.data import activations
from saev.data import config as data_config
from saev.formats import checkpoint, tensors
from saev.scorers import config, kmeans, store

D = 6
Made = tuple[data_config.Shards, np.ndarray]


@pytest.fixture
def data(make_shards) -> Made:
    """80 images of 25 patches in 8 wide clusters around a large mean, and the activations as (2000, D)."""
    rng = np.random.default_rng(0)
    center_KD = 4 * rng.standard_normal((8, D)) + 30
    acts = center_KD[rng.integers(0, 8, (80, 1, 26))] + rng.standard_normal((80, 1, 26, D))
    dpath, acts_NLTD = make_shards(
        acts=acts.astype(np.float32), n_imgs=80, n_patches=25, d_vit=D, layers=(4,), per_shard=9
    )
    return data_config.Shards(str(dpath), 4), acts_NLTD[:, 0, 1:].reshape(-1, D)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("compiled", [True, False])  # False: as on a GPU
@pytest.mark.parametrize("offset", [0.0, 5.0])  # far from the origin, no value or every value is positive
def test_nearest_equals_a_plain_argmin(
    offset: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saev.nn.kernels.available", lambda _: compiled)
    x_BD, center_KD = rand(500, D) + offset, 2 * rand(37, D, seed=1) - offset
    at_B, distance_B = kmeans.nearest(x_BD, center_KD)
    want_BK = (x_BD[:, None] - center_KD).double().square().sum(dim=2)
    torch.testing.assert_close(at_B, want_BK.argmin(dim=1))
    torch.testing.assert_close(distance_B.double(), want_BK.amin(dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_plus_plus_takes_the_best_of_draws_by_squared_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    """For five points on a line, the third centre (the better of two draws) has known probabilities given the first two."""
    monkeypatch.setattr(kmeans, "TRIED", 2)
    x_BD = torch.tensor([[0.0], [1.1], [3.0], [4.4], [9.7]])
    counts: dict[tuple[int, ...], collections.Counter[int]] = {}
    place = {x: i for i, x in enumerate(x_BD.flatten().tolist())}
    for seed in range(1500):
        first, second, third = (place[x] for x in kmeans.plus_plus(x_BD, 3, seed).flatten().tolist())
        counts.setdefault((first, second), collections.Counter())[third] += 1
    checked = 0
    between_BB = (x_BD - x_BD.T).double().square().numpy()
    for (first, second), thirds in counts.items():
        distance_B = between_BB[:, [first, second]].min(axis=1)
        if sum(thirds.values()) < 100:
            continue
        gain_B = (distance_B - np.minimum(distance_B, between_BB)).sum(axis=1)
        groups = [gain_B.round(3) == gain for gain in np.unique(gain_B.round(3)[distance_B > 0])]
        chance_n = np.array([distance_B[group].sum() for group in groups]) / distance_B.sum()
        seen = [sum(thirds[i] for i in np.flatnonzero(group)) for group in groups]
        assert sum(seen) == sum(thirds.values())
        if len(groups) < 2:
            continue
        expected = np.diff(np.cumsum(chance_n) ** 2, prepend=0) * sum(seen)
        assert scipy.stats.chisquare(seen, expected).pvalue > 1e-4
        checked += 1
    assert checked >= 3


@pytest.mark.slow
def test_plus_plus_starts_as_low_as_sklearns() -> None:
    """Compares the sum of squared distances to 60 centres, averaged over seeds. Plain k-means++ is about 10% worse."""
    x_BD = rand(800, D)

    def theirs(seed: int) -> np.ndarray:
        return sklearn.cluster.kmeans_plusplus(x_BD.numpy(), 60, random_state=seed)[0]

    def ours(seed: int) -> torch.Tensor:
        return kmeans.plus_plus(x_BD, 60, seed)

    def potential(center_KD: torch.Tensor) -> float:
        return kmeans.nearest(x_BD, center_KD)[1].sum().item()

    want = np.mean([potential(torch.from_numpy(theirs(seed))) for seed in range(20)])
    assert np.mean([potential(ours(seed)) for seed in range(20)]) < want


def test_shorter_draws_are_prefixes() -> None:
    x_BD = rand(300, D)
    long_KD = kmeans.plus_plus(x_BD, 90, seed=3)
    for k in (1, 7, 33):
        torch.testing.assert_close(kmeans.plus_plus(x_BD, k, seed=3), long_KD[:k], rtol=0, atol=0)


def test_fewer_distinct_activations_than_centres() -> None:
    x_BD = rand(3, D).repeat(20, 1)
    center_KD = kmeans.plus_plus(x_BD, 10, seed=0)
    assert len(center_KD) == 10 and len(center_KD.unique(dim=0)) == 3


def test_passes_equal_sklearn_from_the_same_start(data: Made) -> None:
    cfg, acts_BD = data
    mean_D = torch.from_numpy(acts_BD.mean(axis=0))
    start_KD = torch.from_numpy(acts_BD[::125].copy()) - mean_D
    state = kmeans.State(mean_D, start_KD)
    for n_passes in (1, 2, 3, 4):
        kmeans.one_pass([state], activations.Activations(cfg), config.KMeans())
        theirs = sklearn.cluster.KMeans(
            16, init=(start_KD + mean_D).numpy(), n_init=1, max_iter=n_passes, tol=0
        )
        theirs.fit(acts_BD)
        np.testing.assert_allclose((state.center_KD + mean_D).numpy(), theirs.cluster_centers_, atol=1e-4)


def test_passes_of_a_gpu_are_those_of_a_cpu(data: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the GPU's operations on the CPU; the next test runs them on a GPU."""
    want = kmeans.fit(config.KMeans(n_iters=3), activations.Activations(data[0]), [5, 30], 0)
    monkeypatch.setattr("saev.nn.kernels.available", lambda _: False)
    for scorer, wanted in zip(
        kmeans.fit(config.KMeans(n_iters=3), activations.Activations(data[0]), [5, 30], 0), want, strict=True
    ):
        torch.testing.assert_close(scorer.vectors_KD, wanted.vectors_KD, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("cfg", [config.KMeans(n_iters=3), config.Pca()])
def test_fits_on_a_gpu_equal_those_on_a_cpu(cfg: config.Scorer, data: Made) -> None:
    there, here = (scorers.fit(cfg, data[0], 6, device=torch.device(name)) for name in ("cuda", "cpu"))
    assert there.vectors_KD.device.type == "cpu"
    torch.testing.assert_close(there.vectors_KD, here.vectors_KD, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_inertia_is_not_worse_than_sklearns(data: Made) -> None:
    cfg, acts_BD = data

    def inertia(center_KD: np.ndarray) -> float:
        return ((acts_BD[:, None] - center_KD) ** 2).sum(axis=2).min(axis=1).sum()

    mine, theirs = [], []
    for seed in range(5):
        (scorer,) = kmeans.fit(config.KMeans(n_iters=10), activations.Activations(cfg), [24], seed)
        mine.append(inertia(scorer.vectors_KD.numpy()))
        km = sklearn.cluster.KMeans(24, n_init=1, max_iter=10, random_state=seed).fit(acts_BD)
        theirs.append(inertia(km.cluster_centers_))
    assert np.mean(mine) < 1.01 * np.mean(theirs)


def test_several_k_in_one_pass_equal_separate_fits(data: Made, tmp_path: pathlib.Path) -> None:
    cfg, ks = config.KMeans(n_iters=4), [3, 20, 8]
    together = store.fit_each(cfg, data[0], ks, seed=2, dpath=tmp_path / "together")
    for k, scorer in zip(ks, together, strict=True):
        alone = scorers.fit(cfg, data[0], k, seed=2, dpath=tmp_path / "alone")
        assert scorer.n_prototypes == k
        torch.testing.assert_close(scorer.vectors_KD, alone.vectors_KD, rtol=0, atol=0)
    assert {f.suffix for f in (tmp_path / "together").iterdir()} == {".bin"}


def test_a_centre_without_activations_moves_to_the_farthest(data: Made) -> None:
    cfg, acts_BD = data
    mean_D = torch.from_numpy(acts_BD.mean(axis=0))
    far_KD = torch.cat([torch.zeros(1, D), torch.full((2, D), 1e3)])
    state = kmeans.State(mean_D, far_KD.clone())
    kmeans.one_pass([state], activations.Activations(cfg), config.KMeans())
    order_B = ((acts_BD - mean_D.numpy()) ** 2).sum(axis=1).argsort()[::-1]
    np.testing.assert_allclose((state.center_KD[1:] + mean_D).numpy(), acts_BD[order_B[:2]], atol=1e-4)
    kmeans.one_pass([state], activations.Activations(cfg), config.KMeans())
    assert (state.center_KD.abs().sum(dim=1) < 500).all() and not state.is_done


def test_normalized_centres_are_directions(data: Made) -> None:
    cfg, acts_BD = data
    (scorer,) = kmeans.fit(config.KMeans(normalize=True), activations.Activations(cfg), [8], 0)
    direction_KD = scorer.vectors_KD - scorer.mean_D
    torch.testing.assert_close(direction_KD.norm(dim=1), torch.ones(8), rtol=1e-4, atol=1e-4)
    x_BD = torch.nn.functional.normalize(torch.from_numpy(acts_BD) - scorer.mean_D, dim=1)
    at_B = (x_BD @ direction_KD.T).argmax(dim=1)
    for k in range(8):  # each centre is the direction of its cluster's mean
        mean_D = torch.nn.functional.normalize(x_BD[at_B == k].mean(dim=0), dim=0)
        assert mean_D @ direction_KD[k] > 0.999


def test_too_few_samples(data: Made) -> None:
    with pytest.raises(errors.UserError, match="n-samples 10: fewer than 11 clusters"):
        kmeans.fit(config.KMeans(n_samples=10), activations.Activations(data[0]), [4, 11], 0)


KILLED = """
    import pathlib, sys, time
    from saev import scorers
    from saev.data import config as data_config
    from saev.scorers import config, kmeans
    slow = kmeans.one_pass
    def one_pass(*args):
        slow(*args)
        print("pass", flush=True)
        time.sleep(float(sys.argv[3]))
    kmeans.one_pass = one_pass
    cfg, data = config.KMeans(n_iters=6, tolerance=0.0), data_config.Shards(sys.argv[1], 4)
    scorers.fit_each(cfg, data, [5, 30], seed=1, dpath=pathlib.Path(sys.argv[2]))
"""


def crafted(fpath: pathlib.Path, header: dict[str, object], **changes: object) -> None:
    """Changes a state and updates its checksum."""
    saved, payload = checkpoint.read(fpath, "state")
    tree = tensors.load(payload, "", "") | changes
    checkpoint.write(fpath, "state", {"passes": saved["passes"]} | header, tensors.dump(tree))


DAMAGE = {
    "header": (lambda f: f.write_bytes(f.read_bytes().replace(b"false", b"true ")), "checksum"),
    "tensors": (lambda f: f.write_bytes(f.read_bytes()[:-9]), "checksum"),
    "one centre less": (lambda f: crafted(f, {}, center_KD=torch.ones(3, 6)), r"is \(3, 6\)"),
    "another width": (lambda f: crafted(f, {}, mean_D=torch.ones(7)), r"is \(7,\)"),
    "passes": (lambda f: crafted(f, {"passes": [1.0, "2", False]}), "Expected `int`"),
    "no passes": (lambda f: crafted(f, {"passes": None}), "Expected `array`"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_k_means_starts_again_from_a_damaged_state_and_says_so(
    data: Made, name: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg, fpath = config.KMeans(n_iters=3), tmp_path / "kmeans-4-x.state"
    (want,) = kmeans.fit(cfg, activations.Activations(data[0]), [4], 0, [fpath])
    (again,) = kmeans.fit(cfg, activations.Activations(data[0]), [4], 0, [fpath])
    torch.testing.assert_close(again.vectors_KD, want.vectors_KD, rtol=0, atol=0)
    assert "starts again" not in caplog.text
    damage, match = DAMAGE[name]
    damage(fpath)
    (got,) = kmeans.fit(cfg, activations.Activations(data[0]), [4], 0, [fpath])
    torch.testing.assert_close(got.vectors_KD, want.vectors_KD, rtol=0, atol=0)
    (said,) = [m for m in caplog.messages if "starts again" in m]
    assert re.search(match, said) and fpath.name in said and "\n" not in said


@pytest.mark.slow
def test_a_killed_fit_goes_on_to_the_same_centres(data: Made, tmp_path: pathlib.Path) -> None:
    def command(dpath: pathlib.Path, pause: str) -> list[str]:
        code = textwrap.dedent(KILLED)
        return [sys.executable, "-c", code, data[0].shard_root, str(dpath), pause]

    killed = forked.Popen(
        command(tmp_path / "killed", "1"), cwd=forked.ROOT, stdout=subprocess.PIPE, text=True
    )
    for _ in range(3):
        assert killed.stdout.readline() == "pass\n"
    time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    states = list((tmp_path / "killed").glob("*.state"))
    assert len(states) == 2
    rest = forked.run(
        command(tmp_path / "killed", "0"), cwd=forked.ROOT, capture_output=True, text=True, check=True
    )
    whole = forked.run(
        command(tmp_path / "whole", "0"), cwd=forked.ROOT, capture_output=True, text=True, check=True
    )
    assert 0 < rest.stdout.count("pass") < whole.stdout.count("pass")
    assert not any(state.exists() for state in states)
    names = sorted(f.name for f in (tmp_path / "whole").iterdir())
    assert names == sorted(f.name for f in (tmp_path / "killed").iterdir()) and len(names) == 2
    for name in names:
        mine, theirs = ((tmp_path / d / name) for d in ("killed", "whole"))
        want_KD = scorers.load(theirs).vectors_KD
        torch.testing.assert_close(scorers.load(mine).vectors_KD, want_KD, rtol=0, atol=0)


def test_a_nested_scorer_is_never_fitted_for_a_smaller_k(
    data: Made, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = scorers.fit(config.Random(), data[0], 50, dpath=tmp_path)
    monkeypatch.delattr("saev.scorers.store._fit")  # a second fit would be a NameError
    small = scorers.fit(config.Random(), data[0], 20, dpath=tmp_path)
    torch.testing.assert_close(small.vectors_KD, large.vectors_KD[:20], rtol=0, atol=0)
    with pytest.raises(NameError):
        scorers.fit(config.Random(), data[0], 20, seed=1, dpath=tmp_path)


# ---- empty clusters and rounding ----


def test_many_empty_centres_are_moved_as_sklearns_are(data: Made) -> None:
    """Activations that become centres of empty clusters leave their old clusters."""
    cfg, acts_BD = data
    mean_D = torch.from_numpy(acts_BD.mean(axis=0))
    far_KD = 1e3 + torch.arange(400.0)[:, None] * torch.ones(D)
    start_KD = torch.cat([torch.from_numpy(acts_BD[:40].copy()) - mean_D, far_KD])
    state = kmeans.State(mean_D, start_KD.clone())
    kmeans.one_pass([state], activations.Activations(cfg), config.KMeans())
    theirs = sklearn.cluster.KMeans(440, init=(start_KD + mean_D).numpy(), n_init=1, max_iter=1, tol=0).fit(
        acts_BD
    )

    def in_order(center_KD: np.ndarray) -> np.ndarray:
        return center_KD[np.lexsort(center_KD.round(3).T)]

    np.testing.assert_allclose(
        in_order((state.center_KD + mean_D).numpy()), in_order(theirs.cluster_centers_), atol=1e-3
    )


def test_distances_within_tight_clusters_far_from_the_mean() -> None:
    """x.x - 2 x.c + c.c would lose them to float32 rounding."""
    x_BD = rand(400, D) + torch.tensor([3e3, -3e3])[torch.arange(400) % 2, None]
    center_KD = torch.tensor([[3e3], [-3e3]]) * torch.ones(D)
    _, distance_B = kmeans.nearest(x_BD, center_KD)
    want_B = (x_BD.double() - center_KD[torch.arange(400) % 2].double()).square().sum(dim=1)
    torch.testing.assert_close(distance_B.double(), want_B, rtol=1e-3, atol=1e-2)


def test_a_fit_killed_between_two_files_goes_on(
    data: Made, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config.KMeans(n_iters=3)
    whole = store.fit_each(cfg, activations.Activations(data[0]), [5, 9], dpath=tmp_path / "whole")
    first = store.save
    saved = []

    def save(scorer: scorers.Scorer, fpath: pathlib.Path) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(fpath)
        first(scorer, fpath)

    monkeypatch.setattr(store, "save", save)
    with pytest.raises(KeyboardInterrupt):
        store.fit_each(cfg, activations.Activations(data[0]), [5, 9], dpath=tmp_path / "cut")
    monkeypatch.setattr(store, "save", first)
    monkeypatch.delattr(kmeans, "one_pass")  # no pass is repeated
    cut = store.fit_each(cfg, data[0], [5, 9], dpath=tmp_path / "cut")
    for a, b in zip(whole, cut, strict=True):
        assert a.digest() == b.digest()
    assert {f.suffix for f in (tmp_path / "cut").iterdir()} == {".bin"}
