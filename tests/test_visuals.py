"""The gallery against plain loops. N images, P patches, D d_vit, S latents, K top images, R sampled images."""

import base64
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import typing as tp
import unittest.mock

import forked
import gallery_files
import hypothesis
import hypothesis.strategies as st
import inprocess
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import as_older

from saev import errors, nn, scorers
from saev.data import activations, images, layout, passes, pictures
from saev.data import config as data_config
from saev.data import memory as data_memory
from saev.formats import codeshards, shards
from saev.formats import gallery as galleries
from saev.nn import config as nn_config
from saev.scorers import config as scorers_config
from saev.training import config as training_config
from saev.training import loop
from saev.visuals import (
    coders,
    collect,
    config,
    figure,
    heat,
    kernels,
    memory,
    relations,
    spool,
    statistics,
    write,
)

ROOT = pathlib.Path(__file__).parent.parent
N, P, S, K = 11, 16, 6, 3
GROUPS = ["top", "q4", "q3", "q2", "q1", "random"]


@pytest.fixture(autouse=True)
def page(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Stands for the page's files."""
    dpath = tmp_path / "page"
    (dpath / "views").mkdir(parents=True)
    (dpath / "index.html").write_text("<!doctype html>")
    (dpath / "views" / "latent.js").write_text("// a view")
    monkeypatch.setattr(write, "PAGE", dpath)
    return dpath


@pytest.fixture
def acts_NPD() -> np.ndarray:
    """Few different values, so that ties happen; dimension 2 never fires, dimension 3 is planted."""
    acts_NPD = np.random.default_rng(0).integers(-3, 4, (N, P, S)).astype(np.float32)
    acts_NPD[..., 2] = -1
    acts_NPD[..., 3] = 0
    acts_NPD[5, 6, 3] = 8  # image 5, row 1, column 2 of the 4 x 4 grid
    return acts_NPD


def as_sae(fpath: pathlib.Path, cfg: nn_config.Architecture) -> nn.SparseAutoencoder:
    """An SAE whose pre-activation s is dimension s."""
    sae = nn.SparseAutoencoder(tp.cast(nn_config.Sae, cfg))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(S))
        sae.threshold.fill_(1.5)
        if isinstance(cfg, nn_config.JumpRelu):
            sae.log_threshold.copy_(torch.tensor([0.5, 1.5, 1, 1, 2.5, 0.1]).log())
    nn.save(sae, fpath)
    return nn.load(fpath)


@pytest.fixture
def cfg(make_shards, acts_NPD: np.ndarray, tmp_path: pathlib.Path) -> config.Visuals:
    acts_NLTD = np.concatenate([np.full((N, 1, S), 99, np.float32), acts_NPD], axis=1)[:, None]
    dpath, _ = make_shards(n_imgs=N, n_patches=P, d_vit=S, layers=(13,), acts=acts_NLTD)
    as_sae(tmp_path / "run" / "sae.pt", nn_config.Relu(d_vit=S, exp_factor=1))
    for i, record in enumerate(shards.ShardDir.open(dpath).records):
        fpath = tmp_path / "imgs" / record.path
        fpath.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (60, 40), (10 * i, 100, 50)).save(fpath)
    return config.Visuals(
        images=data_config.ImageFolder(str(tmp_path / "imgs")),
        ckpt=str(tmp_path / "run" / "sae.pt"),
        data=data_config.Shards(str(dpath), 13),
        dump_to=str(tmp_path / "gallery"),
        n_images=K,
        n_group=2,
        device="cpu",
    )


CPU = torch.device("cpu")


def acts_of(cfg: config.Visuals) -> activations.Activations:
    return activations.Activations(cfg.data)


def passed(
    cfg: config.Visuals, dpath: pathlib.Path, block: int = 4
) -> tuple[coders.Coder, spool.Spool, statistics.Stats]:
    """The codes and the statistics."""
    acts = acts_of(cfg)
    coder = coders.load(cfg, acts, CPU)
    codes = spool.run(coder, acts, cfg.n_images, block, dpath)
    classes = write.Classes.of(acts)
    stats = statistics.collect(
        coder, codes, cfg.n_images, cfg.n_group, cfg.seed, classes.class_N, len(classes.names)
    )
    return coder, codes, stats


# ---- statistics ----

ARCHITECTURES = {
    "relu": nn_config.Relu(d_vit=S, exp_factor=1),
    "top-k": nn_config.TopK(d_vit=S, exp_factor=1, top_k=2),
    "signed top-k": nn_config.TopK(d_vit=S, exp_factor=1, top_k=S - 1, keep_negative=True),
    "batch-top-k": nn_config.BatchTopK(d_vit=S, exp_factor=1, top_k=2),
    "jump-relu": nn_config.JumpRelu(d_vit=S, exp_factor=1),
}


def check_stats(
    stats: statistics.Stats,
    f_NPS: np.ndarray,
    peak_NS: np.ndarray,
    seed: int,
    is_ranked_by_score: bool = False,
) -> None:
    """Every number by a plain loop over the codes.

    peak_NS: the values that images are ranked by.
    """
    labels = [f"class{n % 3}" for n in range(N)]
    for s in range(f_NPS.shape[2]):
        values = [v for v in f_NPS[..., s].ravel().tolist() if v != 0]
        assert stats.fired_S[s] == len(values)
        assert stats.freq_S[s] == pytest.approx(len(values) / (N * P))
        mean = np.mean(np.abs(values)) if values else np.nan
        assert stats.mean_S[s] == pytest.approx(mean, rel=1e-6, nan_ok=True)
        assert (stats.low_S[s], stats.high_S[s]) == (min(values, default=0), max(values, default=0))
        bins = [0] * 64
        for v in values:
            width = max(values) - min(values)
            bins[min(63, int(64 * (v - min(values)) / width)) if width else 0] += 1
        assert stats.bin_SH[s].tolist() == bins
        fires = [n for n in range(N) if (f_NPS[n, :, s] != 0).any()]
        assert stats.images_S[s] == len(fires)
        counts = [sum(labels[n] == f"class{g}" for n in fires) for g in range(3)]
        assert stats.class_SG[s].tolist() == counts
        ranked = [n for n in range(N) if is_ranked_by_score or peak_NS[n, s] > 0]
        top = sorted(ranked, key=lambda n, s=s: (-peak_NS[n, s], n))[:K]
        assert stats.top_position_SK[s].tolist() == (top + [-1] * K)[:K]
        assert stats.top_value_SK[s, : len(top)].tolist() == [peak_NS[n, s] for n in top]
        largest_N = f_NPS[..., s].max(axis=1)
        sampled = [n for n in fires if is_ranked_by_score or largest_N[n] > 0]
        sampled = sorted(sampled, key=lambda n, s=s: int(kernels.mix(seed, s, n)))
        sampled = sampled[: stats.at_SR.shape[1]]
        assert stats.sampled_S[s] == len(sampled)
        assert stats.at_SR[s, : len(sampled)].tolist() == sampled


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_statistics_of_a_plain_loop(
    cfg: config.Visuals, acts_NPD: np.ndarray, tmp_path: pathlib.Path, name: str, block: int
) -> None:
    """A plain loop over the dense codes of each image alone."""
    sae = as_sae(pathlib.Path(cfg.ckpt), ARCHITECTURES[name])
    f_NPS = np.stack([sae.encode(torch.from_numpy(acts_PD)).numpy() for acts_PD in acts_NPD])
    if isinstance(sae.cfg, nn_config.TopK):  # of equal pre-activations, the lower latents fire
        order_NPS = np.argsort(-acts_NPD, axis=2, kind="stable")
        is_kept_NPS = np.zeros(f_NPS.shape, bool)
        np.put_along_axis(is_kept_NPS, order_NPS[..., : sae.cfg.top_k], True, axis=2)
        f_NPS = np.where(is_kept_NPS, acts_NPD if sae.cfg.keep_negative else acts_NPD.clip(0), 0)
    _, _, stats = passed(cfg, tmp_path / "pass", block)
    check_stats(stats, f_NPS, f_NPS.max(axis=1), cfg.seed)


