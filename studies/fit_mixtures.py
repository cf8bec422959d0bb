"""Fits a row of triton_kernels/mixtures.py for float32 or 16-bit data:

    python studies/fit_mixtures.py silu --terms 1 --powers 7

For given c the least largest error over x is a linear programme in p and d; c is searched. Prints
c, p, d and the error.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy.optimize import linprog, minimize
from scipy.special import expit, ndtr

# the error is even or odd in x
X = np.concatenate([np.linspace(0, 12, 500), np.linspace(12.2, 40, 40)])
# Less x / 2, which x Phi(c x) has too; and where to begin with c.
TARGETS = {
    "silu": (X * expit(X) - X / 2, (0.55, 0.31, 0.97)),
    "gelu_tanh": (0.5 * X * np.tanh(np.sqrt(2 / np.pi) * (X + 0.044715 * X**3)), (1.1, 0.9, 1.5)),
    "tanh": (np.tanh(X), (1.15, 1.75, 0.75)),
}


def solve(activation: str, cs: np.ndarray, powers: int) -> tuple[float, np.ndarray, np.ndarray]:
    """(largest error, p [terms], d [terms, powers])"""
    odd = activation == "tanh"
    steps = [2 * ndtr(c * X) - 1 if odd else X * (ndtr(c * X) - 0.5) for c in cs]
    columns = [step - steps[0] for step in steps[1:]]  # sum p = 1
    for c in cs:
        a = c * X
        columns += [
            np.exp(-a * a / 2) / np.sqrt(2 * np.pi) * a ** (2 * j + odd) for j in range(powers)
        ]
    matrix, rest = np.stack(columns, 1), TARGETS[activation][0] - steps[0]
    scale = np.abs(matrix).max(0)
    ones = np.ones((len(X), 1))
    upper = np.block([[matrix / scale, -ones], [-matrix / scale, -ones]])
    bounds = [(None, None)] * upper.shape[1]
    tight = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    found = linprog(
        [0.0] * len(scale) + [1.0],
        upper,
        np.concatenate([rest, -rest]),
        bounds=bounds,
        options=tight,
    )
    if found.status:
        return 1.0, np.zeros(len(cs)), np.zeros((len(cs), powers))
    numbers = found.x[:-1] / scale
    others = numbers[: len(cs) - 1]
    return (
        float(found.x[-1]),
        np.array([1 - others.sum(), *others]),
        numbers[len(cs) - 1 :].reshape(len(cs), powers),
    )


def fit(
    activation: str, terms: int, powers: int
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """(largest error, c, p, d)"""
    begin = TARGETS[activation][1]
    begin = np.log(begin[:1] if terms == 1 else begin[1:])
    simplex = np.stack([begin, *(begin + 0.05 * step for step in np.eye(terms))])
    options = {"initial_simplex": simplex, "xatol": 1e-6, "fatol": 1e-4, "maxfev": 150}
    search = minimize(
        lambda logs: np.log(solve(activation, np.exp(logs), powers)[0]),
        begin,
        method="Nelder-Mead",
        options=options,
    )
    cs = np.exp(search.x)
    error, p, d = solve(activation, cs, powers)
    return error, cs, p, d


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("activation", choices=TARGETS)
    parser.add_argument("--terms", type=int, choices=(1, 2), default=1)
    parser.add_argument("--powers", type=int, default=6, help="d of each term (6)")
    args = parser.parse_args()
    error, c, p, d = fit(args.activation, args.terms, args.powers)
    print(f"c {c.tolist()}\np {p.tolist()}\nd {d.tolist()}\nlargest error {error:.3g}")


if __name__ == "__main__":
    main()
