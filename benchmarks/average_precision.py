"""The matrix of average precisions, against a loop over scikit-learn's function. N images, K prototypes, T traits.

    uv run python -m benchmarks.average_precision [--quick]

N and T are CUB's test split; a tenth of the labels are positive. Scores are dense (no ties), those of a TopK SAE (97% zeros:
ties are the rule), or of few values. The loop's time is extrapolated from some of its K x T calls, timed in turn with ours;
ratio: our time as a fraction of it. torchmetrics (dependency group `peers`) is extrapolated from one prototype.

Missing labels: our time with a tenth or half of the labels of each column (12 traits) missing as a fraction of our time without.

Correctness: largest difference to scikit-learn on as many pairs.
"""

import argparse
import importlib.util

import numpy as np
import sklearn.metrics

from benchmarks import common
from saev.protoeval import ap

N, T = 5794, 312


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer prototypes: under 40 s")
    args = parser.parse_args()
    K, n_pairs, n_repeats = (512, 100, 3) if args.quick else (2048, 300, 5)
    labels_NT = np.random.default_rng(0).random((N, T)) < 0.093
    ap.average_precision(np.zeros((N, 2), np.float32), labels_NT)  # compiles
    cases = []
    for kind in ("dense", "sparse", "few values"):
        cases += measure(kind, scores(kind, K), labels_NT, n_pairs, n_repeats)
    cases += [
        measure_missing(share, scores("dense", K // 2), labels_NT, n_pairs, n_repeats) for share in (0.1, 0.5)
    ]
    cases.append(measure_resamples(scores("dense", T), labels_NT, n_repeats))
    common.report(cases)


def scores(kind: str, K: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    scores_NK = rng.standard_normal((N, K), dtype=np.float32)
    if kind == "sparse":
        return np.where(rng.random((N, K)) < 0.03, np.abs(scores_NK), 0).astype(np.float32)
    return np.round(scores_NK * 4) if kind == "few values" else scores_NK


def measure(
    kind: str, scores_NK: np.ndarray, labels_NT: np.ndarray, n_pairs: int, n_repeats: int
) -> list[common.Case]:
    """Ours and torchmetrics' as fractions of scikit-learn's loop."""
    K = scores_NK.shape[1]
    rng = np.random.default_rng(2)
    pairs = list(zip(rng.integers(0, K, n_pairs), rng.integers(0, T, n_pairs), strict=True))

    def loop() -> list[float]:
        return [sklearn.metrics.average_precision_score(labels_NT[:, t], scores_NK[:, k]) for k, t in pairs]

    calls = {
        "saev": lambda: common.seconds(lambda: ap.average_precision(scores_NK, labels_NT)),
        "scikit-learn": lambda: common.seconds(loop) * K * T / n_pairs,
    }
    timed = common.interleaved(calls, n_repeats)
    got_KT = ap.average_precision(scores_NK, labels_NT)
    ratio = common.median_ratio(timed["saev"], timed["scikit-learn"])
    case = {
        "name": f"{kind}, K {K}",
        "ratio": ratio,
        "reference": "scikit-learn's loop (extrapolated)",
        "times_faster": round(1 / ratio),
        "seconds": [round(s, 3) for s in timed["saev"]],
        "max_diff": max(abs(got_KT[k, t] - want) for (k, t), want in zip(pairs, loop(), strict=True)),
    }
    cases: list[common.Case] = [case]
    if importlib.util.find_spec("torchmetrics"):
        cases.append(_torchmetrics(kind, scores_NK, labels_NT, got_KT, timed["scikit-learn"]))
    return cases


def _torchmetrics(
    kind: str, scores_NK: np.ndarray, labels_NT: np.ndarray, got_KT: np.ndarray, loop_s: list[float]
) -> common.Case:
    import torch
    import torchmetrics.functional.classification as lib

    labels = torch.from_numpy(labels_NT)
    score_N = torch.from_numpy(np.ascontiguousarray(scores_NK[:, 0])).sigmoid()
    score_NT = score_N[:, None].expand(-1, T).contiguous()

    def call() -> torch.Tensor:
        return lib.multilabel_average_precision(score_NT, labels.long(), T, average="none")

    seconds = common.seconds(call) * scores_NK.shape[1]
    return {
        "name": f"{kind}, K {scores_NK.shape[1]}: torchmetrics",
        "ratio": round(seconds / float(np.median(loop_s)), 3),
        "reference": "scikit-learn's loop (extrapolated)",
        "max_diff_to_saev": float(np.abs(call().numpy() - got_KT[0]).max()),
    }


def measure_missing(
    share: float, scores_NK: np.ndarray, labels_NT: np.ndarray, n_pairs: int, n_repeats: int
) -> common.Case:
    """With missing labels, against without; scikit-learn on the others is the check."""
    rng = np.random.default_rng(3)
    n_columns = 26  # each of 12 traits
    known_NT = (rng.random((N, n_columns)) >= share).repeat(T // n_columns, axis=1)
    ap.average_precision(scores_NK[:, :2], labels_NT, known_NT)  # compiles
    calls = {
        "missing": lambda: common.seconds(lambda: ap.average_precision(scores_NK, labels_NT, known_NT)),
        "none": lambda: common.seconds(lambda: ap.average_precision(scores_NK, labels_NT)),
    }
    timed = common.interleaved(calls, n_repeats)
    got_KT = ap.average_precision(scores_NK, labels_NT, known_NT)
    pairs = zip(rng.integers(0, scores_NK.shape[1], n_pairs), rng.integers(0, T, n_pairs), strict=True)
    diffs = [
        got_KT[k, t]
        - sklearn.metrics.average_precision_score(labels_NT[known_NT[:, t], t], scores_NK[known_NT[:, t], k])
        for k, t in pairs
    ]
    return {
        "name": f"dense, K {scores_NK.shape[1]}, {share:.0%} of labels missing",
        "ratio": common.median_ratio(timed["missing"], timed["none"]),
        "reference": "without missing labels",
        "seconds": [round(s, 3) for s in timed["missing"]],
        "max_diff": float(np.abs(diffs).max()),
    }


def measure_resamples(scores_NT: np.ndarray, labels_NT: np.ndarray, n_repeats: int) -> common.Case:
    """1,000 bootstrap resamples of T pairs, against scikit-learn with sample weights."""
    times_MN = ap.resamples(N, 1000, seed=0)
    ap.resampled(scores_NT.T, labels_NT, times_MN[:1])

    def loop() -> list[float]:
        return [
            sklearn.metrics.average_precision_score(
                labels_NT[:, t], scores_NT[:, t], sample_weight=times_MN[t]
            )
            for t in range(40)
        ]

    calls = {
        "saev": lambda: common.seconds(lambda: ap.resampled(scores_NT.T, labels_NT, times_MN)),
        "loop": lambda: common.seconds(loop) * T * 1000 / 40,
    }
    timed = common.interleaved(calls, n_repeats)
    got_TM = ap.resampled(scores_NT.T, labels_NT, times_MN)
    ratio = common.median_ratio(timed["saev"], timed["loop"])
    return {
        "name": f"1,000 resamples of {T} traits",
        "ratio": ratio,
        "reference": "scikit-learn's loop (extrapolated)",
        "times_faster": round(1 / ratio),
        "seconds": [round(s, 3) for s in timed["saev"]],
        "max_diff": max(abs(got_TM[t, t] - want) for t, want in enumerate(loop())),
    }


if __name__ == "__main__":
    main()
