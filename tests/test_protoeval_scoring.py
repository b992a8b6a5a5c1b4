"""The pass over the shards: scores of images, killed and continued. N images, K prototypes, P patches, D d_vit."""

import pathlib
import signal
import subprocess
import sys
import textwrap

import forked
import numpy as np
import pytest
import torch

from saev import errors, nn, scorers
from saev.data import activations, ordered
from saev.data import config as data_config
from saev.nn import config as nn_config
from saev.protoeval import score
from saev.scorers import base
from saev.scorers import sae as sae_scorer

D = 8


@pytest.fixture
def data(make_shards) -> tuple[data_config.Shards, np.ndarray]:
    """600 images of 5 patches in shards of 70, and their activations (N, P, D)."""
    rng = np.random.default_rng(0)
    acts = rng.standard_normal((600, 1, 6, D)).astype(np.float32)
    dpath, acts_NLTD = make_shards(acts=acts, n_imgs=600, n_patches=5, d_vit=D, layers=(4,), per_shard=70)
    return data_config.Shards(str(dpath), 4), acts_NLTD[:, 0, 1:]


def prototypes(k: int, similarity: str = "cosine", seed: int = 0) -> base.Prototypes:
    generator = torch.Generator().manual_seed(seed)
    return base.Prototypes.of(torch.randn(k, D, generator=generator), torch.ones(D) / 3, similarity)


@pytest.mark.parametrize("similarity", ["dot", "cosine", "distance"])
@pytest.mark.parametrize("tile", [(512, 2**20), (7, 96)])
def test_scores_of_images_are_the_max_over_patches(
    similarity: str, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "TILE", {"cpu": tile})
    scorer = prototypes(11, similarity)
    acts_BPD = torch.randn(9, 3, D, generator=torch.Generator().manual_seed(1))
    want_BK = scorer(acts_BPD.flatten(0, 1)).unflatten(0, (9, 3)).amax(dim=1)
    torch.testing.assert_close(scorer.of_images(acts_BPD), want_BK, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "cfg",
    [
        nn_config.Relu(d_vit=D, exp_factor=4),
        nn_config.TopK(d_vit=D, exp_factor=4, top_k=3),
        nn_config.TopK(d_vit=D, d_sae=30, top_k=25, keep_negative=True),
        nn_config.BatchTopK(d_vit=D, exp_factor=4, top_k=3),
        nn_config.JumpRelu(d_vit=D, exp_factor=4),
    ],
    ids=lambda cfg: type(cfg).__name__,
)
def test_scores_of_images_are_the_largest_codes(cfg: nn_config.Sae) -> None:
    """TopK's included, where a patch's code depends on all of its latents; thresholds respected."""
    acts_BPD = torch.randn(20, 7, D, generator=torch.Generator().manual_seed(1))
    sae = nn.SparseAutoencoder(cfg).eval().requires_grad_(False)
    sae.initialize(acts_BPD.flatten(0, 1))
    sae.threshold.fill_(1.0)
    sae.W_enc[:, 2] = 0
    sae.b_enc[2] = -0.3  # a TopK of 25 in 30 that keeps negative values keeps this in all patches
    f_BPS = sae.encode(acts_BPD.flatten(0, 1)).unflatten(0, (20, 7))
    want_BS = f_BPS.amax(dim=1)
    assert 0 < (want_BS > 0).float().mean() <= 1
    assert (want_BS < 0).any() == getattr(cfg, "keep_negative", False)
    scorer = sae_scorer.SaeLatents(sae, sae.d_sae)
    torch.testing.assert_close(scorer.of_images(acts_BPD), want_BS, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scorer.prefix(5).of_images(acts_BPD), want_BS[:, :5])


def test_only_the_images_asked_for_in_their_order(
    data: tuple[data_config.Shards, np.ndarray], tmp_path: pathlib.Path
) -> None:
    shards, acts_NPD = data
    image_is = [599, 3, 250]
    run = [prototypes(4), prototypes(2, "distance", seed=1)]
    got = score.score_images(
        run, activations.Activations(shards), image_is, tmp_path, torch.device("cpu"), memory_gb=1e-6
    )
    acts_BPD = torch.from_numpy(acts_NPD[image_is])
    want_BK = torch.cat([scorer.of_images(acts_BPD) for scorer in run], dim=1)
    np.testing.assert_allclose(got.scores_KN.T, want_BK, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.mean_ND, acts_NPD[image_is].mean(axis=1), atol=1e-6)
    np.testing.assert_array_equal(got.max_ND, acts_NPD[image_is].max(axis=1))


