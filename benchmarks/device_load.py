"""How unevenly text loads devices that split the experts, on captured routing: what room they need (`LIKELY`, moe.py).

    python benchmarks/device_load.py --captures runs/studies/real_routing/captures/*.npz --num-experts 64

Captures are files as `trace-jax diagnose` takes them, one a topic; those of `benchmarks/studies/real_routing.py` are
of a published model. A batch is a stretch of one topic, or one half of it and one half of the other topics, as in an
unlearning step. Of every batch and layer the load of the busiest device counts, as a multiple of the balanced one.
Prints a row for each number of devices and writes benchmarks/results/device_load.json.
"""

import argparse
from pathlib import Path

import numpy as np
from sides import RESULTS, environment, write_row

from trace_jax.models.moe import LIKELY


def busiest(routes: np.ndarray, num_experts: int, devices: int) -> np.ndarray:
    """f64 [L], the load of the busiest device by `routes` [L, T, K], as a multiple of the balanced load."""
    device = routes // (num_experts // devices)
    return np.stack([(device == d).sum((1, 2)) for d in range(devices)]).max(0) * devices / routes[0].size


def batches(topics: list[np.ndarray], tokens: int, *, mixed: bool):
    """Routes [L, tokens, K] of stretches of each topic; `mixed`: every second token is one of the other topics."""
    rng = np.random.default_rng(0)
    for number, topic in enumerate(topics):
        others = np.concatenate([other for n, other in enumerate(topics) if n != number], axis=1)
        for start in range(0, topic.shape[1] - tokens + 1, tokens // 4):
            stretch = topic[:, start : start + tokens]
            if mixed:
                chosen = rng.choice(others.shape[1], tokens // 2, replace=False)
                stretch = np.concatenate([stretch[:, ::2], others[:, chosen]], axis=1)
            yield stretch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captures", type=Path, nargs="+", required=True, help="one file a topic")
    parser.add_argument("--num-experts", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch")
    options = parser.parse_args()
    topics = [np.load(file)["expert_ids"] for file in options.captures]
    for devices in (2, 4, 8, 16):
        row: dict = {"captures": [file.stem for file in options.captures], "tokens": options.tokens}
        for name, mixed in (("one topic", False), ("half of others", True)):
            loads = [busiest(b, options.num_experts, devices) for b in batches(topics, options.tokens, mixed=mixed)]
            above = {f"above {limit:g}": round(float(np.mean(np.array(loads) > limit)), 4) for limit in LIKELY}
            row[name] = {"median": round(float(np.median(loads)), 2), "most": round(float(np.max(loads)), 2), **above}
        print(f"{devices} devices: " + "; ".join(f"{name} {row[name]}" for name in ("one topic", "half of others")))
        write_row(RESULTS / "device_load.json", f"{devices} devices", row | {"environment": environment()})


if __name__ == "__main__":
    main()
