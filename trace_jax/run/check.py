"""`--dry-run`: everything about a run that can be checked without its weights and its data, on any machine.

The unlearning step is traced on shapes at full size: nothing is allocated, compiled, downloaded or written.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from trace_jax.checkpoints.checkpoint import open_checkpoint
from trace_jax.checkpoints.parts import account
from trace_jax.checkpoints.pretrained import PretrainedConfig
from trace_jax.data.rows import read_codec
from trace_jax.data.sources import HUGGINGFACE, TFDS, is_here, part, read_source
from trace_jax.evaluation.task import EvaluationConfig, MultipleChoiceConfig
from trace_jax.io.progress import byte_size
from trace_jax.models.architecture import ModelConfig, count_params
from trace_jax.models.families import PUBLISHED, family_of
from trace_jax.parallel.mesh import make_mesh
from trace_jax.plan.plan import shape_of
from trace_jax.plan.programs import assumed_experts, step_program
from trace_jax.run.experiment import METHODS, ExperimentConfig
from trace_jax.tasks.benchmarks import build_tasks
from trace_jax.tasks.text import TextConfig
from trace_jax.unlearning.trainable import table_text, trainable_table

FIRST = 100  # documents that are read of a source


@dataclasses.dataclass
class DryRun:
    """A text to print, what is missing to run, and what is wrong."""

    text: str = ""
    missing: list[str] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def look(self, use: str, source: str, check: Callable[[], str | None], columns: str = "") -> str:
        """A line on a source: `check` may say what is here, and raises if it can't be used."""
        data, said = use.partition(",")[0], f"must have the columns {columns}" if columns else "not looked at"
        try:
            if is_here(source):
                said = check() or "can be used"
            else:
                where = "is downloaded by the run" if source.startswith(HUGGINGFACE) else "is not there"
                if source.startswith(TFDS):
                    name = source.removeprefix(TFDS).partition(":")[0]
                    where = f"is not built: python -m trace_jax.main data --name {name}"
                self.missing.append(f"{data} data: {source} {where}")
        except (ValueError, OSError) as error:
            self.wrong.append(f"{data} data: {error}")
            said = "can't be used" + (f": the columns must be {columns}" if columns else "")
        return f"{use}: {source}: {said}"


def dry_run(config: ExperimentConfig) -> DryRun:
    """Checks an experiment as far as this machine can.

    Missing weights and data are reported. Those that are here are looked at: the headers of the weights, and the first
    documents of each source; what is wrong with them is collected, so that one dry run finds everything.

    Raises:
      ConfigError, CheckpointError: settings that don't fit the model; a config.json of another shape than
        `model.published`.
    """
    run, settings, unlearning = DryRun(), config.model, config.unlearning
    weights = _weights(config, run)
    if isinstance(settings, PretrainedConfig) and settings.published and not Path(settings.path).is_dir():
        settings = dataclasses.replace(settings, path="")  # the published shape; else the checkpoint's
    model = shape_of(settings)
    data = ["data:", *(run.look(*source) for source in _sources(config))]
    if not isinstance(config.data, TextConfig):
        data.insert(1, f"corpus: {config.data.name}: made here from what is installed")
    selected = assumed_experts(unlearning, model)
    trained = table_text(trainable_table(model, unlearning, selected))
    if selected is not None:
        trained += f"\n  assumed: {selected.sum():,} of {selected.size:,} experts are chosen"
    missing = ["missing to run:", *run.missing] if run.missing else ["nothing is missing to run"]
    lists = [data, missing, ["wrong:", *run.wrong] if run.wrong else []]
    run.text = "\n\n".join([_head(config, model, weights), trained, *("\n  ".join(lines) for lines in lists if lines)])
    return run


