"""What the methods of a run share: data, target model (and retrained model), routing statistics, evaluator."""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from trace_jax.attacks.attack import Context
from trace_jax.checkpoints.pretrained import PretrainedConfig
from trace_jax.config import ConfigError, fingerprint
from trace_jax.data.corpora import Corpora, DataConfig, build_corpora
from trace_jax.data.rows import mixture_batches, read_codec, sequential_batches
from trace_jax.evaluation.likelihood import spread_indices
from trace_jax.evaluation.probes import probe_tasks
from trace_jax.evaluation.task import SPLITS, Evaluator, Scoreboard, Scores, ScoreStore, Task, hazardous
from trace_jax.io.environment import describe
from trace_jax.io.files import free_bytes, remove, run_stage, write_json
from trace_jax.io.lock import locked
from trace_jax.io.progress import say, timed, tracked
from trace_jax.models.architecture import ModelConfig, count_params, flatten
from trace_jax.models.model import Model
from trace_jax.parallel.processes import check_joined
from trace_jax.plan.plan import laid_out, mesh_words, shape_of
from trace_jax.routing import statistics as routing
from trace_jax.routing.diagnosis import diagnose
from trace_jax.run.directory import check_workdir, needed, open_workdir
from trace_jax.run.experiment import ExperimentConfig
from trace_jax.run.export import RETRAINED, TARGET, load_model, save_trained
from trace_jax.tasks.benchmarks import build_tasks
from trace_jax.unlearning.step import train_model
from trace_jax.unlearning.trainable import factors, trainable_paths


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything that the methods of a run share. Models and numbers are made, or read back, when first asked for."""

    config: ExperimentConfig
    workdir: Path
    mesh: Mesh
    corpora: Corpora
    tasks: tuple[Task, ...]
    said: set[str] = dataclasses.field(default_factory=set)  # what one method said for all

    @functools.cached_property
    def model_id(self) -> str:
        """Hash of all that made the target model."""
        training = self.config.target and dataclasses.replace(self.config.target, retrained=False)  # of another model
        return fingerprint(self.corpora.fingerprint, self.config.model_identity(), training, self.config.seed)

    @functools.cached_property
    def target(self) -> Model:
        """The model that is unlearned from."""
        return self._model(TARGET, self.corpora.mixture, self.model_id)

    def _model(self, name: str, mixture: Mapping[str, float], identity: str) -> Model:
        """A model as `load_model` reads it; one that is not imported is first trained, on a mixture of the corpora."""
        config, directory, shape, training = self.config, self.workdir / name, self.config.model, self.config.target
        load = functools.partial(load_model, config, self.workdir, name, self.mesh)
        if isinstance(shape, PretrainedConfig) or training is None:
            return load()

        def make() -> Model:
            total, active = count_params(shape)
            size = f"{training.batch_size} x {config.data.row_length} tokens"
            say(f"{name} model: {total:,} parameters, {active:,} active per token; {training.steps} steps of {size}")
            batches = mixture_batches(self.corpora.train, mixture, training.batch_size, seed=config.seed)
            about: dict[str, Any] = {"directory": directory, "identity": identity, "tokenizer": self.corpora.tokenizer}
            about |= {"seed": config.seed, "mesh": self.mesh, "title": f"training the {name} model"}
            model = train_model(shape, training, batches, **about)
            save_trained(directory, model, identity)
            return model

        model = run_stage(name, directory, identity, f"{name} model", make, load)
        remove(directory / "checkpoints")  # of use while it trains only
        return model

    @functools.cached_property
    def statistics(self) -> tuple[routing.ExpertStatistics, routing.ExpertStatistics]:
        """Expert frequencies of the target model on forget and retain data, and whether they differ, said before
        anything trains; the experts of retain tokens are kept.
        """
        directory, size = self.workdir / "statistics", self.config.evaluation.batch_size

        def make() -> None:
            found = []
            for name, rows in (("forget", self.corpora.forget), ("retain", self.corpora.retain)):
                title = f"routing of the {name} corpus"
                batches = tracked(sequential_batches(rows, size), title, -(-len(rows) // size))
                how = {"mesh": self.mesh, "min_activations": routing.MIN_ACTIVATIONS}
                statistics, assignments = routing.expert_routing(self.target, batches, **how)
                statistics.save(directory / f"{name}.npz", assignments if name == "retain" else None)
                found.append(assignments)
            experts = self.target.config.num_experts
            diagnosis = diagnose(*found, num_experts=experts, curve=False, seed=self.config.seed)
            write_json(directory / "diagnosis.json", diagnosis.to_json())

        identity = fingerprint(self.model_id, "routing by document")
        run_stage("statistics", directory, identity, "routing statistics", make)
        say(f"mismatch {needed(directory / 'diagnosis.json')['sentence']}")
        forget, retain = (routing.ExpertStatistics.load(directory / f"{name}.npz") for name in ("forget", "retain"))
        return forget, retain

    @functools.cached_property
    def retain_assignments(self) -> routing.Assignments:
        """The experts of every retain token under the target model."""
        return routing.Assignments.load(self.workdir / "statistics" / "retain.npz", self.corpora.retain)

    @functools.cached_property
    def original_routing(self) -> dict[str, routing.Assignments]:
        """The target model's routing of the rows that `measure_routing` looks at. Of forget text it is never kept on
        disk: most of a text can be read back from its experts (2602.04105).
        """
        settings, forget, retain = self.config.evaluation, self.corpora.forget, self.corpora.retain
        forget = forget.take(spread_indices(len(forget), settings.max_rows))
        batches = sequential_batches(forget, settings.batch_size)
        return {
            "forget": routing.expert_assignments(self.target, batches, mesh=self.mesh),
            "retain": self.retain_assignments.take(spread_indices(len(retain), settings.max_rows)),
        }

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """The evaluator with the scores of the target and the retrained model; their measurements are written down."""
        settings, corpora, retrained = self.config.evaluation, self.corpora, retrained_identity(self.config)
        if hazardous(self.config.data.forget_sources):
            settings = dataclasses.replace(settings, audit_text=False)
        splits, names = {"validation": corpora.validation, "test": corpora.test}, self.config.data.board.questions
        probes = probe_tasks(splits, settings, accuracies=names, identity=corpora.fingerprint)
        evaluator = Evaluator(settings, (*probes, *self.tasks), self.mesh, self.config.seed)

        def scores(name: str, model: Model, identity: str) -> Scores:
            title = f"evaluation of the {name} model"
            say(title)
            with timed(title):
                return evaluator.score(model, full=True, store=ScoreStore(self.workdir / "scores" / name, identity))

        references = {TARGET: scores(TARGET, self.target, fingerprint(self.model_id, "target"))}
        if retrained:  # it is held only while it is evaluated: it takes as much as the target
            identity = fingerprint(self.model_id, RETRAINED, retrained)
            model = self._model(RETRAINED, corpora.retrain_mixture, identity)
            references[RETRAINED] = scores(RETRAINED, model, identity)
        evaluator = dataclasses.replace(evaluator, original=references[TARGET], retrained=references.get(RETRAINED, {}))
        measured = {name: [m.to_json() for m in evaluator.measure(score)] for name, score in references.items()}
        data = {name: getattr(corpora, name) for name in ("documents", "tokens", "fingerprint")}
        write_json(self.workdir / "references.json", {"measurements": measured, "data": data})
        return evaluator

    @functools.cached_property
    def board(self) -> Scoreboard:
        """What methods are compared on: of the first published benchmark that the target model can be read on, else of
        the data. Raises ConfigError: it can't, for it knows nothing, and rules were to read it.
        """
        values = {(m.name, m.split): m.value for m in self.evaluator.measure(self.evaluator.original)}
        for task in self.tasks:
            if (board := task.board) is not None:
                names = f"{board.forgetting} against {', '.join(board.utilities)}"
                known = [values.get((name, split), -1.0) for name in board.utilities for split in SPLITS]
                measured = all((board.forgetting, split) in values for split in SPLITS)
                if measured and min(known) > 0:
                    say(f"levels and rules are read on {names}")
                    return board
                why = f"levels and rules can't be read on {names}: the target model has none of one of these"
                if measured and min(known) == 0 and self.config.unlearning.needs_evaluation:
                    raise ConfigError(f"{why}. Give one that knows what is to be kept, or remove the rules.")
                say(why)
        return self.config.data.board

    @functools.cached_property
    def attacks(self) -> dict[str, Context]:
        """What each attack of the run has for all methods, by name."""
        config, retrained, settings = self.config, retrained_identity(self.config), self.config.evaluation.of_scores
        tasks = [task.identity for task in self.evaluator.tasks]
        shared = self.target, self.corpora, config.data, self.board, self.evaluator, self.mesh, config.seed
        load = functools.partial(load_model, config, self.workdir, RETRAINED, self.mesh) if retrained else None
        contexts = {}
        for name, attack in (config.attacks.chosen if config.attacks else {}).items():
            identity = fingerprint(self.model_id, retrained, name, attack, attack.revisions, settings, tasks)
            place = self.workdir / "attacks" / name
            contexts[name] = Context(attack, *shared, place, identity, lambda: self.original_routing["forget"], load)
        return contexts


def prepare(
    config: ExperimentConfig, workdir: str | os.PathLike, *, overwrite: bool = False, held: ExitStack | None = None
) -> Prepared:
    """Data, target model (and retrained model), statistics and the evaluator: what every method starts from. The
    workdir is locked as long as `held` is open.
    """
    if isinstance(config.model, PretrainedConfig):
        config.model.check()
    config.unlearning.check_layer(shape_of(config.model).num_layers)
    check_workdir(config, workdir, overwrite=overwrite)
    config.tracking.check()
    check_joined()
    parallel = laid_out(config, shape_of(config.model), len(jax.devices()))
    mesh = parallel.mesh()
    if mesh.size > 1:
        say(f"mesh: {mesh_words(parallel)}")
    # Before anything is written: they may be refused.
    with timed("data"):
        corpora, tasks = read_corpora(config.data, config.model), build_tasks(config.evaluation)
    for attack in config.attacks.chosen.values() if config.attacks else ():
        attack.check_source()
    if held is not None:
        held.enter_context(locked(workdir))
    path = open_workdir(config, workdir, overwrite=overwrite)
    write_json(path / "environment.json", describe())
    say(f"data: {data_text(corpora)}")
    prepared = Prepared(config, path, mesh, corpora, tasks)
    if isinstance(config.model, PretrainedConfig):
        _check_disk(config, path, prepared.target)
    _ = prepared.target, prepared.statistics, prepared.evaluator  # in this order, before any method
    return prepared


@functools.lru_cache(maxsize=4)  # a study prepares several runs on the same ones
def read_corpora(data: DataConfig, model: PretrainedConfig | ModelConfig) -> Corpora:
    """The corpora of an experiment, in the tokens of its model."""
    say("data: reading and tokenizing")
    return build_corpora(data, read_codec(model.path) if isinstance(model, PretrainedConfig) else None)


def data_text(corpora: Corpora) -> str:
    """How much there is, in words."""
    documents = ", ".join(f"{name} {count:,}" for name, count in corpora.documents.items())
    rows = f"{len(corpora.forget)} forget rows and {len(corpora.retain)} retain rows"
    return f"{documents} documents; unlearning with {rows}"


def retrained_identity(config: ExperimentConfig) -> str:
    """Hash of a retrained model that is imported, empty without one. One trained here follows from the rest."""
    if isinstance(config.model, PretrainedConfig):
        return config.model.identity(retrained=True)
    return "trained here" if config.target is not None and config.target.retrained else ""


def _check_disk(config: ExperimentConfig, path: Path, target: Model) -> None:
    """Refuses a run whose files would not fit: while a method trains, three of its states are on disk, and a fourth
    where the best is kept. Relearning trains all.
    """
    arrays, sizes, states = flatten(target.params), {}, []  # bytes by name; float32 numbers
    if config.export and not (path / "export").exists():
        sizes["export"] = sum(array.nbytes for array in arrays.values())
    for name in config.methods:
        if not (path / "methods" / name / "results.json").exists():
            unlearning = config.method(name).unlearning
            paths, rank = trainable_paths(target.config, unlearning.trainable), unlearning.trainable.rank
            sizes[name] = sum(arrays[path].nbytes for path in paths)
            shapes: Any = [arrays[p] for p in paths] if rank is None else factors(target.config, paths, rank).values()
            count = sum(math.prod(one.shape) for one in shapes)
            states.append((3 + unlearning.keeps_best) * (1 + unlearning.optimizer.moments) * count)
    for attack in (config.attacks.relearning, config.attacks.benign_relearning) if config.attacks else ():
        if attack is not None:
            count = sum(array.size for array in arrays.values())
            states.append(3 * (1 + attack.optimization.optimizer.moments) * count)
    sizes["states"] = 4 * max(states, default=0)
    needed, free = sum(sizes.values()), free_bytes(path)
    if free < needed:
        parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in sizes.items())
        raise ConfigError(
            f"{path}: {free / 2**30:.1f} GiB are free there; this run needs {needed / 2**30:.1f} GiB ({parts}). Let "
            "less train (unlearning.trainable), or choose another --workdir."
        )