def test_a_matryoshka_sae_as_train_py_leaves_it(
    cfg: config.Visuals, acts_NPD: np.ndarray, tmp_path: pathlib.Path
) -> None:
    """Its checkpoint holds what the objective trained: latents of all prefixes, by one threshold."""
    trained = training_config.Train(
        data=cfg.data,
        sae=nn_config.BatchTopK(exp_factor=2, top_k=2),
        objective=nn_config.Matryoshka(n_prefixes=3),
        n_patches=4096,
        batch_size=64,
        ckpt_to=str(tmp_path / "matryoshka"),
        wandb_project="",
        device="cpu",
    )
    (ckpt,) = loop.main([trained])
    cfg = dataclasses.replace(cfg, ckpt=ckpt)
    f_NPS = nn.load(ckpt).encode(torch.from_numpy(acts_NPD)).numpy()
    assert (f_NPS != 0).any(axis=(0, 1)).sum() > S  # latents beyond the first prefix fire
    _, _, stats = passed(cfg, tmp_path / "pass")
    check_stats(stats, f_NPS, f_NPS.max(axis=1), cfg.seed)
    dpath = collect.main(cfg)
    ids = gallery_files.load(dpath, "stats")["columns"]["id"].tolist()
    assert ids == np.flatnonzero((f_NPS != 0).any(axis=(0, 1))).tolist()
    shown = gallery_files.images(dpath)
    for s, latent in zip(ids, gallery_files.latents(dpath), strict=True):
        top = next(group for group in latent["groups"] if group["name"] == "top")
        for i, place in enumerate(top["image"].tolist()):
            f_P = f_NPS[shown[place]["n"], :, s]
            want_P = np.rint(255 * f_P / f_NPS[..., s].max()).clip(min=f_P > 0)
            np.testing.assert_allclose(gallery_files.heat(top, i, P), want_P, atol=1)


