"""Folders of dictionary_learning, by formula and with the package itself (group `peers`). D d_vit, S latents."""

import collections.abc
import json
import logging
import pathlib
import re
import sys

import forked
import pytest
import torch
from torch import Tensor

from saev import errors, nn
from saev.compat import dictionary_learning, known_keys
from saev.nn import config

ROOT = pathlib.Path(__file__).parent.parent
D, S, K = 6, 25, 4


@pytest.fixture(scope="module", autouse=True)
def torch_as_it_was() -> collections.abc.Iterator[None]:
    """dictionary_learning imports nnsight, which patches torch (its FakeTensor, too) for the whole process."""
    yield
    if nnsight := sys.modules.get("nnsight"):
        nnsight.DEFAULT_PATCHER.__exit__(None, None, None)


def batch() -> Tensor:
    return 2 * torch.randn(40, D, generator=torch.Generator().manual_seed(0)) + torch.arange(D)


SHAPES = {
    "AutoEncoder": {"bias": (D,), "encoder.weight": (S, D), "encoder.bias": (S,), "decoder.weight": (D, S)},
    "AutoEncoderTopK": {"b_dec": (D,), "encoder.weight": (S, D), "encoder.bias": (S,), "decoder.weight": (D, S)},
    "BatchTopKSAE": {"b_dec": (D,), "encoder.weight": (S, D), "encoder.bias": (S,), "decoder.weight": (D, S)},
    "JumpReluAutoEncoder": {"W_enc": (D, S), "b_enc": (S,), "W_dec": (S, D), "b_dec": (D,), "threshold": (S,)},
}  # fmt: skip


def folder(
    tmp_path: pathlib.Path, kind: str, more: dict[str, Tensor] | None = None, **cfg: object
) -> pathlib.Path:
    generator = torch.Generator().manual_seed(1)
    state = {k: torch.randn(shape, generator=generator) for k, shape in SHAPES[kind].items()}
    if "TopK" in kind:
        state |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(1.5)}
        cfg = {"k": K, **cfg}
    dpath = tmp_path / "trainer_0"
    dpath.mkdir(exist_ok=True)
    torch.save({**state, **(more or {})}, dpath / "ae.pt")
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": S, "lr": 1e-3, **cfg}
    (dpath / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"d": 1}}))
    return dpath


