"""The questions of an embedded benchmark as local task files of lm-eval.

So a model that knows something goes through the whole path of WMDP, harness and all, with nothing downloaded: `lm_eval
--include_path DIRECTORY --tasks handbook`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from trace_jax.config import ConfigError
from trace_jax.data.config import DataConfig
from trace_jax.data.handbook import build_handbook
from trace_jax.data.presidents import build_presidents
from trace_jax.io.files import is_remote, replacing, write_json

EMBEDDED = {"handbook": build_handbook, "presidents": build_presidents}
_SPLIT = "test"


def export_tasks(config: DataConfig, directory: Path) -> Path:
    """Writes BENCHMARK_SUBJECT.yaml and .jsonl for each subject that has questions. Returns where they are.

    They hold the test split's questions: the score is that of `forget_accuracy` and its like, question by question.
    BENCHMARK is a tag that names all of them. The yaml files name the data by its full path: export again rather than
    move them. In place of an object store, which lm-eval doesn't read, a temporary directory is taken.

    Raises:
      ConfigError: the user's own text, which has no questions.
    """
    if config.benchmark not in EMBEDDED:
        raise ConfigError(
            f"data.benchmark is {config.benchmark!r}, which has no questions; {' and '.join(EMBEDDED)} have."
        )
    directory = Path(tempfile.mkdtemp()) if is_remote(directory) else directory
    for subject, items in EMBEDDED[config.benchmark](config).test.questions.items():
        name = f"{config.benchmark}_{subject}"
        rows = [
            {"question": item.prompt, "choices": [option.removeprefix(" ") for option in item.options],
             "answer": item.answer}
            for item in items
        ]  # fmt: skip
        data = directory.absolute() / f"{name}.jsonl"
        with replacing(data) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        write_json(directory / f"{name}.yaml", _task(name, config.benchmark, data))  # JSON is YAML
    return directory


def _task(name: str, tag: str, data: Path) -> dict:
    """The options are what comes next in running text: a cloze prompt, a space, the option."""
    return {
        "task": name,
        "tag": tag,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {_SPLIT: str(data)}},
        "test_split": _SPLIT,
        "num_fewshot": 0,
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
