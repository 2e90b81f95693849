"""How long a fit of a scaling law takes beside scipy in a loop, and whether its intervals hold what they promise.

    python benchmarks/scaling_fit.py --out benchmarks/results             # speed, about 5 minutes on 2 cores
    python benchmarks/scaling_fit.py --out benchmarks/results --coverage  # and 400 replicas, about 10 more
    python benchmarks/scaling_fit.py --out benchmarks/results --exponents # IsoFLOP and envelope alone, about 10

The runs are made: losses of the law of Hoffmann et al. 2022 at 10 budgets from 1e17 to 1e21 FLOPs, 25 token counts each
from D_opt / 8 to 8 D_opt, times exp(0.01 z) with z normal.

speed: fit_law on the 250 runs with 1,000 bootstraps, compilation included, on a second table of the same law
and size. scipy's L-BFGS-B does the same in a loop: the same objective (in NumPy, with its gradient written out) in
the same centred coordinates, from the same starts. Its grid is every 50th of the 4,500 starts, its bootstraps the
first 10; both are timed, with one BLAS thread (its fastest), and scaled up. Two totals: with its whole grid carried
to the end, and with the screening that ours does, which scipy is given for nothing: only the 256 descents after it
are counted. Seconds of CPU stand beside those of the clock, for a machine with other work. Then how much higher
scipy's objectives are than ours, and ours than those of the whole grid carried to the end (the point fit, 1
bootstrap).

coverage: 400 tables at 5 budgets of 16 runs, noise of 1 %, each fitted with 400 bootstraps; the share of replicas whose
95 % interval holds the true coefficient. --replicas and --bootstraps make it shorter.

exponents: the share of 95 % intervals of IsoFLOP and the envelope that hold the true exponent of N_opt, on tables whose
sizes range over three decades, of laws whose losses rise more steeply on one side of the optimum than on the other.
"own": 6 budgets, each with 12 sizes of its own around the optimum; "shared": 12 budgets and 18 sizes for all of them,
as in Porian et al. 2024; "curves": whole curves of 12 sizes, each run off by the noise, its evaluations by a tenth;
"finished": the runs of "shared" as curves, one a size, each point off by noise of its own. The rules of the approaches
were chosen on tables of other seeds.
"""

import argparse
import itertools
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from report import facts, write_report

from gptjax.scaling import fits
from gptjax.scaling.approaches import envelope, isoflop
from gptjax.scaling.families import CHINCHILLA
from gptjax.scaling.fits import Fitted, fit_law, redraw, refit
from gptjax.scaling.laws import HOFFMANN, Chinchilla

DELTA, NOISE, BOOTSTRAPS, SEED = 1e-3, 0.01, 1000, 0
SKEWED = {
    "Hoffmann et al.": HOFFMANN,
    "steep in N": Chinchilla(E=1.7, A=2000.0, B=200.0, alpha=0.5, beta=0.25),
    "steep in D": Chinchilla(E=1.5, A=60.0, B=6000.0, alpha=0.22, beta=0.45),
}
LAYOUTS = ("own", "shared", "curves", "finished")  # of IsoFLOP the first two, of the envelope the others
GRID_STRIDE, SCIPY_BOOTSTRAPS, WHOLE_GRID_BOOTSTRAPS = 50, 10, 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the dated report")
    parser.add_argument("--coverage", action="store_true", help="measure the intervals too")
    parser.add_argument("--exponents", action="store_true", help="measure the intervals of IsoFLOP and envelope alone")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS, help="tables of --exponents")
    parser.add_argument("--replicas", type=int, default=400)
    parser.add_argument("--bootstraps", type=int, default=400)
    args = parser.parse_args()
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        # scipy's L-BFGS-B calls BLAS on 5 numbers; beside other work its idle threads cost it up to 70 times the time.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OPENBLAS_NUM_THREADS": "1"})

    device = f"{platform.machine()} {jax.default_backend()}, {os.cpu_count()} cores"
    report = facts(device, "jax", "scipy", "numpy") | {"noise": NOISE, "delta": DELTA, "seed": SEED}
    if args.exponents:
        report["exponents"] = exponents(args.replicas, min(args.bootstraps, 60), args.layouts)
        print(f"wrote {write_report(report, args.out, 'scaling_exponents')}")
        return
    report["speed"] = speed()
    print(report["speed"])
    if args.coverage:
        report["coverage"] = coverage(args.replicas, args.bootstraps)
        print(report["coverage"])
    print(f"wrote {write_report(report, args.out, 'scaling_fit')}")


