"""`--dry-run`: whether a run, study or series would start here, by its own checks; and what it would be.

The unlearning step is traced on shapes at full size: nothing is allocated, compiled, downloaded or written.
"""

import argparse
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from trace_jax.checkpoints.checkpoint import open_checkpoint
from trace_jax.checkpoints.parts import account
from trace_jax.checkpoints.pretrained import PretrainedConfig
from trace_jax.data.corpora import Corpora, DataConfig
from trace_jax.data.rows import read_codec
from trace_jax.data.sources import HUGGINGFACE, TFDS, check_packages, is_here, part, read_source, reading_once
from trace_jax.evaluation.task import EvaluationConfig, MultipleChoiceConfig
from trace_jax.io.files import is_remote
from trace_jax.io.progress import byte_size
from trace_jax.models.architecture import ModelConfig, count_params
from trace_jax.models.families import PUBLISHED, family_of
from trace_jax.parallel.mesh import make_mesh
from trace_jax.parallel.processes import expected_processes
from trace_jax.plan.plan import laid_out, mesh_words, shape_of
from trace_jax.plan.programs import assumed_experts, step_program
from trace_jax.run.directory import check_workdir
from trace_jax.run.experiment import METHODS, ExperimentConfig
from trace_jax.run.prepare import data_text, read_corpora
from trace_jax.run.series import check_series
from trace_jax.run.study import check_study
from trace_jax.tasks.benchmarks import build_tasks
from trace_jax.tasks.text import TextConfig
from trace_jax.unlearning.trainable import table_text, trainable_table


def main(options: argparse.Namespace) -> int:
    """`--dry-run` of the commands run, study and series."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # devices are counted, not used
    alone = getattr(options, "num_processes", None) is None and expected_processes()[1] == 1
    text, missing, wrong = dry_run(options.load_config(), options.workdir, command=options.command, alone=alone)
    print(text)
    return 2 if missing or wrong else 0


def dry_run(
    config: ExperimentConfig, workdir: str | os.PathLike | None = None, *, command: str = "run", alone: bool = True
) -> tuple[str, list[str], list[str]]:
    """Checks all that this machine can of a run, a study or a series. Returns a text, what is missing, and what would
    be refused, all of it at once: weights by their headers, text that is here as a whole. Unless it runs `alone`, its
    mesh is unknown.
    """
    missing, wrong, settings, workdir = [], [], config.model, workdir or f"runs/{config.name}"
    weights, runs, datas = _weights(config, missing, wrong), "", {"forget": config.data}
    known = not missing and not wrong
    if command == "study" and (jobs := _tried(wrong, lambda: check_study(config))):
        study = config.study
        runs = f"{len(jobs)}, of {len(study.methods)} methods and {len({job.seed for job in jobs})} seeds"
        runs += f"; then what these choose, on {len(study.seeds)} seeds" * bool(study.tuning_seeds)
        config = dataclasses.replace(config, methods=study.methods, export=None)
    if command == "series" and (series := _tried(wrong, lambda: check_series(config, workdir))):
        steps = {
            f"forget, step {n}": dataclasses.replace(config.data, forget=f) for n, f in enumerate(series.forget, 1)
        }
        datas = steps if config.target is None else datas | steps  # a target that is trained here has its own
        each = len(config.methods) if series.kind == "sustainability" else 1
        runs = f"{each * len(steps)}, of {len(steps)} steps" + f" and {each} methods" * (each > 1)
    if isinstance(settings, PretrainedConfig) and settings.published and not Path(settings.path).is_dir():
        settings = dataclasses.replace(settings, path="")  # the published shape; else the checkpoint's
    model = shape_of(settings)
    config.unlearning.check_layer(model.num_layers)
    parallel = laid_out(config, model, len(jax.devices()))
    mesh = _tried(wrong, parallel.mesh) if alone else None
    if known:  # a run directory is told by the content of the weights
        _tried(wrong, lambda: check_workdir(config, workdir))
    data = _data(config, datas, known, missing, wrong)
    _tried(missing, config.tracking.check)
    selected = assumed_experts(config.unlearning, model)
    trained = table_text(trainable_table(model, config.unlearning, selected))
    if selected is not None:
        trained += f"\n  assumed: {selected.sum():,} of {selected.size:,} experts are chosen"
    lists = [data, *(["missing to run:", *missing],) * bool(missing), *(["wrong:", *wrong],) * bool(wrong)]
    lists += [] if missing or wrong else [["nothing is missing to run"]]
    text = "\n\n".join(
        [
            _head(config, model, weights, runs, mesh_words(parallel) if mesh and mesh.size > 1 else ""),
            trained,
            *map("\n  ".join, lists),
        ]
    )
    return text, missing, wrong


def _tried(wrong: list[str], check: Callable[[], Any]) -> Any:
    """What a check of the run gives; what it refuses goes to `wrong`."""
    try:
        return check()
    except (ValueError, OSError) as error:
        wrong.append(str(error))


def _weights(config: ExperimentConfig, missing: list[str], wrong: list[str]) -> str:
    """Where the parameters come from, as words; every tensor of a checkpoint is accounted for by the files' headers."""
    model = config.model
    if not isinstance(model, PretrainedConfig):
        assert config.target is not None
        return f"trained here, {config.target.steps} steps of {config.target.batch_size} rows"
    if not model.path or not Path(model.path).is_dir():
        where = f"{model.path} is not there; " if model.path else ""
        repository = PUBLISHED[model.published]["_name_or_path"] if model.published else "OWNER/NAME"
        missing.append(f"weights: {where}hf download {repository} --local-dir DIR, and --config.model.path=DIR")
        return f"of {repository}, not here"
    shape = model.shape()
    try:
        checkpoint = open_checkpoint(model.path)
        _, readable, _ = account(checkpoint, shape, family_of(checkpoint.config))
        read_codec(model.path)
        model.check()
    except (ValueError, OSError) as error:
        wrong.append(f"weights: {error}")
        return f"in {model.path}"
    return f"in {model.path}: every one of {len(readable):,} tensors has its place"


