"""The stages of a run (`io.files.run_stage`): what its methods share, then for each of them weights, unlearning,
evaluation and attacks. A run that was interrupted, or whose later settings changed, continues from what it has.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trace_jax.attacks import AttacksConfig
from trace_jax.attacks.attack import Case, Context
from trace_jax.config import ConfigError, as_dict, fingerprint, resolve
from trace_jax.evaluation import fronts, routing
from trace_jax.evaluation.intervals import Measurement
from trace_jax.evaluation.patching import measure_patching
from trace_jax.evaluation.task import SPLITS, ScoreStore
from trace_jax.io.files import as_path, decode, encode, flush_lines, read_json, remove, run_stage, write_json
from trace_jax.io.progress import plain_name, say, timed
from trace_jax.io.tracking import Tracker
from trace_jax.models.model import Model
from trace_jax.parallel.processes import add_process_arguments, is_main, keep_freed_memory, start_processes
from trace_jax.routing.config import CalibrationConfig, Matching, Permuted, RatioWeights
from trace_jax.routing.weights import Recalibration, RetainWeights, retain_weights
from trace_jax.run.directory import finished, is_done, made_by, needed, seal, write_results
from trace_jax.run.experiment import ExperimentConfig, Method
from trace_jax.run.export import UNLEARNED, load_model, save_unlearned, write_checkpoint
from trace_jax.run.prepare import Prepared, prepare, retrained_identity
from trace_jax.run.result import Run, open_run
from trace_jax.unlearning.loop import Evaluated
from trace_jax.unlearning.metrics import front_rows
from trace_jax.unlearning.trainable import chosen_experts, table_text, trainable_table
from trace_jax.unlearning.unlearn import unlearn

add_arguments = add_process_arguments


def main(options: argparse.Namespace) -> int:
    config = options.load_config()
    keep_freed_memory()
    start_processes(options.coordinator, options.num_processes, options.process_id)
    with timed("run"):
        done = run(config, options.workdir, overwrite=options.overwrite)
    if is_main():
        print(done)
    return 0


def run(config: ExperimentConfig, workdir: str | os.PathLike | None = None, *, overwrite: bool = False) -> Run:
    """Runs, or continues, every stage of an experiment: data, target model, and for each method weights, unlearning,
    evaluation and attacks; then the report.

    With several processes (`start_processes`) each runs this, and process 0 writes.

    Args:
      config: of `load_config`.
      workdir: the directory of the run, or its address gs://BUCKET/NAME; made if missing. Default: runs/NAME.
      overwrite: whether a run of another corpus or model that is there is replaced.

    Raises:
      ConfigError, ValueError: something given can't be used, or another process works in the directory; the message
        says what, and what to do.
    """
    where = workdir or f"runs/{config.name}"
    if is_done(path := as_path(where), by := made_by(config)):
        say("everything is done: settings, text and code are those of the run that is there")
        return Run(path)
    with contextlib.ExitStack() as held:
        _run(prepare(config, where, overwrite=overwrite, held=held))
        seal(path, by)
    return Run(path)


def _run(prepared: Prepared) -> None:
    config = prepared.config
    for context in prepared.attacks.values():
        _ = context.prepared  # while there is nothing to lose
    models = {name: run_method(prepared, config.method(name), label=name) for name in config.methods}
    if is_main():
        with timed("report"):
            write_results(prepared.workdir, config.methods)
    if config.tracking.chosen:
        identity = fingerprint(read_json(prepared.workdir / "results.json"), config.tracking)
        attach = functools.partial(_attach, prepared)
        run_stage("tracking", prepared.workdir, identity, "report in the trackers", attach)
    if (label := config.export) is not None:
        path, output = prepared.workdir, prepared.workdir / "export"
        if not (output / "config.json").exists():
            for left in (output, path / "export.stage.json"):  # what is left of one is no checkpoint to replace
                remove(left)
        about: dict[str, Any] = {"target": prepared.target, "overwrite": True}
        export = functools.partial(write_checkpoint, config, path, label, output, **about)
        run_stage("export", path, fingerprint(models[label], "export"), f"export of {label}", export)


def attack(workdir: str | os.PathLike, attacks: Mapping[str, Any]) -> Run:
    """Attacks what each method of a finished run made; all else is kept as it is. `Run.attacks()` has the numbers.

    Args:
      workdir: the run, or its directory. Its configuration is what it was, with these attacks in addition.
      attacks: settings by attack, as in a configuration: {"router_swap": {}, "quantization": {"bits": [4]}}.

    Raises:
      ConfigError: the run is not finished, or there is no such attack or setting.

    Example:
      >>> run = tj.attack("runs/mine", {"router_swap": {}})
      >>> sorted(set(run.attacks()["at"]))
      ['original routers']
    """
    if "methods" not in finished(as_path(workdir)):
        raise ConfigError(f"{os.fspath(workdir)}: is a study or a series; attacks are made on a single run.")
    config = open_run(workdir).config
    sections = {**as_dict(config.attacks or AttacksConfig()), **attacks}
    return run(dataclasses.replace(config, attacks=resolve(AttacksConfig, sections, "attacks")), workdir)


def run_method(prepared: Prepared, method: Method, *, label: str, alone: bool = False, full: bool = True) -> str:
    """Calibrates, unlearns, evaluates (on quick tasks alone if not `full`) and, if not `alone`, puts experts back and
    attacks, with one method in `methods/LABEL`, or keeps what is there. Returns the hash of what made the model.
    """
    directory, config, tasks = prepared.workdir / "methods" / label, prepared.config, prepared.evaluator.tasks
    weights, weights_id = calibrated(prepared, method.calibration, label)
    calibration_id = fingerprint(prepared.model_id, "calibration", method.calibration)
    quick = [task.identity for task in tasks if task.quick]
    measured = config.evaluation.batch_size, config.evaluation.bootstrap  # what changes the evaluations on the way
    quick += [] if prepared.board == config.data.board else [prepared.board.forgetting]
    model_id = fingerprint(calibration_id, method.unlearning, measured, quick)
    make = functools.partial(_unlearn, prepared, method, (weights, weights_id), label, model_id)
    made = run_stage("unlearning", directory, model_id, f"unlearning with {label}", make)
    load = functools.partial(load_model, config, prepared.workdir, label, target=prepared.target)
    unlearned = functools.cache(lambda: made or load())
    identities = [task.identity for task in tasks if full or task.quick]
    evaluation_id = fingerprint(model_id, config.evaluation.of_scores, identities, retrained_identity(config))
    evaluate = functools.partial(_evaluate, prepared, unlearned, weights, directory, model_id, full)
    run_stage("evaluation", directory, evaluation_id, f"evaluation of {label}", evaluate)
    remove(directory / "checkpoints")
    if alone:
        return model_id
    if config.evaluation.patching:
        patch = functools.partial(_put_back, prepared, unlearned, directory)
        patching_id = fingerprint(model_id, measured, quick, "patching")
        run_stage("patching", directory, patching_id, f"drift and patching of {label}", patch)
    place = directory / "attacks"

    def attack(name: str, context: Context, identity: str) -> None:
        write_json(place / f"{name}.json", Case(context, unlearned(), place / name, identity).attack())

    for name, context in prepared.attacks.items():
        identity = fingerprint(evaluation_id, name, context.attack, context.attack.revisions)
        title = f"{name.replace('_', ' ')} of {label}"
        run_stage(name, place, identity, title, functools.partial(attack, name, context, identity))
    return model_id


def calibrated(prepared: Prepared, config: CalibrationConfig, label: str) -> tuple[RetainWeights, str]:
    """Weights of the retain tokens, and the hash of what made them: they are in `calibrations/HASH`, shared by all
    methods whose weights are the same, wherever these act.
    """
    weighting, plain = config.weighting, as_dict(config.weighting)
    made_by = {name: value for name, value in plain.items() if name not in ("apply", "routing")}
    weights_id = fingerprint(prepared.model_id, "weights", made_by, config.seed)
    directory = prepared.workdir / "calibrations" / weights_id

    def make() -> RetainWeights:
        solved = None
        if isinstance(weighting, Permuted):
            plainly = Matching(**{field.name: getattr(weighting, field.name) for field in dataclasses.fields(Matching)})
            solved, _ = calibrated(prepared, dataclasses.replace(config, weighting=plainly), label)
        about: dict[str, Any] = {"model": prepared.target, "mesh": prepared.mesh, "solved": solved}
        about |= {"forget": prepared.corpora.forget, "retain": prepared.corpora.retain}
        about["forget_statistics"], about["retain_statistics"] = prepared.statistics
        if isinstance(weighting, (Matching, RatioWeights)):
            about["assignments"] = prepared.retain_assignments
        weights = retain_weights(config, **about)
        weights.save(directory)
        if weights.calibration is not None and solved is None:
            say(f"calibration of {label}: {weights.calibration.certificate.text(most=0).removeprefix('calibration: ')}")
        return weights

    load = functools.partial(RetainWeights.load, directory)
    weights = run_stage("weights", directory, weights_id, f"calibration of {label}", make, load)
    return weights.applied(weighting), weights_id


def _unlearn(
    prepared: Prepared, method: Method, weighted: tuple[RetainWeights, str], label: str, model_id: str
) -> Model:
    """Unlearns, and keeps the model and how it was made: with which weights, and unlearned.json."""
    config, corpora, directory = prepared.config, prepared.corpora, prepared.workdir / "methods" / label
    weights, weights_id = weighted
    write_json(directory / "weights.json", {"calibration": weights_id})
    recalibrate = None
    if method.calibration.recalibrates_every is not None:
        settings = method.calibration, prepared.target, corpora.forget, corpora.retain, prepared.mesh
        recalibrate = Recalibration(*settings, config.evaluation.batch_size)
    else:
        remove(directory / "recalibration")  # of other settings
    selected = chosen_experts(method.unlearning, weights.selected, *prepared.statistics, seed=config.seed)
    if (table := table_text(trainable_table(prepared.target.config, method.unlearning, selected))) not in prepared.said:
        say(table)
        prepared.said.add(table)
    of_weights: Any = {"weights": weights, "recalibrate": recalibrate, "selected": selected}
    where: Any = {"mesh": prepared.mesh, "parallel": config.parallel, "directory": directory, "identity": model_id}
    about: Any = {"seed": config.seed, "title": f"unlearning with {label}", "evaluate": _evaluation(prepared, method)}
    data = corpora.forget, corpora.retain
    with _tracker(prepared, method, label) as about["tracker"]:
        unlearned = unlearn(prepared.target, *data, config=method.unlearning, **of_weights, **where, **about)
    save_unlearned(directory, unlearned, model_id)
    flush_lines()
    how = {"method": method.name, "label": label, "seed": config.seed}
    how |= as_dict({"calibration": method.calibration, "unlearning": method.unlearning})
    names = ("step", "steps", "stopped", "failed", "seconds_per_step", "trained", "grip")
    how |= {name: getattr(unlearned, name) for name in names}
    write_json(directory / UNLEARNED, encode(how))
    return unlearned.model


def _tracker(prepared: Prepared, method: Method, label: str) -> Tracker:
    """Shows the run of a method with its own settings in place of the experiment's."""
    config, path = prepared.config, prepared.workdir
    settings = as_dict(config) | {"method": label, "calibration": as_dict(method.calibration)}
    settings |= {"unlearning": as_dict(method.unlearning), "environment": read_json(path / "environment.json")}
    return Tracker(config.tracking, path / "methods" / label, project=config.name, settings=settings)


