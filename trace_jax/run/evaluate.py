"""Published benchmarks on a checkpoint, whoever made it: `python -m trace_jax.main evaluate`."""

import argparse
import dataclasses
import os

from trace_jax.checkpoints.config import PretrainedConfig
from trace_jax.checkpoints.pretrained import load_pretrained
from trace_jax.config import ConfigError, as_dict, fingerprint
from trace_jax.evaluation.task import Evaluator, ScoreStore
from trace_jax.io.environment import describe
from trace_jax.io.files import as_path, is_remote, shown, write_json
from trace_jax.io.progress import say
from trace_jax.run.experiment import ExperimentConfig
from trace_jax.tasks.benchmarks import build_tasks


def evaluate_checkpoints(
    config: ExperimentConfig,
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    original: str | os.PathLike | None = None,
    retrained: str | os.PathLike | None = None,
) -> str:
    """Measures a checkpoint on the tasks of `config.evaluation`. Returns the measurements, and where they are, as text.

    Models are loaded one after the other. Their scores are kept in `output`, so that a second call scores only what
    changed: another checkpoint, another task or another setting of it.

    Args:
      config: its `evaluation`, `parallel` and `seed` are read, and of `model` how weights are read.
      checkpoint: directory of a Hugging Face checkpoint.
      output: directory for results.json and scores; made if missing.
      original, retrained: checkpoints that some measurements are relative to: the model before unlearning, and one that
        was trained without the forget set.

    Raises:
      ConfigError: no task is configured; CheckpointError, DataError: something given can't be read.
    """
    tasks, path = build_tasks(config.evaluation), as_path(output)
    if not tasks:
        raise ConfigError("the configuration names no task to evaluate; set evaluation.muse or another of its tasks.")
    if not is_remote(path) and path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: is a file; --output needs a directory.")
    given = {"original": original, "retrained": retrained, "checkpoint": checkpoint}
    how = {"dtype": "bfloat16"}
    if isinstance(config.model, PretrainedConfig):
        how = {"dtype": config.model.dtype, "grouped_matmul": config.model.grouped_matmul}
    models = {name: PretrainedConfig(path=os.fspath(where), **how) for name, where in given.items() if where}
    for model in models.values():
        model.check()
    mesh = config.parallel.mesh()
    evaluator, scores = Evaluator(config.evaluation, tasks, mesh, config.seed), {}
    for name, model in models.items():
        say(f"evaluation of the {name}, {model.path}" if name == "checkpoint" else f"evaluation of the {name} model")
        loaded = load_pretrained(model.path, mesh=mesh, **how)
        store = ScoreStore(path / "scores" / name, fingerprint(model.identity(), "evaluate"))
        scores[name] = evaluator.score(loaded, full=True, store=store)
        del loaded
    evaluator = dataclasses.replace(
        evaluator, original=scores.get("original", {}), retrained=scores.get("retrained", {})
    )
    measured = {name: evaluator.measure(found) for name, found in scores.items()}
    write_json(
        path / "results.json",
        {
            "models": {name: as_dict(model) for name, model in models.items()},
            "evaluation": dataclasses.asdict(config.evaluation),
            "measurements": {name: [m.to_json() for m in found] for name, found in measured.items()},
            "environment": describe(),
        },
    )
    text = "\n".join(f"{name:<12}{m}" for name, found in measured.items() for m in found)
    return f"{text}\nresults: {shown(path / 'results.json')}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command `evaluate` beside --config."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="the checkpoint that is measured")
    parser.add_argument("--original", metavar="DIR", help="the model before unlearning, to compare with")
    parser.add_argument("--retrained", metavar="DIR", help="a model trained without the forget set, to compare with")
    parser.add_argument("--output", required=True, metavar="DIR", help="for results.json and scores; made if missing")


def main(options: argparse.Namespace) -> int:
    """The command `evaluate`."""
    options.overrides["model.path"] = options.checkpoint
    others = {"original": options.original, "retrained": options.retrained}
    print(evaluate_checkpoints(options.load_config(), options.checkpoint, options.output, **others))
    return 0
