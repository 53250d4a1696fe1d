"""The stages of a run: data, target model, statistics, then for each method calibration, unlearning, evaluation.

Each stage leaves an artefact with the hash of everything that made it, and is skipped when that artefact is there; so a
run that was interrupted, or whose later settings changed, continues from what it has.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from trace_jax.checkpoints.params import load_params, save_params
from trace_jax.data.batches import mixture_batches
from trace_jax.data.config import DataConfig
from trace_jax.data.corpora import Corpora, build_corpora
from trace_jax.environment import describe
from trace_jax.evaluation.fronts import Front, front_from_history
from trace_jax.evaluation.measurement import Measurement
from trace_jax.evaluation.routing import measure_routing
from trace_jax.evaluation.suite import Evaluator, make_evaluator
from trace_jax.experiment import ExperimentConfig, Method
from trace_jax.files import write_json
from trace_jax.models.arrays import abstract_params, count_params
from trace_jax.models.model import Model
from trace_jax.parallel.mesh import make_mesh
from trace_jax.progress import say, tracked
from trace_jax.routing.retain_weights import RetainWeights, retain_weights
from trace_jax.routing.statistics import ExpertStatistics, expert_statistics, row_batches
from trace_jax.stages import Stage, check_workdir, identity, open_workdir
from trace_jax.summary import refresh
from trace_jax.unlearning.loop import front_rows
from trace_jax.unlearning.train import train_model
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

    Raises:
      ConfigError, ValueError: something given can't be used; the message says what, and what to do.
    """
    prepared = prepare(config, workdir, overwrite=overwrite)
    for name in config.methods:
        run_method(prepared, config.method(name), label=name)
    return refresh(prepared.workdir, config.methods)


def prepare(config: ExperimentConfig, workdir: str | os.PathLike, *, overwrite: bool = False) -> Prepared:
    """Data, target model (and retrained model), statistics and the evaluator: what every method starts from."""
    check_workdir(config, workdir, overwrite=overwrite)
    say("data: reading and tokenizing")
    mesh, corpora = make_mesh(), _corpora(config.data)  # before anything is written: data may be refused
    path = open_workdir(config, workdir, overwrite=overwrite)
    write_json(path / "environment.json", describe())
    say(
        f"data: {_counts(corpora.documents, 'documents')}; unlearning with {len(corpora.forget)} forget rows and "
        f"{len(corpora.retain)} retain rows"
    )
    known = identity(corpora.fingerprint, config.model, config.target, config.seed)
    target = _model_stage(config, path, corpora, mesh, "target", corpora.mixture, known)
    retrained = None
    if config.target.retrained:
        retrained = _model_stage(
            config, path, corpora, mesh, "retrained", corpora.retrain_mixture, identity(known, "retrained")
        )
    forget, retain = _statistics_stage(config, path, corpora, target, mesh, identity(known, "statistics"))
    evaluator = _evaluator_stage(config, path, corpora, target, retrained, mesh)
    return Prepared(config, path, mesh, corpora, target, forget, retain, evaluator, known)


@functools.lru_cache(maxsize=4)
def _corpora(config: DataConfig) -> Corpora:
    """The corpora; kept, because a study prepares several runs on the same ones."""
    return build_corpora(config)


def _counts(numbers: Any, what: str) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in numbers.items()) + f" {what}"


def _model_stage(
    config: ExperimentConfig, path: Path, corpora: Corpora, mesh: Mesh, name: str, mixture, known: str
) -> Model:
    """Trains a model on a mixture of the corpora, or loads it."""
    stage = Stage(name, path / name, known)
    file = stage.directory / "model.safetensors"
    total, active = count_params(config.model)

    def make() -> Model:
        say(
            f"{name} model: {total:,} parameters, {active:,} active per token; {config.target.steps} steps of "
            f"{config.target.batch_size} x {config.data.row_length} tokens"
        )
        batches = mixture_batches(corpora.train, mixture, config.target.batch_size, seed=config.seed)
        model, _ = train_model(
            config.model,
            config.target,
            batches.__getitem__,
            seed=config.seed,
            mesh=mesh,
            directory=stage.directory,
            identity=known,
            title=f"training the {name} model",
            tokenizer=corpora.tokenizer,
        )
        save_params(file, model.params, {"identity": known})
        return model

    def load() -> Model:
        return Model(config.model, load_params(file, abstract_params(config.model))[0], corpora.tokenizer)

    return stage.run(make, load, f"{name} model")


