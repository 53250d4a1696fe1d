"""The stages of a run: data, target model, statistics, then for each method calibration, unlearning, evaluation.

Each stage leaves an artefact with the hash of everything that made it, and is skipped when that artefact is there; so a
run that was interrupted, or whose later settings changed, continues from what it has.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from trace_jax.checkpoints.config import PretrainedConfig
from trace_jax.checkpoints.params import parameter_bytes, parameter_count
from trace_jax.config import ConfigError, fingerprint
from trace_jax.data.batches import mixture_batches, sequential_batches
from trace_jax.data.config import DataConfig
from trace_jax.data.corpora import Corpora, build_corpora
from trace_jax.data.tokenizer import read_vocabulary
from trace_jax.environment import describe
from trace_jax.evaluation.audit import hazardous
from trace_jax.evaluation.calibration import measure_calibration
from trace_jax.evaluation.fronts import Front, front_from_history, standing
from trace_jax.evaluation.items import item_outcomes
from trace_jax.evaluation.measurement import Measurement
from trace_jax.evaluation.routing import measure_routing
from trace_jax.evaluation.store import ScoreStore
from trace_jax.evaluation.suite import Evaluator, make_evaluator
from trace_jax.evaluation.task import Task
from trace_jax.evaluation.tasks import build_tasks
from trace_jax.experiment import ExperimentConfig, Method
from trace_jax.export import (
    UNLEARNED,
    export_model,
    load_retrained,
    load_target,
    load_trained,
    load_unlearned,
    save_trained,
    save_unlearned,
)
from trace_jax.files import flush_lines, free_bytes, remove, shown, write_json
from trace_jax.models.arrays import count_params
from trace_jax.models.config import ModelConfig
from trace_jax.models.model import Model
from trace_jax.parallel.hosts import is_main
from trace_jax.parallel.processes import check_joined
from trace_jax.progress import say, tracked
from trace_jax.routing.recalibration import Recalibration
from trace_jax.routing.retain_weights import RetainWeights, retain_weights
from trace_jax.routing.statistics import ExpertStatistics, expert_statistics
from trace_jax.stages import Stage, check_workdir, open_workdir
from trace_jax.summary import needed, refresh
from trace_jax.unlearning.lora import factors
from trace_jax.unlearning.metrics import front_rows
from trace_jax.unlearning.optimizer import moments
from trace_jax.unlearning.rules import Evaluated
from trace_jax.unlearning.selected import chosen_experts
from trace_jax.unlearning.train import train_model
from trace_jax.unlearning.trainable import partition
from trace_jax.unlearning.unlearn import unlearn

SPLITS = ("validation", "test")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything that the methods of a run share."""

    config: ExperimentConfig
    workdir: Path
    mesh: Mesh
    corpora: Corpora
    target: Model
    forget: ExpertStatistics
    retain: ExpertStatistics
    evaluator: Evaluator
    identity: str


def run(config: ExperimentConfig, workdir: str | os.PathLike, *, overwrite: bool = False) -> str:
    """Runs, or continues, every stage of an experiment. Returns the table and where the report is, as text.

    With several processes (`start_processes`) each runs this; process 0 writes and has the table.

    Raises:
      ConfigError, ValueError: something given can't be used; the message says what, and what to do.
    """
    prepared = prepare(config, workdir, overwrite=overwrite)
    known = {name: run_method(prepared, config.method(name), label=name) for name in config.methods}
    text = refresh(prepared.workdir, config.methods) if is_main() else ""
    return f"{text}\n{_export_stage(prepared, config.export, known[config.export])}" if config.export else text


def prepare(config: ExperimentConfig, workdir: str | os.PathLike, *, overwrite: bool = False) -> Prepared:
    """Data, target model (and retrained model), statistics and the evaluator: what every method starts from."""
    if isinstance(config.model, PretrainedConfig):
        config.model.check()
    check_workdir(config, workdir, overwrite=overwrite)
    check_joined()
    mesh = config.parallel.mesh()
    corpora, tasks = read_corpora(config), build_tasks(config.evaluation)  # before anything is written: may be refused
    path = open_workdir(config, workdir, overwrite=overwrite)
    write_json(path / "environment.json", describe())
    say(
        f"data: {_counts(corpora.documents, 'documents')}; unlearning with {len(corpora.forget)} forget rows and "
        f"{len(corpora.retain)} retain rows"
    )
    known = fingerprint(corpora.fingerprint, config.model_identity(), config.target, config.seed)
    retrained, reference = None, fingerprint(known, "retrained", _retrained_identity(config))
    if isinstance(config.model, PretrainedConfig):
        target = load_target(config, path, mesh)
        _check_disk(config, path, target)
    else:
        target = _model_stage(config, path, corpora, mesh, "target", corpora.mixture, known)
        if config.target and config.target.retrained:
            retrained = _model_stage(config, path, corpora, mesh, "retrained", corpora.retrain_mixture, reference)
    forget, retain = _statistics_stage(config, path, corpora, target, mesh, fingerprint(known, "statistics"))
    if isinstance(config.model, PretrainedConfig):
        retrained = load_retrained(config.model, mesh)  # only while it is evaluated: it takes as much as the target
    models = {fingerprint(known, "target"): target} | ({reference: retrained} if retrained is not None else {})
    evaluator = _evaluator_stage(config, path, corpora, tasks, models, mesh)
    return Prepared(config, path, mesh, corpora, target, forget, retain, evaluator, known)


