"""What the methods of a run share: data, target model (and retrained model), routing statistics, evaluator.

Each stage leaves an artefact with the hash of everything that made it, and is skipped when that artefact is there; so a
run that was interrupted, or whose later settings changed, continues from what it has.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path

from jax.sharding import Mesh

from trace_jax.checkpoints.config import PretrainedConfig
from trace_jax.checkpoints.params import parameter_bytes, parameter_count
from trace_jax.config import ConfigError, fingerprint
from trace_jax.data.batches import mixture_batches, sequential_batches
from trace_jax.data.corpora import Corpora, DataConfig
from trace_jax.data.rows import Rows
from trace_jax.data.tokenizer import read_codec
from trace_jax.evaluation.probes import probe_tasks
from trace_jax.evaluation.routing import measured_rows
from trace_jax.evaluation.task import Evaluator, ScoreStore, Task, hazardous
from trace_jax.io.environment import describe
from trace_jax.io.files import free_bytes, remove, write_json
from trace_jax.io.progress import say, tracked
from trace_jax.models.arrays import count_params, flatten
from trace_jax.models.config import ModelConfig
from trace_jax.models.model import Model
from trace_jax.parallel.processes import check_joined
from trace_jax.routing.statistics import (
    MIN_ACTIVATIONS,
    Assignments,
    ExpertStatistics,
    expert_assignments,
    expert_routing,
    expert_statistics,
)
from trace_jax.run.experiment import ExperimentConfig
from trace_jax.run.export import load_model, load_trained, save_trained
from trace_jax.run.stages import Stage, check_workdir, open_workdir
from trace_jax.tasks.benchmarks import build_corpora, build_tasks, scoreboard
from trace_jax.unlearning.train import train_model
from trace_jax.unlearning.trainable import trainable_paths
from trace_jax.unlearning.trained import factors

FORGET_STATISTICS, RETAIN_STATISTICS = "statistics/forget.npz", "statistics/retain.npz"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything that the methods of a run share. `model_id` is the hash of all that made the target model."""

    config: ExperimentConfig
    workdir: Path
    mesh: Mesh
    corpora: Corpora
    target: Model
    forget: ExpertStatistics
    retain: ExpertStatistics
    evaluator: Evaluator
    model_id: str

    @functools.cached_property
    def retain_assignments(self) -> Assignments:
        """The experts of every retain token under the target model."""
        return Assignments.load(self.workdir / RETAIN_STATISTICS, self.corpora.retain.valid)

    @functools.cached_property
    def original_routing(self) -> dict[str, Assignments]:
        """The target model's routing of the rows that `measure_routing` looks at.

        Of forget text it is never kept on disk: most of a text can be read back from its experts (2602.04105).
        """
        settings, forget, retain = self.config.evaluation, self.corpora.forget, self.corpora.retain
        batches = sequential_batches(forget.take(measured_rows(forget, settings.max_rows)), settings.batch_size)
        return {
            "forget": expert_assignments(self.target, batches, mesh=self.mesh),
            "retain": self.retain_assignments.take(measured_rows(retain, settings.max_rows)),
        }


def prepare(config: ExperimentConfig, workdir: str | os.PathLike, *, overwrite: bool = False) -> Prepared:
    """Data, target model (and retrained model), statistics and the evaluator: what every method starts from."""
    if isinstance(config.model, PretrainedConfig):
        config.model.check()
    check_workdir(config, workdir, overwrite=overwrite)
    check_joined()
    mesh = config.parallel.mesh()
    # Before anything is written: they may be refused.
    corpora, tasks = read_corpora(config.data, config.model), build_tasks(config.evaluation)
    for attack in config.attacks.chosen.values() if config.attacks else ():
        attack.check_source()
    path = open_workdir(config, workdir, overwrite=overwrite)
    write_json(path / "environment.json", describe())
    documents = ", ".join(f"{name} {count:,}" for name, count in corpora.documents.items())
    rows = f"{len(corpora.forget)} forget rows and {len(corpora.retain)} retain rows"
    say(f"data: {documents} documents; unlearning with {rows}")
    training = config.target and dataclasses.replace(config.target, retrained=False)  # the target is the same
    model_id = fingerprint(corpora.fingerprint, config.model_identity(), training, config.seed)
    retrained, retrained_id = None, fingerprint(model_id, "retrained", retrained_identity(config))
    if isinstance(config.model, PretrainedConfig):
        target = load_model(config, path, mesh=mesh)
        _check_disk(config, path, target)
    else:
        target = _model_stage(config, path, corpora, mesh, "target", corpora.mixture, model_id)
        if config.target and config.target.retrained:
            retrained = _model_stage(config, path, corpora, mesh, "retrained", corpora.retrain_mixture, retrained_id)
    forget, retain = _statistics_stage(config, path, corpora, target, mesh, fingerprint(model_id, "routing"))
    if isinstance(config.model, PretrainedConfig) and config.model.retrained:
        retrained = load_model(
            config, path, "retrained", mesh
        )  # only while it is evaluated: it takes as much as the target
    models = {fingerprint(model_id, "target"): target} | ({retrained_id: retrained} if retrained is not None else {})
    evaluator = _evaluator_stage(config, path, corpora, tasks, models, mesh)
    return Prepared(config, path, mesh, corpora, target, forget, retain, evaluator, model_id)


