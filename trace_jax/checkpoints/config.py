"""Which published checkpoint a run starts from."""

import dataclasses
import functools
import hashlib
import os
from pathlib import Path

from trace_jax.checkpoints.checkpoint import open_checkpoint, read_object
from trace_jax.config import ConfigError, Section, fingerprint, option
from trace_jax.io.files import is_remote
from trace_jax.models.architecture import GROUPED_MATMULS, ModelConfig
from trace_jax.models.families import PUBLISHED, model_config, published_config, shape_differences

_NO_PATH = "path is empty; give the directory of a checkpoint: --config.model.path=DIR."
_SAMPLE, _STRIDE = 1 << 12, 1 << 18  # bytes


class PretrainedConfig(Section):
    """A model that is imported (`load_pretrained`) instead of trained."""

    path: str = option(help="directory of a Hugging Face checkpoint; may be empty where `published` is given")
    published: str | None = option(
        None, help="published model whose shape the checkpoint must have", choices=tuple(PUBLISHED)
    )
    dtype: str = option("bfloat16", help="type of weights and activations", choices=("float32", "bfloat16"))
    grouped_matmul: str = option(
        "auto", help="how experts are multiplied; auto chooses by platform", choices=GROUPED_MATMULS
    )
    retrained: str = option(
        "", help="directory of the same model trained without the forget set, which PrivLeak and others compare with"
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.path and self.published is None:
            raise ConfigError(_NO_PATH)
        for name in ("path", "retrained"):
            if (path := getattr(self, name)) and not is_remote(path):
                object.__setattr__(self, name, os.path.abspath(os.path.expanduser(path)))  # `export` may run elsewhere

    def shape(self) -> ModelConfig:
        """The model that config.json describes or, without a path, the published one. Weights are not read.

        Raises:
          CheckpointError, ConfigError: config.json is missing, can't be read, or is of another shape than `published`.
        """
        published = published_config(self.published, dtype=self.dtype) if self.published else None
        shape = published
        if self.path or shape is None:
            shape = model_config(read_object(Path(self.path) / "config.json"), dtype=self.dtype)
        if published is not None and (differences := shape_differences(shape, published)):
            raise ConfigError(
                f"{self.path}: this is no {self.published} (model.published): {'; '.join(differences)}. Give the "
                f"directory of {PUBLISHED[self.published or '']['_name_or_path']} or a model trained from it, or "
                "--config.model.published=None."
            )
        return dataclasses.replace(shape, grouped_matmul=self.grouped_matmul)

    def check(self) -> None:
        """Refuses what a run can't start from, before anything is read or written.

        Raises:
          CheckpointError, ConfigError: no path, no complete checkpoint there, a retrained one of another shape, or
            `shape`.
        """
        if not self.path:
            raise ConfigError(_NO_PATH)
        open_checkpoint(self.path)
        shape = self.shape()
        retrained = model_config(open_checkpoint(self.retrained).config, dtype=self.dtype) if self.retrained else shape
        if differences := shape_differences(retrained, shape):
            raise ConfigError(
                f"{self.retrained} (model.retrained) is another model than {self.path}: {'; '.join(differences)}. It "
                "must be the same one, trained on the same text without the forget set."
            )

    def identity(self, *, retrained: bool = False) -> str:
        """Hash of what is in the checkpoint `path`, wherever it lies, and of how it is read; or, empty where there is
        none, of `retrained`."""
        if not (path := self.retrained if retrained else self.path) and retrained:
            return ""
        stats = [file.stat() for file in sorted(Path(path).glob("*.safetensors"))]
        stamps = tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
        return fingerprint(_content(path, stamps), self.dtype, self.grouped_matmul)


@functools.lru_cache(maxsize=4)
def _content(path: str, _stamps: tuple) -> str:
    """Hash of config.json, of every tensor's name, type and shape, and of samples of its content.

    Samples are tensors of up to 256 KiB, and the first 4 KiB of every 256 KiB of larger ones: so other weights of the
    same shapes are told apart by reading 200 MB of 13 GB.
    """
    checkpoint = open_checkpoint(path)
    digest = hashlib.sha256((checkpoint.directory / "config.json").read_bytes())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        for start in range(0, tensor.nbytes, _STRIDE):
            size = min(_STRIDE if tensor.nbytes <= _STRIDE else _SAMPLE, tensor.nbytes - start)
            digest.update(os.pread(tensor.file.descriptor, size, tensor.offset + start))
    return digest.hexdigest()