def test_a_sample_of_the_images_that_fire(
    cfg: config.Visuals, acts_NPD: np.ndarray, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images with the smallest hashes, so the sample does not depend on the blocks."""
    monkeypatch.setattr(memory, "MIN_SAMPLED", 5)
    f_NPS = acts_NPD.clip(min=0)
    cfg = dataclasses.replace(cfg, n_group=1, seed=3)
    for block in (2, 5):
        _, _, stats = passed(cfg, tmp_path / f"pass{block}", block)
        assert stats.at_SR.shape == (S, 5)
        check_stats(stats, f_NPS, f_NPS.max(axis=1), 3)


def test_an_architecture_without_a_sparse_path(
    cfg: config.Visuals, acts_NPD: np.ndarray, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = nn.load(cfg.ckpt)
    monkeypatch.setattr(type(sae.architecture), "fires_above", lambda self, sae: None)
    f_NPS = acts_NPD.clip(min=0)
    _, _, stats = passed(cfg, tmp_path / "pass")
    check_stats(stats, f_NPS, f_NPS.max(axis=1), cfg.seed)


def test_an_untrained_sae(cfg: config.Visuals, acts_NPD: np.ndarray, tmp_path: pathlib.Path) -> None:
    """The file that protoeval.py writes is an SAE; its gallery is named after it."""
    like = scorers_config.Untrained(cfg.ckpt)
    scorers.fit(like, cfg.data, S, dpath=tmp_path / "scorers")
    (fpath,) = (tmp_path / "scorers").glob("untrained-*.bin")
    cfg = dataclasses.replace(cfg, ckpt=str(fpath))
    f_NPS = nn.load(fpath).encode(torch.from_numpy(acts_NPD)).numpy()
    coder, _, stats = passed(cfg, tmp_path / "pass")
    assert stats.fired_S.tolist() == (f_NPS > 0).sum(axis=(0, 1)).tolist()
    top_SK = -np.sort(-f_NPS.max(axis=1), axis=0)[:K].T
    np.testing.assert_allclose(np.where(stats.top_value_SK > 0, stats.top_value_SK, 0), top_SK, atol=1e-4)
    assert (coder.kind, coders.title(cfg, 13)) == ("sae", fpath.stem)


@pytest.mark.parametrize("similarity", ["plain", "dot", "cosine", "distance"])
def test_prototypes(
    cfg: config.Visuals, acts_NPD: np.ndarray, tmp_path: pathlib.Path, similarity: config.Similarity
) -> None:
    """A patch fires the prototype with the highest score; images are ranked by the scores of all patches."""
    rng = np.random.default_rng(1)
    vectors_KD, mean_D = (torch.from_numpy(rng.standard_normal(shape, np.float32)) for shape in ((5, S), S))
    scorer = scorers.Prototypes.of(vectors_KD, mean_D, "cosine")
    fpath = tmp_path / "random-5-abc.bin"
    scorers.save(scorer, fpath)
    cfg = dataclasses.replace(cfg, ckpt="", scorer=config.Fitted(str(fpath), similarity))
    scorer = dataclasses.replace(scorer, similarity=similarity)
    score_NPK = scorer(torch.from_numpy(acts_NPD).flatten(0, 1)).numpy().reshape(N, P, 5)
    coder, codes, stats = passed(cfg, tmp_path / "pass")
    assert (coder.kind, coder.noun) == ("random", "prototype")
    is_best_NPK = np.arange(5) == score_NPK.argmax(axis=2)[..., None]
    peak_NK = score_NPK.max(axis=1)
    check_close = np.where(is_best_NPK, score_NPK, 0)
    assert stats.fired_S.tolist() == is_best_NPK.sum(axis=(0, 1)).tolist()
    np.testing.assert_allclose(stats.total_S, np.abs(check_close).sum(axis=(0, 1)), rtol=1e-4)
    for k in range(5):
        np.testing.assert_allclose(stats.top_value_SK[k], np.sort(peak_NK[:, k])[::-1][:K], rtol=1e-4)
        np.testing.assert_allclose(peak_NK[stats.top_position_SK[k], k], stats.top_value_SK[k], rtol=1e-4)
    low_S, high_S = heat.scale(coder, codes, stats)
    np.testing.assert_allclose(low_S, score_NPK.mean(axis=(0, 1)), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(high_S, peak_NK.max(axis=0), rtol=1e-4)
    # heat is the score above its mean
    collect.main(cfg)
    for k, latent in enumerate(gallery_files.latents(cfg.dump_to)):
        (top, *_) = latent["groups"]
        want_P = 255 * (score_NPK[stats.top_position_SK[k, 0], :, k] - low_S[k]) / (high_S[k] - low_S[k])
        got_P = gallery_files.heat(top, 0, P)
        np.testing.assert_allclose(got_P, np.where(want_P > 0, want_P.clip(1), 0), atol=0.6)


def test_units(cfg: config.Visuals, acts_NPD: np.ndarray, tmp_path: pathlib.Path) -> None:
    cfg = dataclasses.replace(cfg, ckpt="", scorer=config.Units(deviations=1.0))
    coder, _, stats = passed(cfg, tmp_path / "pass")
    assert (coder.n, coder.noun) == (S, "unit")
    above_NPD = acts_NPD - acts_NPD.mean(axis=(0, 1))
    std_D = acts_NPD.std(axis=(0, 1))
    f_NPS = np.where((above_NPD > std_D) & (std_D > 0), above_NPD, 0)
    assert stats.fired_S.tolist() == (f_NPS != 0).sum(axis=(0, 1)).tolist() and stats.fired_S[2] == 0
    np.testing.assert_allclose(stats.total_S, f_NPS.sum(axis=(0, 1)), rtol=1e-5)
    top_S = [f_NPS[:, :, s].max(axis=1).argmax() for s in (0, 1, 3)]
    np.testing.assert_allclose(stats.top_value_SK[[0, 1, 3], 0], f_NPS[top_S, :, [0, 1, 3]].max(axis=1))


@pytest.mark.parametrize("name", ["relu", "signed top-k"])
def test_the_share_of_smaller_values(
    cfg: config.Visuals, tmp_path: pathlib.Path, make_shards, name: str
) -> None:
    """Linear within the bins of the histogram, so at most a bin's share from the exact one. Also where values are negative."""
    dpath, acts_NLTD = make_shards(n_imgs=60, n_patches=P, d_vit=S, layers=(13,))
    cfg = dataclasses.replace(cfg, data=data_config.Shards(str(dpath), 13))
    sae = as_sae(pathlib.Path(cfg.ckpt), ARCHITECTURES[name])
    f_XS = sae.encode(torch.from_numpy(acts_NLTD[:, 0, 1:]).flatten(0, 1)).numpy()
    _, _, stats = passed(cfg, tmp_path / "pass")
    for s in range(S):
        value_n = f_XS[f_XS[:, s] != 0, s]
        got_n = statistics.below(stats, np.full(len(value_n), s, np.int32), value_n)
        exact_n = (value_n[None] < value_n[:, None]).mean(axis=1)
        count_H, edges = np.histogram(value_n, 64)
        np.testing.assert_allclose(
            got_n, np.interp(value_n, edges, np.cumsum([0, *count_H])) / len(value_n), atol=1e-3
        )
        assert np.abs(got_n - exact_n).max() <= count_H.max() / len(value_n) + 1e-3
        assert got_n[value_n.argmax()] == 1 and got_n[value_n.argmin()] == 0


def test_a_latent_with_one_value_is_at_its_top(cfg: config.Visuals, tmp_path: pathlib.Path) -> None:
    *_, stats = passed(cfg, tmp_path / "pass")  # dimension 3 is planted
    one = np.full(1, 3, np.int32), np.full(1, stats.high_S[3], np.float32)
    assert stats.fired_S[3] == 1 and statistics.below(stats, *one).tolist() == [1]


# ---- which images ----


def test_quarters(cfg: config.Visuals, acts_NPD: np.ndarray, tmp_path: pathlib.Path) -> None:
    """Images that fire a latent, sorted by value, are cut into quarters; hashes choose within them."""
    _, _, stats = passed(cfg, tmp_path / "pass")
    chosen_C = np.arange(S)
    shown = statistics.images_of(stats, chosen_C, K, 2, cfg.seed)
    starts = [0, *shown.ends[:-1]]
    parts = {
        name: shown.position_CW[:, a:b] for name, a, b in zip(shown.names, starts, shown.ends, strict=True)
    }
    assert list(parts) == GROUPS
    for s in range(S):
        peak_N = acts_NPD[..., s].max(axis=1)
        fires = sorted((n for n in range(N) if peak_N[n] > 0), key=lambda n: (-peak_N[n], n))
        for q, name in enumerate(("q4", "q3", "q2", "q1")):
            mine = [n for r, n in enumerate(fires) if 4 * r // len(fires) == q]
            drawn = sorted(mine, key=lambda n: int(kernels.mix(cfg.seed, s, n)))[:2]
            assert [n for n in parts[name][s].tolist() if n >= 0] == [n for n in fires if n in drawn]
        assert [n for n in parts["top"][s].tolist() if n >= 0] == fires[:K]
        assert len(set(parts["random"][s].tolist())) == 2
    assert (parts["random"] < N).all() and len(np.unique(parts["random"])) > 2
    assert set(np.unique(parts["random"])) <= set(statistics.random_pool(N, cfg.seed).tolist())


# ---- what latents have to do with each other ----


@pytest.mark.parametrize("chosen", [[3, 699, 0], [*range(699, 200, -1), 3, 0]])
def test_neighbours(chosen: list[int]) -> None:
    """Of a few latents, and of most, of which each pair is computed once."""
    vectors_SD = torch.randn(700, 5, generator=torch.Generator().manual_seed(0))
    chosen_C = np.array(chosen)
    unit_SD = vectors_SD.double() / vectors_SD.double().norm(dim=1, keepdim=True)
    for c, (latents, values) in enumerate(zip(*relations.neighbours(vectors_SD, chosen_C, 4), strict=True)):
        cosine_S = unit_SD @ unit_SD[chosen_C[c]]
        order = [s for s in cosine_S.argsort(descending=True).tolist() if s != chosen_C[c]][:4]
        assert latents.tolist() == order
        np.testing.assert_allclose(values, cosine_S[order], atol=1e-6)


@pytest.mark.parametrize("n_chosen", [50, 1100])
def test_of_equal_neighbours_the_lower_ones_are_shown(n_chosen: int) -> None:
    unit_SD = torch.eye(50).repeat(22, 1)  # latent s is like s + 50, s + 100, ...
    found = relations.neighbours(unit_SD, np.arange(n_chosen), 4)
    for s, latents in enumerate(found.latent_CK.tolist()):
        assert latents == [i for i in range(s % 50, 1100, 50) if i != s][:4]


def test_a_latent_alone_has_no_neighbours() -> None:
    found = relations.neighbours(torch.ones(1, 3), np.array([0]), 2)
    assert found.latent_CK.tolist() == [[-1, -1]]


def test_together(cfg: config.Visuals, acts_NPD: np.ndarray, tmp_path: pathlib.Path) -> None:
    coder, codes, _ = passed(cfg, tmp_path / "pass")
    chosen_C = np.array([4, 1, 2])
    found, n_patches = relations.together(codes, coder.n, chosen_C, 0, 3)
    assert n_patches == N * P
    fires_NS = (acts_NPD > 0).reshape(-1, S)
    for c, s in enumerate(chosen_C):
        counts = {t: int((fires_NS[:, s] & fires_NS[:, t]).sum()) for t in range(S) if t != s}
        best = [t for t in sorted(counts, key=lambda t: (-counts[t], t)) if counts[t]][:3]
        assert found.latent_CK[c].tolist() == (best + [-1] * 3)[:3]
        shares = [counts[t] / max(1, fires_NS[:, s].sum()) for t in best]
        np.testing.assert_allclose(found.value_CK[c, : len(best)], shares, rtol=1e-6)


def test_together_on_a_sample(
    cfg: config.Visuals, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About the share of patches that the limit allows, the same in any blocks."""
    found = []
    for block in (1, 8):
        coder, codes, _ = passed(cfg, tmp_path / f"pass{block}", block)
        monkeypatch.setattr(memory, "MAX_SAMPLED_CODES", codes.n_codes // 2)
        found.append(relations.together(codes, coder.n, np.arange(S), 0, 3))
    assert 0.35 * N * P < found[0].n_patches < 0.65 * N * P
    assert found[0].n_patches == found[1].n_patches
    np.testing.assert_array_equal(found[0].related.value_CK, found[1].related.value_CK)


@pytest.mark.parametrize("is_sampled", [False, True])
def test_classes(
    cfg: config.Visuals, acts_NPD: np.ndarray, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
    is_sampled: bool,
) -> None:  # fmt: skip
    """Counted on all images that fire the latent. The sample holds all of them here."""
    if is_sampled:
        monkeypatch.setattr(statistics, "MAX_COUNTS", 1)
    as_sae(pathlib.Path(cfg.ckpt), nn_config.JumpRelu(d_vit=S, exp_factor=1))
    _, _, stats = passed(cfg, tmp_path / "pass")
    assert stats.class_SG.shape[1] == (0 if is_sampled else 3)
    classes = write.Classes.of(acts_of(cfg))
    assert classes.names == ["class0", "class1", "class2"]
    stats = dataclasses.replace(stats)
    found = relations.classes(stats, np.arange(S), classes.class_N, classes.n_G)
    n_all = [4, 4, 3]
    threshold_S = [0.5, 1.5, 1, 1, 2.5, 0.1]
    for s in range(S):
        fires = [n for n in range(N) if (acts_NPD[n, :, s] > threshold_S[s]).any()]
        counts = [sum(n % 3 == g for n in fires) for g in range(3)]
        lifts = [counts[g] / max(1, len(fires)) / (n_all[g] / N) for g in range(3)]
        good = [g for g in range(3) if counts[g] >= 2 and lifts[g] > 1]
        good.sort(key=lambda g: -counts[g] * np.log(lifts[g]))
        assert [(g, n) for g, n, _ in found[s]] == [(g, counts[g]) for g in good]
        np.testing.assert_allclose([lift for *_, lift in found[s]], [lifts[g] for g in good], atol=1e-3)


def test_images_without_labels_have_no_class() -> None:
    acts = unittest.mock.Mock(activations.Activations, image_is_N=np.arange(2))
    acts.records = [shards.Record("a", ""), shards.Record("b", "x")]
    found = write.Classes.of(acts)
    assert (found.names, found.class_N.tolist(), found.n_G.tolist()) == (["x"], [-1, 0], [1])


# ---- files ----


def test_a_gallery_is_complete(cfg: config.Visuals, acts_NPD: np.ndarray) -> None:
    dpath = pathlib.Path(collect.main(cfg))
    assert (dpath / "index.html").read_text() == "<!doctype html>" and (
        dpath / "views" / "latent.js"
    ).exists()
    stats = gallery_files.load(dpath, "stats")
    assert stats["title"] == "run" and stats["classes"] == ["class0", "class1", "class2"]
    assert stats["scorer"].items() >= {
        "name": "Relu", "kind": "sae", "n": S, "noun": "latent", "signed": False, "ckpt": cfg.ckpt,
    }.items()  # fmt: skip
    assert stats["source"].items() >= {"layer": 13, "n_images": N, "n_patches": P, "grid": [4, 4]}.items()
    assert stats["shown"] == {"n": S - 1, "of": S, "filters": "all latents that fire"}  # 2 is dead
    ids = [0, 1, 3, 4, 5]
    columns = stats["columns"]
    assert columns["id"].tolist() == ids
    f_NPS = acts_NPD.clip(min=0)
    np.testing.assert_allclose(columns["freq"], (f_NPS > 0).mean(axis=(0, 1))[ids], rtol=1e-6)
    np.testing.assert_array_equal(columns["max"], f_NPS.max(axis=(0, 1))[ids])
    np.testing.assert_array_equal(columns["n_images"], (f_NPS > 0).any(axis=1).sum(axis=0)[ids])
    latents = gallery_files.latents(dpath)
    classes = [([g for g, *_ in latent["classes"]] + [-1] * 3)[:3] for latent in latents]
    assert columns["class"].tolist() == classes
    shown = gallery_files.images(dpath)
    paths = gallery_files.load(dpath, "paths")
    assert paths["path"] == [one["path"] for one in shown] and paths["n"].tolist() == list(range(N))
    assert paths["class"].tolist() == [one["class"] for one in shown]
    assert len(shown) == stats["files"]["n_images"] and [one["n"] for one in shown] == list(range(N))
    assert all(one["src"].startswith("data:image/webp;base64,") for one in shown)
    assert [one["class"] for one in shown] == [n % 3 for n in range(N)]
    lines = (dpath / "latents.csv").read_text().splitlines()
    assert (
        lines[0] == "latent,freq,mean,max,n_images" and [int(line.split(",")[0]) for line in lines[1:]] == ids
    )
    assert gallery_files.load(dpath, "traits") == gallery_files.load(dpath, "compare") == {}


@pytest.mark.parametrize("most", [2**26, 40])
def test_heat_is_the_codes(
    cfg: config.Visuals, acts_NPD: np.ndarray, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """In one part, and in many."""
    monkeypatch.setattr(memory, "MAX_SHOWN", most)
    dpath = collect.main(cfg)
    shown, ids = gallery_files.images(dpath), gallery_files.load(dpath, "stats")["columns"]["id"]
    for s, latent in zip(ids.tolist(), gallery_files.latents(dpath), strict=True):
        f_NP = acts_NPD[..., s].clip(0)
        assert (latent["low"], latent["high"]) == (0, f_NP.max())
        assert [g["name"] for g in latent["groups"]] == GROUPS if s != 3 else True
        for group in latent["groups"]:
            for i, place in enumerate(group["image"].tolist()):
                n = shown[place]["n"]
                np.testing.assert_array_equal(
                    gallery_files.heat(group, i, P), np.round(255 * f_NP[n] / f_NP.max())
                )
                assert group["value"][i] == f_NP[n].max()
        assert latent["histogram"]["n"].sum() == (f_NP > 0).sum()
        assert latent["histogram"]["edges"] == [f_NP[f_NP > 0].min(), f_NP.max()]


def test_negative_codes_are_not_drawn(cfg: config.Visuals, acts_NPD: np.ndarray) -> None:
    as_sae(pathlib.Path(cfg.ckpt), ARCHITECTURES["signed top-k"])
    dpath = collect.main(cfg)
    stats = gallery_files.load(dpath, "stats")
    assert stats["scorer"]["signed"]
    shown = gallery_files.images(dpath)
    for s, latent in zip(stats["columns"]["id"].tolist(), gallery_files.latents(dpath), strict=True):
        for group in latent["groups"]:
            for i, place in enumerate(group["image"].tolist()):
                n = shown[place]["n"]
                is_shown_P = gallery_files.heat(group, i, P) > 0
                assert not is_shown_P[acts_NPD[n, :, s] <= 0].any()
    assert (gallery_files.latents(dpath)[0]["histogram"]["edges"][0]) < 0


def test_the_image_view(cfg: config.Visuals, acts_NPD: np.ndarray) -> None:
    dpath = collect.main(dataclasses.replace(cfg, image_view=4, include_latents=(1, 4, 5)))
    shown = gallery_files.images(dpath)
    view = gallery_files.load(dpath, "codes/000")["images"]
    code = gallery_files.load(dpath, "paths")["code"]
    assert [code[one["image"]] for one in view] == [0, 1, 2, 3] and (code >= 0).sum() == 4
    assert [shown[one["image"]]["n"] for one in view] == [0, 3, 6, 10]
    for one in view:
        f_PS = acts_NPD[shown[one["image"]]["n"]].clip(0)
        for p in range(P):
            part = slice(one["start"][p], one["start"][p + 1])
            want = [(r, f_PS[p, s]) for r, s in enumerate((1, 4, 5)) if f_PS[p, s] > 0]
            want.sort(key=lambda pair: -pair[1])
            assert [v for _, v in want] == one["value"][part].tolist()
            assert {r for r, _ in want} == set(one["row"][part].tolist())
            for r, value, rank in zip(
                *(one[k][part].tolist() for k in ("row", "value", "rank")), strict=True
            ):
                all_n = acts_NPD[:, :, (1, 4, 5)[r]].clip(0)
                # few different values, so that each is at an end of its bin: the share of smaller ones or of equal ones
                assert np.mean(all_n[all_n > 0] < value) - 1e-4 <= rank / 65535
                assert rank / 65535 <= np.mean(all_n[all_n > 0] <= value) + 1e-4
    dpath = collect.main(dataclasses.replace(cfg, image_view=0))
    assert gallery_files.load(dpath, "stats")["files"]["n_codes"] == 0
    assert not (pathlib.Path(dpath) / "data" / "codes").exists()


def test_256_latents_a_file(cfg: config.Visuals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "LATENTS", 2)
    monkeypatch.setattr(write, "IMAGES", 4)
    dpath = pathlib.Path(collect.main(cfg))
    assert [len(gallery_files.load(dpath, f"latents/00{i}")["latents"]) for i in range(3)] == [2, 2, 1]
    assert [len(gallery_files.load(dpath, f"images/00{i}")["images"]) for i in range(3)] == [4, 4, 3]
    assert len(list((dpath / "data" / "latents").iterdir())) == 3


def test_a_dead_latent(cfg: config.Visuals) -> None:
    """It can be asked for. Its mean is missing, and no text says nan."""
    dpath = pathlib.Path(collect.main(dataclasses.replace(cfg, include_latents=(2,))))
    columns = gallery_files.load(dpath, "stats")["columns"]
    assert columns["id"].tolist() == [2] and columns["freq"] == 0 and np.isnan(columns["mean"]).all()
    (latent,) = gallery_files.latents(dpath)
    assert (latent["low"], latent["high"], latent["histogram"]["n"].sum()) == (0, 0, 0)
    assert [group["name"] for group in latent["groups"]] == ["random"]
    for fpath in dpath.rglob("*.js"):
        assert "nan" not in fpath.read_text().lower().replace("base64", "") or '"b"' in fpath.read_text()


def test_names_are_text(cfg: config.Visuals, tmp_path: pathlib.Path, make_shards) -> None:
    """Paths and labels come back as they were, and none can end the script."""
    odd = "<b>'\"\u202e\u2028</script>"
    source = shards.ShardDir.open(cfg.data.shard_root)
    records = [shards.Record(f"{odd.replace('/', '_')}/{i}.png", odd) for i in range(N)]
    dpath = shards.ShardDir.create(tmp_path / "odd", source.metadata, records, {})
    for shard_i in range(source.metadata.n_shards):
        with dpath.writing(shard_i) as writer:
            n = len(source.metadata.imgs_in(shard_i))
            writer.write(np.ones((n, 1, source.metadata.n_tokens, S), np.float32))
    for record in records:
        fpath = tmp_path / "photos" / record.path
        fpath.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (8, 8)).save(fpath)
    images_cfg = data_config.ImageFolder(str(tmp_path / "photos"))
    data = data_config.Shards(str(dpath.dpath), 13)
    made = pathlib.Path(collect.main(dataclasses.replace(cfg, images=images_cfg, data=data)))
    assert gallery_files.load(made, "stats")["classes"] == [odd]
    assert gallery_files.images(made)[0]["path"] == records[0].path
    assert not any("<" in fpath.read_text() for fpath in (made / "data").rglob("*.js"))


def test_a_path_that_is_not_utf8(cfg: config.Visuals, tmp_path: pathlib.Path) -> None:
    """The dump keeps such names; the page shows the odd byte as text."""
    name = os.fsdecode(b"caf\xe9.png")
    source = pictures.Pictures(tmp_path, [shards.Record(name, "")], None, (2, 2), 0, 32)
    try:
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / name, format="PNG")
    except OSError:
        pytest.skip("this file system refuses such names")
    write.scripts.write(tmp_path, "images/000", {"images": [{"path": name, "src": source.src(0)}]})
    assert gallery_files.load(tmp_path, "images/000")["images"][0]["path"] == "caf\udce9.png"


# ---- which latents ----


def test_choice(cfg: config.Visuals, tmp_path: pathlib.Path) -> None:
    coder, _, stats = passed(cfg, tmp_path / "pass")

    def chosen(**changes: tp.Any) -> list[int]:
        return collect.choose(dataclasses.replace(cfg, **changes), coder, stats).tolist()

    log_freq_S = np.log10(np.maximum(stats.freq_S, 1e-12))
    assert chosen() == [0, 1, 3, 4, 5]
    assert chosen(log_freq_range=(-9.0, float(log_freq_S[3]) + 0.01)) == [3]
    assert chosen(log_value_range=(0.8, 2.0)) == [3]  # mean 8
    assert chosen(include_latents=(3, 2)) == [2, 3]
    for sort_by, values in {
        "freq": stats.freq_S,
        "mean": stats.mean_S,
        "max": stats.high_S,
        "n-images": stats.images_S,
    }.items():
        order = sorted([0, 1, 3, 4, 5], key=lambda s: (-values[s], s))
        assert chosen(sort_by=sort_by) == order
        assert chosen(sort_by=sort_by, top_k=2) == order[:2]
    with pytest.raises(
        errors.UserError, match=r"Of 5 latents that fire, 90% have log10 frequency .* widen the ranges"
    ):
        chosen(log_value_range=(5.0, 6.0))
    with pytest.raises(errors.UserError, match="--include-latents 6: the scorer has latents 0 to 5"):
        collect.main(dataclasses.replace(cfg, include_latents=(6,)))
    words = collect.filters(
        dataclasses.replace(cfg, log_freq_range=(-3.0, -1.0), top_k=9, sort_by="max"), coder
    )
    assert words == "all latents that fire, with log10 of the frequency from -3 to -1, the first 9 by max"


# ---- a killed pass ----


def files_of(dpath: pathlib.Path | str) -> dict[str, bytes]:
    root = pathlib.Path(dpath)
    return {
        str(f.relative_to(root)): f.read_bytes()
        for f in root.rglob("*")
        if f.is_file() and f.name != "code.json"
    }


class Killed(BaseException):
    """Stands for a kill: nothing of ours catches it."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sae", "prototypes"])
@pytest.mark.parametrize("n_blocks", [1, 3])
def test_a_killed_pass_goes_on(
    cfg: config.Visuals, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, kind: str, n_blocks: int
) -> None:
    """The files are those of an undisturbed gallery, and no block is encoded twice."""
    monkeypatch.setattr(data_memory, "MAX_IMAGES", 2)
    monkeypatch.setattr(passes, "MIN_PATCHES", 1)  # a shard is a block
    if kind == "prototypes":
        vectors_KD = torch.randn(5, S, generator=torch.Generator().manual_seed(0))
        scorers.save(scorers.Prototypes.of(vectors_KD, torch.zeros(S), "dot"), tmp_path / "pca-5.bin")
        cfg = dataclasses.replace(cfg, ckpt="", scorer=config.Fitted(str(tmp_path / "pca-5.bin")))
    whole = files_of(collect.main(dataclasses.replace(cfg, dump_to=str(tmp_path / "whole"))))
    seen: list[int] = []
    cls = coders.SaeCoder if kind == "sae" else coders.PrototypeCoder
    name = "__call__" if kind == "sae" else "of"
    real = getattr(cls, name)

    def counted(self: object, *args: object) -> object:
        if len(seen) == n_blocks:
            seen.append(-1)
            raise Killed
        seen.append(1)
        return real(self, *args)

    monkeypatch.setattr(cls, name, counted)
    with pytest.raises(Killed):
        collect.main(cfg)
    done = list((tmp_path / ".gallery.pass").glob("*/shard*/shard.json"))
    assert len(done) == n_blocks and not pathlib.Path(cfg.dump_to).exists()
    assert files_of(collect.main(cfg)) == whole
    assert seen.count(1) == -(-N // 2)
    assert not list(tmp_path.glob(".gallery*"))


@pytest.mark.parametrize("what", ["patch_latents.bin", "patch_starts.bin", "shard.json"])
@pytest.mark.parametrize("kind", ["sae", "units"])
def test_damaged_files_of_a_pass_are_made_again(
    cfg: config.Visuals, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, what: str, kind: str,
) -> None:  # fmt: skip
    """Only the damaged shard."""
    monkeypatch.setattr(data_memory, "MAX_IMAGES", 2)
    monkeypatch.setattr(passes, "MIN_PATCHES", 4 * P)
    if kind == "units":
        cfg = dataclasses.replace(cfg, ckpt="", scorer=config.Units())
    whole = files_of(collect.main(dataclasses.replace(cfg, dump_to=str(tmp_path / "whole"))))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(statistics, "collect", lambda *_: (_ for _ in ()).throw(Killed()))
        collect.main(cfg)
    (fpath,) = (tmp_path / ".gallery.pass").glob(f"*/shard000001/{what}")
    data = bytearray(fpath.read_bytes())
    data[len(data) // 2] ^= 1
    fpath.write_bytes(data)
    seen: list[int] = []
    cls = coders.UnitCoder if kind == "units" else coders.SaeCoder
    real = cls.__call__
    monkeypatch.setattr(cls, "__call__", lambda self, x_XD: seen.append(len(x_XD)) or real(self, x_XD))
    assert files_of(collect.main(cfg)) == whole
    assert "checksum" in caplog.text and seen == [2 * P, 2 * P]


def test_a_pass_of_something_else_is_not_continued(
    cfg: config.Visuals, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(statistics, "collect", lambda *_: (_ for _ in ()).throw(Killed()))
        collect.main(cfg)
    as_sae(pathlib.Path(cfg.ckpt), ARCHITECTURES["top-k"])
    whole = files_of(collect.main(dataclasses.replace(cfg, dump_to=str(tmp_path / "whole"))))
    assert files_of(collect.main(cfg)) == whole


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_gallery_leaves_nothing_for_long(
    cfg: config.Visuals, tmp_path: pathlib.Path, page: pathlib.Path, signum: signal.Signals
) -> None:
    """The next command continues the pass, sweeps, and makes the same files. Until then the older gallery stays."""
    whole = files_of(collect.main(cfg))
    code = f"""
import pathlib, time
from saev import launch
from saev.data import config as data_config
from saev.visuals import collect, config, write
write.PAGE = pathlib.Path({str(page)!r})
def wait(*args):
    print("there", flush=True)
    time.sleep(60)
write._write_table = wait
launch.entry(lambda: collect.main(config.{cfg!r}))
"""
    for name in ("ImageFolder", "Shards"):
        code = code.replace(f"{name}(", f"data_config.{name}(")
    code = code.replace("SlurmConfig(", "launch.SlurmConfig(").replace("scorer=Sae(", "scorer=config.Sae(")
    before = sorted(p.name for p in tmp_path.iterdir())
    process = forked.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"there\n"
    process.send_signal(signum)
    process.communicate()
    left = sorted({p.name for p in tmp_path.iterdir()} - set(before))
    assert ".gallery.pass" in left and all(n.startswith(".gallery.") for n in left)
    assert files_of(cfg.dump_to) == whole
    assert files_of(collect.main(cfg)) == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_value_that_is_not_finite(
    cfg: config.Visuals, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_sae(pathlib.Path(cfg.ckpt), ARCHITECTURES["relu"])
    real = coders.SaeCoder.__call__

    def broken(self: coders.SaeCoder, x_XD: torch.Tensor) -> codeshards.Csr:
        fired = real(self, x_XD)
        fired.value_n[-1] = np.inf
        return fired

    monkeypatch.setattr(coders.SaeCoder, "__call__", broken)
    with pytest.raises(
        errors.UserError, match=r"the value of latent \d in class1/0010.jpg, patch \d+, is inf"
    ):
        collect.main(cfg)


# ---- folders ----


def test_an_older_gallery_is_replaced_and_anything_else_is_not(
    cfg: config.Visuals, tmp_path: pathlib.Path
) -> None:
    dpath = pathlib.Path(collect.main(cfg))
    (dpath / "stale.txt").write_text("old")
    collect.main(dataclasses.replace(cfg, include_latents=(0,)))
    assert not (dpath / "stale.txt").exists() and (dpath / "index.html").exists()
    older = tmp_path / "older"  # as earlier versions wrote them
    (older / "images").mkdir(parents=True)
    for name in ("index.html", "latents.csv", "images/000000.png"):
        (older / name).write_text("")
    collect.main(dataclasses.replace(cfg, dump_to=str(older)))
    assert not (older / "images").exists() and (older / "data").is_dir()
    with pytest.raises(errors.UserError, match="exists and is not a gallery"):
        collect.main(dataclasses.replace(cfg, dump_to=str(tmp_path / "imgs")))
    assert len(list((tmp_path / "imgs").rglob("*.jpg"))) == N


def test_a_failed_gallery_leaves_the_older_one(cfg: config.Visuals, tmp_path: pathlib.Path) -> None:
    """And what was encoded, for the next command."""
    dpath = pathlib.Path(collect.main(cfg))
    before = sorted(p.name for p in tmp_path.iterdir())
    record = shards.ShardDir.open(cfg.data.shard_root).records[5]
    (tmp_path / "imgs" / record.path).write_text("no image")
    with pytest.raises(errors.UserError, match="cannot be read as an image"):
        collect.main(cfg)
    assert (dpath / "index.html").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([".gallery.pass", *before])


def test_what_does_not_fit(cfg: config.Visuals, tmp_path: pathlib.Path) -> None:
    nn.save(nn.SparseAutoencoder(nn_config.Relu(d_vit=9)), tmp_path / "wide.pt")
    wide = scorers.Prototypes.of(torch.randn(3, 9), torch.zeros(9), "dot")
    scorers.save(wide, tmp_path / "wide.bin")
    cases = {
        "--ckpt is missing": {"ckpt": ""},
        "d_vit 4 instead of 9|d_vit 6 instead of 9": {"ckpt": str(tmp_path / "wide.pt")},
        "--images.root is missing": {"images": data_config.ImageFolder()},
        "no such image. Pass the folder that was dumped": {"images": data_config.ImageFolder(str(tmp_path))},
        "--scorer.path is missing": {"ckpt": "", "scorer": config.Fitted()},
        "is an SAE. Pass it as --ckpt": {"ckpt": "", "scorer": config.Fitted(cfg.ckpt)},
        "has prototypes of 9 dimensions, but --data.shard-root .* has 6": {
            "ckpt": "",
            "scorer": config.Fitted(str(tmp_path / "wide.bin")),
        },
    }
    for match, changes in cases.items():
        with pytest.raises(errors.UserError, match=match):
            collect.main(dataclasses.replace(cfg, **changes))
    with pytest.raises(errors.UserError, match="the first must not exceed the second"):
        dataclasses.replace(cfg, log_freq_range=(0.0, -1.0))
    with pytest.raises(errors.UserError, match="name two scorers"):
        dataclasses.replace(cfg, scorer=config.Units())


def test_missing_images_are_found_before_the_pass(
    cfg: config.Visuals, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = [
        tmp_path / "imgs" / record.path for record in shards.ShardDir.open(cfg.data.shard_root).records[4:6]
    ]
    for fpath in missing:
        fpath.unlink()

    def no_pass(*_: object) -> None:
        raise AssertionError("the pass began")

    with monkeypatch.context() as patch:
        patch.setattr(spool, "run", no_pass)
        with pytest.raises(errors.UserError, match=f"{missing[0]}: no such image. Pass the folder"):
            collect.main(cfg)
    monkeypatch.setattr(collect, "MAX_CHECKED", 1)  # a large data set: only a sample is looked up
    with pytest.raises(errors.UserError, match="no such image. Pass the folder"):
        collect.main(cfg)
    assert not pathlib.Path(cfg.dump_to).exists()


def test_a_swap_that_fails_brings_the_older_gallery_back(
    cfg: config.Visuals, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dpath = pathlib.Path(collect.main(cfg))
    (dpath / "older.txt").write_text("older")
    rename = pathlib.Path.rename

    def fails_for_the_new_one(self: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        if target == dpath and not self.name.endswith(".old"):
            raise OSError("disk on fire")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fails_for_the_new_one)
    with pytest.raises(OSError, match="disk on fire"):
        collect.main(cfg)
    assert (dpath / "older.txt").exists()
    assert [p.name for p in tmp_path.glob(".gallery*")] == [".gallery.pass"]


def test_a_gallery_says_what_it_shows(cfg: config.Visuals) -> None:
    dpath = pathlib.Path(collect.main(dataclasses.replace(cfg, include_latents=(3, 0))))
    said = json.loads((dpath / "gallery.json").read_text())
    assert said["latents"] == [0, 3] and said["ckpt"] == cfg.ckpt
    assert said["sha256"] == hashlib.sha256(pathlib.Path(cfg.ckpt).read_bytes()).hexdigest()
    assert said["filters"] == "the latents of --include-latents" and len(said["xxh3_128"]) == 32


def test_a_figure_makes_its_gallery_first_and_then_uses_it(
    cfg: config.Visuals, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latent 3 fires on one patch: image 5, row 1, column 2 of the 4 x 4 grid."""
    args = ["--dump-to", cfg.dump_to, "--ckpt", cfg.ckpt, "--n-images", K, "--device", "cpu"]
    args += ["--data.shard-root", cfg.data.shard_root, "--data.layer", cfg.data.layer]
    rest = ["images:image-folder", "--images.root", cfg.images.root]
    too_large = inprocess.run("visuals.py", *args, "--figure", S, *rest)
    assert (
        too_large.returncode == 2 and f"--figure {S}: the scorer has latents 0 to {S - 1}" in too_large.stderr
    )
    assert not pathlib.Path(cfg.dump_to).exists()
    png, pdf = tmp_path / "x.png", tmp_path / "x.pdf"
    done = inprocess.run("visuals.py", *args, "--figure", 3, "--out", png, *rest)
    assert (done.returncode, done.stdout) == (0, f"{png}\n"), done.stderr
    assert gallery_files.load(cfg.dump_to, "stats")["columns"]["id"].tolist() == [0, 1, 3, 4, 5]
    with PIL.Image.open(png) as img:
        img_HW3 = np.asarray(img.convert("RGB"), np.int64)
    seen_HW = (np.abs(img_HW3 - (50, 100, 50)) < 4).all(axis=2)  # image 5's colour, less one patch
    hot_HW = (np.abs(img_HW3 - (0.3 * np.array([50, 100, 50]) + 0.7 * np.array([255, 0, 128]))) < 4).all(
        axis=2
    )
    (top, left), (bottom, right) = (f(np.argwhere(seen_HW), axis=0) for f in (np.min, np.max))
    patch = (right + 1 - left) // 4
    want_HW = np.zeros_like(seen_HW)
    want_HW[top + patch : top + 2 * patch, left + 2 * patch : left + 3 * patch] = True
    legend = bottom + 1  # below the picture
    assert (hot_HW[:legend] == want_HW[:legend]).all() and want_HW.sum() == patch**2 > 1000

    def no_pass(*_: object) -> None:
        raise AssertionError("a pass began")

    monkeypatch.setattr(spool, "run", no_pass)
    assert inprocess.run("visuals.py", *args, "--figure", 3, 0, "--out", pdf, *rest).returncode == 0
    assert pdf.read_bytes().startswith(b"%PDF-")
    dead = inprocess.run("visuals.py", *args, "--figure", 2, *rest)
    assert dead.returncode == 2 and "--figure 2: this latent never fires" in dead.stderr


def test_a_folder_filled_meanwhile_is_kept(cfg: config.Visuals, monkeypatch: pytest.MonkeyPatch) -> None:
    dpath, write_table = pathlib.Path(cfg.dump_to), write._write_table

    def and_fill(*args: tp.Any) -> None:
        dpath.mkdir()
        (dpath / "mine.txt").write_text("mine")
        write_table(*args)

    monkeypatch.setattr(write, "_write_table", and_fill)
    with pytest.raises(errors.UserError, match="exists and is not a gallery"):
        collect.main(cfg)
    assert [p.name for p in dpath.iterdir()] == ["mine.txt"]


def test_a_table_alone_does_not_make_a_gallery(tmp_path: pathlib.Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "latents.csv").write_text("my own table")
    with pytest.raises(errors.UserError, match="exists and is not a gallery"):
        write.check_target(tmp_path / "mine")
    with pytest.raises(errors.UserError, match="cannot be created"):
        write.check_target(tmp_path / "mine" / "latents.csv" / "gallery")


# ---- alignment ----


def test_grid() -> None:
    assert images.grid(16, None) == (4, 4, 0)
    assert images.grid(8, (28, 56)) == (2, 4, 14)
    assert images.grid(196, (224, 224)) == (14, 14, 16)  # 15 pixels a side would give as many
    assert images.grid(729, (384, 384)) == (27, 27, 14)  # 384 / 14 is not whole
    with pytest.raises(errors.UserError, match="6 patches do not form a grid on a square input"):
        images.grid(6, None)
    with pytest.raises(errors.UserError, match="6 patches do not form a grid on an input of 32 x 32"):
        images.grid(6, (32, 32))


@hypothesis.given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40))
@hypothesis.settings(max_examples=200, deadline=None)
def test_grid_of_any_number_of_whole_patches(rows: int, columns: int, side: int) -> None:
    """Also with few, large patches, where a smaller side would give as many with a rest."""
    assert images.grid(rows * columns, (rows * side, columns * side)) == (rows, columns, side)


TRANSFORMS = {
    "crop": images.Transform((64, 64), 72, False, "bicubic", (0.5,), (0.5,)),
    "squash": images.Transform((64, 64), 64, True, "bicubic", (0.5,), (0.5,)),
    "wide": images.Transform((32, 64), (32, 64), False, "bicubic", (0.5,), (0.5,)),
    "rest": images.Transform((70, 70), 70, False, "bicubic", (0.5,), (0.5,)),  # 6 pixels belong to no patch
}
SIDE = 16
HALF = (0.5, 0.5, 0.5)
WHOLE = {
    "pad": images.Transform((64, 64), 64, False, "bicubic", HALF, HALF, "pad", SIDE),
    "pad, wide": images.Transform((64, 140), (64, 140), False, "bicubic", HALF, HALF, "pad", SIDE),
    "flexible": images.Transform((64, 64), 64, False, "bicubic", HALF, HALF, "flexible", SIDE),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", [(80, 80), (160, 90), (90, 160), (257, 911), (911, 257)])
@pytest.mark.parametrize("name", WHOLE)
def test_the_patch_that_fires_is_the_bright_square_of_a_whole_photo(
    name: str, size: tuple[int, int], tmp_path: pathlib.Path, make_shards, cfg: config.Visuals
) -> None:
    """As below, for --resize pad and flexible. Photos have two sizes, so grids and borders differ. Padding holds
    activations that would fire, which are not shown."""
    transform = WHOLE[name]
    n_patches = math.prod(n // SIDE for n in transform.size)
    photos, acts_NP, want = [], np.full((4, n_patches), 9, np.float32), []
    for i, (width, height) in enumerate([size, size[::-1]] * 2):
        rows, columns = (n // SIDE for n in transform.input_size(width, height))
        left, top, right, bottom = transform.box(width, height)
        scales = (right - left) / width, (bottom - top) / height
        shown = [
            (row, column)
            for row in range(rows)
            for column in range(columns)
            if top < (row + 1) * SIDE
            and row * SIDE < bottom
            and left < (column + 1) * SIDE
            and column * SIDE < right
        ]
        whole = [(r, c) for r, c in shown if (r + 1) * SIDE <= bottom and (c + 1) * SIDE <= right]
        row, column = [whole[0], whole[-1], whole[len(whole) // 2], whole[1]][i]
        img = PIL.Image.new("L", (width, height))
        corners = (column * SIDE - left, row * SIDE - top, (column + 1) * SIDE - left, (row + 1) * SIDE - top)
        img.paste(255, tuple(round(p / scales[k % 2]) for k, p in enumerate(corners)))
        photos.append(img.convert("RGB"))
        seen_HW = (transform(photos[-1])[0].numpy() / 2 + 0.5)[: rows * SIDE, : columns * SIDE]
        mean_RC = seen_HW.reshape(rows, SIDE, columns, SIDE).mean(axis=(1, 3))
        for r, c in shown:  # borders are grey
            acts_NP[i, r * columns + c] = mean_RC[r, c] if (r, c) in whole else 0
        want.append((rows, columns, row, column))
    dpath, _ = make_shards(
        n_imgs=4, n_patches=n_patches, d_vit=1, layers=(0,), cls_token=False, acts=acts_NP[:, None, :, None],
        transform=transform.to_dict(), sizes=[img.size for img in photos],
    )  # fmt: skip
    for img, record in zip(photos, shards.ShardDir.open(dpath).records, strict=True):
        (fpath := tmp_path / "photos" / record.path).parent.mkdir(parents=True, exist_ok=True)
        img.save(fpath, format="PNG")
    sae = nn.SparseAutoencoder(nn_config.Relu(d_vit=1, exp_factor=1))
    with torch.no_grad():
        sae.W_enc.fill_(1)
        sae.b_enc.fill_(-0.5)
    nn.save(sae, tmp_path / "bright.pt")
    asked = {
        "ckpt": str(tmp_path / "bright.pt"),
        "data": data_config.Shards(str(dpath), 0),
        "thumb_side": 128,
    }
    asked |= {"images": data_config.ImageFolder(str(tmp_path / "photos")), "image_view": 4, "n_images": 4}
    made_at = collect.main(dataclasses.replace(cfg, **asked))
    columns_of = gallery_files.load(made_at, "stats")["columns"]
    n_shown = layout.Photos([shards.ShardDir.open(dpath)]).shown_AP.sum()
    assert columns_of["freq"] == pytest.approx(4 / n_shown) and columns_of["max"][0] < 0.6
    shown_images = gallery_files.images(made_at)
    (top, *_) = gallery_files.latents(made_at)[0]["groups"]
    assert len(top["image"]) == 4
    for i, place in enumerate(top["image"].tolist()):
        rows, columns, row, column = want[shown_images[place]["n"]]
        is_nominal = (rows, columns) == tuple(n // SIDE for n in transform.size)
        assert shown_images[place].get("grid") == (None if is_nominal else [rows, columns])
        (patch,) = np.flatnonzero(gallery_files.heat(top, i, n_patches))
        assert patch == row * columns + column
        data = base64.b64decode(shown_images[place]["src"].partition(",")[2])
        with PIL.Image.open(io.BytesIO(data)) as picture:
            assert picture.width / picture.height == pytest.approx(columns / rows, rel=0.02)
            cells = picture.convert("L").resize((8 * columns, 8 * rows), PIL.Image.Resampling.BOX)
        cells = np.asarray(cells, np.float64).reshape(rows, 8, columns, 8).mean(axis=(1, 3))
        assert cells[row, column] > 175
        cells[row, column] = 0
        assert cells.max() < 150  # grey borders
    found = galleries.Gallery(pathlib.Path(made_at), "Again.")
    for place, (picture, heat_P, grid) in zip(
        top["image"].tolist(), figure._row(found, 0, 4).shown, strict=True
    ):
        rows, columns, row, column = want[shown_images[place]["n"]]
        assert grid == (rows, columns)
        heat_1 = heat_P[row * columns + column]
        assert heat_1 == heat_P.sum() > 0.5
        spot = int((column + 0.5) * picture.width / columns), int((row + 0.5) * picture.height / rows)
        got, before = (
            np.array(img.getpixel(spot), float)
            for img in (pictures.painted(picture, heat_P, grid, 1.0), picture)
        )
        assert np.abs(got - before - heat_1 * (np.array(pictures.HUE) - before)).max() <= 2
    figure.draw(found, (0,), 4)


@pytest.mark.parametrize("size", [(80, 80), (160, 90), (90, 160), (257, 911), (911, 257)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_patch_that_fires_is_the_bright_square(
    name: str, size: tuple[int, int], tmp_path: pathlib.Path, make_shards, cfg: config.Visuals
) -> None:
    """End to end: the "ViT" sees the mean brightness of each patch of its input. Each image has one bright square,
    and the gallery's heat lies exactly on it: its rectangle of the picture is bright, all others are dark."""
    transform = TRANSFORMS[name]
    rows, columns = (n // SIDE for n in transform.size)
    whole = transform._resized(*size)  # width, height
    offset = [round((whole[i] - transform.size[1 - i]) / 2) for i in (0, 1)]
    places = [(0, 0), (rows - 1, columns - 1), (rows // 2, 1)]
    acts_NTD = np.zeros((len(places), rows * columns, 1), np.float32)
    made = []
    for i, (row, column) in enumerate(places):
        first = [(offset[0] + SIDE * column), (offset[1] + SIDE * row)]
        box = [
            round(p * size[k % 2] / whole[k % 2])
            for k, p in enumerate((*first, first[0] + SIDE, first[1] + SIDE))
        ]
        img = PIL.Image.new("L", size)
        img.paste(255, tuple(box))
        made.append(img.convert("RGB"))
        seen_HW = transform(made[-1])[0].numpy() / 2 + 0.5
        seen_HW = seen_HW[: rows * SIDE, : columns * SIDE]
        acts_NTD[i, :, 0] = seen_HW.reshape(rows, SIDE, columns, SIDE).mean(axis=(1, 3)).ravel()
        assert acts_NTD[i].argmax() == row * columns + column and acts_NTD[i].max() > 0.75
    dpath, _ = make_shards(
        n_imgs=len(places),
        n_patches=rows * columns,
        d_vit=1,
        layers=(0,),
        cls_token=False,
        acts=acts_NTD[:, None],
    )
    (as_older(pathlib.Path(dpath)) / "transform.json").write_text(json.dumps(transform.to_dict()))
    for img, record in zip(made, shards.ShardDir.open(dpath).records, strict=True):
        fpath = tmp_path / "photos" / record.path
        fpath.parent.mkdir(parents=True, exist_ok=True)
        img.save(fpath, format="PNG")
    sae = nn.SparseAutoencoder(nn_config.Relu(d_vit=1, exp_factor=1))
    with torch.no_grad():
        sae.W_enc.fill_(1)
        sae.b_enc.fill_(-0.5)  # only the bright patch fires
    nn.save(sae, tmp_path / "bright.pt")
    made_at = collect.main(
        dataclasses.replace(
            cfg,
            ckpt=str(tmp_path / "bright.pt"),
            data=data_config.Shards(str(dpath), 0),
            thumb_side=64,
            images=data_config.ImageFolder(str(tmp_path / "photos")),
        )
    )
    stats = gallery_files.load(made_at, "stats")
    assert stats["source"]["grid"] == [rows, columns] and stats["source"]["size"] == [
        SIDE * rows,
        SIDE * columns,
    ]
    shown = gallery_files.images(made_at)
    (latent,) = gallery_files.latents(made_at)
    (top, *_) = latent["groups"]
    for i, place in enumerate(top["image"].tolist()):
        row, column = places[shown[place]["n"]]
        (patch,) = np.flatnonzero(gallery_files.heat(top, i, rows * columns))
        assert patch == row * columns + column
        data = base64.b64decode(shown[place]["src"].partition(",")[2])
        with PIL.Image.open(io.BytesIO(data)) as picture:
            bright_HW = np.asarray(picture.convert("L"), np.float64)
        height, width = bright_HW.shape
        assert width / height == pytest.approx(columns / rows)
        cells = bright_HW.reshape(rows, height // rows, columns, width // columns).mean(axis=(1, 3))
        assert cells[row, column] > 180
        cells[row, column] = 0
        assert cells.max() < 70


def test_without_a_transform_a_centre_crop_is_shown(cfg: config.Visuals) -> None:
    dpath = collect.main(dataclasses.replace(cfg, thumb_side=32))
    source = gallery_files.load(dpath, "stats")["source"]
    assert source["size"] == [32, 32] and "square centre crop is assumed" in source["transform"]
    data = base64.b64decode(gallery_files.images(dpath)[4]["src"].partition(",")[2])
    with PIL.Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (32, 32)
        np.testing.assert_allclose(picture.convert("RGB").getpixel((16, 16)), (40, 100, 50), atol=6)


def test_32768_latents_with_128_images_fit_in_2_gb(cfg: config.Visuals) -> None:
    sizes = memory.Sizes(100_000, 256, 1024, 32768)
    assert memory.peak(dataclasses.replace(cfg, n_images=128), sizes) < 2e9
