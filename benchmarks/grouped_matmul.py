"""Memory and FLOPs of each grouped_matmul, compiled for a TPU or a GPU that is not there.

    python benchmarks/grouped_matmul.py --device v5e:2x2     # libtpu: pip install "jax[tpu]==<the jax installed>"
    python benchmarks/grouped_matmul.py --device h100        # pip install jax-cuda12-plugin jax-cuda12-pjrt, as jax

Prints one row per shape and implementation, of the product alone and with both gradients, on one chip in bfloat16:
the temporary memory that XLA reserves, and its count of FLOPs over those needed (not given on GPUs; a kernel counts as
it declares itself, that is 1). Speed can't be known without the device. Writes benchmarks/results/grouped_matmul.json
(a device's rows replace the earlier ones of that device).
"""

import argparse
import json
import os
import pathlib

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trace_jax.models.grouped_matmul import grouped_matmul, implementations, resolve_implementation

RESULTS = pathlib.Path(__file__).parent / "results" / "grouped_matmul.json"

# name: rows (tokens times experts per token), D, F, E: the up projection (gate and up together) of 4,096 tokens
SHAPES = {
    "OLMoE-1B-7B": (32768, 2048, 2048, 64),
    "Qwen1.5-MoE-A2.7B": (16384, 2048, 2816, 60),
    "DeepSeek-V2-Lite": (24576, 2048, 2816, 64),
    "GPT-OSS-20B": (16384, 2880, 5760, 32),
    "Qwen3-30B-A3B": (32768, 2048, 1536, 128),
    "Mixtral-8x7B, an eighth of F": (8192, 4096, 3584, 8),
    "small": (4096, 256, 256, 32),
}

# What XLA must know of an H100 SXM to compile for it (xla.gpu.GpuTargetConfigProto).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def mesh_of_one(device: str) -> Mesh:
    """One chip of `device` ("h100" or a TPU topology), present or not."""
    jax.devices()  # registers the plugins
    if device == "h100":
        topology = topologies.get_topology_desc("", platform="cuda", target_config=H100, topology="1x1x1")
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=device)
    return Mesh(topology.devices[:1], ("data",), axis_types=(AxisType.Auto,))


def compiled_costs(mesh: Mesh, implementation: str, shape: tuple[int, ...], gradients: bool) -> dict:
    """{"temporary_bytes", "flops_ratio" (or None)} of one program."""
    N, D, F, E = shape

    def program(x, w, cotangent, sizes):
        y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
        return (y, *pullback(cotangent)) if gradients else y

    spec = PartitionSpec()
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype in (((N, D), "bfloat16"), ((E, D, F), "bfloat16"), ((N, F), "bfloat16"), ((E,), jnp.int32))
    ]
    spread = jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True)
    compiled = jax.jit(spread).lower(*arguments).compile()
    flops = (compiled.cost_analysis() or {}).get("flops")
    needed = 2 * N * D * F * (3 if gradients else 1)
    return {
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "flops_ratio": flops and round(flops / needed, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="v5e:2x2", help="h100, or a TPU topology such as v5e:2x2, v5p:2x2x1")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--implementations", nargs="+", help="default: all that the device can run")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    mesh = mesh_of_one(arguments.device)
    chip = mesh.devices.flat[0]
    names = arguments.implementations or [
        name for name in implementations(chip.platform) if name not in ("auto", "blocked")
    ]
    print(f"{chip.device_kind}, jax {jax.__version__}; auto is {resolve_implementation('auto', chip.platform)}")
    print(f"{'shape':30}{'':10}{'product: MiB':>14}{'FLOPs':>8}{'with gradients: MiB':>22}{'FLOPs':>8}")
    rows = {}
    for shape in arguments.shapes:
        for name in names:
            row = [compiled_costs(mesh, name, SHAPES[shape], gradients) for gradients in (False, True)]
            rows.setdefault(shape, {})[name] = dict(zip(("product", "with_gradients"), row, strict=True))
            (mib, flops), (mib_all, flops_all) = ((r["temporary_bytes"] / 2**20, r["flops_ratio"] or "-") for r in row)
            print(f"{shape:30}{name:10}{mib:14,.1f}{flops:>8}{mib_all:22,.1f}{flops_all:>8}", flush=True)
    if not arguments.no_write:
        written = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        written[arguments.device] = {"kind": chip.device_kind, "jax": jax.__version__, "results": rows}
        RESULTS.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
