"""Export: a model as a directory that transformers loads, `save_pretrained`.

The files begin as copies of the source's; over them is written what is no longer what the import made of them. Only
quantised tensors that have changed, models trained here and other sizes of files need files of their own.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trace_jax.checkpoints import checkpoint
from trace_jax.checkpoints.checkpoint import INDEX, SINGLE, CheckpointError, Quantised, Readable, Specs, Tensor
from trace_jax.checkpoints.parts import THREADS, Slot, account, parts_of, places, slots_of, take
from trace_jax.config import ConfigError
from trace_jax.io.files import free_bytes, is_remote, replacing, write_json
from trace_jax.io.progress import progress
from trace_jax.models.architecture import ModelConfig, flat_specs, flatten
from trace_jax.models.families import FAMILIES, family_of, model_config
from trace_jax.models.model import Model, SpecialTokens
from trace_jax.parallel.processes import is_main

# What travels along with the tensors. Code and weights of other formats don't.
_ALONG = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*")
_ALONG += ("vocab*", "merges.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
_NEVER = {".py", ".bin", ".pt", ".pth", ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx"}


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What a reader of the checkpoint should know: what the model was made to forget, in a sentence; by which method,
    with which settings by name; and, in rows of a table with the same columns, what was measured.
    """

    unlearned: str
    method: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    measured: Sequence[Mapping[str, Any]] = ()


