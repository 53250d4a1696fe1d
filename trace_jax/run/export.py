"""The models of a run: kept in its directory, read back, and handed on as a checkpoint that others can load."""

import argparse
import os
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from tokenizers import Tokenizer

from trace_jax.checkpoints.export import ModelCard, save_pretrained
from trace_jax.checkpoints.pretrained import PretrainedConfig, load_pretrained
from trace_jax.checkpoints.state import load_params, save_params
from trace_jax.config import ConfigError, fingerprint, resolve
from trace_jax.data.sources import HUGGINGFACE, TFDS
from trace_jax.io import files, progress
from trace_jax.models.architecture import abstract_params, flatten, unflatten
from trace_jax.models.model import Model
from trace_jax.run.directory import ANEW, SPLIT, needed
from trace_jax.run.experiment import METHODS, ExperimentConfig
from trace_jax.tasks.text import TextConfig
from trace_jax.unlearning.unlearn import Unlearned

TARGET, RETRAINED = "target", "retrained"
UNLEARNED = "unlearned.json"  # how a method made its model
_FILE, _TOKENIZER = "model.safetensors", "tokenizer.json"


def save_trained(directory: Path, model: Model, identity: str) -> None:
    """Keeps a model that was trained here, with its tokenizer."""
    with files.replacing(directory / _TOKENIZER) as temporary:
        model.tokenizer.save(str(temporary))
    save_params(directory / _FILE, model.params, {"identity": identity})


def save_unlearned(directory: Path, unlearned: Unlearned, identity: str) -> None:
    """Keeps what a method has trained, by path; the rest is the target model's."""
    flat = flatten(unlearned.model.params)
    trained = {row["path"]: flat[row["path"]] for row in unlearned.trained if row["trained"]}
    save_params(directory / _FILE, trained, {"identity": identity, "step": unlearned.step})


def load_model(
    config: ExperimentConfig, workdir: Path, label: str = TARGET, mesh: Mesh | None = None, target: Model | None = None
) -> Model:
    """The model that a run unlearns from, "retrained", which never saw the forget set, or that of `methods/LABEL`.

    The first two are checkpoints, or were trained in WORKDIR/LABEL. With the `target` others share what did not train.
    """
    settings, directory = config.model, workdir / label
    if label not in (TARGET, RETRAINED):
        target, directory = target or load_model(config, workdir, mesh=mesh), workdir / "methods" / label
        flat, table = flatten(target.params), needed(directory / UNLEARNED)["trained"]
        trained = load_params(directory / _FILE, {row["path"]: flat[row["path"]] for row in table if row["trained"]})
        return target.replace(params=unflatten({**flat, **trained}))
    if isinstance(settings, PretrainedConfig):
        path = settings.path if label == TARGET else settings.retrained
        return load_pretrained(path, dtype=settings.dtype, grouped_matmul=settings.grouped_matmul, mesh=mesh)
    params = load_params(directory / _FILE, abstract_params(settings))
    with files.local_copy(directory / _TOKENIZER) as local:
        return Model(settings, params, Tokenizer.from_file(str(local)))


def find_model(workdir: str | os.PathLike, label: str | None) -> tuple[ExperimentConfig, str, str]:
    """Of a model of a finished run what `load_model` takes: the experiment and its label; and the hash of what made it.

    The label is a method's, or "target" for the model that all methods started from; None: the run's only method.
    """
    path = files.as_path(workdir)
    saved = needed(path / "config.json")
    config = resolve(ExperimentConfig, {name: saved["config"][name] for name in ("name", "data", "model")})
    identity = fingerprint(saved["config"]["data"], config.model_identity())
    if isinstance(config.model, PretrainedConfig) and identity != saved["identity"]:
        raise ConfigError(f"{path}: the checkpoint that this run started from has changed; run it again.")
    methods = path / "methods"
    there = methods.iterdir() if methods.is_dir() else ()
    finished = sorted(d.name for d in there if (d / "results.json").exists())
    if label is None and len(finished) == 1:
        label = finished[0]
    if label not in (TARGET, *finished):
        given = f"{path}: {label or 'no method'} is given"
        raise ConfigError(f"{given}; name one that is finished: --method={' or '.join(finished)}.")
    if label == TARGET and isinstance(config.model, PretrainedConfig):
        return config, label, config.model.identity()
    made = path / "target" / "target.stage.json" if label == TARGET else methods / label / "unlearning.stage.json"
    if problem := files.damage(made):
        raise ValueError(f"{problem}. {ANEW}")
    return config, label, needed(made)["identity"]


