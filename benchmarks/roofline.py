"""What bounds a training step on a GPU, by arithmetic: bytes and operations of each kernel, and the least time they take.

    uv run python -m benchmarks.roofline

prints the tables of docs/gpu.md. Nothing is measured. A kernel takes at least the larger of its operations at the card's
peak and its bytes at the memory's peak; launches and waits cost nothing here. Weights and activations are float32; with
bfloat16, copies of them are read where the code does so.

Shape letters: B batch, D d_vit, S d_sae, k codes per sample, G groups of a row.
"""

import argparse
import collections.abc
import typing as tp

from saev.nn import triton_select


class Card(tp.NamedTuple):
    """Published peaks, without sparsity: TFLOP/s of each precision, and TB/s."""

    name: str
    tflops: dict[str, float]
    tb_s: float


CARDS = (
    Card("A100 80GB", {"float32": 19.5, "TF32": 156, "bfloat16": 312}, 2.0),
    Card("H100 SXM", {"float32": 67, "TF32": 495, "bfloat16": 989}, 3.35),
)
D, K = 1024, 32
SIZES = [(S, B) for S in (16384, 32768) for B in (4096, 16384)]
"""Latents and batch."""
BATCH_PASSES = 28
"""Reads and writes of B x D numbers between the products: centring, error, loss, their gradients. A test counts them."""
ADAM_PASSES = 2 * 7 + 5
"""Reads and writes of S x D numbers by `optim.Adam` on a GPU. For each matrix: weight, gradient and two moments read, three
written. Before, the gradients once for their norm, and the decoder for the gradient along its rows; then it is normalised."""


class Kernel(tp.NamedTuple):
    name: str
    flops: float
    n_bytes: float
    precision: str = "float32"

    def ms(self, card: Card) -> float:
        return 1e3 * max(self.flops / card.tflops[self.precision] / 1e12, self.n_bytes / card.tb_s / 1e12)


def product(S: int, B: int, precision: str) -> Kernel:
    """The encoder's product. bfloat16's is written in float32, and then the bias is added."""
    n_bytes = 4 * (B * D + S * D + B * S)
    if precision == "bfloat16":
        n_bytes = (4 + 2 + 2) * (B * D + S * D) + (4 + 4 + 4) * B * S
    return Kernel(f"encoder product, {precision}", 2 * B * S * D, n_bytes, precision)


def top_k(S: int, B: int, k: int = K) -> Kernel:
    """`triton_select.top_k` of float32: maxima written and read, the groups' numbers twice, values, codes."""
    L = triton_select._group(S, k) or 1
    G = S // L
    return Kernel("TopK's selection", 0, 4 * B * (S + 2 * G + 2 * k + L * k + 2 * k))


def batch_top_k(S: int, B: int, k: int = K) -> Kernel:
    """`triton_select.batch_top_k`: maxima written, read 4 times for the bound and twice for the list of groups.

    The listed groups (k a row, if the maxima differ) are read 4 times for the smallest code and twice for the codes.
    """
    L = triton_select.BATCH_GROUP
    n_digits = 32 // triton_select.DIGIT_BITS
    maxima = (1 + n_digits + 2) * S // L
    listed = k + (n_digits + 2) * (k * L + k)
    return Kernel("BatchTopK's selection", 0, 4 * B * (S + maxima + listed + 3 * k))


def gathers(S: int, B: int, precision: str, k: int = K) -> list[Kernel]:
    """Rows that codes select, from memory; what the cache holds makes it less. In bfloat16, of tables copied before."""
    n, size, copy, said = B * k, 4, 0, ""
    if precision == "bfloat16":
        size, copy, said = 2, 4 + 2, ", bfloat16"
    both = 2 * (size * n * D + 4 * S * D + copy * B * D)
    return [
        Kernel(f"decoder: sums of k rows{said}", 2 * n * D, size * n * D + 4 * B * D + copy * S * D),
        Kernel(f"gradient of the codes{said}", 2 * n * D, size * n * D + 4 * B * D),
        Kernel(f"gradients of both matrices, by latent{said}", 4 * n * D, both),
    ]


def others(S: int, B: int, k: int = K) -> list[Kernel]:
    """What TopK and BatchTopK share in every precision."""
    return [
        Kernel("order by latent: radix sort of int32, int64", 0, 4 * 2 * (4 + 8) * B * k),
        Kernel("gradient of b_dec", 2 * S * D, 4 * S * D),
        Kernel("element by element on B x D", 0, 4 * BATCH_PASSES * B * D),
        Kernel("Adam and unit norms", 0, 4 * ADAM_PASSES * S * D),
    ]


def rows(S: int, B: int) -> list[Kernel]:
    products = [product(S, B, precision) for precision in CARDS[0].tflops]
    rounded = [
        each for pair in zip(gathers(S, B, "TF32"), gathers(S, B, "bfloat16"), strict=True) for each in pair
    ]
    return [*products, top_k(S, B), batch_top_k(S, B), *rounded, *others(S, B)]


def step_ms(card: Card, S: int, B: int, precision: str, select: Kernel) -> float:
    kernels = (product(S, B, precision), select, *gathers(S, B, precision), *others(S, B))
    return sum(kernel.ms(card) for kernel in kernels)


def tables() -> collections.abc.Iterator[str]:
    """Markdown: bytes and operations; then for each card milliseconds, and steps in units of the product."""
    sizes = " | ".join(f"{S:,} x {B:,}" for S, B in SIZES)
    line = "|---|" + "---:|" * len(SIZES)
    cases = [rows(S, B) for S, B in SIZES]
    yield "\n".join(
        [
            f"| GB; TFLOP | {sizes} |",
            line,
            *(
                f"| {same[0].name} | "
                + " | ".join(f"{x.n_bytes / 1e9:.2f}; {x.flops / 1e12:.2f}" for x in same)
                + " |"
                for same in zip(*cases, strict=True)
            ),
        ]
    )
    for card in CARDS:
        out = [f"| {card.name}: ms | {sizes} |", line]
        for same in zip(*cases, strict=True):
            out.append(f"| {same[0].name} | " + " | ".join(f"{x.ms(card):.2f}" for x in same) + " |")
        for precision in card.tflops:
            for name, select in (("TopK", top_k), ("BatchTopK", batch_top_k)):
                cells = []
                for S, B in SIZES:
                    ms = step_ms(card, S, B, precision, select(S, B))
                    bare_ms = 1e3 * 2 * B * S * D / card.tflops[precision] / 1e12
                    cells.append(f"{ms:.2f} = {ms / bare_ms:.1f} x")
                out.append(f"| **{name} step, {precision}** | " + " | ".join(cells) + " |")
        yield "\n".join(out)
    yield "\n".join(
        [
            f"| what could be saved | {sizes} |",
            line,
            "| bfloat16's bias added by the product's kernel | "
            + " | ".join(f"{8 * S * B / 1e9:.2f} GB" for S, B in SIZES)
            + " |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    print(f"d_vit {D:,}, k {K}; columns: d_sae x batch\n")
    print("\n\n".join(tables()))


if __name__ == "__main__":
    main()