def save_pretrained(
    model: Model,
    path: str | os.PathLike,
    *,
    card: ModelCard | None = None,
    overwrite: bool = False,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes `model` as a Hugging Face checkpoint: like its source, with what has changed put in.

    Tensors keep the source's names, layout and type, and numbers that are those of the import keep their bytes; so does
    what the import ignored. If a quantised tensor has changed, all quantised ones are written as bfloat16 and
    config.json loses its quantization_config. A model without a source (trained here) becomes a `mixtral`. Everything
    is written under a temporary name and renamed at the end. Memory is as in `load_pretrained`. Of several processes
    all must call it, and process 0 writes.

    Args:
      card: what README.md says was done; without it, only how the tensors differ from the source's.
      overwrite: replaces an existing checkpoint at `path`.
      shard_bytes: largest file of tensors.

    Raises:
      CheckpointError: `path` exists or has too little space; the source is gone or doesn't fit the model.
      ConfigError: a model without a source that no `mixtral` config.json describes.

    Example:
      >>> original = tj.load_pretrained(checkpoint)
      >>> changed = original.replace(params={**original.params, "embed": 2 * original.params["embed"]})
      >>> tj.save_pretrained(changed, "changed")
      >>> bool((tj.load_pretrained("changed").params["embed"] == changed.params["embed"]).all())
      True
    """
    if is_remote(path):
        raise CheckpointError(f"{os.fspath(path)}: a checkpoint is exported to a local disk. Copy it there afterwards.")
    destination, params, specs = Path(path).absolute(), flatten(model.params), flat_specs(model.config)
    checkpoint.check_arrays("the model", params, specs)
    _check_destination(destination, overwrite=overwrite, source=model.source.directory if model.source else None)
    source, written, merged, ignored = None, [], [], {}  # written: slots whose tensors are new in the files
    if model.source is None:
        config_json = mixtral_config_json(model.config, model.special)
        written = slots_of(model.config, FAMILIES["mixtral"], ())
        dtypes = {path: np.dtype(leaf.dtype) for path, leaf in params.items()}
        files = {name: (dtypes[slot.path], slot.tensor_shape) for slot in written for name in slot.names}
    else:
        family = family_of({"model_type": model.source.model_type})
        source = checkpoint.open_checkpoint(model.source.directory)
        slots, readable, unread = account(source, model.config, family)
        config_json, files = dict(source.config), _specs(source)
        imported = {p: reference() for p, reference in model.source.imported.items()}
        touched = [slot for slot in slots if params[slot.path] is not imported.get(slot.path)]
        packed = [slot for slot in touched if isinstance(readable[slot.names[0]], Quantised)]
        merged = [slot for slot in touched if isinstance(readable[slot.names[0]], Tensor)]
        if _write(packed, params, readable, dry=True):
            config_json.pop("quantization_config", None)
            slots = slots_of(model.config, family, readable)
            written = [slot for slot in slots if isinstance(readable[slot.names[0]], Quantised)]
            files, ignored = _decoded(written, source, readable, unread)
    if (needed := _nbytes(files) + 2**26) > (free := free_bytes(destination)):
        raise CheckpointError(f"{destination} needs {needed / 1e9:.1f} GB, and there are {free / 1e9:.1f} GB free.")
    with replacing(destination) if is_main() else contextlib.nullcontext() as directory:
        tensors = {}
        if directory is not None:
            directory.mkdir()
            tensors = _lay_out(directory, files, source, shard_bytes)
        changed = _write([*written, *merged], params, tensors)
        if directory is None:
            return
        for name, tensor in ignored.items():
            tensors[name].copy(tensor)
        changed |= ignored.keys() | {name for slot in written for name in slot.names}
        _write_others(directory, model, source, config_json)
        text = readme(card, source, _note(len(changed), len(files), bool(source), decoded=bool(written)))
        (directory / "README.md").write_text(text, encoding="utf-8")


def _check_destination(path: Path, *, overwrite: bool, source: Path | None) -> None:
    """Refuses a directory that must not be replaced."""
    if not path.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{path} exists; choose another directory, or overwrite it (--overwrite).")
    if source is not None and source.resolve().is_relative_to(path.resolve()):
        raise CheckpointError(f"{path} holds the checkpoint that the model came from; choose another directory.")
    if not path.is_dir() or (any(path.iterdir()) and not (path / "config.json").exists()):
        raise CheckpointError(f"{path} is no checkpoint, and is not replaced by one; choose another directory.")


# --- tensors


def _specs(source: checkpoint.Checkpoint | None) -> Specs:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in source.tensors.items()} if source else {}


def _nbytes(specs: Specs) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())


def _decoded(
    slots: Sequence[Slot], source: checkpoint.Checkpoint, readable: Mapping[str, Readable], unread: Iterable[str]
) -> tuple[Specs, dict[str, Readable]]:
    """All tensors in the order of the files, those of `slots` as bfloat16 without scales; and the ignored ones that are
    decoded too, because config.json no longer says how they are stored.
    """
    ignored = {
        name: checkpoint.readable_tensor(name, source.tensors, source.config)
        for name in unread
        if source.tensors[name].dtype == checkpoint.DTYPES["F8_E4M3"] and f"{name}_scale_inv" in source.tensors
    }
    shapes = {name: slot.tensor_shape for slot in slots for name in slot.names}
    decoded, scales = {}, set()
    for name in [*shapes, *ignored]:
        data, scale = (ignored.get(name) or readable[name]).parts
        decoded[data.name] = name, (checkpoint.DTYPES["BF16"], shapes.get(name, data.shape))
        scales.add(scale.name)
    return dict(decoded.get(name, (name, spec)) for name, spec in _specs(source).items() if name not in scales), ignored


def _lay_out(directory: Path, specs: Specs, source: checkpoint.Checkpoint | None, limit: int) -> dict[str, Tensor]:
    """The tensors of new files, with the source's bytes wherever one has its type and shape: copies of the source's
    files if they hold the same tensors and none is beyond `limit` bytes, else cut anew, with an index for several.
    """
    before = _specs(source)
    sizes = [sum(tensor.nbytes for tensor in file.tensors.values()) for file in source.files] if source else []
    if source and specs == before and max(sizes) <= limit:
        names = [file.path.name for file in source.files]
        for name in (*names, *[INDEX] * (names != [SINGLE])):
            shutil.copyfile(source.directory / name, directory / name)
        files = [checkpoint.TensorFile(directory / name, writable=True) for name in names]
        return {name: tensor for file in files for name, tensor in file.tensors.items()}
    shards: list[dict] = [{}]
    for name, spec in specs.items():
        if shards[-1] and _nbytes({**shards[-1], name: spec}) > limit:
            shards.append({})
        shards[-1][name] = spec
    tensors, file_of = {}, {}
    for number, shard in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors |= checkpoint.create_file(directory / file, shard, {"format": "pt"}).tensors
        file_of |= dict.fromkeys(shard, file)
    for name, spec in specs.items():
        if source and before.get(name) == spec:
            tensors[name].copy(source.tensors[name])
    if len(shards) > 1:
        index = {"metadata": {"total_size": _nbytes(specs)}, "weight_map": dict(sorted(file_of.items()))}
        write_json(directory / INDEX, index)
    return tensors


def _write(
    slots: Sequence[Slot], params: Mapping[str, jax.Array], tensors: Mapping[str, Readable], *, dry: bool = False
) -> set[str]:
    """Writes parameters over the tensors of their slots (`dry`: compares); the names of those that get other numbers.
    A number that the import would cast to the parameter's stays, bit by bit. Without `tensors` a process only helps.
    """

    def bits(array: np.ndarray) -> np.ndarray:
        return array.view(f"u{array.dtype.itemsize}")

    def write(place: tuple[int, str, int, np.ndarray]) -> str | None:
        _, name, start, view = place
        tensor, numbers = tensors[name], view.reshape(-1)
        before = tensor.read(start, start + numbers.size)
        on_device = before.astype(jax.dtypes.canonicalize_dtype(before.dtype), copy=False)
        differs = bits(on_device.astype(numbers.dtype, copy=False)) != bits(numbers)
        if not differs.any():
            return None
        if not dry and isinstance(tensor, Tensor):
            np.copyto(bits(before), bits(numbers.astype(tensor.dtype, copy=False)), where=differs)
            tensor.write(before, start)
        return name

    changed: set[str] = set()
    with ThreadPoolExecutor(THREADS) as pool, progress("Writing", len(slots), unit="slot") as advance:
        for done, slot in enumerate(slots):
            parameter = params[slot.path]
            for part in parts_of(slot, parameter.sharding, parameter.dtype.itemsize):
                numbers = take(parameter, part)
                if tensors:
                    changed.update(filter(None, pool.map(write, places(part, numbers))))
            advance(done + 1, slot.path)
    return changed


# --- what lies beside them


def _write_others(
    directory: Path, model: Model, source: checkpoint.Checkpoint | None, config_json: Mapping[str, Any]
) -> None:
    """config.json, the tokenizer and what else travels along."""
    if source and config_json == source.config:
        shutil.copyfile(source.directory / "config.json", directory / "config.json")
    else:
        write_json(directory / "config.json", config_json)
    if source:
        for file in sorted({file for pattern in _ALONG for file in source.directory.glob(pattern)}):
            if file.is_file() and file.suffix not in _NEVER:
                shutil.copyfile(file, directory / file.name)
    elif model.tokenizer is not None:
        model.tokenizer.save(str(directory / "tokenizer.json"))
        ids = {"bos": model.special.bos, "eos": next(iter(model.special.eos), None), "pad": model.special.pad}
        fields = {"tokenizer_class": "PreTrainedTokenizerFast"}
        fields |= {f"{kind}_token": model.tokenizer.id_to_token(i) for kind, i in ids.items() if i is not None}
        write_json(directory / "tokenizer_config.json", fields)


def _note(changed: int, total: int, has_source: bool, *, decoded: bool) -> str:
    """How the files differ from the source's."""
    if not has_source:
        return "All tensors are this model's own."
    if not changed:
        return f"An unchanged re-export: all {total} tensors are the base model's, byte for byte."
    why = "The base model's quantised tensors changed; all of them are written as bfloat16. " if decoded else ""
    return f"{why}{changed} of {total} tensors differ from the base model's; the rest are its bytes."


def readme(card: ModelCard | None, source: checkpoint.Checkpoint | None, note: str) -> str:
    """The text of README.md. `note` says how the files differ from the source's."""
    front: dict[str, Any] = licence_of(source.directory) if source else {}
    front |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    name = "a model trained by trace_jax"
    if source:
        name = front["base_model"] = base_model_of(source.directory, source.config)
    lines = [f"# {name}", "", "Written by trace_jax; nothing is recorded about how it was made.", ""]
    if card:
        front["tags"] = ["unlearning", "trace_jax"]
        lines = [f"# {name}, unlearned", "", card.unlearned, "", f"Method: {card.method}, by trace_jax.", ""]
        lines += _table([{"setting": key, "value": value} for key, value in card.settings.items()], "Settings")
        lines += _table(card.measured, "Measured")
    head = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    return "\n".join([*head, *lines, "## Files", "", note, ""])


def _table(rows: Sequence[Mapping[str, Any]], title: str) -> list[str]:
    if not rows:
        return []
    columns = list(rows[0])
    cells = [[str(row.get(column, "")).replace("|", "\\|").replace("\n", " ") for column in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return [f"## {title}", "", *("| " + " | ".join(line) + " |" for line in lines), ""]


def licence_of(directory: Path) -> dict[str, str]:
    """The licence fields in the front matter of a checkpoint's README.md; none if it has none."""
    path, keys = directory / "README.md", ("license", "license_name", "license_link")
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    front = re.match(r"---\n(.*?)\n---(\n|$)", text, re.DOTALL)
    pairs = [line.partition(":") for line in front[1].splitlines()] if front else []
    return {key: value.strip().strip("'\"") for key, _, value in pairs if key in keys and value.strip()}


def base_model_of(directory: Path, config_json: Mapping[str, Any]) -> str:
    """The name of a checkpoint: of its hub repository where the path or config.json tells it, else its directory's."""
    if cached := next((part for part in directory.absolute().parts if part.startswith("models--")), ""):
        return cached.removeprefix("models--").replace("--", "/")
    return str(config_json.get("_name_or_path") or directory.absolute().name)


def mixtral_config_json(config: ModelConfig, special: SpecialTokens) -> dict[str, Any]:
    """config.json of a model trained here; a ConfigError names switches that Mixtral doesn't have."""
    fields = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.expert_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.ropes[0].theta,
        "sliding_window": max(config.windows, default=0) or None,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.dtype,
        "bos_token_id": special.bos,
        "eos_token_id": list(special.eos),
        "pad_token_id": special.pad,
    }
    read = dataclasses.replace(model_config(fields, dtype=config.dtype), grouped_matmul=config.grouped_matmul)
    names = [field.name for field in dataclasses.fields(config)]
    if other := ", ".join(f"{n} = {getattr(config, n)!r}" for n in names if getattr(config, n) != getattr(read, n)):
        raise ConfigError(f"a model that was not imported is exported as a mixtral, which can't express {other}.")
    return fields
