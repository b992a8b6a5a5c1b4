"""The patch table, against scikit-learn in plain loops over all patches.

N images, P patches, D d_vit, K prototypes, C classes.
"""

import dataclasses
import json
import pathlib

import inprocess
import numpy as np
import polars as pl
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from saev import errors, nn, scorers
from saev.data import config as data_config
from saev.data import images, passes
from saev.demo import minicub
from saev.formats import patchlabels, patchresults, shards
from saev.nn import config as nn_config
from saev.protoeval import audit as audit_of_prototypes
from saev.protoeval import config, logistic, merge, patch_fit, run
from saev.report import frame
from saev.scorers import config as scorers_config

pytestmark = pytest.mark.usefixtures("undrawn")

N, P, D = 60, 9, 6
CLASSES = {0: "background", 1: "wing", 2: "bill", 3: "tail", 7: "never"}
PATHS = [f"{i % 5 + 1:03}.Bird/bird {i:03}.jpg" for i in range(N)]
IS_TRAIN_N = np.arange(1, N + 1) % 2 == 1
LABELS_N2 = np.random.default_rng(0).random((N, 2)) < 0.4


def draw() -> tuple[np.ndarray, np.ndarray]:
    """(ids (N, P), -1 without a label; activations (N, P, D)). Dimension d is large on the patches of class d."""
    rng = np.random.default_rng(1)
    id_NP = rng.choice([-1, 0, 0, 0, 1, 2, 3], (N, P))
    acts_NPD = rng.standard_normal((N, P, D)).astype(np.float32)
    acts_NPD += 2 * (id_NP[:, :, None] == np.arange(D))
    return id_NP, acts_NPD


def write_shards(
    dump_to: pathlib.Path, acts_NPD: np.ndarray, id_NP: np.ndarray | None, **data: str
) -> shards.ShardDir:
    """Images in reverse order, so that only a join by path is right."""
    data = {"__class__": "ImageFolder"} | data
    metadata = shards.Metadata("timm", "planted", (3,), P, False, D, N, 7 * P, data)
    out = shards.ShardDir.create(dump_to, metadata, [shards.Record(p, "") for p in PATHS[::-1]], {})
    for shard_i in range(metadata.n_shards):
        image_is = metadata.imgs_in(shard_i)
        with out.writing(shard_i) as writer:
            writer.write(np.ascontiguousarray(acts_NPD[::-1][image_is.start : image_is.stop, None]))
    out = shards.ShardDir.open(str(out.dpath))
    if id_NP is not None:
        patchlabels.write(out, "", id_NP[::-1], CLASSES, {})
    return out


@pytest.fixture
def cfg(tmp_path: pathlib.Path) -> config.ProtoEval:
    root = tmp_path / "CUB_200_2011"
    (root / "attributes").mkdir(parents=True)
    pairs = np.ndenumerate(LABELS_N2)
    files = {
        "images.txt": [f"{i} {path}" for i, path in enumerate(PATHS, 1)],
        "train_test_split.txt": [f"{i} {int(is_train)}" for i, is_train in enumerate(IS_TRAIN_N, 1)],
        "image_class_labels.txt": [f"{i} {(i - 1) % 5 + 1}" for i in range(1, N + 1)],
        "attributes/attributes.txt": ["1 has_a::x", "2 has_a::y"],
        "attributes/image_attribute_labels.txt": [
            f"{i + 1} {t + 1} {int(present)} 4 1.0" for (i, t), present in pairs
        ],
    }
    for name, lines in files.items():
        (root / name).write_text("\n".join(lines) + "\n")
    id_NP, acts_NPD = draw()
    dpath = write_shards(tmp_path / "dump", acts_NPD, id_NP).dpath
    return config.ProtoEval(
        scorer=scorers_config.Random("dot"),
        cub_root=str(root),
        train_data=data_config.Shards(str(dpath), 3),
        patch_labels=str(dpath / "labels.bin"),
        n_prototypes=(4, 12),
        n_train=(-1,),
        n_boot=20,
        force=True,
        dump_to=str(tmp_path / "results"),
        scorers_to=str(tmp_path / "scorers"),
        device="cpu",
    )