def _attach(prepared: Prepared) -> None:
    """Adds the report of a run to what the trackers show of each method."""
    config, path = prepared.config, prepared.workdir
    for label in config.methods if is_main() else ():
        with _tracker(prepared, config.method(label), label) as tracker:
            tracker.begin(None)
            tracker.attach(path / "report.html", needed(path / "results.json")["table"])


def _evaluate(
    prepared: Prepared,
    unlearned: Callable[[], Model],
    weights: RetainWeights,
    directory: Path,
    model_id: str,
    full: bool,
) -> None:
    """What is measured on an unlearned model, and on the weights it was made with: results.json."""
    evaluation, corpora, model = prepared.config.evaluation, prepared.corpora, unlearned()
    scores = prepared.evaluator.score(model, full=full, store=ScoreStore(directory / "scores", model_id))
    about: dict[str, Any] = {"forget": corpora.forget, "retain": corpora.retain, "mesh": prepared.mesh}
    about |= {"max_rows": evaluation.max_rows, "batch_size": evaluation.batch_size}
    about |= {"resamples": evaluation.bootstrap, "seed": prepared.config.seed}
    compared = routing.measure_routing(prepared.target, model, original_routing=prepared.original_routing, **about)
    calibration = routing.measure_calibration(weights, *prepared.statistics)
    measured = [*prepared.evaluator.measure(scores), *routing.routing_measurements(compared)]
    measured += routing.calibration_measurements(calibration)
    evaluated, board = front_rows(directory, model_id), prepared.board
    history = [(row["step"], [decode(Measurement, m) for m in row["evaluation"]]) for row in evaluated]
    results = {
        **needed(directory / UNLEARNED),
        "fronts": {s: encode(fronts.front_from_history(history, board=board, split=s)) for s in SPLITS},
        "board": encode(board),
        "measurements": [m.to_json() for m in measured],
        "routing": encode(compared, digits=6) | {"calibration": encode(calibration)},
    }
    write_json(directory / "results.json", results)


