"""Checkpoint files: a line of JSON, then bytes; and what is refused."""

import json
import pathlib

import pytest
import torch

from saev import errors, helpers, nn
from saev.formats import checkpoint
from saev.nn import config


@pytest.fixture
def sae_fpath(tmp_path: pathlib.Path) -> pathlib.Path:
    fpath = tmp_path / "x" / "sae.pt"
    nn.save(nn.SparseAutoencoder(config.TopK(d_vit=4, exp_factor=2, top_k=3)), fpath)
    return fpath


def test_round_trip_of_any_bytes(tmp_path: pathlib.Path) -> None:
    payload = bytes(range(256)) * 3
    checkpoint.write(tmp_path / "a.pt", "scorer", {"cls": "X", "cfg": {"k": 3}}, payload)
    header, got = checkpoint.read(tmp_path / "a.pt", "scorer")
    assert got == payload
    assert (header["cls"], header["cfg"]) == ("X", {"k": 3})
    assert checkpoint.kind(tmp_path / "a.pt") == "scorer"


def test_bytes_are_one_json_line_then_the_payload(tmp_path: pathlib.Path) -> None:
    checkpoint.write(tmp_path / "a.pt", "sae", {"note": "two\nlines"}, b"\n\x00payload")
    line, _, rest = (tmp_path / "a.pt").read_bytes().partition(b"\n")
    want = {"lib": "saev", "schema": checkpoint.SCHEMA, "kind": "sae", "note": "two\nlines"}
    got = json.loads(line)
    assert len(got.pop("xxh3")) == 32 and got == want
    assert rest == b"\n\x00payload"


@pytest.mark.parametrize("at", [-1, 0, 5])
def test_changed_bytes_are_refused(tmp_path: pathlib.Path, at: int) -> None:
    checkpoint.write(tmp_path / "a.bin", "scorer", {}, b"0123456789")
    content = bytearray((tmp_path / "a.bin").read_bytes())
    place = content.index(b"\n") + 1 + at % 10
    content[place] ^= 1
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(errors.UserError, match=r"a\.bin: its bytes are not those .* Delete it"):
        checkpoint.read(tmp_path / "a.bin", "scorer")


def refuses(fpath: pathlib.Path, match: str) -> None:
    with pytest.raises(errors.UserError, match=match):
        nn.load(fpath)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"exp_factor": 2}, "schema 'missing'"),
        ({"schema": 6, "cfg": {}}, "schema 6"),
        ({"lib": "saev", "schema": 102, "kind": "sae"}, "schema 102"),
        ({"lib": "other", "schema": 100, "kind": "sae"}, "lib 'other'"),
        ({"lib": "saev", "schema": 100, "kind": "scorer"}, "holds a 'scorer'.* 'sae' is needed"),
        ({"lib": "saev", "schema": 100, "kind": "sae", "cls": "Gated"}, "architecture 'Gated'"),
        ({"lib": "saev", "schema": 100, "kind": "sae", "cls": "TopK"}, "cfg does not fit TopK"),
        (
            {"lib": "saev", "schema": 100, "kind": "sae", "cls": "TopK", "cfg": {"d_vit": "4"}},
            "cfg does not fit TopK",
        ),
        (
            {"lib": "saev", "schema": 100, "kind": "sae", "cls": "TopK", "cfg": {}},
            "cfg does not fit TopK",
        ),
    ],
)
def test_headers_that_are_refused(header: dict, match: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "sae.pt").write_bytes(json.dumps(header).encode() + b"\nrest")
    refuses(tmp_path / "sae.pt", match)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"PK\x03\x04junk", b"[1]\n", b"\xff\xfe{}\n", b"[" * 99999]
)
def test_not_a_checkpoint(content: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / "sae.pt").write_bytes(content)
    refuses(tmp_path / "sae.pt", "not a saev checkpoint")


def test_directory_suggests_the_file_inside(sae_fpath: pathlib.Path) -> None:
    refuses(sae_fpath.parent, f"is a directory.*Did you mean {sae_fpath}")


def test_empty_directory(tmp_path: pathlib.Path) -> None:
    refuses(tmp_path, r"is a directory.*Pass the file inside it \(sae.pt\)")


def test_no_such_file(tmp_path: pathlib.Path) -> None:
    refuses(tmp_path / "gone.pt", "gone.pt: no such checkpoint")
    assert checkpoint.kind(tmp_path / "gone.pt") is None


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.6, 0.95, 0.999])
def test_truncated_payload(sae_fpath: pathlib.Path, keep: float) -> None:
    """With a checksum and, as older files, without."""
    line, _, payload = sae_fpath.read_bytes().partition(b"\n")
    for header, match in (
        (line, "not those that were written"),
        (unsigned(line), "its tensors cannot be read"),
    ):
        sae_fpath.write_bytes(header + b"\n" + payload[: int(keep * len(payload))])
        refuses(sae_fpath, match)


def unsigned(line: bytes) -> bytes:
    header = json.loads(line)
    del header["xxh3"]
    return json.dumps(header).encode()


def test_tensors_of_another_size(sae_fpath: pathlib.Path) -> None:
    line, _, payload = sae_fpath.read_bytes().partition(b"\n")
    header = json.loads(line)
    header["cfg"]["exp_factor"] = 4
    sae_fpath.write_bytes(json.dumps(header).encode() + b"\n" + payload)
    refuses(sae_fpath, "its tensors cannot be read")


def test_failed_write_leaves_the_old_file(sae_fpath: pathlib.Path) -> None:
    before = sae_fpath.read_bytes()
    with pytest.raises(OSError, match="disk"), helpers.atomic(sae_fpath) as tmp_fpath:
        tmp_fpath.write_bytes(b"half")
        raise OSError("disk full")
    assert sae_fpath.read_bytes() == before
    assert [p.name for p in sae_fpath.parent.iterdir()] == ["sae.pt"]


def test_header_that_is_no_json_writes_nothing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(TypeError):
        checkpoint.write(tmp_path / "a.pt", "sae", {"bad": object()}, b"")
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_in_the_payload_is_not_run(
    sae_fpath: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    class Touch:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return pathlib.Path.touch, (tmp_path / "owned",)

    torch.save({"W_enc": Touch()}, tmp_path / "bad")
    line, _, _ = sae_fpath.read_bytes().partition(b"\n")
    sae_fpath.write_bytes(unsigned(line) + b"\n" + (tmp_path / "bad").read_bytes())
    refuses(sae_fpath, "its tensors cannot be read")
    assert not (tmp_path / "owned").exists()


def test_header_of_an_sae(sae_fpath: pathlib.Path) -> None:
    header, _ = checkpoint.read(sae_fpath, "sae")
    assert header == {
        "lib": "saev",
        "schema": 101,
        "kind": "sae",
        "cls": "TopK",
        "cfg": {
            "d_vit": 4,
            "exp_factor": 2,
            "normalize": "scale",
            "b_dec_init": "mean",
            "tied_init": True,
            "top_k": 3,
            "aux_coeff": 1 / 32,
            "aux_k": 0,
        },
        "activations": {},
    }