def read_corpora(config: ExperimentConfig) -> Corpora:
    """The corpora of an experiment, in the tokens of its model."""
    say("data: reading and tokenizing")
    return _corpora(config.data, config.model.path if isinstance(config.model, PretrainedConfig) else None)


@functools.lru_cache(maxsize=4)
def _corpora(config: DataConfig, checkpoint: str | None) -> Corpora:
    """Kept, because a study prepares several runs on the same ones."""
    return build_corpora(config, None if checkpoint is None else read_vocabulary(checkpoint))


def _counts(numbers: Any, what: str) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in numbers.items()) + f" {what}"


def _model_stage(
    config: ExperimentConfig, path: Path, corpora: Corpora, mesh: Mesh, name: str, mixture, known: str
) -> Model:
    """Trains a model on a mixture of the corpora, or loads it."""
    stage = Stage(name, path / name, known)
    shape, training = config.model, config.target
    assert isinstance(shape, ModelConfig) and training is not None

    def make() -> Model:
        total, active = count_params(shape)
        say(
            f"{name} model: {total:,} parameters, {active:,} active per token; {training.steps} steps of "
            f"{training.batch_size} x {config.data.row_length} tokens"
        )
        batches = mixture_batches(corpora.train, mixture, training.batch_size, seed=config.seed)
        model, _ = train_model(
            shape,
            training,
            batches.__getitem__,
            seed=config.seed,
            mesh=mesh,
            directory=stage.directory,
            identity=known,
            title=f"training the {name} model",
            tokenizer=corpora.tokenizer,
        )
        save_trained(stage.directory, model, known)
        return model

    model = stage.run(make, lambda: load_trained(stage.directory, shape), f"{name} model")
    remove(stage.directory / "checkpoints")  # of use while it trains only
    return model


def _retrained_identity(config: ExperimentConfig) -> str:
    """Hash of a retrained model that is imported. One that is trained here follows from the rest."""
    return config.model.retrained_identity() if isinstance(config.model, PretrainedConfig) else ""


def _check_disk(config: ExperimentConfig, path: Path, target: Model) -> None:
    """Refuses a run whose files would not fit.

    While a method trains, three of its states are on disk, and a fourth where the best is kept.
    """
    sizes = {"export": parameter_bytes(target.params)} if config.export and not (path / "export").exists() else {}
    for name in config.methods:
        if not (path / "methods" / name / "results.json").exists():
            unlearning = config.method(name).unlearning
            training, _ = partition(target.params, unlearning.trainable or "all")
            sizes[name], count = parameter_bytes(training), parameter_count(training)
            if unlearning.lora_rank is not None:
                own = factors(target.config, training, unlearning.lora_rank).values()
                count = sum(math.prod(spec.shape) for spec in own)
            states, numbers = 3 + unlearning.rules.keeps_best, 1 + moments(unlearning)
            sizes["states"] = max(sizes.get("states", 0), states * numbers * 4 * count)
    needed, free = sum(sizes.values()), free_bytes(path)
    if free < needed:
        parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in sizes.items())
        raise ConfigError(
            f"{path}: {free / 2**30:.1f} GiB are free there; this run needs {needed / 2**30:.1f} GiB ({parts}). Let "
            "less train (unlearning.trainable), or choose another --workdir."
        )


