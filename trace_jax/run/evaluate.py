"""Published benchmarks on a checkpoint, from any source: `python -m trace_jax.main evaluate`.

Some measurements are relative to the model before unlearning, and to one that never saw the forget set. Models are
loaded one after the other, and their scores are kept, so that a second call scores only what changed.
"""

import argparse
import dataclasses

from trace_jax.checkpoints.pretrained import PretrainedConfig, load_pretrained
from trace_jax.config import ConfigError, as_dict, fingerprint
from trace_jax.evaluation.task import Evaluator, ScoreStore
from trace_jax.io.environment import describe
from trace_jax.io.files import as_path, is_remote, shown, write_json
from trace_jax.io.progress import say
from trace_jax.tasks.benchmarks import build_tasks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="the checkpoint that is measured")
    parser.add_argument("--original", metavar="DIR", help="the model before unlearning, to compare with")
    parser.add_argument("--retrained", metavar="DIR", help="a model trained without the forget set, to compare with")
    parser.add_argument("--output", required=True, metavar="DIR", help="for results.json and scores; made if missing")


def main(options: argparse.Namespace) -> int:
    places = {"original": options.original, "retrained": options.retrained, "checkpoint": options.checkpoint}
    options.overrides["model.path"] = options.checkpoint
    config = options.load_config()
    assert isinstance(config.model, PretrainedConfig)  # it has a path
    tasks, path = build_tasks(config.evaluation), as_path(options.output)
    if not tasks:
        raise ConfigError("the configuration names no task to evaluate; set evaluation.muse or another of its tasks.")
    if not is_remote(path) and path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: is a file; --output needs a directory.")
    alone = dataclasses.replace(config.model, published=None, retrained="")
    models = {name: dataclasses.replace(alone, path=place) for name, place in places.items() if place}
    for model in models.values():
        model.check()
    mesh = config.parallel.mesh()
    evaluator, scores = Evaluator(config.evaluation, tasks, mesh, config.seed), {}
    for name, model in models.items():
        say(f"evaluation of the {name}, {model.path}" if name == "checkpoint" else f"evaluation of the {name} model")
        loaded = load_pretrained(model.path, mesh=mesh, dtype=model.dtype, grouped_matmul=model.grouped_matmul)
        store = ScoreStore(path / "scores" / name, fingerprint(model.identity(), "evaluate"))
        scores[name] = evaluator.score(loaded, full=True, store=store)
        del loaded
    references = {name: scores.get(name, {}) for name in ("original", "retrained")}
    evaluator = dataclasses.replace(evaluator, **references)
    measured = {name: evaluator.measure(of_model) for name, of_model in scores.items()}
    results = as_dict({"models": models, "evaluation": config.evaluation})
    results["measurements"] = {name: [m.to_json() for m in of_model] for name, of_model in measured.items()}
    write_json(path / "results.json", results | {"environment": describe()})
    print(*(f"{name:<12}{m}" for name, of_model in measured.items() for m in of_model), sep="\n")
    print(f"results: {shown(path / 'results.json')}")
    return 0