def _statistics_stage(config, path: Path, corpora: Corpora, target: Model, mesh: Mesh, known: str):
    """Expert frequencies of the original model on forget and retain data."""
    stage = Stage("statistics", path / "statistics", known)

    def make():
        found = []
        for name, rows in (("forget", corpora.forget), ("retain", corpora.retain)):
            size = config.evaluation.batch_size
            batches = tracked(row_batches(rows, size), f"routing of the {name} corpus", -(-len(rows) // size))
            statistics = expert_statistics(target, batches, mesh=mesh)
            statistics.save(stage.directory / f"{name}.npz")
            found.append(statistics)
        return tuple(found)

    def load():
        return tuple(ExpertStatistics.load(stage.directory / f"{name}.npz") for name in ("forget", "retain"))

    return stage.run(make, load, "routing statistics")


def _evaluator_stage(
    config, path: Path, corpora: Corpora, target: Model, retrained: Model | None, mesh: Mesh
) -> Evaluator:
    """The evaluator with the scores of the original (and retrained) model; their measurements are written down."""
    probes = {"validation": corpora.validation, "test": corpora.test}
    evaluator = make_evaluator(
        config.evaluation,
        config.model,
        probes,
        corpora.tokenizer,
        benchmark=config.data.benchmark,
        mesh=mesh,
        seed=config.seed,
    )
    say("evaluation of the target model" + (" and of the retrained model" if retrained is not None else ""))
    models = {"target": target} | ({} if retrained is None else {"retrained": retrained})
    scores = {name: evaluator.score(model.params, full=True) for name, model in models.items()}
    evaluator = evaluator.with_references(original=scores["target"], retrained=scores.get("retrained"))
    measured = {name: [m.to_json() for m in evaluator.measure(score)] for name, score in scores.items()}
    counts = {"documents": dict(corpora.documents), "tokens": dict(corpora.tokens), "fingerprint": corpora.fingerprint}
    write_json(path / "references.json", {"measurements": measured, "data": counts})
    return evaluator


# --- one method


def run_method(prepared: Prepared, method: Method, *, label: str) -> None:
    """Calibrates, unlearns and evaluates with one method in `methods/LABEL`, or keeps what is there."""
    directory = prepared.workdir / "methods" / label
    weights, known = _calibration_stage(prepared, method, directory, label)
    known = identity(known, method.unlearning, prepared.config.evaluation)
    stage = Stage("unlearning", directory, known)

    def make() -> None:
        config, corpora = prepared.config, prepared.corpora
        unlearned = unlearn(
            prepared.target,
            corpora.forget,
            corpora.retain,
            config=method.unlearning,
            weights=weights,
            seed=config.seed,
            mesh=prepared.mesh,
            directory=directory,
            identity=known,
            title=f"unlearning with {label}",
            evaluate=lambda params: [m.to_json() for m in prepared.evaluator(params)],
        )
        save_params(
            directory / "model.safetensors", unlearned.model.params, {"identity": known, "step": unlearned.step}
        )
        measured = prepared.evaluator.full(unlearned.model.params)
        routing = measure_routing(
            prepared.target,
            unlearned.model,
            forget=corpora.forget,
            retain=corpora.retain,
            mesh=prepared.mesh,
            batch_size=config.evaluation.batch_size,
            max_rows=config.evaluation.max_rows,
        )
        fronts = {split: _front(prepared, directory, known, split).to_json() for split in SPLITS}
        write_json(
            directory / "results.json",
            {
                "method": method.name,
                "label": label,
                "seed": config.seed,
                "calibration": dataclasses.asdict(method.calibration),
                "unlearning": dataclasses.asdict(method.unlearning),
                "step": unlearned.step,
                "stopped": unlearned.stopped,
                "seconds_per_step": _finite(unlearned.seconds_per_step),
                "trained": unlearned.trained,
                "fronts": fronts,
                "measurements": [m.to_json() for m in measured],
                "routing": routing.to_json(),
            },
        )

    stage.run(make, lambda: None, f"unlearning with {label}")


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _front(prepared: Prepared, directory: Path, known: str, split: str) -> Front:
    rows = front_rows(directory, known)
    history = [(row["step"], [Measurement.from_json(m) for m in row["evaluation"]]) for row in rows]
    return front_from_history(history, benchmark=prepared.config.data.benchmark, split=split)


def _calibration_stage(prepared: Prepared, method: Method, directory: Path, label: str) -> tuple[RetainWeights, str]:
    """Weights of the retain tokens, and the hash of what made them."""
    known = identity(prepared.identity, "calibration", method.calibration)
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
