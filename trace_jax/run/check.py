"""`--dry-run`: everything about a run that can be checked without its weights and its data, on any machine.

The unlearning step is traced on shapes at full size: nothing is allocated, compiled, downloaded or written.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

from trace_jax.attacks.config import AttacksConfig
from trace_jax.attacks.table import check_text, own_text
from trace_jax.checkpoints.accounting import account
from trace_jax.checkpoints.checkpoint import open_checkpoint
from trace_jax.checkpoints.config import PretrainedConfig
from trace_jax.data.config import DataConfig
from trace_jax.data.sources import HUGGINGFACE, TFDS, is_here, part, read_source
from trace_jax.data.tokenizer import read_vocabulary
from trace_jax.evaluation.config import EvaluationConfig, MultipleChoiceConfig
from trace_jax.io.text import byte_size
from trace_jax.models.arrays import count_params
from trace_jax.models.config import ModelConfig
from trace_jax.models.families import family_of
from trace_jax.models.families.published import PUBLISHED
from trace_jax.parallel.mesh import make_mesh
from trace_jax.plan.plan import shape_of
from trace_jax.plan.programs import assumed_experts, step_program
from trace_jax.run.experiment import METHODS, ExperimentConfig
from trace_jax.tasks.benchmarks import build_tasks
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.trainable import table_text, trainable_layers, trainable_table

FIRST = 100  # documents that are read of a source
_COLUMNS = "text, or question and answer"


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What was found: a text to print, what is missing to run, and what is wrong."""

    text: str
    missing: tuple[str, ...]
    wrong: tuple[str, ...]


def dry_run(config: ExperimentConfig) -> DryRun:
    """Checks an experiment as far as this machine can.

    Missing weights and data are reported. Those that are here are looked at: the headers of the weights, and the first
    documents of each source; what is wrong with them is collected, so that one dry run finds everything.

    Raises:
      ConfigError, CheckpointError: settings that don't fit the model; a config.json of another shape than
        `model.published`.
    """
    missing, wrong = [], []
    weights = _weights(config, missing, wrong)
    model = _shape(config)
    sources = _sources(config.data, missing, wrong)
    sources += _tasks(config.evaluation, missing, wrong)
    sources += _attacks(config.attacks, missing, wrong)
    data = _list("data", [": ".join(source) for source in sources])
    parts = [_head(config, model, weights), _trained(config.unlearning, model), data]
    parts += [_list("missing to run", missing)] if missing else ["nothing is missing to run"]
    parts += [_list("wrong", wrong)] if wrong else []
    return DryRun("\n\n".join(parts), tuple(missing), tuple(wrong))


def _shape(config: ExperimentConfig) -> ModelConfig:
    """The model's shape: of the checkpoint where it is here, else the published one."""
    model = config.model
    if isinstance(model, PretrainedConfig) and model.published and not Path(model.path).is_dir():
        return dataclasses.replace(model, path="").shape()
    return shape_of(config.model)


def _weights(config: ExperimentConfig, missing: list[str], wrong: list[str]) -> str:
    """Where the parameters come from, as words; every tensor of a checkpoint is accounted for by the files' headers."""
    model = config.model
    if not isinstance(model, PretrainedConfig):
        assert config.target is not None
        return f"trained here, {config.target.steps} steps of {config.target.batch_size} rows"
    if not model.path or not Path(model.path).is_dir():
        where = f"{model.path} is not there; " if model.path else ""
        repository = PUBLISHED[model.published].repository if model.published else "OWNER/NAME"
        missing.append(f"weights: {where}hf download {repository} --local-dir DIR, and --config.model.path=DIR")
        return f"of {repository}, not here"
    model.shape()
    try:
        checkpoint = open_checkpoint(model.path)
        accounting = account(checkpoint, model.shape(), family_of(checkpoint.config))
        read_vocabulary(model.path)
    except (ValueError, OSError) as error:
        wrong.append(f"weights: {error}")
        return f"in {model.path}"
    return f"in {model.path}: every one of {len(accounting.readable):,} tensors has its place"


def _sources(data: DataConfig, missing: list[str], wrong: list[str]) -> list[tuple[str, ...]]:
    """One row per source: its use, where it is, and what its first documents are or what they must be."""
    if not data.forget_sources or data.retain is None:
        return [("corpus", data.benchmark, "made here from what is installed")]
    topics = data.forget_sources
    uses = [("forget" if len(topics) == 1 else f"forget, topic {topic}", path) for topic, path in enumerate(topics)]
    uses += [(use, path) for use in ("retain", "neighbour", "holdout") if (path := getattr(data, use))]
    return [(use, path, _source(use, path, data.min_length or 0, missing, wrong)) for use, path in uses]


def _source(use: str, path: str, min_length: int, missing: list[str], wrong: list[str]) -> str:
    if not is_here(path):
        missing.append(f"{use} data: {_absent(path)}")
        return f"must have the columns {_COLUMNS}"
    try:
        source = read_source(path, min_length=min_length, most=FIRST)
    except (ValueError, OSError) as error:
        wrong.append(f"{use} data: {error}")
        return f"can't be used: the columns must be {_COLUMNS}"
    answers = sum(document.answer is not None for document in source.documents)
    kinds = [f"{len(source.documents) - answers} texts"] * (answers < len(source.documents))
    kinds += [f"{answers} questions and answers"] * bool(answers)
    left_out = f", {source.left_out} left out as shorter than {min_length} characters" if source.left_out else ""
    return f"the first {len(source.documents)} documents are {' and '.join(kinds)}{left_out}"