def _put_back(prepared: Prepared, unlearned: Callable[[], Model], directory: Path) -> None:
    """Which experts carry what the method did: patching.json."""
    config, (forget, retain) = prepared.config, prepared.statistics
    about: dict[str, Any] = {"forget": forget, "retain": retain, "seed": config.seed}
    boards = prepared.board, config.data.board
    put = measure_patching(prepared.target, unlearned(), prepared.evaluator, boards, **about)
    if put["note"]:
        say(put["note"])
    write_json(directory / "patching.json", encode(put, digits=6))


def _evaluation(prepared: Prepared, method: Method) -> Callable[[Any], Evaluated]:
    """What is measured while unlearning. The numbers that rules read are those of the validation split."""
    evaluator, board, original = prepared.evaluator, prepared.board, None
    if method.unlearning.needs_evaluation:
        measured = evaluator.measure(evaluator.original)
        original = {m.name: m.value for m in measured if m.split == "validation"}

    def evaluate(params: Any) -> Evaluated:
        scores = evaluator.score(prepared.target.replace(params=params))
        measured, items = evaluator.measure(scores), evaluator.outcomes(scores)
        rows = [m.to_json() for m in measured]
        note = {m.name: f"{plain_name(m.name)} {m.value:.3f}" for m in measured if m.split == "validation"}
        about: Any = {"items": items, "note": note.get(board.forgetting, "")}
        if original is None:
            return Evaluated(rows, **about)
        front = fronts.front_from_history([(0, measured)], board=board, split="validation", original=original)
        return Evaluated(rows, float(front.forgetting[0]), float(front.utilities[fronts.MEAN][0]), **about)

    return evaluate