def _weights(config: ExperimentConfig, run: DryRun) -> str:
    """Where the parameters come from, as words; every tensor of a checkpoint is accounted for by the files' headers."""
    model = config.model
    if not isinstance(model, PretrainedConfig):
        assert config.target is not None
        return f"trained here, {config.target.steps} steps of {config.target.batch_size} rows"
    if not model.path or not Path(model.path).is_dir():
        where = f"{model.path} is not there; " if model.path else ""
        repository = PUBLISHED[model.published]["_name_or_path"] if model.published else "OWNER/NAME"
        run.missing.append(f"weights: {where}hf download {repository} --local-dir DIR, and --config.model.path=DIR")
        return f"of {repository}, not here"
    model.shape()
    try:
        checkpoint = open_checkpoint(model.path)
        _, readable, _ = account(checkpoint, model.shape(), family_of(checkpoint.config))
        read_codec(model.path)
    except (ValueError, OSError) as error:
        run.wrong.append(f"weights: {error}")
        return f"in {model.path}"
    return f"in {model.path}: every one of {len(readable):,} tensors has its place"


def _sources(config: ExperimentConfig) -> Iterator[tuple[Any, ...]]:
    """Every text that the run reads, as `DryRun.look` takes it. Of a corpus the first documents are read, else all."""
    data = config.data
    if isinstance(data, TextConfig):

        def first_documents(path: str) -> str:
            documents, left_out = read_source(path, min_length=data.min_length, most=FIRST)
            answers, count = sum(d.answer is not None for d in documents), len(documents)
            kinds = [f"{count - answers} texts"] * (answers < count)
            kinds += [f"{answers} questions and answers"] * bool(answers)
            short = f", {left_out} left out as shorter than {data.min_length} characters" if left_out else ""
            return f"the first {count} documents are {' and '.join(kinds)}{short}"

        topics = data.forget_sources
        paths = {"forget" if len(topics) == 1 else f"forget, topic {n}": path for n, path in enumerate(topics)}
        paths |= {use: path for use in ("retain", "neighbour", "holdout") if (path := getattr(data, use))}
        for use, path in paths.items():
            yield use, path, functools.partial(first_documents, path), "text, or question and answer"

    def readable(**task: Any) -> None:
        build_tasks(EvaluationConfig(**task))

    evaluation = config.evaluation
    if muse := evaluation.muse:  # one file stands for all
        yield "evaluation, muse", part(muse.data, "verbmem", "forget"), lambda: readable(muse=muse)
    if tofu := evaluation.tofu:
        first = part(tofu.data, f"{tofu.forget}_perturbed", "train")
        yield "evaluation, tofu", first, lambda: readable(tofu=tofu)
    for name, path in (evaluation.multiple_choice.sources if evaluation.multiple_choice else {}).items():
        alone = MultipleChoiceConfig({name: path})
        yield f"evaluation, {name}", path, functools.partial(readable, multiple_choice=alone)
    for name, attack in (config.attacks.chosen if config.attacks else {}).items():
        if attack.source:
            yield f"attack, {name.replace('_', ' ')}", attack.source, attack.check_source


def _head(config: ExperimentConfig, model: ModelConfig, weights: str) -> str:
    total, active = count_params(model)
    unlearning, length = config.unlearning, config.data.row_length
    parallel = dataclasses.replace(config.parallel, data=1, expert=1, tensor=1)
    one = make_mesh(jax.devices("cpu")[:1], data=1, expert=1, tensor=1)
    program = step_program(unlearning, model, parallel, one, length)
    objective, rows = unlearning.objective.name, f"{unlearning.forget_batch_size} forget rows"
    if unlearning.retains:
        objective += f" with retain loss {unlearning.retain_loss.name} x {unlearning.alpha:g}"
        rows += f" and {unlearning.retain_batch_size} retain rows"
    steps = []
    for name in config.methods:
        of = config.method(name).unlearning  # how many steps an epoch has is known once the data is read
        steps.append(f"{f'{of.epochs:g} epochs of the {of.epoch_anchor} rows' if of.epochs else of.steps} of {name}")
    facts = {
        "experiment": config.name,
        "model": f"{total:,} parameters in {model.dtype}, {active:,} active per token",
        "weights": weights,
        "objective": objective,
        "methods": "; ".join(f"{name} ({METHODS[name].summary})" for name in config.methods),
        "a step": f"{rows} of {length} tokens: {program.tokens:,} tokens, in {parallel.microbatches} part(s)",
        "steps": ", ".join(steps),
        "memory": f"{byte_size(program.parameters)} parameters, {byte_size(program.optimizer)} what trains in float32 "
        "and the optimizer's state, over all devices; activations come on top (plan has them)",
    }
    return "\n".join(f"{name:<12}{words}" for name, words in facts.items())