def export(
    workdir: str | os.PathLike, output: str | os.PathLike, method: str | None = None, *, overwrite: bool = False
) -> Path:
    """Writes the model that a method of a finished run made as a Hugging Face checkpoint, with a card: what was
    unlearned, how, and what was measured.

    Args:
      workdir: the run, or its directory.
      output: a directory, which is made; one that is there is replaced with `overwrite` alone.
      method: its label; None: the run's only one.

    Returns:
      the full path of `output`.

    Raises:
      ConfigError: the run is not finished, or has no such method.

    Example:
      >>> place = tj.export("runs/mine", "exported", "trace_rows")
      >>> tj.load_pretrained(place).config.num_layers
      2
    """
    if method == TARGET:
        raise ConfigError("the target model isn't exported: it is what the run started from. Name a method.")
    config, label, _ = find_model(workdir, method)
    write_checkpoint(config, files.as_path(workdir), label, output, overwrite=overwrite)
    return Path(output).resolve()


def write_checkpoint(
    config: ExperimentConfig, path: Path, label: str, output: str | os.PathLike, *, overwrite: bool, target: Any = None
) -> None:
    """Writes the model of `methods/LABEL` (`load_model`) with its card."""
    progress.say(f"export of {label}: writing {output}")
    card, model = model_card(config, path, label), load_model(config, path, label, target=target)
    save_pretrained(model, output, card=card, overwrite=overwrite)


def model_card(config: ExperimentConfig, workdir: Path, label: str) -> ModelCard:
    """What was unlearned (names and counts, never the text), how, and what was measured on the test split."""
    result, references = needed(workdir / "methods" / label / "results.json"), needed(workdir / "references.json")
    documents, tokens = (references["data"][key]["train/forget"] for key in ("documents", "tokens"))
    settings = {"seed": result["seed"], "steps done": result["step"], "row_length": config.data.row_length}
    made_with = progress.flatten({section: result[section] for section in ("calibration", "unlearning")})
    settings |= {name: value for name, value in made_with if value != "not set"}
    before = {m["name"]: m for m in references["measurements"]["target"] if m["split"] == SPLIT}
    measured = [
        {
            "on the test split": progress.plain_name(m["name"]),
            "before": progress.format_number(before.get(m["name"], {}).get("value")),
            "after": progress.format_number(m["value"]),
            "95 % interval": progress.format_interval(m["low"], m["high"]),
            "n": m["n"],
        }
        for m in result["measurements"]
        if m["split"] == SPLIT
    ]
    forgotten, retained = config.data.forgotten, ""
    if isinstance(config.data, TextConfig):  # the user's files by name, but not where they lie
        sources = (*config.data.forget_sources, config.data.retain)
        *forget, retain = (x if x.startswith((HUGGINGFACE, TFDS)) else Path(x).name for x in sources)
        forgotten, retained = " and ".join(forget), f" while holding on to {retain}"
    what = f"Unlearned: {forgotten} ({documents:,} documents, {tokens:,} tokens){retained}"
    why = "failed, and this is a state from before" if result["failed"] else "was ended by a rule"
    stopped = f" The run {why}: {result['stopped']}." if result["stopped"] else ""
    method = f"{result['method']} ({METHODS[result['method']].summary})"
    return ModelCard(f"{what}.{stopped}", method, settings, measured)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="DIR", help="where the checkpoint goes; made")
    parser.add_argument("--method", metavar="LABEL", help="whose model; needed where the run has several methods")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def main(options: argparse.Namespace) -> int:
    print(f"export: {export(options.workdir, options.output, options.method, overwrite=options.overwrite)}")
    return 0
