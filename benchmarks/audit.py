"""What it costs to rank prototypes by image labels (`saev.protoeval.audit_rank`). K prototypes, N images, T labels, B that are ranked.

    uv run python -m benchmarks.audit [--quick]

Two prototypes are planted for each label in noise. Reference: one product of all scores with the residuals of all labels, with reading
and standardising the scores, which checks all prototypes at one penalty. Processor time, so that other programs matter little.

Correctness: of the ranking by the labels, the share of planted prototypes among the first 2 T; of one fit, how far a gradient is at
most from what the optimum needs, relative to the penalty (1 where the weight is not 0, else at most 1).
"""

import argparse
import statistics
import typing as tp
import unittest.mock

import numpy as np

from benchmarks import common
from saev.formats import patchresults
from saev.protoeval import audit_rank, score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer prototypes and images: under 40 s")
    args = parser.parse_args()
    common.report(measure(*(2048, 1000, 20, 40, 3) if args.quick else (16_384, 5000, 50, 100, 5)))


def draw(K: int, N: int, T: int) -> score.Split:
    """Prototypes 2 t and 2 t + 1 raise the odds of label t, the first labels' most."""
    rng = np.random.default_rng(0)
    scores_KN = rng.standard_normal((K, N), dtype=np.float32)
    logit_NT = np.linspace(1.5, 0.2, T) * scores_KN[: 2 * T].reshape(T, 2, N).sum(axis=1).T - 1
    labels_NT = rng.random((N, T)) < 1 / (1 + np.exp(-logit_NT))
    pooled_N1 = np.zeros((N, 1), np.float32)
    found = score.Scores(scores_KN, pooled_N1, pooled_N1, np.arange(N))
    return score.Split(found, np.arange(N), labels_NT, None)


def measure(K: int, N: int, T: int, B: int, n_repeats: int) -> list[common.Case]:
    train = draw(K, N, T)
    labels_NT = train.labels_NT
    x = audit_rank.images(train, 0, K, 1.0)
    rest_NT = (labels_NT - labels_NT.mean(axis=0)) / N
    product_s = statistics.median(
        common.cpu_seconds(lambda: x.gradients(rest_NT)) for _ in range(1 + n_repeats)
    )

    def case(name: str, seconds: float, **found: object) -> common.Case:
        of = {"reference": "one product of all scores", "seconds": round(seconds, 2)}
        return {"name": name, "ratio": round(seconds / product_s, 2), **of, **found}

    cases: list[common.Case] = []
    path(x, labels_NT, 1)  # loads compiled code
    order_N = np.random.default_rng(1).permutation(N)
    for name, label_NT in (("labels", labels_NT), ("permuted labels", labels_NT[order_N])):
        ranking, path_s, fits_s = path(x, label_NT, B)
        n_penalties = round(float(np.log(np.nanmin(ranking.penalty_B)) / np.log(audit_rank.RATIO)))
        is_planted_B = ranking.prototype_B[: 2 * T] < 2 * T
        cases.append(
            case(f"path, {name}", path_s, n_penalties=n_penalties, planted_first=is_planted_B.mean().item())
        )
        cases.append(case("of which fits", sum(fits_s), n_fits=len(fits_s)))
    k_S = np.arange(min(K, 2048))
    penalty = 0.5 * float(np.abs(x.gradients(rest_NT)[k_S, 0]).max())
    found = []

    def alone() -> None:
        found.append(audit_rank._fit(x.rows(k_S), labels_NT[:, 0], penalty, np.zeros(1 + len(k_S))))

    alone_s = statistics.median(common.cpu_seconds(alone) for _ in range(n_repeats))
    (_, *w_S), rest_N = found[-1]
    w_S, gradient_S = np.array(w_S), np.abs(x.rows(k_S) @ rest_N) / penalty
    off_S = np.where(w_S == 0, np.maximum(gradient_S - 1, 0), np.abs(gradient_S - 1))
    fit = case(f"one fit of {len(k_S):,}, no screening", alone_s, n_weights=int((w_S != 0).sum()))
    return [*cases, fit | {"max_diff": off_S.max().item()}]


def path(
    x: audit_rank.Images, labels_NT: np.ndarray, B: int
) -> tuple[patchresults.Ranking, float, list[float]]:
    """(the ranking, its seconds, the seconds of each of the fits in it)."""
    fits_s, found, fit = [], [], audit_rank._fit

    def timed(*args: tp.Any) -> tp.Any:
        out = []
        fits_s.append(common.cpu_seconds(lambda: out.append(fit(*args))))
        return out[0]

    with unittest.mock.patch.object(audit_rank, "_fit", timed):
        path_s = common.cpu_seconds(lambda: found.append(audit_rank.rank(x, labels_NT, None, B)))
    return found[0], path_s, fits_s


if __name__ == "__main__":
    main()