def table(budgets: int, per_budget: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, D and noisy loss of runs at budgets from 1e17 to 1e21, from an eighth of D_opt to 8 times it."""
    flops = np.logspace(17, 21, budgets)
    _, best = HOFFMANN.optimal(flops)
    D = np.ravel(best[:, None] * np.geomspace(1 / 8, 8, per_budget))
    N = np.repeat(flops, per_budget) / 6 / D
    return N, D, HOFFMANN.loss(N, D) * np.exp(NOISE * rng.normal(size=len(N)))


def speed() -> dict[str, Any]:
    rng = np.random.default_rng(SEED)
    began = time.perf_counter()
    fitted = fit_law(CHINCHILLA, *table(10, 25, rng), bootstraps=BOOTSTRAPS, seed=SEED)
    first = time.perf_counter() - began
    N, D, loss = table(10, 25, rng)
    began, cpu = time.perf_counter(), time.process_time()
    fitted = fit_law(CHINCHILLA, N, D, loss, bootstraps=BOOTSTRAPS, seed=SEED)
    ours, our_cpu = time.perf_counter() - began, time.process_time() - cpu

    problem, starts = CHINCHILLA.problem(N, D, loss, delta=DELTA), CHINCHILLA.starts
    loss_BN = redraw(problem, theta(fitted), BOOTSTRAPS, np.random.default_rng(SEED))
    near_SP = np.vstack([theta(fitted), fits.neighbours(problem, starts)])
    own = refit(problem, near_SP, loss_BN[:SCIPY_BOOTSTRAPS])
    whole = np.vstack([loss, loss_BN[:WHOLE_GRID_BOOTSTRAPS]])
    best = refit(problem, starts, whole).objective_B  # every start, to the end
    mine = np.append(fitted.objective, own.objective_B[:WHOLE_GRID_BOOTSTRAPS])

    scipy = Scipy(N, D)
    share = starts[::GRID_STRIDE]
    began, cpu = time.perf_counter(), time.process_time()
    grid = [scipy.fit(start, loss)[0] for start in share]
    a_start, cpu_of_start = (time.perf_counter() - began) / len(share), (time.process_time() - cpu) / len(share)
    began, cpu = time.perf_counter(), time.process_time()
    found = [min(scipy.fit(start, redrawn)[0] for start in near_SP) for redrawn in loss_BN[:SCIPY_BOOTSTRAPS]]
    a_bootstrap = (time.perf_counter() - began) / SCIPY_BOOTSTRAPS
    cpu_of_bootstrap = (time.process_time() - cpu) / SCIPY_BOOTSTRAPS

    whole_grid = len(starts) * a_start + BOOTSTRAPS * a_bootstrap
    screened = fits.FINAL * a_start + BOOTSTRAPS * a_bootstrap
    return {
        "points": len(N), "bootstraps": BOOTSTRAPS, "starts": len(starts), "starts_of_a_bootstrap": len(near_SP),
        "seconds": ours, "seconds_with_compilation": first,
        "scipy_seconds_scaled": whole_grid, "scipy_seconds_scaled_screened": screened,
        "cpu_seconds": our_cpu, "scipy_cpu_seconds_scaled": len(starts) * cpu_of_start + BOOTSTRAPS * cpu_of_bootstrap,
        "scipy_cpu_seconds_scaled_screened": fits.FINAL * cpu_of_start + BOOTSTRAPS * cpu_of_bootstrap,
        "scipy_ms_a_start": 1e3 * a_start, "scipy_ms_a_bootstrap": 1e3 * a_bootstrap,
        "scipy_timed": {"starts": len(share), "bootstraps": SCIPY_BOOTSTRAPS},
        "times_faster": whole_grid / ours, "times_faster_screened": screened / ours,
        "gradient": fitted.gradient, "gradient_of_bootstraps": float(own.gradient_B.max()),
        "unconverged": fitted.unconverged, "starts_agreed": f"{fitted.agreed} of {fitted.starts}",
        "objective": fitted.objective, "objective_scipy": min(grid),
        "scipy_above_ours_in_bootstraps": float(np.max(np.array(found) / own.objective_B - 1)),
        "ours_above_the_whole_grid": float(np.max(mine / best - 1)),
    }  # fmt: skip


def theta(fitted: Fitted) -> np.ndarray:
    """The law as what is fitted: log A, log B, log E, alpha, beta."""
    law = fitted.law
    return np.array([np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta])


class Scipy:
    """The same objective and coordinates for scipy.optimize.minimize, one start and one row of losses at a time."""

    def __init__(self, N: np.ndarray, D: np.ndarray):
        x, y = np.log(N), np.log(D)
        self.mean, self.spread = (x.mean(), y.mean()), (x.std(), y.std())
        self.x, self.y = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()

    def value_and_gradient(self, phi: np.ndarray, log_loss: np.ndarray) -> tuple[float, np.ndarray]:
        a, b, e, alpha, beta = phi
        first, second = a - alpha * self.x, b - beta * self.y
        top = np.maximum(np.maximum(first, second), e)
        p, q, r = np.exp(first - top), np.exp(second - top), np.exp(e - top)
        total = p + q + r
        error = top + np.log(total) - log_loss
        pull = np.clip(error, -DELTA, DELTA)
        share = pull / total / (DELTA * len(log_loss))
        p, q, r = share * p, share * q, share * r
        gradient = np.array([p.sum(), q.sum(), r.sum(), -(p @ self.x), -(q @ self.y)])
        return float(np.sum(pull * (error - pull / 2))) / (DELTA * len(log_loss)), gradient

    def fit(self, start: np.ndarray, loss: np.ndarray) -> tuple[float, np.ndarray]:
        """The objective as a sum over points, and where it is least."""
        import scipy.optimize

        a, b, e, alpha, beta = start
        (mx, my), (sx, sy) = self.mean, self.spread
        phi = np.array([a - alpha * mx, b - beta * my, e, alpha * sx, beta * sy])
        settings = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-14, "gtol": 1e-8}
        found = scipy.optimize.minimize(
            self.value_and_gradient, phi, (np.log(loss),), jac=True, method="L-BFGS-B", options=settings
        )
        return float(found.fun) * DELTA * len(loss), found.x


def coverage(replicas: int, bootstraps: int) -> dict[str, Any]:
    """The share of replicas whose 95 % interval holds the truth, of each coefficient and of two that follow."""
    rng = np.random.default_rng(SEED + 1)
    held, wide, unconverged, began = [], [], 0, time.perf_counter()
    truth = {name: getattr(HOFFMANN, name) for name in ("E", "A", "B", "alpha", "beta")}
    for replica in range(replicas):
        fitted = fit_law(CHINCHILLA, *table(5, 16, rng), bootstraps=bootstraps, seed=replica)
        edges = {name: fitted.interval(name) for name in truth}
        edges["a"] = fitted.of(lambda law: law.exponents[0])[1:]
        edges["N_opt at 1e22"] = fitted.of(lambda law: law.optimal(1e22)[0])[1:]
        true = truth | {"a": HOFFMANN.exponents[0], "N_opt at 1e22": HOFFMANN.optimal(1e22)[0]}
        held.append([low <= true[name] <= high for name, (low, high) in edges.items()])
        wide.append([(high - low) / true[name] for name, (low, high) in edges.items()])
        unconverged += fitted.unconverged
        names = list(edges)
    share, width = np.mean(held, axis=0), np.median(wide, axis=0)
    return {
        "replicas": replicas, "points": 80, "bootstraps": bootstraps, "noise": NOISE,
        "share_that_hold": dict(zip(names, share.tolist())), "relative_width": dict(zip(names, width.tolist())),
        "unconverged": unconverged, "seconds": time.perf_counter() - began,
    }  # fmt: skip


def wide_table(layout: str, law: Chinchilla, noise: float, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """budget, N, D and noisy loss of runs whose sizes range over three decades."""
    budgets = np.logspace(17, 20.3, 12 if layout == "shared" else 6)
    best, _ = law.optimal(budgets)
    if layout == "shared":
        sizes = np.geomspace(best[0] / 4, best[-1] * 4, 18)
        near = [sizes[np.abs(np.log(sizes / n)) < np.log(30)] for n in best]
    else:
        near = [n * np.geomspace(1 / 30, 30, 12) * np.exp(rng.uniform(-0.3, 0.3)) for n in best]
    budget, N = np.repeat(budgets, [len(sizes) for sizes in near]), np.concatenate(near)
    D = budget / 6 / N
    return budget, N, D, law.loss(N, D) * np.exp(noise * rng.normal(size=len(N)))


def wide_curves(law: Chinchilla, noise: float, rng: np.random.Generator) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """N, tokens and noisy loss along the runs of 12 sizes over three decades, around the budgets where each is best."""
    curves, budgets = [], np.logspace(12, 26, 3000)
    best, _ = law.optimal(budgets)
    for N in np.geomspace(1e7, 1e10, 12):
        D = budgets[np.argmin(np.abs(np.log(best / N)))] * np.geomspace(1 / 60, 30, 80) / 6 / N
        curves.append((N, D, law.loss(N, D) * np.exp(noise * (rng.normal() + 0.1 * rng.normal(size=len(D))))))
    return curves


def finished_curves(
    law: Chinchilla, noise: float, rng: np.random.Generator
) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """N, tokens and noisy loss of the runs of each size with at least two token counts, in ascending order."""
    _, N, D, loss = wide_table("shared", law, noise, rng)
    of_sizes = [np.flatnonzero(size == N) for size in np.unique(N)]
    return [(float(N[of[0]]), D[of], loss[of]) for of in of_sizes if len(of) > 1]


def exponents(replicas: int, bootstraps: int, layouts: Sequence[str] = LAYOUTS) -> dict[str, Any]:
    """Rows, one a case: share of intervals that hold the true exponent, mean error and median width; pooled shares."""
    rows = []
    for (name, law), layout, noise in itertools.product(SKEWED.items(), layouts, (0.002, 0.005)):
        rng, true, found = np.random.default_rng([SEED, len(rows)]), float(law.exponents[0]), []
        for seed in range(replicas):
            again = {"bootstraps": bootstraps, "seed": seed}
            if layout in ("curves", "finished"):
                curves = wide_curves if layout == "curves" else finished_curves
                fitted = envelope(curves(law, noise, rng), whole=layout == "curves", **again)
            else:
                fitted = isoflop(*wide_table(layout, law, noise, rng), **again)
            low, high = fitted.interval("a")
            found.append((low <= true <= high, fitted.a - true, high - low))
        holds, error, width = np.array(found).T
        rows.append(
            {
                "law": name,
                "approach": fitted.approach,
                "layout": layout,
                "noise": noise,
                "share": float(holds.mean()),
                "mean_error": error.mean(),
                "scatter": error.std(),
                "median_width": float(np.median(width)),
            }
        )
        print(rows[-1], flush=True)
    pooled = {layout: float(np.mean([row["share"] for row in rows if row["layout"] == layout])) for layout in layouts}
    return {"replicas": replicas, "bootstraps": bootstraps, "share": pooled, "rows": rows}


if __name__ == "__main__":
    main()
