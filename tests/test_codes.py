"""Codes in files against `encode`, plain loops and `of_images`. N images, P patches, R rows, D d_vit, K latents."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import typing as tp

import forked
import inprocess
import numpy as np
import pytest
import scipy.sparse
import torch

import saev
from saev import errors, helpers, nn, scorers
from saev.codes import config, encode
from saev.data import activations, memory, passes
from saev.data import config as data_config
from saev.formats import codes, codeshards
from saev.nn import config as nn_config
from saev.scorers import base
from saev.scorers import config as scorers_config

ROOT = pathlib.Path(__file__).parent.parent
N, P, D, K = 10, 4, 8, 24
SAES = {
    "relu": nn_config.Relu(d_vit=D, d_sae=K),
    "top-k": nn_config.TopK(d_vit=D, d_sae=K, top_k=3),
    "top-k, negative": nn_config.TopK(d_vit=D, d_sae=K, top_k=20, keep_negative=True),
    "batch-top-k": nn_config.BatchTopK(d_vit=D, d_sae=K, top_k=3),
    "jump-relu": nn_config.JumpRelu(d_vit=D, d_sae=K),
}


def an_sae(cfg: nn_config.Sae, seed: int = 0) -> nn.SparseAutoencoder:
    sae = nn.SparseAutoencoder(cfg, seed).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    sae.b_enc.copy_(0.3 * torch.randn(K, generator=generator))
    sae.b_dec.copy_(0.3 * torch.randn(D, generator=generator))
    sae.scale.fill_(1.5)
    sae.threshold.fill_(0.7)
    if isinstance(cfg, nn_config.JumpRelu):
        sae.log_threshold.copy_(torch.linspace(-1, 1, K))
    return sae


@pytest.fixture
def dump(make_shards) -> tuple[data_config.Shards, torch.Tensor]:
    """Activations of layer 7, and their (N, P, D) patches. Image 4 is corrupt."""
    dpath, acts_NLTD = make_shards(n_imgs=N + 1, n_patches=P, d_vit=D, per_shard=4, skip=(4,))
    acts_NPD = np.delete(acts_NLTD[:, 1, 1:], 4, axis=0)
    return data_config.Shards(str(dpath), 7), torch.from_numpy(acts_NPD)


@pytest.fixture
def cfg(dump, tmp_path: pathlib.Path) -> config.Codes:
    """Shards of 3 images, so that the last one is short."""
    return config.Codes(
        data=dump[0], dump_to=str(tmp_path / "codes"), max_patches_per_shard=3 * P + 1, device="cpu"
    )


def written(cfg: config.Codes, scorer: object, fpath: pathlib.Path, **changes: object) -> saev.codes.Codes:
    if isinstance(scorer, nn.SparseAutoencoder):
        nn.save(scorer, fpath)
    else:
        scorers.save(scorer, fpath)
    return saev.codes.open(encode.main(dataclasses.replace(cfg, scorer=str(fpath), **changes)))


def prototypes(similarity: scorers_config.Similarity) -> base.Prototypes:
    generator = torch.Generator().manual_seed(1)
    return base.Prototypes.of(
        torch.randn(K, D, generator=generator), torch.randn(D, generator=generator), similarity
    )


# ---- against encode ----


@pytest.mark.parametrize("image_codes", ["csr", "dense"])
@pytest.mark.parametrize("name", SAES)
def test_codes_of_an_sae_are_those_of_encode(
    dump, cfg: config.Codes, tmp_path: pathlib.Path, name: str, image_codes: config.Layout
) -> None:
    sae, acts_NPD = an_sae(SAES[name]), dump[1]
    codes = written(cfg, sae, tmp_path / "run" / "sae.pt", image_codes=image_codes)
    f_NPK = sae.encode(acts_NPD)
    found_RK = codes.patches().dense()
    np.testing.assert_allclose(found_RK, f_NPK.flatten(0, 1), atol=1e-5)
    assert ((found_RK != 0) == (f_NPK.flatten(0, 1).numpy() != 0)).all()
    assert 0 < (found_RK != 0).mean() < 0.9
    np.testing.assert_allclose(codes.pooled("mean").dense(), f_NPK.mean(dim=1), atol=1e-5)
    max_NK = codes.pooled().dense()
    np.testing.assert_array_equal(max_NK, found_RK.reshape(N, P, K).max(axis=1))
    of_images_NK = scorers.load(tmp_path / "run" / "sae.pt").of_images(acts_NPD)
    np.testing.assert_allclose(max_NK, of_images_NK, atol=1e-5)


def test_codes_of_an_untrained_sae(dump, cfg: config.Codes, tmp_path: pathlib.Path) -> None:
    nn.save(an_sae(SAES["batch-top-k"]), tmp_path / "sae.pt")
    like = scorers_config.Untrained(str(tmp_path / "sae.pt"))
    scorer = scorers.fit(like, dump[0], K, dpath=tmp_path / "scorers")
    (fpath,) = (tmp_path / "scorers").glob("untrained-*.bin")
    codes = saev.codes.open(encode.main(dataclasses.replace(cfg, scorer=str(fpath))))
    np.testing.assert_allclose(codes.patches().dense(), scorer(dump[1].flatten(0, 1)), atol=1e-5)


@pytest.mark.parametrize("image_codes", ["csr", "dense"])
@pytest.mark.parametrize("similarity", ["plain", "dot", "cosine", "distance"])
def test_codes_of_prototypes_are_their_scores(
    dump,
    cfg: config.Codes,
    tmp_path: pathlib.Path,
    similarity: scorers_config.Similarity,
    image_codes: config.Layout,
) -> None:
    scorer, acts_NPD = prototypes(similarity), dump[1]
    codes = written(cfg, scorer, tmp_path / "random.bin", image_codes=image_codes)
    score_RK = scorer(acts_NPD.flatten(0, 1)).numpy()
    np.testing.assert_allclose(codes.patches().dense(), score_RK, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(codes.pooled().dense(), scorer.of_images(acts_NPD), rtol=1e-6, atol=1e-6)
    mean_NK = score_RK.reshape(N, P, K).mean(axis=1)
    np.testing.assert_allclose(codes.pooled("mean").dense(), mean_NK, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scorer", ["distance", "relu"])
def test_top_n(dump, cfg: config.Codes, tmp_path: pathlib.Path, scorer: str) -> None:
    """The n largest codes of each patch, by a plain sort; codes of images are of all."""
    made = an_sae(SAES["relu"]) if scorer == "relu" else prototypes("distance")
    every = written(cfg, made, tmp_path / "all.bin")
    some = written(cfg, made, tmp_path / "all.bin", top_n=4)
    assert some.dpath != every.dpath and some.metadata.layout == "csr"
    all_RK, kept = every.patches().dense(), some.patches()
    for r, row_K in enumerate(all_RK):
        order = np.argsort(-row_K, kind="stable")[:4]
        want = sorted(k for k in order if scorer != "relu" or row_K[k] > 0)
        part = slice(kept.start_R1[r], kept.start_R1[r + 1])
        assert kept.latent_n[part].tolist() == want
        np.testing.assert_array_equal(kept.value_n[part], row_K[want])
    np.testing.assert_array_equal(every.pooled().dense(), some.pooled().dense())
    assert written(cfg, made, tmp_path / "all.bin", top_n=K).dpath == every.dpath  # all


def test_top_n_of_equal_values() -> None:
    """The lowest latents are kept, as in a dense row and in a sparse one."""
    value_RK = np.random.default_rng(0).integers(0, 4, (50, 12)).astype(np.float32)
    want_Rn = np.sort(np.argsort(-value_RK, axis=1, kind="stable")[:, :5], axis=1)
    dense = encode._largest(value_RK, 5)
    np.testing.assert_array_equal(dense.latent_n.reshape(50, 5), want_Rn)
    rows = codeshards.Csr(np.arange(0, 601, 12), np.tile(np.arange(12, dtype=np.int32), 50), value_RK.ravel())
    np.testing.assert_array_equal(encode._cut(rows, 5).latent_n.reshape(50, 5), want_Rn)


def test_a_latent_that_is_negative_wherever_it_fires() -> None:
    """Its maximum is 0, unless it fires on every patch."""
    rows = codeshards.Csr(
        np.array([0, 2, 3]), np.array([0, 2, 0], np.int32), np.array([-1, -2, -3], np.float32)
    )
    pooled = encode._pooled(rows, np.array([2]), 4)
    assert pooled.index is not None
    assert [x.tolist() for x in pooled.index] == [[0, 2], [0, 2]]
    assert pooled.values.tolist() == [[-1, 0], [-2, -1]]
    padded = rows.of_rows(np.array([True, False]))  # of one patch and padding
    pooled = encode._pooled(padded, np.array([1]), 4)
    assert pooled.values.tolist() == [[-1, -2], [-1, -2]]


def test_a_code_that_is_not_finite(dump) -> None:
    rows = codeshards.Csr(np.arange(N * P + 1), np.full(N * P, 7, np.int32), np.ones(N * P, np.float32))
    acts = activations.Activations(dump[0])
    for bad in (np.nan, -np.inf):
        rows.value_n[2 * P + 1] = bad
        for found in (rows, np.pad(rows.value_n[:, None], ((0, 0), (7, 0)))):
            message = f"the value of unit 7 in class2/0002.jpg, patch 1, is {bad}. Check the weights"
            with pytest.raises(errors.UserError, match=message):
                passes.check(found, acts.image_is_N, acts, "unit")


def test_cls_and_all_tokens(dump, cfg: config.Codes, tmp_path: pathlib.Path) -> None:
    sae = an_sae(SAES["top-k"])
    for patches, n in (("cls", 1), ("all", P + 1)):
        data = dataclasses.replace(cfg.data, patches=patches)
        codes = written(cfg, sae, tmp_path / "sae.pt", data=data)
        acts = activations.Activations(data)
        want_NPK = sae.encode(torch.from_numpy(acts.read(0, N)))
        assert codes.n_patches == n
        np.testing.assert_allclose(codes.patches().dense(), want_NPK.flatten(0, 1), atol=1e-5)


def test_float16(dump, cfg: config.Codes, tmp_path: pathlib.Path) -> None:
    sae = an_sae(SAES["relu"])
    wide = written(cfg, sae, tmp_path / "sae.pt")
    half = written(cfg, sae, tmp_path / "sae.pt", dtype="float16")
    assert half.patches().value_n.dtype == np.float16
    np.testing.assert_array_equal(half.patches().dense(), wide.patches().dense().astype(np.float16))
    np.testing.assert_array_equal(half.pooled().dense(), wide.pooled().dense())  # float32


def test_a_code_that_float16_cannot_hold(dump, cfg: config.Codes, tmp_path: pathlib.Path) -> None:
    sae, best_NK = an_sae(SAES["relu"]), an_sae(SAES["relu"]).encode(dump[1]).amax(dim=1)
    second, first = best_NK[:, 3].sort().values[-2:].tolist()
    image_i = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10][int(best_NK[:, 3].argmax())]
    factor = 2 * 65504.0 / (first + second)  # so that one image alone has a code above the limit
    sae.W_enc[:, 3] *= factor
    sae.b_enc[3] *= factor
    message = (
        rf"latent 3 in class\d/{image_i:04}.jpg, patch \d, is .*; the largest float16 is 65504. Pass --dtype"
    )
    with pytest.raises(errors.UserError, match=message):
        written(cfg, sae, tmp_path / "sae.pt", dtype="float16")
    codes = written(cfg, sae, tmp_path / "sae.pt")
    np.testing.assert_allclose(
        codes.patches().dense(), sae.encode(dump[1]).flatten(0, 1), rtol=1e-4, atol=1e-4
    )


# ---- reading ----


def test_slices(dump, cfg: config.Codes, tmp_path: pathlib.Path) -> None:
    """By images and latents, over the borders of shards, as scipy and torch take them."""
    codes = written(cfg, an_sae(SAES["top-k"]), tmp_path / "sae.pt")
    all_RK = codes.patches().dense()
    latents = [7, 0, 23, 11]
    for imgs, rows in (
        (slice(2, 7), slice(2 * P, 7 * P)),
        (range(4, 5), slice(4 * P, 5 * P)),
        (9, slice(9 * P, 10 * P)),
        (slice(3, 3), slice(0, 0)),
    ):
        part = codes.patches(imgs)
        np.testing.assert_array_equal(part.dense(), all_RK[rows])
        np.testing.assert_array_equal(part.scipy().toarray(), all_RK[rows])
        np.testing.assert_array_equal(part.torch().to_dense(), all_RK[rows])
        np.testing.assert_array_equal(codes.patches(imgs, latents).dense(), all_RK[rows][:, latents])
        np.testing.assert_array_equal(codes.patches(imgs, 5).torch().to_dense(), all_RK[rows][:, [5]])
    assert isinstance(part.scipy(), scipy.sparse.csr_array) and part.torch().layout == torch.sparse_csr
    max_NK = all_RK.reshape(N, P, K).max(axis=1)
    np.testing.assert_array_equal(
        codes.pooled("max", slice(1, 8), latents).scipy().toarray(), max_NK[1:8, latents]
    )


def test_images_are_named_in_the_order_of_the_rows(dump, cfg: config.Codes, tmp_path: pathlib.Path) -> None:
    codes = written(cfg, an_sae(SAES["top-k"]), tmp_path / "sae.pt")
    image_is = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert [image.image_i for image in codes.images] == image_is
    assert codes.paths == [f"class{i % 3}/{i:04}.jpg" for i in image_is]
    assert codes.labels == [f"class{i % 3}" for i in image_is]
    assert (codes.n_imgs, codes.n_patches, codes.n_latents) == (N, P, K)
    acts = activations.Activations(dump[0])
    want_K = an_sae(SAES["top-k"]).encode(torch.from_numpy(acts.read(5, 6)))[0, 2]
    np.testing.assert_allclose(codes.patches().dense()[5 * P + 2], want_K, atol=1e-5)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda c: c.patches(N), "images range.10, 11.: pass consecutive positions from 0 to 9 of .*codes"),
        (lambda c: c.patches(range(0, 4, 2)), "images range.0, 4, 2.: pass consecutive"),
        (lambda c: c.patches(slice(None), K), "latent 24: .* has latents 0 to 23"),
        (lambda c: c.pooled("max", 0, [1, 1]), "one is named twice"),
    ],
)
def test_slices_that_do_not_exist(
    dump, cfg: config.Codes, tmp_path: pathlib.Path, ask: object, message: str
) -> None:
    codes = written(cfg, an_sae(SAES["top-k"]), tmp_path / "sae.pt")
    with pytest.raises(errors.UserError, match=message):
        ask(codes)


def test_reading_imports_no_torch(dump, cfg: config.Codes, tmp_path: pathlib.Path) -> None:
    codes = written(cfg, an_sae(SAES["top-k"]), tmp_path / "sae.pt")
    code = "import sys, saev; c = saev.codes.open(sys.argv[1]); x = c.patches(0).scipy(); print(x.nnz, c.paths[0]); "
    code += "assert not {'torch', 'numba'} & sys.modules.keys()"
    done = subprocess.run(
        [sys.executable, "-c", code, codes.dpath], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "12 class0/0000.jpg\n"


@pytest.mark.skipif(not pathlib.Path("/proc/self/fd").exists(), reason="counts open files by Linux's /proc")
def test_many_shards_keep_few_files_open(tmp_path: pathlib.Path) -> None:
    """While all of them are read, image by image and at once."""
    dtypes = codeshards.csr("patch") | {"patch_values": codeshards.VALUES}
    shards = codeshards.Shards(tmp_path, 40, 1, dtypes, "command")
    rows = codeshards.Csr(np.array([0, 1, 3]), np.array([4, 0, 2]), np.array([1.5, 2, 3]))
    for i in shards.missing():
        with shards.writing(i) as writer:
            writer.add_codes("patch", rows)
    n_before = len(list(pathlib.Path("/proc/self/fd").iterdir()))
    found = [shards.rows("patch", "patch_values", 2, imgs) for imgs in shards.parts(range(40))]
    assert len(list(pathlib.Path("/proc/self/fd").iterdir())) - n_before <= codeshards.N_OPEN
    joined = codeshards.Csr.joined(found, codeshards.VALUES)
    assert joined.start_R1.tolist() == sorted([*range(0, 121, 3), *range(1, 120, 3)])
    assert joined.latent_n.tolist() == [4, 0, 2] * 40 and joined.value_n.tolist() == [1.5, 2, 3] * 40


# ---- damage, kills ----


def files(dpath: pathlib.Path) -> list[pathlib.Path]:
    return sorted(f for f in dpath.rglob("*") if f.is_file() and f.name not in ("code.json",))


def read_all(dpath: pathlib.Path) -> None:
    codes = saev.codes.open(dpath)
    codes.patches(), codes.pooled("max"), codes.pooled("mean"), codes.images


@pytest.mark.parametrize("image_codes", ["csr", "dense"])
def test_a_damaged_file_is_named(
    dump, cfg: config.Codes, tmp_path: pathlib.Path, image_codes: config.Layout
) -> None:
    """Each file with one bit changed, with one byte less, and missing."""
    sae = an_sae(SAES["top-k"])
    dpath = written(cfg, sae, tmp_path / "sae.pt", image_codes=image_codes).dpath
    read_all(dpath)
    tried = files(dpath)
    assert len(tried) == 2 + 4 * (8 if image_codes == "csr" else 6)
    for fpath in tried:
        whole = fpath.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for damaged in (bytes(flipped), whole[:-1], None):
            fpath.unlink() if damaged is None else fpath.write_bytes(damaged)
            with pytest.raises(errors.UserError) as err:
                read_all(dpath)
            is_gone = damaged is None and fpath.name in ("shard.json", "metadata.json")
            assert str(dpath if is_gone else fpath) in str(err.value) and "\n" not in str(err.value)
            fpath.write_bytes(whole)
    read_all(dpath)


def test_only_missing_shards_are_written(dump, cfg: config.Codes, tmp_path: pathlib.Path) -> None:
    sae = an_sae(SAES["top-k"])
    dpath = written(cfg, sae, tmp_path / "sae.pt").dpath
    want = {fpath: fpath.read_bytes() for fpath in files(dpath)}
    kept = {f: f.stat().st_mtime_ns for f in files(dpath) if "shard000002" not in str(f)}
    for fpath in (dpath / "shard000002").iterdir():
        fpath.unlink()
    (dpath / "shard000002").rmdir()
    with pytest.raises(errors.UserError, match="1 of 4 shards are missing. Run the same"):
        saev.codes.open(dpath)
    assert written(cfg, sae, tmp_path / "sae.pt").dpath == dpath
    assert {fpath: fpath.read_bytes() for fpath in files(dpath)} == want
    assert {f: f.stat().st_mtime_ns for f in kept} == kept


def test_a_pass_keeps_only_its_own_shards(dump, tmp_path: pathlib.Path) -> None:
    """Those that are complete and undamaged; nothing of another pass or of an older version."""
    acts, dtypes = activations.Activations(dump[0]), {"sums": codeshards.VALUES}
    dpath = tmp_path / "pass"
    dpath.mkdir()
    (dpath / "state").write_text("of an older version")
    n_written = []

    def write_shard(writer, blocks) -> None:
        for block in blocks:
            n_written.append(len(block.image_i_N))
            writer.add("sums", block.act_NXD.sum(axis=(1, 2)))

    def made(key: str, n_block: int) -> codeshards.Shards:
        shards = passes.scratch(dpath, key, acts, n_block, dtypes)
        passes.write(shards, acts, n_block, write_shard, "test")
        return shards

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "MIN_PATCHES", 4 * P)
        first = made("a", 2)
        assert (
            n_written == [2] * 5
            and len(first) == 3
            and [len(first.imgs_in(i)) for i in range(3)] == [4, 4, 2]
        )
        sums_N = np.concatenate([first.array(i, "sums") for i in range(3)])
        np.testing.assert_allclose(sums_N, dump[1].sum(dim=(1, 2)), rtol=1e-4)
        assert [f.name for f in dpath.iterdir()] == [first.dpath.name]
        (first.dpath_of(1) / "sums.bin").write_bytes(bytes(16))
        n_written.clear()
        again = made("a", 2)
        assert again.dpath == first.dpath and n_written == [2, 2]
        np.testing.assert_array_equal(again.array(1, "sums"), sums_N[4:8])
        n_written.clear()
        assert made("b", 2).dpath != first.dpath and n_written == [2] * 5
        assert not first.dpath.exists()


@pytest.mark.slow
def test_a_killed_command_goes_on(make_shards, tmp_path: pathlib.Path) -> None:
    """SIGKILL at several moments; then the bytes are those of an undisturbed one, and nothing else is left."""
    dpath, _ = make_shards(n_imgs=240, n_patches=16, d_vit=16, layers=(0,), per_shard=100)
    nn.save(nn.SparseAutoencoder(nn_config.TopK(d_vit=16, d_sae=512, top_k=8)), tmp_path / "sae.pt")
    command = [sys.executable, "-m", "saev.codes", "--scorer", str(tmp_path / "sae.pt"), "--device", "cpu"]
    command += ["--data.shard-root", str(dpath), "--max-patches-per-shard", "128"]
    run = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    run["also"] = ("saev.codes.encode", "saev.scorers")
    whole = forked.run([*command, "--dump-to", str(tmp_path / "whole")], check=True, **run).stdout.strip()
    want = {fpath.relative_to(whole): fpath.read_bytes() for fpath in files(pathlib.Path(whole))}
    assert len(want) == 2 + 30 * 8
    killed, n_killed = tmp_path / "killed", 0
    for n_shards in (1, 7, 15, 22):
        process = forked.Popen([*command, "--dump-to", str(killed)], **run)
        while len(list(killed.glob("*/shard*/shard.json"))) < n_shards and process.poll() is None:
            time.sleep(0.002)
        n_killed += process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert n_killed >= 2
    before = {f: f.stat().st_mtime_ns for f in killed.glob("*/shard*/shard.json")}
    found = forked.run([*command, "--dump-to", str(killed)], check=True, **run).stdout.strip()
    assert {fpath.relative_to(found): fpath.read_bytes() for fpath in files(pathlib.Path(found))} == want
    assert before and {f: f.stat().st_mtime_ns for f in before} == before
    assert [f.name for f in killed.iterdir()] == [pathlib.Path(found).name]


# ---- the command ----


def test_the_command(dump, tmp_path: pathlib.Path) -> None:
    nn.save(an_sae(SAES["relu"]), tmp_path / "sae.pt")
    flags = [
        "--scorer",
        tmp_path / "sae.pt",
        "--data.shard-root",
        dump[0].shard_root,
        "--dump-to",
        tmp_path / "c",
    ]
    done = inprocess.run("-m", "saev.codes", *flags, "--data.layer", 7, "--dtype", "float16")
    assert done.returncode == 0 and "memory: about" in done.stderr, done.stderr
    codes = saev.codes.open(done.stdout.strip())
    assert codes.metadata.scorer == str(tmp_path / "sae.pt") and codes.patches().value_n.dtype == np.float16
    assert {"commit", "job"} <= json.loads((codes.dpath / "code.json").read_text()).keys()
    again = inprocess.run("-m", "saev.codes", *flags, "--data.layer", 7, "--dtype", "float16")
    assert again.stdout == done.stdout and "already written" in again.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": ""}, "--scorer is missing: pass an SAE"),
        ({"scorer": "WIDE"}, r"d_vit|16"),
        ({"scorer": "PROTOTYPES"}, "has prototypes of 16 dimensions, but --data.shard-root .* has 8. Pass"),
        ({"scorer": "nowhere/sae.pt"}, "nowhere/sae.pt"),
        ({"layer": "all"}, "--data.layer all: codes are of one layer at a time"),
    ],
)
def test_bad_input_is_one_line(
    cfg: config.Codes, tmp_path: pathlib.Path, changes: dict[str, str], message: str
) -> None:
    nn.save(nn.SparseAutoencoder(nn_config.TopK(d_vit=16, d_sae=32)), tmp_path / "wide.pt")
    wide = base.Prototypes.of(torch.randn(4, 16), torch.zeros(16), "dot")
    scorers.save(wide, tmp_path / "wide.bin")
    nn.save(an_sae(SAES["relu"]), tmp_path / "sae.pt")
    paths = {"WIDE": "wide.pt", "PROTOTYPES": "wide.bin"}
    scorer = changes.get("scorer", str(tmp_path / "sae.pt"))
    scorer = str(tmp_path / paths[scorer]) if scorer in paths else scorer
    data = dataclasses.replace(cfg.data, layer=changes.get("layer", 7))
    with pytest.raises((errors.UserError, OSError), match=message) as err:
        encode.main(dataclasses.replace(cfg, scorer=scorer, data=data))
    assert "\n" not in str(err.value) and not pathlib.Path(cfg.dump_to).exists()


def test_a_folder_without_codes(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            errors.UserError, match="holds no codes .*Pass the folder that `python -m saev.codes`"
        ):
            saev.codes.open(path)


def test_a_block_of_a_large_dictionary_is_small() -> None:
    assert (
        memory.n_block(256, 16384) == 16 and memory.n_block(4096, 10**6) == 1 and memory.n_block(4, 8) == 64
    )


def test_a_field_that_is_added_later_keeps_the_names_of_older_folders() -> None:
    class Later(codes.Metadata, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
        power: float = 1.0

    old: dict[str, tp.Any] = {"scorer": "a/sae.pt", "digest": "d", "activations": "x", "vit_family": "timm"}
    old |= {"vit_ckpt": "v", "layer": 7, "patches": "image", "n_latents": K, "n_imgs": N, "n_patches": P}
    old |= {"imgs_per_shard": 4, "dtype": "float32", "layout": "csr", "image_layout": "csr", "top_n": 0}
    name = helpers.hash_of(old | {"scorer": "", "schema": codes.SCHEMA})[:16]
    assert codes.Metadata(**old).hash == Later(**old).hash == name != Later(**old, power=2.0).hash