def test_pooled_activations_are_of_the_patches_that_are_kept() -> None:
    """An image that keeps none has all of them."""
    rng = np.random.default_rng(0)
    acts_BPD = rng.standard_normal((5, 4, D)).astype(np.float32)
    is_kept_BP = rng.random((5, 4)) < 0.5
    is_kept_BP[1], is_kept_BP[2] = False, True
    wanted_B = np.array([True, True, True, False, True])
    block = ordered.Block(np.arange(5), acts_BPD)
    acts_NPD, pooled_2ND = score._images(block, is_kept_BP, wanted_B, torch.device("cpu"))
    for n, b in enumerate(np.flatnonzero(wanted_B)):
        kept_nD = acts_BPD[b][is_kept_BP[b]] if is_kept_BP[b].any() else acts_BPD[b]
        np.testing.assert_allclose(pooled_2ND[0, n], kept_nD.mean(axis=0), atol=1e-6)
        np.testing.assert_array_equal(pooled_2ND[1, n], kept_nD.max(axis=0))
        np.testing.assert_array_equal(acts_NPD[n].amax(dim=0), kept_nD.max(axis=0))


KILLED = """
    import pathlib, sys, time
    import torch
    from saev.data import activations, passes
    from saev.data import config as data_config
    from saev.protoeval import score
    from saev.scorers import base
    passes.SAVE_S, score.MAX_BLOCK = 0.0, 50
    whole = base.Prototypes.of_images
    def of_images(*args):
        print("block", flush=True)
        time.sleep(float(sys.argv[3]))
        return whole(*args)
    base.Prototypes.of_images = of_images
    scorer = base.Prototypes.of(torch.eye(8)[:5], torch.ones(8) / 3, "cosine")
    data = data_config.Shards(sys.argv[1], 4)
    score.score_images([scorer], activations.Activations(data), list(range(600)), pathlib.Path(sys.argv[2]), torch.device("cpu"))
"""


@pytest.mark.slow
def test_a_killed_pass_goes_on_to_the_same_scores(
    data: tuple[data_config.Shards, np.ndarray], tmp_path: pathlib.Path
) -> None:
    def command(name: str, pause: str) -> list[str]:
        code = textwrap.dedent(KILLED)
        return [sys.executable, "-c", code, data[0].shard_root, str(tmp_path / name), pause]

    killed = forked.Popen(command("killed", "0.3"), cwd=forked.ROOT, stdout=subprocess.PIPE, text=True)
    for _ in range(4):
        assert killed.stdout.readline() == "block\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    counts = []
    for name in ("killed", "whole", "killed"):
        done = forked.run(command(name, "0"), cwd=forked.ROOT, capture_output=True, text=True, check=True)
        counts.append(done.stdout.count("block"))
    assert counts[1] == 12 and 0 < counts[0] < 12 and counts[2] == 0
    for fname in ("scores.bin", "means.bin", "maxima.bin"):
        assert (tmp_path / "killed" / fname).read_bytes() == (tmp_path / "whole" / fname).read_bytes()