def formula(kind: str, dpath: pathlib.Path) -> tuple[Tensor, Tensor]:
    t = torch.load(dpath / "ae.pt", weights_only=True)
    if kind == "JumpReluAutoEncoder":  # does not subtract b_dec
        pre_BS = batch() @ t["W_enc"] + t["b_enc"]
        f_BS = torch.where(pre_BS > t["threshold"], pre_BS, 0.0).relu()
        return f_BS, f_BS @ t["W_dec"] + t["b_dec"]
    b_dec = t["bias" if kind == "AutoEncoder" else "b_dec"]
    f_BS = ((batch() - b_dec) @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    if kind == "AutoEncoderTopK":
        f_BS = torch.where(f_BS >= f_BS.topk(K).values[:, -1:], f_BS, 0.0)
    if kind == "BatchTopKSAE":
        f_BS = torch.where(f_BS > 1.5, f_BS, 0.0)
    return f_BS, f_BS @ t["decoder.weight"].T + b_dec


def assert_same(sae: nn.SparseAutoencoder, f_BS: Tensor, x_hat_BD: Tensor) -> None:
    got_x_hat, got_f = sae(batch())
    assert 0 < (f_BS > 0).float().mean() < 1
    torch.testing.assert_close(got_f, f_BS, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_x_hat, x_hat_BD, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", SHAPES)
def test_each_class_by_its_formula(kind: str, tmp_path: pathlib.Path) -> None:
    dpath = folder(tmp_path, kind)
    assert_same(dictionary_learning.load(dpath), *formula(kind, dpath))


def test_a_batch_top_k_without_a_threshold_says_so(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    dpath = folder(tmp_path, "BatchTopKSAE", {"threshold": torch.tensor(-1.0)})
    with caplog.at_level(logging.WARNING, "saev"):
        sae = dictionary_learning.load(dpath)
    assert "threshold was never set; every positive value fires" in caplog.text
    assert isinstance(sae.cfg, config.BatchTopK) and sae.cfg.top_k == K and sae.threshold == 0


@pytest.mark.slow
def test_the_command(tmp_path: pathlib.Path) -> None:
    dpath, fpath = folder(tmp_path, "AutoEncoderTopK"), tmp_path / "sae.pt"
    command = [sys.executable, "-m", "saev.compat", "dictionary_learning", "load", str(dpath), str(fpath)]
    done = forked.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, str(fpath)), done.stderr
    assert_same(nn.load(fpath), *formula("AutoEncoderTopK", dpath))


class Touch:
    def __init__(self, fpath: pathlib.Path):
        self.fpath = fpath

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return pathlib.Path.touch, (self.fpath,)


@pytest.mark.parametrize(
    ("kind", "cfg", "more", "match"),
    [
        ("AutoEncoder", {"dict_class": "IdentityDict"}, {}, "dict_class is 'IdentityDict'; saev can read"),
        ("AutoEncoder", {"dict_class": ["AutoEncoder"]}, {}, "dict_class is"),
        ("AutoEncoder", {"norm_factor": 3.0}, {}, "unknown key norm_factor. It may change"),
        ("AutoEncoder", {"k": 3}, {}, "k is 3, but a AutoEncoder has none"),
        ("AutoEncoder", {"dict_size": S + 1}, {}, "tensor encoder.weight has shape"),
        ("AutoEncoder", {"activation_dim": "6"}, {}, "activation_dim is '6', not a positive"),
        ("AutoEncoder", {}, {"scale": torch.ones(S)}, "unknown tensor scale"),
        ("AutoEncoder", {}, {"bias": torch.full((D,), torch.nan)}, "b_dec holds NaN"),
        ("AutoEncoderTopK", {"k": 5}, {}, "its k is 4, but config.json says 5"),
        ("AutoEncoderTopK", {}, {"k": torch.tensor(4.0)}, "k is not a whole number"),
        ("JumpReluAutoEncoder", {"dict_class": "AutoEncoder"}, {}, "encoder.weight is missing"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(kind: str, cfg: dict, more: dict, match: str, tmp_path: pathlib.Path) -> None:
    dpath = folder(tmp_path, kind, more, **cfg)
    with pytest.raises(errors.UserError, match=match):
        dictionary_learning.load(dpath)


def test_broken_folders(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match=r"config\.json: cannot be read"):
        dictionary_learning.load(tmp_path)
    dpath = folder(tmp_path, "AutoEncoder")
    torch.save({"bias": Touch(tmp_path / "owned")}, dpath / "ae.pt")
    with pytest.raises(errors.UserError, match="its tensors cannot be read"):
        dictionary_learning.load(dpath)
    assert not (tmp_path / "owned").exists()
    (dpath / "ae.pt").unlink()
    with pytest.raises(errors.UserError, match=r"ae\.pt: cannot be read"):
        dictionary_learning.load(dpath)
    for text, match in [("{}", "has no trainer"), ("[]", "cannot be read"), ('{"x": 1}', "key x")]:
        (dpath / "config.json").write_text(text)
        with pytest.raises(errors.UserError, match=match):
            dictionary_learning.load(dpath)


# ---- the package itself ----


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("dictionary", "AutoEncoder"),
        ("dictionary", "AutoEncoderNew"),
        ("dictionary", "GatedAutoEncoder"),
        ("dictionary", "JumpReluAutoEncoder"),
        ("trainers.top_k", "AutoEncoderTopK"),
        ("trainers.batch_top_k", "BatchTopKSAE"),
        ("trainers.matryoshka_batch_top_k", "MatryoshkaBatchTopKSAE"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_we_read_what_the_package_saves(module: str, kind: str, tmp_path: pathlib.Path) -> None:
    theirs_module = pytest.importorskip(f"dictionary_learning.{module}")
    more = {"k": K} if "TopK" in kind else {}
    more |= {"group_sizes": [10, S - 10]} if "Matryoshka" in kind else {}
    theirs = getattr(theirs_module, kind)(D, S, **more)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in theirs.parameters():
            p += torch.randn(p.shape, generator=generator)
        if more:
            theirs.threshold.fill_(1.2)
        f_BS = theirs.encode(batch())
        x_hat_BD = theirs.decode(f_BS)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": kind, **({"k": K} if more else {})}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    assert_same(dictionary_learning.load(tmp_path), f_BS, x_hat_BD)


def test_every_key_that_the_package_can_write_is_decided() -> None:
    """The keys of every trainer's `config`, read from its source."""
    package = pytest.importorskip("dictionary_learning")
    known = known_keys.DICTIONARY_LEARNING | {"dict_class", "activation_dim", "dict_size", "k"}
    for fpath in (pathlib.Path(package.__file__).parent / "trainers").glob("*.py"):
        for body in re.findall(r"def config\(self\):\s+return \{(.*?)\}", fpath.read_text(), re.S):
            assert set(re.findall(r"""["'](\w+)["']\s*:""", body)) <= known, fpath.name
