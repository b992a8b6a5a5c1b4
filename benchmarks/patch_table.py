"""The regressions of the patch table, against scoring alone and against scikit-learn. K prototypes, C classes, R patches.

    uv run python -m benchmarks.patch_table [--quick]

Sums: adding scores of patches to `logistic.Sums`, as a fraction of the product that makes the scores (d_vit 1,024). Fits: all
classes on all prototypes, as a fraction of a loop over scikit-learn's LogisticRegression, extrapolated from a few of its fits on
the same patches. Scores are dense, or those of a TopK SAE (99.6% zeros: 64 of 16,384 latents fire).

Correctness: largest difference to scikit-learn's loss on as many pairs.
"""

import argparse

import numpy as np
import sklearn.linear_model
import torch

from benchmarks import common
from saev.protoeval import logistic

D, C = 1024, 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer prototypes: under 40 s")
    args = parser.parse_args()
    K, R, n_pairs, n_repeats = (256, 8192, 4, 3) if args.quick else (1024, 32768, 20, 5)
    cases = []
    for kind in ("dense", "sparse"):
        cases += measure(kind, K, R, n_pairs, n_repeats)
    common.report(cases)


def measure(kind: str, K: int, R: int, n_pairs: int, n_repeats: int) -> list[common.Case]:
    rng = np.random.default_rng(0)
    x_RD, w_KD = torch.randn(R, D), torch.randn(K, D)
    code_KR = rng.standard_normal((K, R), dtype=np.float32)
    if kind == "sparse":
        code_KR = np.where(rng.random((K, R)) < 64 / 16_384, np.abs(code_KR), 0).astype(np.float32)
    class_R1 = rng.integers(0, C, (R, 1)).astype(np.int32)
    logistic.Sums.empty(2, C).add(code_KR[:2], class_R1)  # compiles
    sums = logistic.Sums.empty(K, C)
    timed = common.interleaved(
        {
            "sums": lambda: common.seconds(lambda: sums.add(code_KR, class_R1)),
            "product": lambda: common.seconds(lambda: common.products(x_RD, w_KD)),
        },
        n_repeats,
    )
    per_score_ns = np.median(timed["sums"]) / (K * R) * 1e9
    cases: list[common.Case] = [
        {
            "name": f"sums, {kind}, K {K}",
            "ratio": common.median_ratio(timed["sums"], timed["product"]),
            "reference": f"the product with d_vit {D}",
            "ns_per_score": round(float(per_score_ns), 2),
        }
    ]
    sums = logistic.Sums.empty(K, C)
    sums.add(code_KR, class_R1)
    sums.fit()  # compiles
    found: list[logistic.Fits] = []
    fit_s = common.seconds(lambda: found.append(sums.fit()))
    pairs = [(int(rng.integers(K)), int(rng.integers(C))) for _ in range(n_pairs)]
    losses: list[float] = []
    loop_s = common.seconds(
        lambda: losses.extend(by_scikit(code_KR[k], class_R1[:, 0] == c) for k, c in pairs)
    )
    per_pair = loop_s / n_pairs
    gaps = [abs(found[0].loss_KC[k, c] - loss) for (k, c), loss in zip(pairs, losses, strict=True)]
    fits = {
        "name": f"fits, {kind}, K {K}, C {C}",
        "ratio": fit_s / (per_pair * K * C),
        "reference": "scikit-learn's loop (extrapolated)",
        "us_per_fit": round(fit_s / (K * C) * 1e6, 2),
        "max_diff": max(gaps),
    }
    return [*cases, fits]


def by_scikit(code_R: np.ndarray, y_R: np.ndarray) -> float:
    """The loss without the penalty."""
    x_R1 = code_R[:, None].astype(np.float64)
    model = sklearn.linear_model.LogisticRegression(solver="newton-cholesky", tol=1e-12).fit(x_R1, y_R)
    z_R = model.decision_function(x_R1)
    return float(np.mean(np.logaddexp(0, z_R) - y_R * z_R))


if __name__ == "__main__":
    main()
