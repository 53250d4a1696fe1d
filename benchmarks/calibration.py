"""Time to solve a calibration, against scipy's L-BFGS on the same dual. Run from the repository root:

    python benchmarks/calibration.py            # 10^6 tokens, 256 selected experts
    python benchmarks/calibration.py --tokens 100000 --layers 4

"all" also makes features of the routing, finds the rho that keeps the effective sample size, and makes the certificate;
L-BFGS is given that rho, so its time is that of one solve. Routing is random, in domains that prefer other experts. The
row is also written to benchmarks/results/calibration.json.
"""

import argparse
import json
import os
import platform
import resource
import time
from pathlib import Path

import numpy as np
import scipy
from scipy.optimize import minimize

from trace_jax.routing.calibration import calibrate, count_activations
from trace_jax.routing.solver import closest_match, find_patterns


def random_routing(generator, preference, tokens, top_k):
    """integer [L, T, K]: top K of random scores; preference [L, domains, E]."""
    layers, domains, experts = preference.shape
    domain = generator.integers(0, domains, tokens)
    chosen = np.empty((layers, tokens, top_k), np.uint8)
    for layer in range(layers):
        scores = generator.gumbel(size=(tokens, experts)).astype(np.float32) + preference[layer, domain]
        chosen[layer] = np.argpartition(-scores, top_k, axis=1)[:, :top_k]
    return chosen


def lbfgs(features, target, base, rho, max_weight, tolerance):
    """(multipliers, intercept, gradient norm) of the same dual by scipy."""
    base = base / base.sum()

    def dual(point):
        multipliers, scores = point[:-1], features @ point[:-1] + point[-1]
        weights = np.clip(scores, 0.0, max_weight)
        value = base @ (weights * (scores - weights / 2)) - multipliers @ target - point[-1]
        slope = features.T @ (base * weights) - target + rho * multipliers
        return value + rho / 2 * multipliers @ multipliers, np.append(slope, base @ weights - 1)

    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-16, "gtol": tolerance, "maxcor": 20}
    found = minimize(dual, np.append(np.zeros(len(target)), 1.0), jac=True, method="L-BFGS-B", options=options)
    return found.x[:-1], found.x[-1], float(np.abs(found.jac).max())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--selected", type=int, default=16, help="experts selected per layer")
    parser.add_argument("--size", type=float, default=0.2, help="effective sample size that is to remain")
    parser.add_argument("--output", default="benchmarks/results/calibration.json")
    options = parser.parse_args()

    generator = np.random.default_rng(0)
    preference = generator.normal(size=(options.layers, 20, options.experts)).astype(np.float32)
    retain = random_routing(generator, preference, options.tokens, options.top_k)
    forget = random_routing(generator, preference[:, :2], 20_000, options.top_k)
    f_forget = count_activations(forget, options.experts) / 20_000
    f_retain = count_activations(retain, options.experts) / options.tokens
    rank = np.argsort(np.argsort(-(f_forget - f_retain), axis=1), axis=1)
    selected = rank < options.selected

    begin, begin_cpu = time.perf_counter(), time.process_time()
    calibration = calibrate(retain, selected=selected, target=f_forget, min_effective_sample_size=options.size)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    certificate = calibration.certificate

    features, base, *_ = find_patterns(retain, selected, None)
    begin = time.perf_counter()
    solved = closest_match(features, f_forget[selected], base=base, sizes=[options.size])[0]
    solve_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    multipliers, intercept, gradient = lbfgs(features, f_forget[selected], base, solved.rho, 50.0, 1e-8)
    scipy_seconds = time.perf_counter() - begin
    difference = np.abs(np.clip(features @ multipliers + intercept, 0.0, 50.0) - solved.weights).max()

    row = {
        "tokens": options.tokens, "layers": options.layers, "experts": options.experts, "top_k": options.top_k,
        "selected": int(selected.sum()), "patterns": len(base), "size": options.size,
        "calibrate_seconds": round(seconds, 2),
        "calibrate_cpu_seconds": round(cpu_seconds, 2), "solve_seconds": round(solve_seconds, 2),
        "gradient": solved.gradient_norm,
        "scipy_lbfgs_seconds": round(scipy_seconds, 2), "scipy_gradient": gradient,
        "largest_weight_difference": float(difference), "closed": certificate.closed,
        "gap_before": certificate.gap_before,
        "gap_after": certificate.gap_after, "effective_sample_size": certificate.effective_sample_size,
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "cores": os.cpu_count(), "load_average": round(os.getloadavg()[0], 1),
        "machine": platform.machine(), "numpy": np.__version__, "scipy": scipy.__version__,
    }  # fmt: skip
    print("  tokens selected | calibrate: all, its solve, gradient | scipy L-BFGS: solve, gradient | other processes")
    print(
        f"{row['tokens']:8d} {row['selected']:8d} | {seconds:13.2f}s {solve_seconds:8.2f}s {row['gradient']:9.1e} | "
        f"{scipy_seconds:18.2f}s {gradient:9.1e} | load {row['load_average']} on {row['cores']} cores"
    )
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
