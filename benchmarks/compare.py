"""Cost of comparing dictionaries: products of sparse codes next to dense ones, and one-to-one matching.

    uv run python -m benchmarks.compare [--quick]

R rows, S latents of both dictionaries, L0 codes a row. Each figure is the median of interleaved repeats.
"""

import argparse

import numpy as np
import scipy.sparse
import torch

from benchmarks import common
from saev.compare import correlate, match
from saev.formats import codeshards


def codes(R: int, S: int, l0: int, seed: int) -> codeshards.Csr:
    """l0 different latents fire in each row; some fire a hundred times as often as others."""
    rng = np.random.default_rng(seed)
    weight_S = 10 ** -rng.uniform(0, 2, S)
    key_RS = rng.random((R, S), np.float32) ** (1 / weight_S.astype(np.float32))
    latent_RK = np.sort(np.argpartition(key_RS, S - l0, axis=1)[:, S - l0 :], axis=1)
    value_n = rng.random(R * l0, np.float32) + 0.1
    start_R1 = np.arange(0, R * l0 + 1, l0)
    return codeshards.Csr(start_R1, latent_RK.ravel().astype(np.int32), value_n)


def product(R: int, S: int, l0: int, n_repeats: int) -> list[common.Case]:
    """Sums of products of all pairs of latents: ours, scipy's sparse product, and the dense product in float32."""
    rows = (codes(R, S, l0, 0), codes(R, S, l0, 1))
    sums = {"sparse": np.zeros((S, S)), "dense": np.zeros((S, S))}
    f_RS, g_RS = (torch.from_numpy(scipy_of(r, R, S).toarray()) for r in rows)
    out = torch.empty(S, S)

    def ours(name: str) -> float:
        sums[name][:] = 0
        add = correlate._add_sparse if name == "sparse" else correlate._add_dense
        return common.seconds(lambda: add(sums[name], 0, *rows))

    a, b = (scipy_of(r, R, S) for r in rows)
    calls = {
        "reference": lambda: common.seconds(lambda: torch.mm(f_RS.T, g_RS, out=out)),
        "sparse": lambda: ours("sparse"),
        "dense": lambda: ours("dense"),
        "scipy": lambda: common.seconds(lambda: a.T @ b),
    }
    calls["sparse"]()  # compiles
    found = common.interleaved(calls, n_repeats)
    np.testing.assert_allclose(sums["sparse"], sums["dense"], atol=1e-9)
    np.testing.assert_allclose(sums["sparse"], out.double().numpy(), atol=1e-2)
    density = (l0 / S) ** 2
    return [
        {
            "name": f"products, {name}, S {S}, L0 {l0}",
            "ratio": common.median_ratio(found[name], found["reference"]),
            "reference": "the dense product in float32",
            "product_of_densities": density,
            "seconds": float(np.median(found[name])),
            "checked": "sparse and float64 dense sums agree to 1e-9",
        }
        for name in ("sparse", "scipy", "dense")
    ]


def scipy_of(rows: codeshards.Csr, R: int, S: int) -> scipy.sparse.csr_matrix:
    return scipy.sparse.csr_matrix((rows.value_n, rows.latent_n, rows.start_R1), shape=(R, S))


def one_to_one(S: int) -> common.Case:
    """Candidates against all pairs, on correlations in which half of the latents have a partner."""
    rng = np.random.default_rng(0)
    corr_SS = 0.3 * rng.random((S, S)) ** 8
    other_S = rng.permutation(S)[: S // 2]
    corr_SS[np.arange(S // 2), other_S] = rng.uniform(0.3, 1, S // 2)
    found = {}

    def exact() -> None:
        found["exact"] = match._exact(corr_SS)

    def restricted() -> None:
        found["restricted"] = match._restricted(match._candidates(corr_SS, 0, 32), S, S)

    exact_s, restricted_s = common.seconds(exact), common.seconds(restricted)
    best, reached = (float(np.nansum(found[name].corr_S)) for name in ("exact", "restricted"))
    return {
        "name": f"one to one, 32 candidates, S {S}",
        "ratio": restricted_s / exact_s,
        "reference": "all pairs (linear_sum_assignment)",
        "seconds": restricted_s,
        "reference_seconds": exact_s,
        "share_of_optimum": reached / best,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    R, S, n_repeats = (4096, 1024, 3) if args.quick else (8192, 2048, 5)
    cases = [case for share in (16, 8, 4) for case in product(R, S, S // share, n_repeats)]
    cases += product(R, S, 32, n_repeats)
    cases += [one_to_one(n) for n in ((1024,) if args.quick else (4096, 6144))]
    common.report(cases)


if __name__ == "__main__":
    main()
