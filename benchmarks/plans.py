"""What six published models take on slices of TPUs that are not there, by `plan`, as a table.

    python benchmarks/plans.py [olmoe-1b-7b ...]

Needs the TPU compiler (`pip install "jax[tpu]==VERSION"`). A model takes one to five minutes on 2 cores. Prints a row
for each and writes benchmarks/results/plans.json.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from importlib.metadata import version

import jax
from sides import RESULTS, environment, write_row

SLICES = {
    "olmoe-1b-7b": "v5e:2x4",
    "qwen1.5-moe-a2.7b": "v5e:4x4",
    "deepseek-v2-lite": "v5e:4x4",
    "mixtral-8x7b": "v5p:2x2x2",
    "qwen3-30b-a3b": "v5p:2x2x2",
    "gpt-oss-20b": "v5p:2x2x2",
}


def planned(model: str) -> dict:
    """What `plan` writes, of a process of its own, which gives its memory back."""
    with tempfile.TemporaryDirectory() as directory:
        file = pathlib.Path(directory) / "plan.json"
        command = [sys.executable, "-m", "trace_jax.main", "plan", "--config", f"configs/plan.py:{model}"]
        subprocess.run([*command, "--topology", SLICES[model], "--json", str(file)], check=True)
        return json.loads(file.read_text())


def row(model: str, plan: dict) -> str:
    """A row of the table in docs/scaling.md."""
    step, statistics, decoding = plan["programs"]
    mesh = " x ".join(str(plan["parallel"][axis]) for axis in ("data", "expert", "tensor"))
    cells = [model, plan["target"], mesh, f"{(step['parameters'] + step['optimizer']) / 2**30:.1f} GiB"]
    cells += [
        f"{step['peak'] / 2**30:.1f} GiB, {step['peak'] / step['capacity']:.0%}",
        f"{step['flops'] / 1e12:.0f} TFLOP",
    ]
    cells.append(f"{step['memory_bytes'] / 2**30:.0f} GiB")
    cells.append("; ".join(f"{e['kind']} {e['count']:,}, {e['bytes'] / 2**30:.1f} GiB" for e in step["exchanges"]))
    cells += [f"{p['least'] * 1e3:.3g} ms, {p['bound']}" for p in (step, statistics, decoding)]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(SLICES), help="of configs/plan.py; default: all")
    jax.config.update("jax_platforms", "cpu")
    for model in parser.parse_args().models:
        plan = planned(model)
        print(row(model, plan), flush=True)
        write_row(RESULTS / "plans.json", model, {**plan, "environment": environment(libtpu=version("libtpu"))})


if __name__ == "__main__":
    main()
