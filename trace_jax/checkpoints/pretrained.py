"""Published checkpoints as models: which one a run starts from (`PretrainedConfig`), and its import."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import ref

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from tokenizers import Tokenizer

from trace_jax.checkpoints.checkpoint import CheckpointError, open_checkpoint, read_object
from trace_jax.checkpoints.parts import account, host_memory, parts_of, place, stream
from trace_jax.config import ConfigError, Section, fingerprint, option
from trace_jax.io.files import is_remote
from trace_jax.io.progress import progress
from trace_jax.models.architecture import GROUPED_MATMULS, ModelConfig, flat_specs, flatten, unflatten
from trace_jax.models.families import PUBLISHED, family_of, model_config, shape_differences
from trace_jax.models.model import Model, Source, SpecialTokens, token_id
from trace_jax.models.sharding import param_shardings

_NO_PATH = "path is empty; give the directory of a checkpoint: --config.model.path=DIR."
_SAMPLE, _STRIDE = 1 << 12, 1 << 18  # bytes


class PretrainedConfig(Section):
    """A model that is imported (`load_pretrained`) instead of trained."""

    path: str = option(help="directory of a Hugging Face checkpoint; may be empty where `published` is given")
    published: str | None = option(None, help="published model whose shape it must have", choices=tuple(PUBLISHED))
    dtype: str = option("bfloat16", help="type of weights and activations", choices=("float32", "bfloat16"))
    grouped_matmul: str = option("auto", help="how experts are multiplied; auto: by platform", choices=GROUPED_MATMULS)
    retrained: str = option("", help="directory of the same model trained without the forget set, to compare with")

    def __post_init__(self):
        super().__post_init__()
        if not self.path and self.published is None:
            raise ConfigError(_NO_PATH)
        for name in ("path", "retrained"):
            if (path := getattr(self, name)) and not is_remote(path):
                object.__setattr__(self, name, os.path.abspath(os.path.expanduser(path)))  # `export` may run elsewhere

    def shape(self) -> ModelConfig:
        """The model of config.json or, without a path, the published one. Another than `published` is a ConfigError."""
        published = PUBLISHED[self.published] if self.published else {}
        fields = read_object(Path(self.path) / "config.json") if self.path else published
        shape = model_config(fields, dtype=self.dtype)
        if published and (differences := shape_differences(shape, model_config(published, dtype=self.dtype))):
            raise ConfigError(
                f"{self.path}: this is no {self.published} (model.published): {'; '.join(differences)}. Give the "
                f"directory of {published['_name_or_path']}, of one trained from it, or --config.model.published=None."
            )
        return dataclasses.replace(shape, grouped_matmul=self.grouped_matmul)

    def check(self) -> None:
        """Refuses what a run can't start from, before anything else is read or anything written."""
        if not self.path:
            raise ConfigError(_NO_PATH)
        open_checkpoint(self.path)
        shape = self.shape()
        retrained = model_config(open_checkpoint(self.retrained).config, dtype=self.dtype) if self.retrained else shape
        if differences := shape_differences(retrained, shape):
            why = f"is another model than {self.path}: {'; '.join(differences)}. It must be the same one"
            raise ConfigError(f"{self.retrained} (model.retrained) {why}, trained without the forget set.")

    def identity(self, *, retrained: bool = False) -> str:
        """Hash of what is in the checkpoint `path`, wherever it lies, and of how it is read; or (else empty) of
        `retrained`.
        """
        if not (path := self.retrained if retrained else self.path) and retrained:
            return ""
        stats = [file.stat() for file in sorted(Path(path).glob("*.safetensors"))]
        stamps = tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
        return fingerprint(_content(path, stamps), self.dtype, self.grouped_matmul)


@functools.lru_cache(maxsize=4)
def _content(path: str, _stamps: tuple) -> str:
    """Hash of config.json, of every tensor's name, type and shape, and of its content: all of it up to 256 KiB, and the
    first 4 KiB of every 256 KiB of larger ones, which is 200 MB of 13 GB.
    """
    checkpoint = open_checkpoint(path)
    digest = hashlib.sha256((checkpoint.directory / "config.json").read_bytes())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        for start in range(0, tensor.nbytes, _STRIDE):
            size = min(_STRIDE if tensor.nbytes <= _STRIDE else _SAMPLE, tensor.nbytes - start)
            digest.update(os.pread(tensor.file.descriptor, size, tensor.offset + start))
    return digest.hexdigest()


