"""Checkpoint files: a line of JSON, then bytes; and what is refused."""

import io
import json
import pathlib
import typing as tp

import pytest
import torch
import xxhash

from saev import errors, helpers, nn, scorers
from saev.formats import checkpoint, jsonfile
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
    assert got.pop("checksum") == jsonfile.checksum(want, b"\n\x00payload") and got == want
    assert rest == b"\n\x00payload"


@pytest.mark.parametrize("at", [-1, 0, 5])
def test_changed_bytes_are_refused(tmp_path: pathlib.Path, at: int) -> None:
    checkpoint.write(tmp_path / "a.bin", "scorer", {}, b"0123456789")
    content = bytearray((tmp_path / "a.bin").read_bytes())
    place = content.index(b"\n") + 1 + at % 10
    content[place] ^= 1
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(errors.UserError, match=r"a\.bin: its bytes changed .* Delete it"):
        checkpoint.read(tmp_path / "a.bin", "scorer")


def refuses(fpath: pathlib.Path, match: str) -> None:
    with pytest.raises(errors.UserError, match=match):
        nn.load(fpath)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"exp_factor": 2}, "schema 'missing'"),
        ({"schema": 6, "cfg": {}}, "schema 6"),
        ({"lib": "saev", "schema": 103, "kind": "sae"}, "schema 103"),
        ({"lib": "saev", "schema": 100.0, "kind": "sae"}, "schema 100.0"),
        ({"lib": "saev", "schema": 102, "kind": "sae"}, "its bytes changed since it was written"),
        ({"lib": "other", "schema": 100, "kind": "sae"}, "lib 'other'"),
        ({"lib": "saev", "schema": 100, "kind": "scorer"}, "holds a 'scorer'.* 'sae' is needed"),
        ({"lib": "saev", "schema": 100, "kind": "sae", "cls": "Gated"}, "architecture 'Gated'"),
        ({"lib": "saev", "schema": 100, "kind": "sae", "cls": "TopK"}, "cfg does not match TopK"),
        (
            {"lib": "saev", "schema": 100, "kind": "sae", "cls": "TopK", "cfg": {"d_vit": "4"}},
            "cfg does not match TopK",
        ),
        ({"lib": "saev", "schema": 100, "kind": "sae", "cls": "TopK", "cfg": {}}, "cfg does not match TopK"),
    ],
)
def test_headers_that_are_refused(header: dict, match: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "sae.pt").write_bytes(json.dumps(header).encode() + b"\nrest")
    refuses(tmp_path / "sae.pt", match)


@pytest.mark.parametrize("content", [b"", b"\n", b"PK\x03\x04junk", b"[1]\n", b"\xff\xfe{}\n", b"[" * 99999])
def test_not_a_checkpoint(content: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / "sae.pt").write_bytes(content)
    refuses(tmp_path / "sae.pt", "not a saev checkpoint")


def test_a_number_that_is_a_boolean(sae_fpath: pathlib.Path) -> None:
    header, payload = checkpoint.read(sae_fpath, "sae")
    cfg = {**header["cfg"], "top_k": True}
    checkpoint.write(sae_fpath, "sae", {"cls": "TopK", "cfg": cfg, "activations": {}}, payload)
    refuses(sae_fpath, "cfg does not match TopK: top_k is True")


@pytest.mark.parametrize("kind", [[], {}, 1, None, True])
def test_a_kind_that_is_no_text(kind: object, tmp_path: pathlib.Path) -> None:
    header = {"lib": "saev", "schema": checkpoint.SCHEMA, "kind": kind}
    (tmp_path / "a.bin").write_bytes(json.dumps(header).encode() + b"\nrest")
    with pytest.raises(errors.UserError, match="but a 'scorer' is needed here"):
        scorers.load(tmp_path / "a.bin")


def test_directory_suggests_the_file_inside(sae_fpath: pathlib.Path) -> None:
    refuses(sae_fpath.parent, f"is a directory.*Did you mean {sae_fpath}")


def test_empty_directory(tmp_path: pathlib.Path) -> None:
    refuses(tmp_path, r"is a directory.*Pass the sae.pt that train.py printed")


def test_no_such_file(tmp_path: pathlib.Path) -> None:
    refuses(tmp_path / "gone.pt", "gone.pt: no such checkpoint")
    assert checkpoint.kind(tmp_path / "gone.pt") is None


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.6, 0.95, 0.999])
def test_truncated_payload(sae_fpath: pathlib.Path, keep: float) -> None:
    """Also of a header that says so."""
    header, payload = split(sae_fpath)
    cut = payload[: int(keep * len(payload))]
    sae_fpath.write_bytes(json.dumps(header).encode() + b"\n" + cut)
    refuses(sae_fpath, "its bytes changed since it was written")
    rewrite(sae_fpath, header, cut)
    refuses(sae_fpath, "its tensors cannot be read")