def save_sae(fpath: pathlib.Path) -> scorers_config.Sae:
    """Latent i is the positive part of dimension i, minus 1."""
    sae = nn.SparseAutoencoder(nn_config.Relu(d_vit=D, exp_factor=1), 0)
    sae.W_enc.data, sae.b_enc.data = torch.eye(D), -torch.ones(D)
    nn.save(sae.eval(), fpath)
    return scorers_config.Sae(str(fpath))


def like_sae(fpath: pathlib.Path) -> scorers_config.Untrained:
    """An SAE before training, of the shape of a trained one."""
    fpath.parent.mkdir()
    trained = nn.SparseAutoencoder(nn_config.BatchTopK(d_vit=D, d_sae=14, top_k=3), 5)
    nn.save(trained.eval(), fpath)
    return scorers_config.Untrained(str(fpath))


def by_hand(code_NPK: np.ndarray, id_NP: np.ndarray, class_id: int) -> tuple[int, float, float, float, float]:
    """(prototype, train R, test R, AP, purity of the first 16) by scikit-learn, prototype by prototype."""
    is_labelled_NP, code_NPK = id_NP >= 0, code_NPK.astype(np.float64)
    train_n, test_n = (is_labelled_NP & (split_N[:, None]) for split_N in (IS_TRAIN_N, ~IS_TRAIN_N))
    y_n, y_m = id_NP[train_n] == class_id, id_NP[test_n] == class_id
    share = y_n.mean()
    best = (np.inf, 0, None)
    for k in range(code_NPK.shape[2]):
        model = LogisticRegression(solver="newton-cholesky", tol=1e-12, max_iter=1000)
        model.fit(code_NPK[train_n][:, k : k + 1], y_n)
        z_n = model.decision_function(code_NPK[train_n][:, k : k + 1])
        loss = np.mean(np.logaddexp(0, z_n) - y_n * z_n)
        if loss < best[0] - 1e-9:
            best = (loss, k, model)
    loss, k, model = best
    z_m = model.decision_function(code_NPK[test_n][:, k : k + 1])
    entropy = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    bias = -np.where(y_m, np.log(share), np.log(1 - share)).mean()
    last = np.sort(z_m)[-16]  # equal scores at the end of the first 16 share what is left
    hits = y_m[z_m > last].sum() + (16 - (z_m > last).sum()) * y_m[z_m == last].mean()
    r = 1 - np.mean(np.logaddexp(0, z_m) - y_m * z_m) / bias
    return k, 1 - loss / entropy, r, average_precision_score(y_m, z_m), hits / 16


def read(dpath: pathlib.Path, name: str, columns: dict) -> pl.DataFrame:
    return frame.read_csv((dpath / name).read_bytes(), columns)


def of_images_by_hand(code_NPK: np.ndarray, t: int) -> tuple[int, float, float]:
    """(prototype, train AP, test AP) of a trait in the image table."""
    best_NK = code_NPK.max(axis=1)
    aps = [average_precision_score(LABELS_N2[IS_TRAIN_N, t], score_N[IS_TRAIN_N]) for score_N in best_NK.T]
    k = int(np.argmax(np.round(aps, 12)))
    return k, aps[k], float(average_precision_score(LABELS_N2[~IS_TRAIN_N, t], best_NK[~IS_TRAIN_N, k]))


