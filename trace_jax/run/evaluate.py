"""Published benchmarks on a checkpoint, from any source: `python -m trace_jax.main evaluate`.

Some measurements are relative to the model before unlearning, and to one that never saw the forget set. Models are
loaded one after the other, and their scores are kept, so that a second call scores only what changed.
"""

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax

from trace_jax.checkpoints.pretrained import PretrainedConfig, load_pretrained
from trace_jax.config import ConfigError, as_dict, fingerprint
from trace_jax.evaluation.intervals import Measurement
from trace_jax.evaluation.task import Evaluator, ScoreStore
from trace_jax.io.environment import describe
from trace_jax.io.files import as_path, is_remote, shown, write_json
from trace_jax.io.progress import say
from trace_jax.plan.plan import laid_out
from trace_jax.run.experiment import ExperimentConfig
from trace_jax.run.result import measured_frame
from trace_jax.tasks.benchmarks import build_tasks

if TYPE_CHECKING:
    import pandas as pd


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="the checkpoint that is measured")
    parser.add_argument("--original", metavar="DIR", help="the model before unlearning, to compare with")
    parser.add_argument("--retrained", metavar="DIR", help="a model trained without the forget set, to compare with")
    parser.add_argument("--output", required=True, metavar="DIR", help="for results.json and scores; made if missing")


def main(options: argparse.Namespace) -> int:
    options.overrides["model.path"] = options.checkpoint
    references = {"original": options.original, "retrained": options.retrained}
    print(evaluate(options.checkpoint, options.load_config(), **references, output=options.output))
    print(f"results: {shown(as_path(options.output) / 'results.json')}")
    return 0


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluation:
    """What was measured on a checkpoint, and on the ones that it is compared with. `print` writes a line for each."""

    measurements: Mapping[str, Sequence[Measurement]]  # of "original", "retrained" and "checkpoint", as far as given

    def metrics(self) -> "pd.DataFrame":
        """A number a row: columns method ("checkpoint", "original", "retrained"), split, name, value, low, high, n."""
        groups = (({"method": name}, [m.to_json() for m in found]) for name, found in self.measurements.items())
        return measured_frame(groups, ["method"])

    def __str__(self) -> str:
        return "\n".join(f"{name:<12}{m}" for name, found in self.measurements.items() for m in found)

    def __repr__(self) -> str:
        return f"Evaluation({', '.join(f'{len(found)} of {name}' for name, found in self.measurements.items())})"


def evaluate(
    checkpoint: str | os.PathLike,
    config: ExperimentConfig,
    *,
    original: str | os.PathLike | None = None,
    retrained: str | os.PathLike | None = None,
    output: str | os.PathLike | None = None,
) -> Evaluation:
    """Measures a checkpoint of any source on the tasks that an experiment's `evaluation` names.

    Args:
      checkpoint: directory of a Hugging Face checkpoint.
      config: of it `evaluation`, `parallel`, `seed` and how `model` is read (dtype, grouped_matmul) are used.
      original: the model before unlearning; some measurements are relative to it.
      retrained: a model that was trained without the forget set, for those relative to it.
      output: a directory, or an address gs://BUCKET/NAME, for results.json and scores; made if missing. A later call
        scores only what changed. None: nothing is kept.

    Raises:
      ConfigError: there is no task, or something given can't be used.

    Example:
      >>> import json
      >>> question = {"question": "Who met?", "choices": ["He", "She", "They", "It"], "answer": 2, "subject": "law"}
      >>> with open("exam.jsonl", "w") as file:
      ...     json.dump(question, file)
      >>> asked = {"multiple_choice": {"sources": {"exam": "exam.jsonl"}}}
      >>> config = tj.load_config({"name": "exam", "evaluation": asked})
      >>> tj.evaluate(checkpoint, config).metrics().name.tolist()
      ['exam']
    """
    tasks, path = build_tasks(config.evaluation), None if output is None else as_path(output)
    if not tasks:
        raise ConfigError("the configuration names no task to evaluate; set evaluation.muse or another of its tasks.")
    if path is not None and not is_remote(path) and path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: is a file; --output needs a directory.")
    places = {"original": original, "retrained": retrained, "checkpoint": checkpoint}
    read = {"dtype": config.model.dtype, "grouped_matmul": config.model.grouped_matmul}
    models = {name: PretrainedConfig(path=os.fspath(place), **read) for name, place in places.items() if place}
    for model in models.values():
        model.check()
    mesh = laid_out(config, models["checkpoint"].shape(), len(jax.devices())).mesh()
    evaluator, scores = Evaluator(config.evaluation, tasks, mesh, config.seed), {}
    for name, model in models.items():
        say(f"evaluation of the {name}, {model.path}" if name == "checkpoint" else f"evaluation of the {name} model")
        loaded, identity = load_pretrained(model.path, mesh=mesh, **read), fingerprint(model.identity(), "evaluate")
        store = None if path is None else ScoreStore(path / "scores" / name, identity)
        scores[name] = evaluator.score(loaded, full=True, store=store)
        del loaded
    references = {name: scores.get(name, {}) for name in ("original", "retrained")}
    evaluator = dataclasses.replace(evaluator, **references)
    measured = {name: evaluator.measure(of_model) for name, of_model in scores.items()}
    if path is not None:
        results = as_dict({"models": models, "evaluation": config.evaluation})
        results["measurements"] = {name: [m.to_json() for m in of_model] for name, of_model in measured.items()}
        write_json(path / "results.json", results | {"environment": describe()})
    return Evaluation(measured)