def split(fpath: pathlib.Path) -> tuple[dict[str, tp.Any], bytes]:
    line, _, payload = fpath.read_bytes().partition(b"\n")
    return json.loads(line), payload


def rewrite(fpath: pathlib.Path, header: dict[str, tp.Any], payload: bytes) -> None:
    """As somebody would who knows how."""
    header = {k: v for k, v in header.items() if k not in ("lib", "schema", "checksum")}
    checkpoint.write(fpath, header.pop("kind"), header, payload)


def test_tensors_of_another_size(sae_fpath: pathlib.Path) -> None:
    header, payload = split(sae_fpath)
    for d_sae, match in [
        (16, "its tensors do not match its header"),
        (2**30, "its tensors do not match its header"),  # no model of that size is made
        (10**12, "1,000,000,000,000 latents .* take 32,000 GB"),
    ]:
        header["cfg"]["d_sae"] = d_sae
        rewrite(sae_fpath, header, payload)
        refuses(sae_fpath, match)


def test_a_header_that_says_more(sae_fpath: pathlib.Path) -> None:
    header, payload = split(sae_fpath)
    rewrite(sae_fpath, header | {"sign": -1}, payload)
    refuses(sae_fpath, "unknown key sign. It may change what the SAE computes")
    header["cfg"]["sign"] = -1
    rewrite(sae_fpath, header, payload)
    refuses(sae_fpath, "header's cfg does not match TopK")


def with_state(fpath: pathlib.Path, change: tp.Callable[[dict[str, tp.Any]], object]) -> None:
    """Changes a file's tensors, and its checksum with them."""
    header, payload = split(fpath)
    state = torch.load(io.BytesIO(payload), weights_only=True)
    state = change(state) or state
    out = io.BytesIO()
    torch.save(state, out)
    rewrite(fpath, header, out.getvalue())


