"""Speed and memory of importing and exporting a Hugging Face checkpoint. Run from the repository root:

    python benchmarks/checkpoint_io.py                        # OLMoE's shape with 5 layers, bfloat16, 4.6 GB on disk
    python benchmarks/checkpoint_io.py --dtype float32        # parameters in float32: twice the file

Makes a checkpoint of random numbers in a temporary directory (needs twice its size), then measures in a fresh process,
with the page cache emptied of these files ("cold") or just filled with them ("warm"):
- raw reading: all files, 32 MB at a time, into one buffer; and warm into fresh memory of the files' size, whose pages
  of 4 KB the system has to map and clear (those of the parameters too; where it can, it takes larger ones for them);
- load_pretrained, after transformers' class has read config.json once: the first time in a process that imports the
  library (and PyTorch, where it is installed), which is timed apart;
- save_pretrained, synced, of the model as imported and with the last layer's second expert matrices changed, against
  writing and syncing the same number of bytes, and against reading the files and writing them, as an export has to.
Memory is what the process held (anonymous, and all of it) at its peak, beyond what it held before and the parameters.
Results go to benchmarks/results/checkpoint_io.json, a row per --dtype.
"""

import argparse
import contextlib
import datetime
import json
import mmap
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import jax
import ml_dtypes
import numpy as np

from trace_jax.checkpoints.checkpoint import create_file
from trace_jax.checkpoints.export import save_pretrained
from trace_jax.checkpoints.pretrained import load_pretrained
from trace_jax.io.environment import describe
from trace_jax.models.families import model_config
from trace_jax.models.model import Model