@pytest.mark.parametrize("kind", ["Random", "Units", "Sae", "Untrained"])
def test_equals_a_loop_over_all_patches(cfg: config.ProtoEval, tmp_path: pathlib.Path, kind: str) -> None:
    """Both tables."""
    if kind == "Untrained":
        cfg = dataclasses.replace(cfg, scorer=like_sae(tmp_path / "run" / "sae.pt"))
    if kind == "Sae":
        cfg = dataclasses.replace(cfg, scorer=save_sae(tmp_path / "run" / "sae.pt"), n_prototypes=(2, 6))
    if kind == "Units":
        cfg = dataclasses.replace(cfg, scorer=scorers_config.Units())
    dpath = pathlib.Path(run.main([cfg]))
    id_NP, acts_NPD = draw()
    if kind == "Units":
        code_NPK = np.stack([acts_NPD, -acts_NPD], axis=3).reshape(N, P, -1)
    elif kind == "Sae":
        code_NPK = np.maximum(acts_NPD - 1, 0)
    elif kind == "Untrained":
        (fpath,) = pathlib.Path(cfg.scorers_to).glob("untrained-14-*.bin")
        code_NPK = nn.load(fpath).encode(acts_NPD).numpy()
        assert 2 < (code_NPK[IS_TRAIN_N] > 0).sum(axis=2).mean() < 4
    else:
        (fpath,) = pathlib.Path(cfg.scorers_to).glob("random*.bin")
        scorer = dataclasses.replace(scorers.load(fpath), similarity="dot")
        code_NPK = scorer(torch.from_numpy(acts_NPD).flatten(0, 1)).numpy().reshape(N, P, -1)
    found = read(dpath, "patch-classes.csv", patchresults.PATCH_CLASSES)
    found = found.filter(pl.col("scorer").str.starts_with(kind))
    found = found.filter(~pl.col("scorer").str.ends_with("permuted labels"))
    for n_prototypes in cfg.n_prototypes:
        rows = found.filter(pl.col("n_prototypes") == n_prototypes)
        measured = []
        for class_id, name in CLASSES.items():
            row = rows.filter(pl.col("class") == name).row(0, named=True)
            if name == "never":
                assert np.isnan([row["probe_r"], row["ap"], row["purity"]]).all()
                continue
            k, train_r, r, ap, purity = by_hand(code_NPK[:, :, :n_prototypes], id_NP, class_id)
            assert row["prototype"] == k
            got = (row["train_r"], row["probe_r"], row["ap"], row["purity"])
            assert got == pytest.approx((train_r, r, ap, purity), abs=1e-5 if kind == "Sae" else 1e-6)
            measured.append((r, ap, purity, ap >= 0.3))
        cells = read(dpath, "patches.csv", patchresults.PATCHES).filter(
            pl.col("n_prototypes") == n_prototypes
        )
        cell = cells.filter(pl.col("scorer") == rows["scorer"][0]).row(0, named=True)
        means = [cell[name] for name in ("probe_r", "map", "purity", "coverage")]
        assert means == pytest.approx(np.mean(measured, axis=0).tolist(), abs=1e-5)
        assert cell["n_classes"] == 4
        traits = pl.read_parquet(dpath / "traits.parquet").filter(
            pl.col("n_prototypes") == n_prototypes, pl.col("scorer") == rows["scorer"][0]
        )
        for t, row in enumerate(traits.iter_rows(named=True)):
            got = (row["prototype"], row["train_ap"], row["test_ap"])
            assert got == pytest.approx(of_images_by_hand(code_NPK[:, :, :n_prototypes], t), abs=1e-9)
        for name in ("probe_r", "map", "purity", "coverage"):
            assert cell[f"{name}_low"] <= cell[name] <= cell[f"{name}_high"]


def test_a_latent_that_is_a_parts_mask_is_chosen(cfg: config.ProtoEval, tmp_path: pathlib.Path) -> None:
    """Dimension 5 is 8 on wings and 0 elsewhere. Labels that were permuted do not find it."""
    id_NP, acts_NPD = draw()
    acts_NPD[:, :, 5] = 8 * (id_NP == 1)
    dpath = write_shards(tmp_path / "planted", acts_NPD, id_NP).dpath
    data = data_config.Shards(str(dpath), 3)
    sae = save_sae(tmp_path / "run" / "sae.pt")
    cfg = dataclasses.replace(cfg, scorer=sae, train_data=data, patch_labels="labels.bin", n_prototypes=(6,))
    rows = read(pathlib.Path(run.main([cfg])), "patch-classes.csv", patchresults.PATCH_CLASSES)
    wings = rows.filter(pl.col("class") == "wing").rows_by_key("scorer", named=True, unique=True)
    best = wings["Sae run"]
    assert best["prototype"] == 5 and best["weight"] > 0
    assert min(best["train_r"], best["probe_r"]) > 0.98 and (best["ap"], best["purity"]) == (1, 1)
    null = wings["Sae run, permuted labels"]
    assert abs(null["probe_r"]) < 0.1 and null["train_r"] < 0.05
    share = (id_NP[~IS_TRAIN_N] == 1).sum() / (id_NP[~IS_TRAIN_N] >= 0).sum()
    constant = wings["constant"]
    assert constant["probe_r"] == 0
    assert (constant["ap"], constant["purity"]) == pytest.approx((share, share))


