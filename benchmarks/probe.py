"""The probes' regressions, against scipy.optimize one by one. N images, E inputs, C regressions (12 traits x 5 folds).

    uv run python -m benchmarks.probe [--quick]

Processor time of a fit by `newton_cg.fit`, as a fraction of scipy's with the same start, one thread each. Scipy fits a few of the
regressions, to an excess of about 1e-9, which is what `probe.scores` asks for. Correctness: largest excess of the mean loss over that of a fit that goes on until a step gains less than 1e-15.
"""

import argparse
import collections.abc

import numpy as np
import scipy.optimize
import scipy.special
import torch

from benchmarks import common
from saev.protoeval import newton_cg

N_TRAITS, N_FOLDS = 12, 5
Loss = collections.abc.Callable[[np.ndarray], tuple[float, np.ndarray]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images and dimensions: under 40 s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    N, E, n_fits = (1500, 256, 1) if args.quick else (5994, 1024, 4)
    x_NE, label_NC, used_NC = draw(N, E)
    cases = []
    for penalty in (1000.0, 10.0, 1.0):
        cases += measure(x_NE, label_NC, used_NC, penalty, n_fits)
    common.report(cases)


def draw(N: int, E: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs in principal axes with a decaying spectrum, and 1; labels of 1% to 40% of the images; folds."""
    rng = np.random.default_rng(0)
    x_NE = np.linalg.qr(rng.standard_normal((N, E)))[0] * np.arange(1, E + 1) ** -0.5
    x_NE *= np.sqrt(N * E) / np.linalg.norm(x_NE)  # mean square 1
    logit_NT = x_NE[:, :40] / x_NE[:, :40].std(axis=0) @ rng.standard_normal((40, N_TRAITS)) * 0.4
    logit_NT += rng.logistic(size=logit_NT.shape)
    share_T = np.geomspace(0.01, 0.4, N_TRAITS)
    label_NT = logit_NT > np.quantile(logit_NT, 1 - share_T, axis=0).diagonal()
    used_NC = rng.integers(0, N_FOLDS, (N, 1)) != np.tile(np.arange(N_FOLDS), N_TRAITS)
    x_NE = np.column_stack([x_NE, np.ones(N)])
    return (
        torch.from_numpy(x_NE),
        torch.from_numpy(label_NT.repeat(N_FOLDS, axis=1)),
        torch.from_numpy(used_NC),
    )


def measure(
    x_NE: torch.Tensor, label_NC: torch.Tensor, used_NC: torch.Tensor, penalty: float, n_fits: int
) -> list[common.Case]:
    C, columns = label_NC.shape[1], slice(0, None, label_NC.shape[1] // n_fits)
    penalty_C, start_EC = torch.full((C,), penalty).double(), x_NE.new_zeros(x_NE.shape[1], C)
    problem = (x_NE, label_NC, used_NC, penalty_C, start_EC)
    ours: list[torch.Tensor] = []
    ours_s = common.cpu_seconds(lambda: ours.append(newton_cg.fit(*problem))) / C
    w_EC, mine = ours[0].numpy(), range(C)[columns]
    best_EC = newton_cg.fit(x_NE, *(each[..., columns] for each in problem[1:]), precision=1e-15).numpy()
    losses = [loss(x_NE, label_NC[:, c], used_NC[:, c], penalty) for c in mine]
    least = [of(best_EC[:, i])[0] for i, (of, _) in enumerate(losses)]
    excess = max(of(w_EC[:, c])[0] - low for c, (of, _), low in zip(mine, losses, least, strict=True))
    cases: list[common.Case] = []
    options = {"L-BFGS-B": {"maxiter": 5000, "ftol": 1e-12, "gtol": 1e-7}, "Newton-CG": {"xtol": 1e-5}}
    for method, its in options.items():
        found: list[float] = []

        def by_scipy(method: str = method, its: dict[str, float] = its, found: list[float] = found) -> None:
            for of, product in losses:
                extra = {"hessp": product} if method == "Newton-CG" else {}
                start_E = np.zeros(x_NE.shape[1])
                done = scipy.optimize.minimize(of, start_E, jac=True, method=method, options=its, **extra)
                found.append(done.fun)

        scipy_s = common.cpu_seconds(by_scipy) / len(losses)
        cases.append(
            {
                "name": f"probe, penalty {penalty:g}",
                "ratio": ours_s / scipy_s,
                "reference": f"scipy's {method}",
                "ms_per_fit": round(1000 * ours_s, 1),
                "excess": excess,
                "excess_scipy": max(np.subtract(found, least).tolist()),
            }
        )
    return cases


def loss(
    x_NE: torch.Tensor, label_N: torch.Tensor, used_N: torch.Tensor, penalty: float
) -> tuple[Loss, collections.abc.Callable[[np.ndarray, np.ndarray], np.ndarray]]:
    """(mean loss and gradient, product with the Hessian) of one regression, on the rows that it uses."""
    x_nE, y_n = x_NE[used_N].numpy(), label_N[used_N].double().numpy()
    penalty_E = np.full(x_nE.shape[1], penalty)
    penalty_E[-1] = 0

    def of(w_E: np.ndarray) -> tuple[float, np.ndarray]:
        z_n = x_nE @ w_E
        total = (np.logaddexp(0, z_n) - y_n * z_n).sum() + penalty_E @ w_E**2 / 2
        return total / len(y_n), (x_nE.T @ (scipy.special.expit(z_n) - y_n) + penalty_E * w_E) / len(y_n)

    def product(w_E: np.ndarray, along_E: np.ndarray) -> np.ndarray:
        share_n = scipy.special.expit(x_nE @ w_E)
        return (x_nE.T @ (share_n * (1 - share_n) * (x_nE @ along_E)) + penalty_E * along_E) / len(y_n)

    return of, product


if __name__ == "__main__":
    main()