RESULTS = pathlib.Path(__file__).parent / "results" / "checkpoint_io.json"
D, F, E, LAYERS, HEADS, VOCABULARY = 2048, 1024, 64, 5, 16, 50304
CONFIG = {
    "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "hidden_size": D, "intermediate_size": F,
    "num_experts": E, "num_experts_per_tok": 8, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS, "vocab_size": VOCABULARY, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def layer_tensors(layer: int) -> dict[str, tuple[int, ...]]:
    at = f"model.layers.{layer}."
    shapes: dict[str, tuple[int, ...]] = {f"{at}self_attn.{side}_proj.weight": (D, D) for side in "qkvo"}
    for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
        shapes[f"{at}{name}.weight"] = (D,)
    shapes[f"{at}mlp.gate.weight"] = (E, D)
    for expert in range(E):
        name = f"{at}mlp.experts.{expert}."
        shapes |= {
            f"{name}gate_proj.weight": (F, D),
            f"{name}up_proj.weight": (F, D),
            f"{name}down_proj.weight": (D, F),
        }
    return shapes


def make_checkpoint(directory: pathlib.Path) -> None:
    """One file per layer, and one for the embedding, the final norm and the head."""
    outer = {
        "model.embed_tokens.weight": (VOCABULARY, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (VOCABULARY, D),
    }
    shards, generator = [outer, *map(layer_tensors, range(LAYERS))], np.random.default_rng(0)
    noise = (0.02 * generator.standard_normal(2**23, np.float32)).astype(ml_dtypes.bfloat16)
    weight_map = {}
    for number, shapes in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        specs = {name: (noise.dtype, shape) for name, shape in shapes.items()}
        tensors = create_file(directory / file, specs, {"format": "pt"}).tensors
        for name, (_, shape) in specs.items():
            size = int(np.prod(shape))
            tensors[name].write(np.resize(np.roll(noise, generator.integers(noise.size)), size))
        weight_map |= dict.fromkeys(shapes, file)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def evict(directory: pathlib.Path) -> None:
    """Empties the page cache of these files."""
    for file in directory.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_all(directory: pathlib.Path) -> float:
    """Seconds to read every file, 32 MB at a time into one buffer."""
    buffer, begin = np.empty(2**25, np.uint8), time.perf_counter()
    for file in sorted(directory.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - begin


def touch_memory() -> None:
    """A virtual machine gets its memory from the host when it is first used; that is not what is measured here."""
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    np.ones(available * 2 // 3, np.uint8)


def read_into_fresh_memory(directory: pathlib.Path) -> float:
    files = sorted(directory.glob("*.safetensors"))
    begin = time.perf_counter()
    memory = memoryview(mmap.mmap(-1, sum(file.stat().st_size for file in files)))
    start = 0
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while count := stream.readinto(memory[start : start + 2**25]):
                start += count
    return time.perf_counter() - begin


def write_all(directory: pathlib.Path, size: int) -> float:
    """Seconds to write and sync `size` bytes, 32 MB at a time."""
    data, begin = np.random.default_rng(0).bytes(2**25), time.perf_counter()
    with open(directory / "raw", "wb", buffering=0) as stream:
        for _ in range(size // len(data)):
            stream.write(data)
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - begin
    (directory / "raw").unlink()
    return seconds


def copy_all(source: pathlib.Path) -> float:
    """Seconds to copy every file, 32 MB at a time, and sync, with the page cache emptied of them."""
    evict(source)
    output, buffer, begin = source.parent / "copied", memoryview(bytearray(2**25)), time.perf_counter()
    output.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as stream, open(output / file.name, "wb", buffering=0) as copy:
            while count := stream.readinto(buffer):
                copy.write(buffer[:count])
    sync(output)
    seconds = time.perf_counter() - begin
    shutil.rmtree(output)
    return seconds


def memory() -> dict[str, int]:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return {"anonymous": fields["RssAnon"], "all": fields["VmRSS"]}


@contextlib.contextmanager
def peak_memory():
    """Yields a dict that holds, afterwards, the most memory seen at intervals of 5 ms, less that of the beginning."""
    begin, peak, done = memory(), {}, threading.Event()

    def watch():
        while not done.wait(0.005):
            for kind, value in memory().items():
                peak[kind] = max(peak.get(kind, 0), value - begin[kind])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def sync(directory: pathlib.Path) -> None:
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def measure_export(name: str, model: Model, source: pathlib.Path) -> dict:
    output, row = source.parent / "exported", {}
    evict(source)
    with peak_memory() as peak:
        begin = time.perf_counter()
        save_pretrained(model, output)
        row[f"export_{name}_seconds"] = time.perf_counter() - begin
    sync(output)
    row[f"export_{name}_synced_seconds"] = time.perf_counter() - begin
    row[f"export_{name}_above_parameters_mb"] = {kind: value / 1e6 for kind, value in peak.items()}
    shutil.rmtree(output)
    return row


def measure(source: pathlib.Path, dtype: str) -> dict:
    """Runs in a fresh process."""
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    touch_memory()
    begin = time.perf_counter()
    model_config(CONFIG, dtype=dtype)
    row: dict = {"dtype": dtype, "file_gb": size / 1e9, "libraries_seconds": time.perf_counter() - begin}
    for state in ("cold", "warm"):
        if state == "cold":
            evict(source)
        row[f"raw_read_{state}_gb_s"] = size / 1e9 / read_all(source)
    row["raw_read_fresh_gb_s"] = size / 1e9 / min(read_into_fresh_memory(source) for _ in range(2))
    model = None
    for state in ("cold", "warm"):
        if state == "cold":
            evict(source)
        else:
            read_all(source)
        del model
        with peak_memory() as peak:
            begin = time.perf_counter()
            model = load_pretrained(source, dtype=dtype)
            row[f"import_{state}_seconds"] = time.perf_counter() - begin
        if state == "cold":
            parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
            row["parameters_gb"] = parameters / 1e9
            row["import_above_parameters_mb"] = {kind: (value - parameters) / 1e6 for kind, value in peak.items()}
    row["largest_layer_mb"] = 2 * sum(int(np.prod(shape)) for shape in layer_tensors(0).values()) / 1e6
    row["raw_write_synced_gb_s"] = size / 1e9 / write_all(source.parent, size)
    row["raw_copy_synced_gb_s"] = size / 1e9 / copy_all(source)
    row |= measure_export("unchanged", model, source)
    layers = model.params["layers"]
    layers["experts"]["down"] = jax.block_until_ready(layers["experts"]["down"].at[-1].multiply(1.5))
    row |= measure_export("changed", model, source)
    return row


def report(row: dict) -> None:
    size = row["file_gb"]
    raw = {state: row[f"raw_read_{state}_gb_s"] for state in ("cold", "warm", "fresh")}
    print(f"importing transformers: {row['libraries_seconds']:.1f} s")
    print("raw reading: " + ", ".join(f"{state} {speed:.2f} GB/s" for state, speed in raw.items()))
    for state in ("cold", "warm"):
        speed = size / row[f"import_{state}_seconds"]
        shares = (
            f"{100 * speed / raw[state]:.0f} % of raw reading, {100 * speed / raw['fresh']:.0f} % into fresh memory"
        )
        print(f"import, {state}: {speed:.2f} GB/s of file, {shares}")
    for name in ("unchanged", "changed"):
        speed, write = size / row[f"export_{name}_synced_seconds"], row["raw_write_synced_gb_s"]
        copied = row["raw_copy_synced_gb_s"]
        shares = f"{100 * speed / write:.0f} % of raw writing ({write:.2f}), {100 * speed / copied:.0f} % of copying"
        print(f"export, {name}: {speed:.2f} GB/s synced, {shares} ({copied:.2f})")
    for name in ("import", "export_unchanged", "export_changed"):
        peak = row[f"{name}_above_parameters_mb"]
        print(
            f"{name}: {peak['anonymous']:.0f} MB anonymous, {peak['all']:.0f} MB in all above the parameters "
            f"(largest layer {row['largest_layer_mb']:.0f} MB)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--directory", help="where the checkpoint is made; default: the system's temporary directory")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(pathlib.Path(options.measure), options.dtype)))
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        source = pathlib.Path(directory) / "source"
        source.mkdir()
        make_checkpoint(source)
        command = [sys.executable, __file__, "--measure", str(source), "--dtype", options.dtype]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    row = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()} | {
        "date": datetime.date.today().isoformat(),
        "load_average": os.getloadavg()[0],
        "environment": describe(),
    }
    report(row)
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = [other for other in rows if other["dtype"] != row["dtype"]] + [row]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
