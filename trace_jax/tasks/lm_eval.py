"""lm-eval on models of this package: any task of lm-eval, or a local task file.

`TraceLM` is an lm-eval `LM`: `lm_eval.simple_evaluate(model=TraceLM(model), tasks=[...])`. `evaluate_tasks` runs tasks
one after another and keeps what is finished.
"""

import difflib
import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from trace_jax.config import ConfigError, fingerprint
from trace_jax.data.corpora import DataConfig
from trace_jax.evaluation.likelihood import score_texts, score_tokens
from trace_jax.io.files import is_remote, read_json, replacing, write_json
from trace_jax.io.progress import say
from trace_jax.models.generate import continue_tokens
from trace_jax.models.model import Model, TextCodec

try:
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ImportError as error:
    raise ConfigError(f"lm-eval is needed for this ({error}): pip install lm-eval.") from error

_KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")
_TASK_FILES = (".yaml", ".jsonl", ".py")
MAX_NEW_TOKENS = 256  # where a task sets no limit, as in lm-eval's class for transformers
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts


class Decoding(NamedTuple):
    """How a task wants text written (`generation_kwargs` of its file): arguments of `continue_tokens`."""

    stop: tuple[str, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


def read_decoding(settings: Mapping[str, Any], *, max_new_tokens: int) -> Decoding:
    """Settings by lm-eval's rules: greedy unless `do_sample`, or a temperature and no `do_sample`."""
    unread = dict(settings)
    until = unread.pop("until", None) or []
    limits = [value for name in _LIMITS if (value := unread.pop(name, None)) is not None]
    temperature = float(unread.pop("temperature", None) or 0.0)
    sampled = unread.pop("do_sample", None)
    top_k, top_p = unread.pop("top_k", None) or 0, unread.pop("top_p", None)
    if unread.pop("num_beams", 1) != 1 or unread:
        raise ValueError(
            f"a task asks for text written with {', '.join(unread) or 'num_beams'}; this model writes greedily, or by "
            "temperature, top_k and top_p."
        )
    return Decoding(
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        max_new_tokens=int(limits[0]) if limits else max_new_tokens,
        temperature=0.0 if sampled is False else temperature,
        top_k=int(top_k),
        top_p=1.0 if top_p is None else float(top_p),
    )


class TraceLM(LM):
    """A model as lm-eval sees it: texts in, log-likelihoods and texts out.

    It reads, scores and writes as lm-eval's own class for transformers (`hf`) does with the same checkpoint, without
    chat templates and the repetition penalty of a generation_config.json; text is drawn with other random numbers.

    Args:
      model: with its tokenizer.
      batch_size, mesh: texts per batch, and the devices that share it.
      max_length: most tokens read at once; longer texts are cut from the left (default: `TextCodec.context_length`).
      max_new_tokens: written for a task that sets no limit.
      seed: of drawn text.

    Example:
      >>> from lm_eval.api.instance import Instance  # `lm_eval.simple_evaluate(model=tj.TraceLM(model))` makes them
      >>> request = Instance("loglikelihood", {}, ("House 1 has", " 1 rooms"), 0)
      >>> [(log_likelihood, greedy)] = tj.TraceLM(model).loglikelihood([request])
      >>> log_likelihood < 0
      True
    """

    def __init__(
        self,
        model: Model,
        *,
        batch_size: int = 16,
        mesh: Mesh | None = None,
        max_length: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int = 0,
    ):
        super().__init__()
        self._model, self._seed, self._codec = model, seed, TextCodec.of(model)
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.max_length = max_length or self._codec.context_length
        self._batches: dict[str, Any] = {"batch_size": batch_size, "mesh": mesh}

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is greedy) of each request's continuation after its context."""
        texts = [request.args for request in requests]
        return score_texts(self._model, texts, max_length=self.max_length, **self._batches)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each request's text, in windows of `max_length` tokens that share one token."""
        windows, owners, (prefix, _) = [], [], self._codec.prefix_and_end
        for number, request in enumerate(requests):
            ids = self._codec.encode(request.args[0])
            own = [make_disjoint_window(w) for w in get_rolling_token_windows(ids, prefix, self.max_length, 1)]
            windows += own
            owners += [number] * len(own)
        scored = score_tokens(self._model, windows, max_length=self.max_length, **self._batches)
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, [log_likelihood for log_likelihood, _ in scored])
        return totals.tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each request's context, up to the first of the request's stop strings."""
        groups: dict[Decoding, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(read_decoding(request.args[1], max_new_tokens=self.max_new_tokens), []).append(number)
        results, (prefix, end) = {}, self._codec.prefix_and_end
        for decoding, numbers in groups.items():
            room = self.max_length - decoding.max_new_tokens  # of a context, which is cut from the left
            if room < 1:
                raise ConfigError(
                    f"a task writes {decoding.max_new_tokens} tokens, and the model reads {self.max_length} at "
                    "once; give a larger max_length."
                )
            contexts = [self._codec.encode(requests[number].args[0]) for number in numbers]
            generated = continue_tokens(
                self._model,
                [context[-room:] or [prefix] for context in contexts],
                ends=tuple(dict.fromkeys((*self._model.special.eos, end))),
                apart=True,
                seed=self._seed,
                **self._batches,
                **decoding._asdict(),
            )
            results |= {number: one.text for number, one in zip(numbers, generated, strict=True)}
        return [results[number] for number in range(len(requests))]

    @property
    def tokenizer_name(self) -> str:  # asked for first where a chat template is to be used
        raise ConfigError("chat templates aren't supported: leave apply_chat_template away.")


def evaluate_tasks(
    load: Callable[[], Model],
    tasks: Sequence[str],
    *,
    identity: str,
    output: str | os.PathLike | None = None,
    include: Sequence[str | os.PathLike] = (),
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    bootstrap: int = 100_000,
    mesh: Mesh | None = None,
) -> dict[str, dict[str, Any]]:
    """Runs lm-eval's tasks (names of tasks, groups or tags) one after another, by `lm_eval.simple_evaluate`.

    By task comes what lm-eval gives, "results", "groups" and what else its table needs, without texts. Each is written
    to `output` when it is finished, and is not run again as long as the model, whose hash is `identity`, the settings
    and the files of `include`, directories of local task files, stay the same. `load` is called only if one is run.
    """
    manager = TaskManager(include_path=[os.fspath(directory) for directory in include])
    names = set(manager.all_tasks)
    if unknown := [task for task in tasks if task not in names]:
        close = difflib.get_close_matches(unknown[0], names, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(
            f"lm-eval has no task {unknown[0]!r}.{hint} All of them: lm_eval ls tasks; your own: --include-path DIR."
        )
    stored = {} if output is None else (read_json(output) or {})
    harness = functools.cache(lambda: TraceLM(load(), batch_size=batch_size, mesh=mesh, max_length=max_length))
    digest = hashlib.sha256()  # of the task files, which may change under the same name
    for directory in include:
        for file in sorted(path for path in Path(directory).rglob("*") if path.suffix in _TASK_FILES):
            digest.update(str(file.relative_to(directory)).encode() + b"\0" + file.read_bytes())
    for task in tasks:
        made_by = fingerprint(identity, task, num_fewshot, limit, max_length, lm_eval.__version__, digest.hexdigest())
        if stored.get(task, {}).get("identity") != made_by:
            say(f"lm-eval: {task}")
            settings: dict[str, Any] = {"num_fewshot": num_fewshot, "limit": limit, "bootstrap_iters": bootstrap}
            settings["torch_random_seed"] = None  # nothing here is drawn by torch
            model, start = harness(), time.perf_counter()
            evaluate: Any = lm_eval.simple_evaluate
            result = evaluate(model=model, tasks=[task], log_samples=False, task_manager=manager, **settings)
            stored[task] = {"identity": made_by, "lm_eval": lm_eval.__version__, "seconds": time.perf_counter() - start}
            stored[task] |= {key: result[key] for key in _KEPT if key in result}
            if output is not None:
                write_json(output, stored)
    return {task: stored[task] for task in tasks}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """lm-eval's own tables of what `evaluate_tasks` returns, and how many items each task has."""
    lines = []
    for result in results.values():
        lines.append(make_table(result))
        if result.get("groups"):
            lines.append(make_table(result, "groups"))
        counts = result["n-samples"]
        lines.append("n: " + ", ".join(f"{name} {count['effective']:,}" for name, count in counts.items()) + "\n")
    return "\n".join(lines)


def export_tasks(config: DataConfig, directory: Path) -> Path:
    """Writes BENCHMARK_SUBJECT.yaml and .jsonl, the test split's questions, for each subject of an embedded benchmark.

    Returns where they are: in place of an object store, which lm-eval doesn't read, in a temporary directory.
    BENCHMARK is a tag that names all of them. The yaml files name the data by its full path.
    """
    if config.forget_sources:
        raise ConfigError(f"data.benchmark is {config.name!r}, which has no questions.")
    directory = (Path(tempfile.mkdtemp()) if is_remote(directory) else directory).absolute()
    for subject, items in config.build().test.questions.items():
        name = f"{config.name}_{subject}"
        with replacing(directory / f"{name}.jsonl") as temporary:
            lines = ({"question": i.prompt, "choices": [o[1:] for o in i.options], "answer": i.answer} for i in items)
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        task = {
            "task": name,
            "tag": config.name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(directory / f"{name}.jsonl")}},
            "test_split": "test",
            "num_fewshot": 0,
            "output_type": "multiple_choice",
            # The options are what comes next in running text: a cloze prompt, a space, the option.
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "target_delimiter": " ",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1},
        }
        write_json(directory / f"{name}.yaml", task)  # JSON is YAML
    return directory