def load_pretrained(
    path: str | os.PathLike,
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    shardings: Any = None,
    grouped_matmul: str = "auto",
) -> Model:
    """Reads a Hugging Face checkpoint of a supported family, straight onto the devices.

    Every tensor is accounted for before anything is allocated. Only safetensors are read, and no code of a checkpoint
    ever runs. Quantised tensors (FP8 in blocks, MXFP4) are decoded. Host memory besides the parameters is about two
    parts of 64 MB (or of one expert, where that is more).

    Args:
      path: a directory with config.json and model.safetensors, or several files with an index.
      dtype: of weights and activations, float32 or bfloat16. The router is float32 always.
      mesh: devices that share the parameters (`param_shardings`); None: the default device.
      shardings: pytree of `NamedSharding` like the parameters, instead of `mesh`; any axis but "layers" may be sharded.
      grouped_matmul: how experts are multiplied (`ModelConfig.grouped_matmul`).

    Raises:
      CheckpointError: files, tensors or quantization that can't be read; the message names them.
      ConfigError: a model_type or a value of config.json that isn't implemented; the message lists what is.
      ValueError: a sharded "layers" axis.

    Example:
      >>> tj.load_pretrained(checkpoint, dtype="bfloat16")  # the path of a directory
      Model(olmoe, ... parameters, 2 layers x 8 experts, top 3, bfloat16)
    """
    directory, checkpoint = Path(path), open_checkpoint(path)
    config_json = checkpoint.config
    config = dataclasses.replace(model_config(config_json, dtype=dtype), grouped_matmul=grouped_matmul)
    slots, readable, _ = account(checkpoint, config, family_of(config_json))
    specs, params = flat_specs(config), {}
    placing: dict[str, NamedSharding | None] = dict.fromkeys(specs)  # uncommitted on the default device
    if shardings is not None:
        placing = flatten(shardings)
    elif mesh is not None:
        placing = dict(param_shardings(config, mesh))
    for name, sharding in placing.items():
        if sharding and specs[name].axes[0] == "layers" and sharding.spec[:1] not in ((), (None,)):
            raise ValueError(f"{name}: its layers can't be sharded ({sharding.spec}); shard another axis.")
    sizes = [readable[slot.names[0]].dtype.itemsize for slot in slots]
    parts = [part for slot, size in zip(slots, sizes, strict=True) for part in parts_of(slot, placing[slot.path], size)]
    tokenizer, special = read_tokenizer(directory, config_json)
    memory = {n: array for n, sharding in placing.items() if (array := host_memory(specs[n], sharding)) is not None}
    with progress(f"Reading {directory.name}", len(parts), unit="part") as advance:
        for done, (part, numbers) in enumerate(stream(parts, readable, memory)):
            name = part.slot.path
            if numbers is not None:
                if name not in params:
                    make = jax.jit(lax.empty, static_argnums=(0, 1), out_shardings=placing[name])
                    params[name] = make(specs[name].shape, specs[name].dtype)
                params[name] = jax.block_until_ready(place(params[name], numbers, part))
            advance(done + 1, name)
    params |= {name: jax.device_put(array, placing[name]) for name, array in memory.items()}
    source = Source(directory.absolute(), str(config_json["model_type"]), {p: ref(a) for p, a in params.items()})
    return Model(config, unflatten(params), tokenizer, special, source)


def read_tokenizer(directory: Path, config_json: Mapping[str, Any]) -> tuple[Tokenizer | None, SpecialTokens]:
    """The tokenizer of a checkpoint, if it has a tokenizer.json, and its special tokens: of generation_config.json, of
    config.json or, by their text, of tokenizer_config.json. Where none fills rows, the first that ends a text does.
    """

    def read(name: str) -> dict[str, Any]:
        return read_object(directory / name) if (directory / name).exists() else {}

    generation, texts = read("generation_config.json"), read("tokenizer_config.json")
    file = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file)) if file.exists() else None
    except Exception as error:  # the library raises nothing more special
        raise CheckpointError(f"{file}: can't be read as a tokenizer ({error}). Download it again.") from error
    ids: dict[str, list[int]] = {}
    for kind in ("bos", "eos", "pad"):
        by_text = token_id(tokenizer, texts.get(f"{kind}_token")) if tokenizer else None
        values = generation.get(f"{kind}_token_id"), config_json.get(f"{kind}_token_id"), by_text
        value = next((value for value in values if value is not None), None)
        ids[kind] = [token for token in (value if isinstance(value, list) else [value]) if token is not None]
        if wrong := [token for token in ids[kind] if type(token) is not int]:
            raise CheckpointError(f"{directory}: {kind}_token_id has {wrong[0]!r}; expected the number of a token.")
    eos = tuple(ids["eos"])
    return tokenizer, SpecialTokens(bos=next(iter(ids["bos"]), None), eos=eos, pad=next(iter(ids["pad"] or eos), 0))
