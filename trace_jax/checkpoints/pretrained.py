"""Import of published checkpoints: `load_pretrained`."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import ref

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from tokenizers import Tokenizer

from trace_jax.checkpoints.accounting import account
from trace_jax.checkpoints.checkpoint import CheckpointError, open_checkpoint, read_object
from trace_jax.checkpoints.parts import Part, parts_of, place, stream
from trace_jax.io.progress import progress
from trace_jax.models.architecture import flat_specs, flatten, unflatten
from trace_jax.models.families import family_of, model_config
from trace_jax.models.model import Model, Source, SpecialTokens
from trace_jax.models.sharding import param_shardings


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
    """
    directory = Path(path)
    checkpoint = open_checkpoint(directory)
    config_json = checkpoint.config
    config = dataclasses.replace(model_config(config_json, dtype=dtype), grouped_matmul=grouped_matmul)
    accounting = account(checkpoint, config, family_of(config_json))
    specs = flat_specs(config)
    placing: dict[str, NamedSharding | None] = dict.fromkeys(specs)  # uncommitted on the default device
    if shardings is not None:
        placing = flatten(shardings)
    elif mesh is not None:
        placing = dict(param_shardings(config, mesh))
    for name, sharding in placing.items():
        if sharding and specs[name].axes[0] == "layers" and sharding.spec[:1] not in ((), (None,)):
            raise ValueError(f"{name}: its layers can't be sharded ({sharding.spec}); shard another axis.")
    parts: list[Part] = []
    for slot in accounting.slots:
        parts += parts_of(slot, placing[slot.path], accounting.readable[slot.names[0]].dtype.itemsize)
    tokenizer, special = read_tokenizer(directory), special_tokens(directory, config_json)
    params: dict[str, jax.Array] = {}
    with progress(f"Reading {directory.name}", len(parts), unit="part") as advance:
        for done, (part, numbers) in enumerate(stream(parts, accounting.readable)):
            name = part.slot.path
            if name not in params:
                make = jax.jit(lax.empty, static_argnums=(0, 1), out_shardings=placing[name])
                params[name] = make(specs[name].shape, specs[name].dtype)
            params[name] = jax.block_until_ready(place(params[name], numbers, part))
            advance(done + 1, name)
    return Model(
        config=config,
        params=unflatten(params),
        tokenizer=tokenizer,
        special=special,
        source=Source(directory.absolute(), str(config_json["model_type"]), {p: ref(a) for p, a in params.items()}),
    )


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint, if it has one in the form of tokenizer.json.

    Raises:
      CheckpointError: the file can't be read.
    """
    file = directory / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(file)) if file.exists() else None
    except Exception as error:  # the library raises nothing more special
        raise CheckpointError(f"{file}: can't be read as a tokenizer ({error}). Download it again.") from error


def special_tokens(directory: Path, config_json: Mapping[str, Any]) -> SpecialTokens:
    """Ids from generation_config.json, config.json or, by the tokens' text, tokenizer_config.json; in this order.

    Without a token to fill rows with, the first that ends a text serves.
    """

    def read(name: str) -> dict[str, Any]:
        return read_object(directory / name) if (directory / name).exists() else {}

    tokenizer, texts = None, read("tokenizer_config.json")
    ids: dict[str, Any] = {}
    for kind in ("bos", "eos", "pad"):
        values = [file.get(f"{kind}_token_id") for file in (read("generation_config.json"), config_json)]
        ids[kind] = next((value for value in values if value is not None), None)
        token = texts.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if ids[kind] is None and isinstance(text, str):
            tokenizer = tokenizer or read_tokenizer(directory)
            ids[kind] = tokenizer.token_to_id(text) if tokenizer else None
    eos = ids["eos"] if isinstance(ids["eos"], list) else [ids["eos"]]
    eos = tuple(int(token) for token in eos if token is not None)
    pad = ids["pad"] if ids["pad"] is not None else next(iter(eos), 0)
    return SpecialTokens(bos=ids["bos"], eos=eos, pad=int(pad))