def _statistics_stage(config, path: Path, corpora: Corpora, target: Model, mesh: Mesh, known: str):
    """Expert frequencies of the original model on forget and retain data."""
    stage = Stage("statistics", path / "statistics", known)

    def make():
        found = []
        for name, rows in (("forget", corpora.forget), ("retain", corpora.retain)):
            size = config.evaluation.batch_size
            batches = tracked(sequential_batches(rows, size), f"routing of the {name} corpus", -(-len(rows) // size))
            statistics = expert_statistics(target, batches, mesh=mesh)
            statistics.save(stage.directory / f"{name}.npz")
            found.append(statistics)
        return tuple(found)

    def load():
        return tuple(ExpertStatistics.load(stage.directory / f"{name}.npz") for name in ("forget", "retain"))

    return stage.run(make, load, "routing statistics")


def _evaluator_stage(
    config: ExperimentConfig,
    path: Path,
    corpora: Corpora,
    tasks: tuple[Task, ...],
    models: Mapping[str, Model],
    mesh: Mesh,
) -> Evaluator:
    """The evaluator with the scores of the original (and retrained) model; their measurements are written down.

    `models` are the target and, if there is one, the retrained model, by the hash of what made them.
    """
    target = next(iter(models.values()))
    settings = config.evaluation
    if hazardous(config.data.forget_sources):
        settings = dataclasses.replace(settings, audit_text=False)
    evaluator = make_evaluator(
        settings,
        target.config,
        {"validation": corpora.validation, "test": corpora.test},
        corpora.tokenizer,
        benchmark=config.data.benchmark,
        mesh=mesh,
        seed=config.seed,
        special=target.special,
        source=target.source,
        tasks=tasks,
        identity=fingerprint(corpora.fingerprint, *settings.of_probes()),
    )
    say("evaluation of the target model" + (" and of the retrained model" if len(models) > 1 else ""))
    scores = {
        name: evaluator.full_scores(model.params, store=ScoreStore(path / "scores" / name, identity))
        for name, (identity, model) in zip(("target", "retrained"), models.items(), strict=False)
    }
    evaluator = evaluator.with_references(original=scores["target"], retrained=scores.get("retrained"))
    measured = {name: [m.to_json() for m in evaluator.measure(score)] for name, score in scores.items()}
    counts = {"documents": dict(corpora.documents), "tokens": dict(corpora.tokens), "fingerprint": corpora.fingerprint}
    write_json(path / "references.json", {"measurements": measured, "data": counts})
    return evaluator


# --- one method


def run_method(prepared: Prepared, method: Method, *, label: str) -> str:
    """Calibrates, unlearns and evaluates with one method in `methods/LABEL`, or keeps what is there.

    Returns the hash of everything that made the model.
    """
    directory, config = prepared.workdir / "methods" / label, prepared.config
    weights, known = _calibration_stage(prepared, method, directory, label)
    quick = [task.identity for task in prepared.evaluator.tasks if task.quick]
    known = fingerprint(known, method.unlearning, config.evaluation.along_the_way(), quick)
    made = Stage("unlearning", directory, known).run(
        lambda: _unlearn(prepared, method, weights, label, known), lambda: None, f"unlearning with {label}"
    )
    tasks = [task.identity for task in prepared.evaluator.tasks]

    def evaluate() -> None:
        model = made or load_unlearned(prepared.workdir, label, prepared.target)
        _evaluate(prepared, model, weights, directory, known)

    everything = fingerprint(known, config.evaluation, tasks, _retrained_identity(config))
    evaluation = Stage("evaluation", directory, everything)
    evaluation.run(evaluate, lambda: None, f"evaluation of {label}")
    remove(directory / "checkpoints")
    return known


def _unlearn(prepared: Prepared, method: Method, weights: RetainWeights, label: str, known: str) -> Model:
    """Unlearns, and keeps the model and how it was made (unlearned.json)."""
    config, corpora, recalibrate = prepared.config, prepared.corpora, _recalibration(prepared, method)
    directory = prepared.workdir / "methods" / label
    if recalibrate is None:
        remove(directory / "recalibration")  # of other settings
    unlearned = unlearn(
        prepared.target,
        corpora.forget,
        corpora.retain,
        config=method.unlearning,
        weights=weights,
        recalibrate=recalibrate,
        selected=chosen_experts(
            method.unlearning, weights.selected, prepared.forget, prepared.retain, seed=config.seed
        ),
        seed=config.seed,
        mesh=prepared.mesh,
        parallel=config.parallel,
        directory=directory,
        identity=known,
        title=f"unlearning with {label}",
        evaluate=_evaluation(prepared, method),
    )
    save_unlearned(directory, unlearned, known)
    flush_lines()
    how = {
        "method": method.name,
        "label": label,
        "seed": config.seed,
        "calibration": dataclasses.asdict(method.calibration),
        "unlearning": dataclasses.asdict(method.unlearning),
        "step": unlearned.step,
        "steps": unlearned.steps,
        "stopped": unlearned.stopped,
        "failed": unlearned.failed,
        "seconds_per_step": _finite(unlearned.seconds_per_step),
        "trained": unlearned.trained,
        "grip": unlearned.grip,
    }
    write_json(directory / UNLEARNED, how)
    return unlearned.model


def _evaluate(prepared: Prepared, model: Model, weights: RetainWeights, directory: Path, known: str) -> None:
    """Everything that is measured on an unlearned model, and on the weights it was made with: results.json."""
    evaluation, corpora = prepared.config.evaluation, prepared.corpora
    measured = prepared.evaluator.full(model.params, store=ScoreStore(directory / "scores", known))
    routing = measure_routing(
        prepared.target,
        model,
        forget=corpora.forget,
        retain=corpora.retain,
        mesh=prepared.mesh,
        batch_size=evaluation.batch_size,
        max_rows=evaluation.max_rows,
        resamples=evaluation.bootstrap,
        seed=prepared.config.seed,
    )
    calibration = measure_calibration(weights, prepared.forget, prepared.retain)
    measured = [*measured, *routing.measurements(), *calibration.measurements()]
    results = {
        **needed(directory / UNLEARNED),
        "fronts": {split: _front(prepared, directory, known, split).to_json() for split in SPLITS},
        "measurements": [m.to_json() for m in measured],
        "routing": routing.to_json() | {"calibration": calibration.to_json()},
    }
    write_json(directory / "results.json", results)


def _evaluation(prepared: Prepared, method: Method) -> Callable[[Any], Evaluated]:
    """What is measured while unlearning. The numbers that rules read are those of the validation split."""
    evaluator = prepared.evaluator
    original = evaluator.measure(evaluator.original) if evaluator.original and method.unlearning.rules.asks else None

    def evaluate(params: Any) -> Evaluated:
        scores = evaluator.score(params)
        found, items = evaluator.measure(scores), item_outcomes(evaluator, scores)
        rows = [m.to_json() for m in found]
        if original is None:
            return Evaluated(rows, items=items)
        benchmark = prepared.config.data.benchmark
        numbers = standing(found, benchmark=benchmark, split="validation", original=original)
        return Evaluated(rows, *numbers, items)

    return evaluate


def _recalibration(prepared: Prepared, method: Method) -> Recalibration | None:
    """What solves the weights of a method anew while it unlearns, if it is to."""
    if method.calibration.routing != "recalibrated":
        return None
    corpora, size = prepared.corpora, prepared.config.evaluation.batch_size
    return Recalibration(method.calibration, prepared.target, corpora.forget, corpora.retain, prepared.mesh, size)


def _export_stage(prepared: Prepared, label: str, known: str) -> str:
    """Writes the unlearned model of a method into WORKDIR/export. Returns where it is, as a sentence."""
    output = prepared.workdir / "export"
    stage = Stage("export", prepared.workdir, fingerprint(known, "export"))
    if not output.exists():
        stage.forget()

    def make() -> None:
        model = load_unlearned(prepared.workdir, label, prepared.target)
        export_model(prepared.config, prepared.workdir, label, model, output, overwrite=True)

    stage.run(make, lambda: None, f"export of {label}")
    return f"export: {shown(output)}"


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _front(prepared: Prepared, directory: Path, known: str, split: str) -> Front:
    rows = front_rows(directory, known)
    history = [(row["step"], [Measurement.from_json(m) for m in row["evaluation"]]) for row in rows]
    return front_from_history(history, benchmark=prepared.config.data.benchmark, split=split)


def _calibration_stage(prepared: Prepared, method: Method, directory: Path, label: str) -> tuple[RetainWeights, str]:
    """Weights of the retain tokens, and the hash of what made them."""
    known = fingerprint(prepared.identity, "calibration", method.calibration)
    stage = Stage("calibration", directory, known)

    def make() -> RetainWeights:
        weights = retain_weights(
            method.calibration,
            model=prepared.target,
            forget=prepared.corpora.forget,
            retain=prepared.corpora.retain,
            forget_statistics=prepared.forget,
            retain_statistics=prepared.retain,
            mesh=prepared.mesh,
        )
        weights.save(directory)
        if weights.certificate is not None:
            say(f"calibration of {label}:\n{weights.certificate.text(most=0)}")
        return weights

    return stage.run(make, lambda: RetainWeights.load(directory), f"calibration of {label}"), known