@functools.lru_cache(maxsize=4)  # a study prepares several runs on the same ones
def read_corpora(data: DataConfig, model: PretrainedConfig | ModelConfig) -> Corpora:
    """The corpora of an experiment, in the tokens of its model."""
    say("data: reading and tokenizing")
    return build_corpora(data, read_codec(model.path) if isinstance(model, PretrainedConfig) else None)


def _model_stage(
    config: ExperimentConfig, path: Path, corpora: Corpora, mesh: Mesh, name: str, mixture, model_id: str
) -> Model:
    """Trains a model on a mixture of the corpora, or loads it."""
    stage = Stage(name, path / name, model_id)
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
            identity=model_id,
            title=f"training the {name} model",
            tokenizer=corpora.tokenizer,
        )
        save_trained(stage.directory, model, model_id)
        return model

    model = stage.run(make, f"{name} model", lambda: load_trained(stage.directory, shape))
    remove(stage.directory / "checkpoints")  # of use while it trains only
    return model


def retrained_identity(config: ExperimentConfig) -> str:
    """Hash of a retrained model that is imported. One that is trained here follows from the rest."""
    if isinstance(config.model, PretrainedConfig):
        return config.model.retrained_identity()
    return "trained here" if config.target is not None and config.target.retrained else ""


def _check_disk(config: ExperimentConfig, path: Path, target: Model) -> None:
    """Refuses a run whose files would not fit.

    While a method trains, three of its states are on disk, and a fourth where the best is kept. Relearning trains all.
    """
    sizes = {"export": parameter_bytes(target.params)} if config.export and not (path / "export").exists() else {}
    for name in config.methods:
        if not (path / "methods" / name / "results.json").exists():
            unlearning = config.method(name).unlearning
            paths, arrays = trainable_paths(target.config, unlearning.patterns), flatten(target.params)
            training = {path: arrays[path] for path in paths}
            sizes[name], count = parameter_bytes(training), parameter_count(training)
            if unlearning.lora is not None:
                own = factors(target.config, paths, unlearning.lora.rank).values()
                count = sum(math.prod(spec.shape) for spec in own)
            states, numbers = 3 + unlearning.keeps_best, 1 + unlearning.optimizer.moments
            sizes["states"] = max(sizes.get("states", 0), states * numbers * 4 * count)
    for attack in (config.attacks.relearning, config.attacks.benign_relearning) if config.attacks else ():
        if attack is not None:
            numbers = 1 + attack.optimization.optimizer.moments
            sizes["states"] = max(sizes.get("states", 0), 3 * numbers * 4 * parameter_count(flatten(target.params)))
    needed, free = sum(sizes.values()), free_bytes(path)
    if free < needed:
        parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in sizes.items())
        raise ConfigError(
            f"{path}: {free / 2**30:.1f} GiB are free there; this run needs {needed / 2**30:.1f} GiB ({parts}). Let "
            "less train (unlearning.trainable), or choose another --workdir."
        )


def _statistics_stage(
    config: ExperimentConfig, path: Path, corpora: Corpora, target: Model, mesh: Mesh, identity: str
) -> tuple[ExpertStatistics, ExpertStatistics]:
    """Expert frequencies of the original model on forget and retain data; the experts of retain tokens are kept."""
    stage = Stage("statistics", path / "statistics", identity)

    def batches(name: str, rows: Rows):
        size = config.evaluation.batch_size
        return tracked(sequential_batches(rows, size), f"routing of the {name} corpus", -(-len(rows) // size))

    def make():
        forget = expert_statistics(target, batches("forget", corpora.forget), mesh=mesh)
        forget.save(path / FORGET_STATISTICS)
        retain, assignments = expert_routing(
            target, batches("retain", corpora.retain), mesh=mesh, min_activations=MIN_ACTIVATIONS
        )
        retain.save(path / RETAIN_STATISTICS, assignments)
        return forget, retain

    def load():
        return ExpertStatistics.load(path / FORGET_STATISTICS), ExpertStatistics.load(path / RETAIN_STATISTICS)

    return stage.run(make, "routing statistics", load)


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
    settings = config.evaluation
    if hazardous(config.data.forget_sources):
        settings = dataclasses.replace(settings, audit_text=False)
    probes = probe_tasks(
        {"validation": corpora.validation, "test": corpora.test},
        settings,
        accuracies=scoreboard(config.data.benchmark).questions,
        identity=corpora.fingerprint,
    )
    evaluator = Evaluator(settings, (*probes, *tasks), mesh, config.seed)
    say("evaluation of the target model" + (" and of the retrained model" if len(models) > 1 else ""))
    scores = {
        name: evaluator.score(model, full=True, store=ScoreStore(path / "scores" / name, identity))
        for name, (identity, model) in zip(("target", "retrained"), models.items(), strict=False)
    }
    evaluator = dataclasses.replace(evaluator, original=scores["target"], retrained=scores.get("retrained", {}))
    measured = {name: [m.to_json() for m in evaluator.measure(score)] for name, score in scores.items()}
    counts = {"documents": dict(corpora.documents), "tokens": dict(corpora.tokens), "fingerprint": corpora.fingerprint}
    write_json(path / "references.json", {"measurements": measured, "data": counts})
    return evaluator