@pytest.mark.parametrize("name", ["scores.bin", "means.bin", "maxima.bin", "done.npz"])
@pytest.mark.parametrize("how", ["gone", "cut", "empty"])
def test_a_pass_whose_files_are_not_whole_starts_again(
    data: tuple[data_config.Shards, np.ndarray], tmp_path: pathlib.Path, name: str, how: str
) -> None:
    def scored(scorer: scorers.Scorer) -> np.ndarray:
        return score.score_images(
            [scorer], activations.Activations(data[0]), [4, 599, 7], tmp_path, torch.device("cpu")
        ).scores_KN.copy()

    want = scored(prototypes(4))
    fpath = tmp_path / name
    content = fpath.read_bytes()
    fpath.unlink()
    if how != "gone":
        fpath.write_bytes(content[: len(content) // 2] if how == "cut" else b"")
    np.testing.assert_array_equal(scored(prototypes(4)), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scores.bin", "means.bin", "maxima.bin", "done.npz"])
def test_a_flipped_bit_is_scored_again(
    data: tuple[data_config.Shards, np.ndarray],
    tmp_path: pathlib.Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(score, "MAX_BLOCK", 2)
    image_is = [4, 90, 7, 91, 300, 5]

    def scored() -> list[bytes]:
        got = score.score_images(
            [prototypes(3)], activations.Activations(data[0]), image_is, tmp_path, torch.device("cpu")
        )
        return [got.scores_KN.tobytes(), got.mean_ND.tobytes(), got.max_ND.tobytes()]

    want, fpath = scored(), tmp_path / name
    content = fpath.read_bytes()
    places = range(8 * len(content)) if name != "done.npz" else range(5, 8 * len(content), 4999)
    for i in list(places)[:: 1 + len(places) // 6]:
        bad = bytearray(content)
        bad[i // 8] ^= 1 << i % 8
        fpath.write_bytes(bad)
        assert scored() == want, i
        assert fpath.read_bytes() == content, i
    assert "scored again" in caplog.text or name == "done.npz"


def test_only_what_follows_a_flipped_bit_is_scored_again(
    data: tuple[data_config.Shards, np.ndarray],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(score, "MAX_BLOCK", 50)
    monkeypatch.setattr(score, "CHECKED", 1000)
    run, whole, n = [prototypes(9)], base.Prototypes.of_images, 0

    def of_images(*args: object) -> torch.Tensor:
        nonlocal n
        n += 1
        return whole(*args)

    monkeypatch.setattr(base.Prototypes, "of_images", of_images)
    for want in (12, 0):
        n = 0
        got = score.score_images(
            run, activations.Activations(data[0]), list(range(600)), tmp_path, torch.device("cpu")
        )
        assert n == want
    want_KN = np.array(got.scores_KN)
    got.scores_KN[8, 425] += 1
    n = 0
    got = score.score_images(
        run, activations.Activations(data[0]), list(range(600)), tmp_path, torch.device("cpu")
    )
    np.testing.assert_array_equal(got.scores_KN, want_KN)
    assert n == 4 and "all but the first 400 images are scored again" in caplog.text


def test_scores_of_other_scorers_are_not_taken_for_these(
    data: tuple[data_config.Shards, np.ndarray], tmp_path: pathlib.Path
) -> None:
    for seed in (0, 1):
        run, where = [prototypes(4, seed=seed)], (tmp_path / "same", tmp_path / f"own{seed}")
        both = [
            score.score_images(
                run, activations.Activations(data[0]), [4, 599], dpath, torch.device("cpu")
            ).scores_KN
            for dpath in where
        ]
        np.testing.assert_array_equal(*both)


def test_scores_that_are_no_numbers_name_the_image(
    data: tuple[data_config.Shards, np.ndarray], tmp_path: pathlib.Path
) -> None:
    broken = scorers.Prototypes(torch.full((2, 8), torch.nan), torch.zeros(8), "dot")
    with pytest.raises(errors.UserError, match=r"score of .*0007\.jpg for prototype 3 .* is nan"):
        run = [prototypes(3), broken]
        score.score_images(run, activations.Activations(data[0]), [7], tmp_path, torch.device("cpu"))


def test_a_top_k_sae_is_scored_some_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = nn.SparseAutoencoder(nn_config.TopK(d_vit=D, exp_factor=4, top_k=3)).eval()
    scorer = sae_scorer.SaeLatents(sae.requires_grad_(False), sae.d_sae)
    acts_BPD = torch.randn(20, 7, D, generator=torch.Generator().manual_seed(1))
    want_BK = scorer.of_images(acts_BPD)
    monkeypatch.setattr(sae_scorer, "AT_ONCE", 4 * 7 * D * 3)
    torch.testing.assert_close(scorer.of_images(acts_BPD), want_BK, rtol=1e-6, atol=1e-6)