def test_the_order_of_the_shards_and_other_folders_change_nothing(
    cfg: config.ProtoEval, tmp_path: pathlib.Path
) -> None:
    """The same images in another order, as two directories; only a join by path and by name is right."""
    want = run.main([cfg])
    id_NP, acts_NPD = draw()
    roots = []
    for part, own in enumerate((np.arange(0, N, 3), np.setdiff1d(np.arange(N), np.arange(0, N, 3)))):
        metadata = shards.Metadata("timm", "planted", (3,), P, False, D, len(own), 7 * P, {"part": part})
        out = shards.ShardDir.create(
            tmp_path / "parts", metadata, [shards.Record(PATHS[i], "") for i in own], {}
        )
        for shard_i in range(metadata.n_shards):
            with out.writing(shard_i) as writer:
                image_is = metadata.imgs_in(shard_i)
                writer.write(np.ascontiguousarray(acts_NPD[own][image_is.start : image_is.stop, None]))
        out = shards.ShardDir.open(str(out.dpath))
        ids = {name: 10 * part + i for i, name in CLASSES.items()}  # other ids for the same names
        new_NP = np.array([-1, *(ids[CLASSES.get(i, "never")] for i in range(8))])[id_NP[own] + 1]
        patchlabels.write(out, "parts", new_NP, {i: name for name, i in ids.items()}, {})
        roots.append(str(out.dpath))
    sae = save_sae(tmp_path / "run" / "sae.pt")
    data = data_config.Shards(roots[0], 3, more_roots=(roots[1],))
    other = dataclasses.replace(cfg, scorer=sae, train_data=data, patch_labels="labels-parts.bin")
    dpaths = [pathlib.Path(run.main([each])) for each in (other, dataclasses.replace(cfg, scorer=sae))]
    got, want = (json.loads((dpath / "about.json").read_bytes())["patch_labels"] for dpath in dpaths)
    assert got == want != ""
    got, want = (read(dpath, "patch-classes.csv", patchresults.PATCH_CLASSES) for dpath in dpaths)
    keep = ~pl.col("scorer").str.contains("permuted")
    by = ["scorer", "n_prototypes", "class"]
    got, want = (rows.filter(keep).sort(by) for rows in (got, want))
    assert got.select(by).equals(want.select(by)) and got["prototype"].equals(want["prototype"])
    for name in ("weight", "train_r", "probe_r", "ap", "purity"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-9)


