"""docs/gpu.md shows what benchmarks.roofline prints, and its counts of passes are those of a step."""

import collections
import inspect
import math
import pathlib
import re
import typing as tp
import unittest.mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import roofline
from saev.nn import config, kernels, objectives, sae, triton_select

DOCS = pathlib.Path(__file__).parent.parent / "docs"


def test_the_tables_are_those_of_the_command() -> None:
    text = (DOCS / "gpu.md").read_text()
    shown = text.split("<!-- tables -->\n")[1].split("<!-- end -->")[0].strip()
    assert shown == "\n\n".join(roofline.tables())


def test_a_kernel_takes_the_larger_of_its_times() -> None:
    card = roofline.Card("a card", {"float32": 2.0}, 0.5)
    assert roofline.Kernel("few bytes", 4e12, 1e9).ms(card) == 2000
    assert roofline.Kernel("many bytes", 4e9, 1e12).ms(card) == 2000
    h100 = roofline.CARDS[1]
    assert roofline.product(32768, 16384, "TF32").ms(h100) == pytest.approx(2 * 2**15 * 2**14 * 2**10 / 495e9)


def test_bfloat16_halves_rows_and_adds_copies() -> None:
    n_latents, n_batch = 2**14, 2**12
    rows, copy = n_batch * roofline.K * roofline.D, 6 * roofline.D
    pairs = zip(*(roofline.gathers(n_latents, n_batch, p) for p in ("float32", "bfloat16")), strict=True)
    saved = [exact.n_bytes - rough.n_bytes for exact, rough in pairs]
    assert saved == [2 * rows - copy * n_latents, 2 * rows, 4 * rows - 2 * copy * n_batch]


B, S, D, K = 48, 320, 20, 4
NO_PASS = {
    "alias",
    "permute",
    "squeeze",
    "as_strided",
    "empty_like",
    "detach",
    "t",
    "transpose",
    "expand",
    "unsqueeze",
    "view",
    "select",
    "slice",
    "split",
    "_unsafe_view",
}
PRODUCTS = {"addmm", "mm", "mv", "index", "topk", "_embedding_bag", "_embedding_bag_forward_only"}


class Passes(TorchDispatchMode):
    """Counts B x D and S x D tensors that operations read or write, except products and views."""

    def __init__(self) -> None:
        super().__init__()
        self.n: collections.Counter[int] = collections.Counter()

    def __torch_dispatch__(
        self, func: tp.Any, types: tp.Any, args: tp.Any = (), kwargs: tp.Any = None
    ) -> tp.Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in NO_PASS | PRODUCTS:
            reads = {
                id(x): x
                for x in torch.utils._pytree.tree_leaves((args, kwargs))
                if isinstance(x, torch.Tensor)
            }
            writes = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.n.update(x.numel() for x in (*reads.values(), *writes))
        return out


@pytest.mark.slow
def test_passes_are_those_of_a_step() -> None:
    """On a CPU, by the operations that a GPU uses."""
    torch.manual_seed(0)
    model = sae.SparseAutoencoder(config.TopK(d_vit=D, d_sae=S, top_k=K)).train()
    objective, x_BD = objectives.Objective(model, config.Vanilla()), torch.randn(B, D)
    with unittest.mock.patch.object(kernels, "available", lambda t: False), Passes() as step:
        objective(x_BD).loss.backward()
    assert step.n[B * D] == roofline.BATCH_PASSES
    assert step.n[S * D] == 0


def test_passes_of_adam() -> None:
    """Loads and stores of rows in its programs, and one of W_enc's gradient for its norm."""
    pytest.importorskip("triton")
    from saev.nn import triton_programs

    dots, adam = (inspect.getsource(p.fn) for p in (triton_programs.row_dots, triton_programs.adam_rows))
    each, unit = (part.count("mask=d < D") for part in adam.split("    if IS_UNIT:"))
    assert dots.count("mask=d < D") + 2 * each + unit + 1 == roofline.ADAM_PASSES


def test_selection_is_read_once() -> None:
    """At the sizes of the tables, selection moves little more than one read of the pre-activations."""
    for n_latents, n_batch in roofline.SIZES:
        read = 4 * n_batch * n_latents
        assert read < roofline.top_k(n_latents, n_batch).n_bytes < 1.25 * read
        assert read < roofline.batch_top_k(n_latents, n_batch).n_bytes < 1.7 * read
    assert triton_select._group(32768, roofline.K) == 32


def test_how_many_saes_a_stream_feeds_follows_from_the_tables() -> None:
    shown = (DOCS / "gpu.md").read_text()
    lines = [
        line for line in (DOCS / "training.md").read_text().splitlines() if re.match(r"\| [AH]100, ", line)
    ]
    assert len(lines) == 4
    for line in lines:
        _, step_ms, rate, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert f" {step_ms} = " in shown
        r = 16_384 / float(step_ms) * 1e3
        assert rate == f"{r / 1e6:.2f} M/s"
        want = [[math.ceil(r * a / R) for a in (2048, 4096)] for R in (1e9, 3e9, 1e10)]
        assert [[int(n) for n in cell.split(" / ")] for cell in cells] == want
