"""Time to solve a calibration, against scipy's L-BFGS on the same problem. Run from the repository root:

    python benchmarks/calibration.py            # 10^6 tokens, 256 selected experts
    python benchmarks/calibration.py --tokens 100000 --layers 4

"all" also finds the patterns and makes the certificate; both solves start from the same features. Routing is random,
in domains that prefer other experts. The row is also written to benchmarks/results/calibration.json.
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
from trace_jax.routing.entropy_balancing import clipped_to_mean_one, entropy_balance, find_patterns


def random_routing(generator, preference, tokens, top_k):
    """integer [L, T, K]: top K of random scores; preference [L, domains, E]."""
    layers, domains, experts = preference.shape
    domain = generator.integers(0, domains, tokens)
    chosen = np.empty((layers, tokens, top_k), np.uint8)
    for layer in range(layers):
        scores = generator.gumbel(size=(tokens, experts)).astype(np.float32) + preference[layer, domain]
        chosen[layer] = np.argpartition(-scores, top_k, axis=1)[:, :top_k]
    return chosen


def lbfgs(features, target, base, ridge, tolerance):
    """(multipliers, gradient norm) of the same dual by scipy."""

    def dual(multipliers):
        scores = features @ multipliers
        top = scores.max()
        mass = base * np.exp(scores - top)
        value = top + np.log(mass.sum() / base.sum()) - multipliers @ target + ridge / 2 * multipliers @ multipliers
        return value, features.T @ (mass / mass.sum()) - target + ridge * multipliers

    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-16, "gtol": tolerance, "maxcor": 20}
    found = minimize(dual, np.zeros(len(target)), jac=True, method="L-BFGS-B", options=options)
    return found.x, float(np.abs(found.jac).max())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--selected", type=int, default=16, help="experts selected per layer")
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
    calibration = calibrate(retain, selected=selected, target=f_forget, ridge=1e-3)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    certificate = calibration.certificate

    features, tokens = find_patterns(retain, selected, "token", np.arange(options.tokens))
    begin = time.perf_counter()
    solved = entropy_balance(features, f_forget[selected], base=tokens, ridge=1e-3)
    solve_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    multipliers, gradient = lbfgs(features, f_forget[selected], tokens, 1e-3, 1e-8)
    scipy_seconds = time.perf_counter() - begin
    of_scipy = np.exp(features @ multipliers)
    of_scipy, ours = (
        clipped_to_mean_one(weights / np.average(weights, weights=tokens), 50.0, tokens)[0]
        for weights in (of_scipy, solved.weights)
    )
    difference = np.abs(ours / of_scipy - 1).max()

    row = {
        "tokens": options.tokens, "layers": options.layers, "experts": options.experts, "top_k": options.top_k,
        "selected": int(selected.sum()), "patterns": len(tokens), "calibrate_seconds": round(seconds, 2),
        "calibrate_cpu_seconds": round(cpu_seconds, 2), "solve_seconds": round(solve_seconds, 2),
        "newton_steps": solved.iterations, "gradient": solved.gradient_norm,
        "scipy_lbfgs_seconds": round(scipy_seconds, 2), "scipy_gradient": gradient,
        "largest_relative_weight_difference": float(difference), "gap_before": certificate.gap_before,
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