def test_less_memory_means_more_passes(
    cfg: config.ProtoEval, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same table from sums of 5 prototypes, and scores of 3, at a time."""
    want = read(pathlib.Path(run.main([cfg])), "patch-classes.csv", patchresults.PATCH_CLASSES)
    n_bytes = logistic.Sums.n_bytes(2 * len(CLASSES))
    small = dataclasses.replace(cfg, dump_to=str(tmp_path / "small"), memory_gb=5 * n_bytes / 1e9)
    n_passes = []
    with monkeypatch.context() as patch:
        patch.setattr(patch_fit, "TILE", 100)
        patch.setattr(patch_fit, "_sums", lambda *a, own=patch_fit._sums: n_passes.append(a[1]) or own(*a))
        got = read(pathlib.Path(run.main([small])), "patch-classes.csv", patchresults.PATCH_CLASSES)
    assert n_passes == [[(0, 0, 5)], [(0, 5, 10)], [(0, 10, 12)]]
    for name in want.columns[2:]:
        if want[name].dtype.is_float():
            np.testing.assert_allclose(got[name], want[name], rtol=1e-9, atol=1e-12)
        else:
            assert got[name].equals(want[name])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "damaged", "foreign"])
def test_a_killed_pass_goes_on(
    cfg: config.ProtoEval, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(passes, "SAVE_S", 0.0)
    monkeypatch.setattr(patch_fit, "N_IMGS", 6)
    want = (pathlib.Path(run.main([cfg])) / "patch-classes.csv").read_bytes()
    again = dataclasses.replace(cfg, dump_to=str(tmp_path / "again"))
    read_of: list[int] = []
    own_add = logistic.Sums.add

    def add(sums: logistic.Sums, code_KR: np.ndarray, class_R2: np.ndarray) -> None:
        if len(read_of) == 3 and killed:
            raise KeyboardInterrupt
        read_of.append(len(class_R2))
        own_add(sums, code_KR, class_R2)

    monkeypatch.setattr(logistic.Sums, "add", add)
    killed = True
    with pytest.raises(KeyboardInterrupt):
        run.main([again])
    (fpath,) = tmp_path.glob("again/.*.partial/patches/sums0.npz")
    if how == "damaged":
        data = bytearray(fpath.read_bytes())
        data[len(data) // 2] ^= 1
        fpath.write_bytes(data)
    elif how == "foreign":
        with np.load(fpath) as arrays:
            np.savez(fpath, **{**arrays, "key": np.array("other")})
    killed = False
    read_of.clear()
    assert (pathlib.Path(run.main([again])) / "patch-classes.csv").read_bytes() == want
    assert len(read_of) == (2 if how == "killed" else 5)  # of 5 blocks of 6 train images


def test_bad_input_is_one_line(cfg: config.ProtoEval, tmp_path: pathlib.Path) -> None:
    dpath = pathlib.Path(cfg.train_data.shard_root)
    id_NP, acts_NPD = draw()
    for change, message in [
        ({"patch_labels": "masks.png"}, r"--patch-labels masks\.png: pass the labels\.bin"),
        ({"patch_labels": str(tmp_path / "labels.bin")}, "does not lie beside the shards of --train-data"),
        ({"patch_labels": "labels-x.bin"}, r"labels-x\.bin: no such file.*It has: \(without a name\)"),
    ]:
        with pytest.raises(errors.UserError, match=message):
            run.main([dataclasses.replace(cfg, **change)])
    shard_dir = shards.ShardDir.open(str(dpath))
    for new_NP, message in [
        (np.full((N, P), -1), "the patches of the train images have no label"),
        (np.where(IS_TRAIN_N[::-1, None], id_NP[::-1], 1), "of the test images have only the class wing"),
    ]:
        patchlabels.write(shard_dir, "", new_NP, CLASSES, {})
        with pytest.raises(errors.UserError, match=message):
            run.main([cfg])
    other = write_shards(tmp_path / "other", acts_NPD + 1, id_NP).dpath
    (dpath / "labels.json").unlink()
    with pytest.raises(errors.UserError, match=r"labels\.json is missing"):
        run.main([cfg])
    assert (other / "labels.bin").exists()


def test_other_labels_are_another_result(cfg: config.ProtoEval) -> None:
    """A name of the file gives the same folder; new labels in it another one; no labels a third."""
    first = run.main([cfg])
    assert run.main([dataclasses.replace(cfg, patch_labels="labels.bin")]) == first
    without = run.main([dataclasses.replace(cfg, patch_labels="")])
    assert not (pathlib.Path(without) / "patches.md").exists()
    id_NP, _ = draw()
    patchlabels.write(shards.ShardDir.open(cfg.train_data.shard_root), "", np.roll(id_NP, 1), CLASSES, {})
    third = run.main([cfg])
    assert len({first, without, third}) == 3
    hashes = [
        json.loads((pathlib.Path(dpath) / "about.json").read_bytes())["patch_labels"]
        for dpath in (first, without, third)
    ]
    assert hashes[1] == "" and len(set(hashes)) == 3
    (pathlib.Path(first) / "patches.csv").write_text("")
    patchlabels.write(shards.ShardDir.open(cfg.train_data.shard_root), "", id_NP[::-1], CLASSES, {})
    with pytest.raises(errors.UserError, match=r"patches\.csv: was changed"):
        run.main([cfg])


DOCS = pathlib.Path(__file__).parent.parent / "docs"


def test_every_file_and_column_is_documented(cfg: config.ProtoEval) -> None:
    run.main([cfg])
    text = (DOCS / "results.md").read_text()
    sections = {section.split("\n")[0]: section for section in text.split("\n### ")}
    for name in patchresults.PATCH_FILES:
        assert f"| `{name}` |" in text
    for name, columns in (
        ("patches.csv", patchresults.PATCHES),
        ("patch-classes.csv", patchresults.PATCH_CLASSES),
        ("patch-differences.csv", patchresults.PATCH_DIFFERENCES),
    ):
        assert all(f"`{column}`" in sections[name] for column in columns), name


@pytest.mark.slow
def test_tables_name_the_dumps_resize(cfg: config.ProtoEval, tmp_path: pathlib.Path) -> None:
    """So a report does not replace one dump's rows of reference by another's."""
    _, acts_NPD = draw()
    for mode in ("squash", "pad"):
        dpath = write_shards(tmp_path / mode, acts_NPD, None, resize=mode).dpath
        data = data_config.Shards(str(dpath), 3)
        run.main([dataclasses.replace(cfg, patch_labels="", train_data=data, n_prototypes=(4,))])
    found = {result.about.tokens for result in merge.read_all(tmp_path / "results")}
    assert found == {f"9 tokens an image (image, --resize {mode})" for mode in ("squash", "pad")}


@pytest.mark.slow
def test_the_example_in_the_docs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of docs/patch-table.md, then that of docs/audit.md, on made-up activations of 40 of mini-CUB's birds,
    with fewer prototypes and permutations than the docs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(audit_of_prototypes, "N_NULL", 2)
    texts = [(DOCS / name).read_text().partition("## Example")[2] for name in ("patch-table.md", "audit.md")]
    lines = "\n".join(texts).replace("\\\n", "").splitlines()
    commands = [line.split("uv run ")[1] for line in lines if "    uv run " in line]
    for old, new in (
        ("640", "40"),
        (" 128 512 1536", " 48"),
        ("1536", "48"),
        (" 64 -1", " -1"),
        (" 50 100", ""),
    ):
        commands = [command.replace(old, new) for command in commands]
    demo, label, evaluate, audit = commands
    assert demo == "python -m saev.demo"
    cub_root = pathlib.Path("demo/40/CUB_200_2011")
    minicub.draw(cub_root, n_imgs=40, parts=pathlib.Path("demo/40/parts"))
    records = [shards.Record(path, "") for path in (cub_root / "images.txt").read_text().split()[1::2]]
    transform = images.Transform((112, 112), 112, False, "bicubic", (0.5,) * 3, (0.5,) * 3)
    metadata = shards.Metadata("timm", "planted", (7,), 49, False, 48, 40, 40 * 49, {"__class__": "Cub200"})
    out = shards.ShardDir.create(tmp_path / "demo/shards", metadata, records, transform.to_dict())
    with out.writing(0) as writer:
        writer.write(np.random.default_rng(0).standard_normal((40, 1, 49, 48), np.float32))
    shard_root = str(out.dpath)
    pathlib.Path("demo/scorers.toml").write_text('[[scorer]]\ntype = "random"\n[[scorer]]\ntype = "pca"\n')
    for command in (label, evaluate, audit):
        words = command.replace("HASH", pathlib.Path(shard_root).name).removeprefix("python ").split()
        words = [f"{tmp_path}/{word}" if word.startswith("demo/") else word for word in words]
        done = inprocess.run(*words)
        assert done.returncode == 0, done.stderr
        if command is evaluate:
            dpath = pathlib.Path(done.stdout.split()[-1])
    assert (
        "| Scorer | Prototypes | mAP |" in done.stdout.replace("Train | ", "")
        and "| Probe R |" in done.stdout
        and "| Scorer | Prototypes | Yield(10) | Yield(25) | Area |" in done.stdout
    )
    audited = pl.read_parquet(pathlib.Path(done.stdout.split()[-1]) / "audit.parquet")
    ranks = audited.group_by("scorer").agg(pl.len(), pl.col("prototype").n_unique())
    assert set(ranks.rows()) == {("constant", 25, 1), ("Random", 25, 25), ("Pca", 25, 25)}
    rows = read(dpath, "patch-classes.csv", patchresults.PATCH_CLASSES)
    assert set(rows["scorer"]) == {
        "constant",
        "Random",
        "Pca",
        "Random, permuted labels",
        "Pca, permuted labels",
    }
    constant = rows.filter(pl.col("scorer") == "constant", pl.col("class") == "background").row(0, named=True)
    labels = patchlabels.read(shards.ShardDir.open(shard_root))
    cub_split = pathlib.Path("demo/40/CUB_200_2011/train_test_split.txt").read_text().split()[1::2]
    is_background_n = labels.id_NP[np.array(cub_split) == "0"] == 0
    assert constant["ap"] == pytest.approx(is_background_n.mean())