CRAFTED = {
    "a list": (lambda s: [1, 2], "holds a list instead of a dict"),
    "no tensor": (lambda s: {"b_dec": s["b_dec"]}, "do not match its header .*W_dec"),
    "one more": (lambda s: s.update(W_gate=s["b_dec"]), "do not match its header"),
    "a number": (lambda s: s.update(W_dec=3), "do not match its header"),
    "wider": (lambda s: s.update(W_dec=torch.zeros(8, 5)), r"W_dec has shape \(8, 5\)"),
    "no rows": (lambda s: s.update(W_dec=torch.zeros(0, 4)), r"W_dec has shape \(0, 4\)"),
    "fewer bytes": (
        lambda s: s.update(W_dec=torch.zeros(1).expand(8, 4)),
        r"a tensor of shape \(8, 4\) has fewer bytes",
    ),
    "NaN": (lambda s: s["W_enc"].view(-1).__setitem__(3, float("nan")), "W_enc holds NaN or inf"),
    "infinity": (lambda s: s["b_dec"].__setitem__(0, -float("inf")), "b_dec holds NaN or inf"),
    "no threshold": (lambda s: s.update(threshold=torch.tensor(float("nan"))), "threshold holds NaN or inf"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_tensors_with_a_good_checksum_are_refused(sae_fpath: pathlib.Path, name: str) -> None:
    change, match = CRAFTED[name]
    with_state(sae_fpath, change)
    refuses(sae_fpath, rf"sae\.pt: .*{match}[^\n]*$")


@pytest.mark.parametrize("activations", [None, [], {"layers": [[1]]}, {"vit_ckpt": 3}])
def test_crafted_provenance_is_refused(sae_fpath: pathlib.Path, activations: object) -> None:
    header, payload = split(sae_fpath)
    rewrite(sae_fpath, header | {"activations": activations}, payload)
    refuses(sae_fpath, "do not match its header")


def test_a_jumprelu_with_thresholds_of_zero_loads(tmp_path: pathlib.Path) -> None:
    sae = nn.SparseAutoencoder(config.JumpRelu(d_vit=4, exp_factor=2))
    sae.log_threshold.data.fill_(-float("inf"))
    nn.save(sae, tmp_path / "sae.pt")
    assert (nn.load(tmp_path / "sae.pt").log_threshold == -float("inf")).all()


def test_every_flipped_bit_is_refused(tmp_path: pathlib.Path) -> None:
    """Also one that makes 102 out of 100, or another key of the checksum's."""
    fpath = tmp_path / "a.bin"
    checkpoint.write(fpath, "scorer", {"cls": "X", "k": 8, "é": [0.1, None]}, b"a\nfew bytes")
    content = fpath.read_bytes()
    assert checkpoint.read(fpath, "scorer")[1] == b"a\nfew bytes"
    for i in range(8 * len(content)):
        bad = bytearray(content)
        bad[i // 8] ^= 1 << i % 8
        fpath.write_bytes(bad)
        with pytest.raises(errors.UserError) as caught:
            checkpoint.read(fpath, "scorer")
        assert str(caught.value).startswith(f"{fpath}: ") and "\n" not in str(caught.value), i


def older(fpath: pathlib.Path, schema: int, **more: object) -> None:
    """Writes a file's SAE as schema 100 or 101 did."""
    header, payload = split(fpath)
    cfg = {"d_vit": header["cfg"]["d_vit"], "exp_factor": 2, "top_k": header["cfg"]["top_k"]}
    said = {"lib": "saev", "schema": schema, "kind": "sae", "cls": "TopK", "cfg": cfg, **more}
    fpath.write_bytes(json.dumps(said).encode() + b"\n" + payload)


def test_older_schemas_load_and_what_they_can_check_is_checked(sae_fpath: pathlib.Path) -> None:
    want, (_, payload) = nn.load(sae_fpath), split(sae_fpath)
    checksum = xxhash.xxh3_128_hexdigest(payload)
    for schema, more in ((100, {}), (101, {"activations": {}}), (101, {"activations": {}, "xxh3": checksum})):
        older(sae_fpath, schema, **more)
        torch.testing.assert_close(nn.load(sae_fpath).W_enc, want.W_enc, rtol=0, atol=0)
    for schema, more in (
        (101, {"activations": {}, "xxh3": "0" * 32}),
        (101, {"activations": {}, "xxh2": checksum}),
        (101, {"activations": {}, "checksum": "0" * 32}),
        (100, {"activations": {}}),
        (100, {"xxh3": checksum}),
    ):
        older(sae_fpath, schema, **more)
        refuses(sae_fpath, "its bytes changed since it was written")


def test_a_flipped_bit_in_an_older_files_tensors_is_refused(sae_fpath: pathlib.Path) -> None:
    """They have no checksum, but the CRC that torch writes; as the field's files have."""
    older(sae_fpath, 100)
    content = sae_fpath.read_bytes()
    weights = nn.SparseAutoencoder(config.TopK(d_vit=4, exp_factor=2, top_k=3)).W_dec
    place = content.index(weights.detach().numpy().tobytes())
    for i in range(place, place + 4 * weights.numel()):
        sae_fpath.write_bytes(content[:i] + bytes([content[i] ^ 64]) + content[i + 1 :])
        refuses(sae_fpath, "its tensors cannot be read .*the CRC")


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


def test_a_pickle_in_the_payload_is_not_run(sae_fpath: pathlib.Path, tmp_path: pathlib.Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return pathlib.Path.touch, (tmp_path / "owned",)

    torch.save({"W_enc": Touch()}, tmp_path / "bad")
    rewrite(sae_fpath, split(sae_fpath)[0], (tmp_path / "bad").read_bytes())
    refuses(sae_fpath, "its tensors cannot be read")
    assert not (tmp_path / "owned").exists()


def test_header_of_an_sae(sae_fpath: pathlib.Path) -> None:
    header, _ = checkpoint.read(sae_fpath, "sae")
    assert header == {
        "lib": "saev",
        "schema": checkpoint.SCHEMA,
        "kind": "sae",
        "cls": "TopK",
        "cfg": {
            "d_vit": 4,
            "exp_factor": None,
            "d_sae": 8,
            "normalize": "scale",
            "b_dec_init": "mean",
            "tied_init": True,
            "init": "random",
            "init_blend": 0.8,
            "top_k": 3,
            "aux_coeff": 1 / 32,
            "aux_k": 0,
            "keep_negative": False,
        },
        "activations": {},
    }


@pytest.mark.parametrize(
    ("schema", "is_upstream"),
    [(1, True), (5, True), (0, False), (6, False), (3.0, False), (True, False), ("3", False)],
)
def test_which_schemas_are_upstreams(schema: object, is_upstream: bool) -> None:
    assert checkpoint.is_upstream({"schema": schema}) == is_upstream
    assert not checkpoint.is_upstream({"schema": schema, "kind": "sae"})