@reading_once()
def _data(
    config: ExperimentConfig, datas: Mapping[str, DataConfig], known: bool, missing: list[str], wrong: list[str]
) -> list[str]:
    """All that is read, as lines."""
    data, complete = ["data:"], True
    if not isinstance(config.data, TextConfig):
        data.append(f"corpus: {config.data.name}: generated locally")
    for use, source, check, *columns in _sources(config, datas):
        what, said = use.partition(",")[0], f"must have the columns {columns[0]}" if columns else "not looked at"
        here = is_here(source)
        try:
            if here:
                said = words if isinstance(words := check(), str) else "can be used"
            elif source.startswith(HUGGINGFACE) or is_remote(source):
                check_packages(source)
                said = f"is downloaded by the run; {said}"
            else:
                where = "is not there"
                if source.startswith(TFDS):
                    name = source.removeprefix(TFDS).partition(":")[0]
                    where = f"is not built: python -m trace_jax.main data --name {name}"
                missing.append(f"{what} data: {source} {where}")
        except (ValueError, OSError) as error:
            wrong.append(f"{what} data: {error}")
            said = "can't be used" + (f": the columns must be {columns[0]}" if columns else "")
            here = False
        complete = complete and here
        data.append(f"{use}: {source}: {said}")
    for use, one in datas.items() if complete else ():
        corpora = _tried(wrong, lambda one=one: read_corpora(one, config.model) if known else one.build())
        data += [f"{use}: " * (len(datas) > 1) + data_text(corpora)] if isinstance(corpora, Corpora) else []
    return data


def _sources(config: ExperimentConfig, datas: Mapping[str, DataConfig]) -> Iterator[tuple[Any, ...]]:
    """Every text that is read: its use, the source, a check that may say what is there, and columns it must have."""
    data = config.data
    if isinstance(data, TextConfig):

        def told(path: str) -> str:
            documents, left_out = read_source(path, min_length=data.min_length)
            answers, count = sum(d.answer is not None for d in documents), len(documents)
            kinds = [f"{count - answers} texts"] * (answers < count)
            kinds += [f"{answers} questions and answers"] * bool(answers)
            short = f", {left_out} left out as shorter than {data.min_length} characters" if left_out else ""
            return f"{count} documents: {' and '.join(kinds)}{short}"

        paths = {}
        for use, one in datas.items():
            topics = one.forget_sources
            paths |= {use if len(topics) == 1 else f"{use}, topic {n}": path for n, path in enumerate(topics)}
        paths |= {use: path for use in ("retain", "neighbour", "holdout") if (path := getattr(data, use))}
        for use, path in paths.items():
            yield use, path, functools.partial(told, path), "text, or question and answer"

    evaluation = config.evaluation
    if muse := evaluation.muse:  # one file stands for all
        yield "evaluation, muse", part(muse.data, "verbmem", "forget"), lambda: build_tasks(EvaluationConfig(muse=muse))
    if tofu := evaluation.tofu:
        first = part(tofu.data, f"{tofu.forget}_perturbed", "train")
        yield "evaluation, tofu", first, lambda: build_tasks(EvaluationConfig(tofu=tofu))
    for name, path in (evaluation.multiple_choice.sources if evaluation.multiple_choice else {}).items():
        alone = EvaluationConfig(multiple_choice=MultipleChoiceConfig({name: path}))
        yield f"evaluation, {name}", path, functools.partial(build_tasks, alone)
    for name, attack in (config.attacks.chosen if config.attacks else {}).items():
        if attack.source:
            yield f"attack, {name.replace('_', ' ')}", attack.source, attack.check_source


def _head(config: ExperimentConfig, model: ModelConfig, weights: str, runs: str, mesh: str) -> str:
    (total, active), unlearning, length = count_params(model), config.unlearning, config.data.row_length
    parallel = dataclasses.replace(config.parallel, data=1, expert=1, tensor=1)
    program = step_program(unlearning, model, parallel, make_mesh(jax.devices("cpu")[:1]), length)
    objective, rows = unlearning.objective.name, f"{unlearning.forget_batch_size} forget rows"
    if unlearning.retains:
        objective += f" with retain loss {unlearning.retain_loss.name} x {unlearning.alpha:g}"
        rows += f" and {unlearning.retain_batch_size} retain rows"
    steps = []
    for name in config.methods:
        of = config.method(name).unlearning  # how many steps an epoch has is known once the data is read
        steps.append(f"{f'{of.epochs:g} epochs of the {of.epoch_anchor} rows' if of.epochs else of.steps} of {name}")
    count = parallel.microbatches
    facts = {
        "experiment": config.name,
        **({"runs": runs} if runs else {}),
        "model": f"{total:,} parameters in {model.dtype}, {active:,} active per token",
        "weights": weights,
        "objective": objective,
        "methods": "; ".join(f"{name} ({METHODS[name].summary})" for name in config.methods),
        "a step": f"{rows} of {length} tokens: {program.tokens:,} tokens, in {count} microbatch{'es' * (count > 1)}",
        "steps": ", ".join(steps),
        **({"mesh": mesh} if mesh else {}),
        "memory": f"{byte_size(program.parameters)} parameters, {byte_size(program.optimizer)} trainable in float32 "
        "and the optimizer's state, over all devices; activations come on top (plan has them)",
    }
    return "\n".join(f"{name:<12}{words}" for name, words in facts.items())