def _absent(path: str) -> str:
    """Where a source that isn't here comes from, as words."""
    if path.startswith(TFDS):
        return f"{path} is not built: python -m trace_jax.main data --name {path.removeprefix(TFDS).partition(':')[0]}"
    return f"{path} {'is downloaded by the run' if path.startswith(HUGGINGFACE) else 'is not there'}"


def _tasks(evaluation: EvaluationConfig, missing: list[str], wrong: list[str]) -> list[tuple[str, ...]]:
    """One row per benchmark, or source of questions, that the model is evaluated on. What is here is read whole."""
    alone: dict[str, tuple[str, EvaluationConfig]] = {}  # by name: a source that stands for all of it, and its section
    if evaluation.muse is not None:
        source = part(evaluation.muse.data, "verbmem", "forget")
        alone["muse"] = source, EvaluationConfig(muse=evaluation.muse)
    if evaluation.tofu is not None:
        source = part(evaluation.tofu.data, f"{evaluation.tofu.forget}_perturbed", "train")
        alone["tofu"] = source, EvaluationConfig(tofu=evaluation.tofu)
    if evaluation.multiple_choice is not None:
        for name, source in evaluation.multiple_choice.sources.items():
            alone[name] = source, EvaluationConfig(multiple_choice=MultipleChoiceConfig({name: source}))
    return [
        _looked_at(f"evaluation, {name}", source, functools.partial(build_tasks, section), missing, wrong)
        for name, (source, section) in alone.items()
    ]


def _attacks(attacks: AttacksConfig | None, missing: list[str], wrong: list[str]) -> list[tuple[str, ...]]:
    """One row per text of the user's own that an attack reads."""
    chosen = attacks.chosen if attacks is not None else {}
    return [
        _looked_at(
            f"attack, {name.replace('_', ' ')}", source, functools.partial(check_text, name, settings), missing, wrong
        )
        for name, settings in chosen.items()
        if (source := own_text(name, settings))
    ]


def _looked_at(
    use: str, source: str, check: Callable[[], object], missing: list[str], wrong: list[str]
) -> tuple[str, ...]:
    """(use, source, what was found): `check` raises if data that is here can't be used."""
    kind = f"{use.partition(',')[0]} data"
    try:
        if not is_here(source):
            missing.append(f"{kind}: {_absent(source)}")
            return use, source, "not looked at"
        check()
    except (ValueError, OSError) as error:
        wrong.append(f"{kind}: {error}")
        return use, source, "can't be used"
    return use, source, "can be used"


def _length(unlearning: UnlearningConfig) -> str:
    """Steps where they are known: those of an epoch are once the data is read."""
    if unlearning.epochs is None:
        return f"{unlearning.steps}"
    return f"{unlearning.epochs:g} epochs of the {unlearning.epoch_anchor} rows"


def _head(config: ExperimentConfig, model: ModelConfig, weights: str) -> str:
    total, active = count_params(model)
    unlearning, length = config.unlearning, config.data.row_length
    parallel = dataclasses.replace(config.parallel, data=1, expert=1, tensor=1)
    program = step_program(unlearning, model, parallel, _one_device(), length)
    each = f"{unlearning.forget_batch_size} forget rows"
    if unlearning.retains:
        each += f" and {unlearning.retain_batch_size} retain rows"
    steps = ", ".join(f"{_length(config.method(name).unlearning)} of {name}" for name in config.methods)
    return _facts(
        [
            ("experiment", config.name),
            ("model", f"{total:,} parameters in {model.dtype}, {active:,} active per token"),
            ("weights", weights),
            ("objective", " with ".join(x for x in (unlearning.objective, _retain(unlearning)) if x)),
            ("methods", "; ".join(f"{name} ({METHODS[name].summary})" for name in config.methods)),
            ("a step", f"{each} of {length} tokens: {program.tokens:,} tokens, in {parallel.microbatches} part(s)"),
            ("steps", steps),
            ("memory", f"{byte_size(program.parameters)} parameters, {byte_size(program.optimizer)} what trains in "
             "float32 and the optimizer's state, over all devices; activations come on top (plan has them)"),
        ]
    )  # fmt: skip


def _facts(pairs: list[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<12}{words}" for name, words in pairs)


def _retain(unlearning: UnlearningConfig) -> str:
    return f"retain loss {unlearning.retain_loss} x {unlearning.alpha:g}" if unlearning.retains else ""


def _one_device() -> Mesh:
    return make_mesh(jax.devices("cpu")[:1], data=1, expert=1, tensor=1)


def _trained(unlearning: UnlearningConfig, model: ModelConfig) -> str:
    """What trains of every parameter."""
    trainable, selected = unlearning.trainable or "all", assumed_experts(unlearning, model)
    layers, rank = trainable_layers(unlearning), unlearning.lora_rank
    text = table_text(trainable_table(model, trainable, layers=layers, selected=selected, rank=rank))
    note = "" if selected is None else f"\n  assumed: {selected.sum():,} of {selected.size:,} experts are chosen"
    return f"{text}{note}"


def _list(title: str, lines: list[str]) -> str:
    return "\n".join([f"{title}:", *(f"  {line}" for line in lines)])
