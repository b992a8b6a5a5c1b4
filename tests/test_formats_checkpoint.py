"""Checkpoint files: what is refused, and how."""

import json
import pathlib

import pytest
import torch

from saev import errors, nn
from saev.formats import checkpoint
from saev.nn import config

FIELD_FILE = pathlib.Path(__file__).parent / "data" / "schema2_relu.pt"


@pytest.fixture
def fpath(tmp_path: pathlib.Path) -> pathlib.Path:
    nn.save(nn.SparseAutoencoder(config.TopK(d_vit=4, exp_factor=2)), tmp_path / "run" / "sae.pt")
    return tmp_path / "run" / "sae.pt"


def edit_header(fpath: pathlib.Path, **changes: object) -> None:
    line, _, payload = fpath.read_bytes().partition(b"\n")
    fpath.write_bytes(json.dumps(json.loads(line) | changes).encode() + b"\n" + payload)


def test_header_is_one_line_of_json(fpath: pathlib.Path) -> None:
    with fpath.open("rb") as fd:
        header = json.loads(fd.readline())
    assert header == {
        "lib": "saev",
        "schema": 100,
        "kind": "sae",
        "cls": "TopK",
        "cfg": {"d_vit": 4, "exp_factor": 2, "top_k": 32},
    }


@pytest.mark.parametrize(
    "cfg", [config.Relu(d_vit=6), config.TopK(d_vit=6), config.BatchTopK(d_vit=6)]
)
def test_round_trip(cfg: config.Sae, tmp_path: pathlib.Path) -> None:
    sae = nn.SparseAutoencoder(cfg, seed=3)
    sae.initialize(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)) + 2)
    sae.threshold.fill_(0.3)
    nn.save(sae.eval(), tmp_path / "sae.pt")
    loaded = nn.load(str(tmp_path / "sae.pt"))
    assert loaded.cfg == cfg and not loaded.training
    x_BD = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    for got, want in zip(loaded(x_BD), sae(x_BD), strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=0, atol=0)


def test_schemas_of_the_field_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        errors.UserError, match=r"checkpoint schema 2 .* is unknown to this version"
    ):
        nn.load(FIELD_FILE)
    (tmp_path / "old.pt").write_bytes(b'{"d_vit": 4}\n')
    with pytest.raises(errors.UserError, match="schema 'missing'"):
        nn.load(tmp_path / "old.pt")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"schema": 101}, "checkpoint schema 101"),
        ({"kind": "scorer"}, "holds a 'scorer', but a 'sae' is needed"),
        ({"cls": "JumpRelu"}, "architecture 'JumpRelu' is unknown"),
        ({"cfg": {"d_vit": 4, "k": 2}}, "cfg does not fit TopK"),
        ({"cfg": {"d_vit": 8, "exp_factor": 2, "top_k": 2}}, "tensors cannot be read"),
    ],
)
def test_edited_headers(fpath: pathlib.Path, changes: dict[str, object], match: str) -> None:
    edit_header(fpath, **changes)
    with pytest.raises(errors.UserError, match=match):
        nn.load(fpath)


def test_files_that_are_no_checkpoints(fpath: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        errors.UserError, match=r"is a directory, not a checkpoint file. Did you mean .*sae\.pt"
    ):
        nn.load(fpath.parent)
    with pytest.raises(errors.UserError, match="no such checkpoint"):
        nn.load(tmp_path / "gone.pt")
    for content in (b"", b"PK\x03\x04\n", b"[1]\n"):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(errors.UserError, match="not a saev checkpoint"):
            nn.load(tmp_path / "x.pt")


def test_cut_file(fpath: pathlib.Path) -> None:
    fpath.write_bytes(fpath.read_bytes()[:-100])
    with pytest.raises(errors.UserError, match="tensors cannot be read"):
        nn.load(fpath)


def test_a_pickle_in_the_payload_is_not_run(fpath: pathlib.Path, tmp_path: pathlib.Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return pathlib.Path.touch, (tmp_path / "owned",)

    header, _ = checkpoint.read(fpath, "sae")
    torch.save({"W_enc": Touch()}, tmp_path / "bad")
    line = json.dumps(header).encode()
    fpath.write_bytes(line + b"\n" + (tmp_path / "bad").read_bytes())
    with pytest.raises(errors.UserError, match="tensors cannot be read"):
        nn.load(fpath)
    assert not (tmp_path / "owned").exists()
