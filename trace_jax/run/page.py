"""What a report shows beside the numbers: texts, loss curves, and the settings that are not the usual ones."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import scipy

from trace_jax.config import ConfigError, resolve
from trace_jax.evaluation.likelihood import spread_indices
from trace_jax.evaluation.probes import MOST_SHOWN
from trace_jax.evaluation.task import hazardous
from trace_jax.io.files import read_lines
from trace_jax.io.progress import flatten
from trace_jax.run.experiment import ExperimentConfig
from trace_jax.unlearning.metrics import step_rows

CURVES = ("loss", "forget_loss", "retain_loss", "gradient_norm")
_MOST_POINTS = 300
_MOST_LETTERS = 600


def text_examples(path: Path, config: Mapping[str, Any], labels: Iterable[str]) -> list[dict[str, Any]]:
    """Questions and prompts of the forget set with what the target model and each method's model say, as runs keep them
    under scores/. None where text is not to be shown: `evaluation.audit_text` is off, or it is of WMDP.

    Each has prompt, truth, options (() where text was generated), and by model in "answers" a text, or the probability
    of each option among them.
    """
    if not config["evaluation"].get("audit_text", True) or hazardous([str(config["data"])]):
        return []
    places = {"target model": path / "scores" / "target"}
    places |= {label: path / "methods" / label / "scores" for label in labels}
    names = [file.name for file in sorted(places["target model"].glob("*.jsonl"))]
    examples = []
    for name in (n for n in names if n.startswith(("questions.", "verbatim.")) or "forget" in n):
        lines = {model: read_lines(place / name) for model, place in places.items()}
        first = lines["target model"]
        own = [i for i, one in enumerate(first) if one.get("split", "test") == "test" and _texts(one)]
        chosen = [own[i] for i in spread_indices(len(own), MOST_SHOWN)]
        for one, index in ((first[i], i) for i in chosen):
            answers = {m: _answer(of[index]) for m, of in lines.items() if index < len(of)}
            examples.append({**_texts(one), "answers": {m: a for m, a in answers.items() if a is not None}})
    return examples[: 2 * MOST_SHOWN]


def _texts(line: Mapping[str, Any]) -> dict[str, Any]:
    """Prompt, truth and options of a line; empty where it has no text."""
    if "options" in line:
        return {"prompt": line["question"], "options": line["options"], "truth": line["options"][line["answer"]]}
    if "generation" not in line or "ground_truth" not in line:
        return {}
    prompt = line.get("prompt") or line.get("question", "")
    return {"prompt": _short(prompt, end=True), "options": (), "truth": _short(line["ground_truth"])}


def _answer(line: Mapping[str, Any]) -> Any:
    if "log_likelihood" in line:
        return scipy.special.softmax(line["log_likelihood"]).tolist()
    return _short(line["generation"]) if "generation" in line else None


def _short(text: str | Sequence[str], *, end: bool = False) -> str:
    text = text if isinstance(text, str) else " / ".join(text)
    if len(text) <= _MOST_LETTERS:
        return text
    return f"… {text[-_MOST_LETTERS:]}" if end else f"{text[:_MOST_LETTERS]} …"


def loss_curves(path: Path, labels: Iterable[str]) -> dict[str, dict[str, list[float | None]]]:
    """By method the steps and what was written of them; of long runs some hundred, spread evenly."""
    curves = {}
    for label in labels:
        rows = step_rows(path / "methods" / label)
        rows = [rows[i] for i in spread_indices(len(rows), _MOST_POINTS)]
        if rows:
            curves[label] = {name: [row.get(name) for row in rows] for name in ("step", *CURVES)}
    return curves


def side_by_side(pages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One page of several runs, by workdir: their methods together, and the settings in which the runs differ.

    Raises ConfigError: one is a study or series, or was compared on another measure or level.
    """
    first, names = next(iter(pages.values())), _short_names(list(pages))
    on = [(p["forgetting"], p["config"].get("evaluation", {}).get("levels", [None])[0]) for p in pages.values()]
    for (workdir, page), own in zip(pages.items(), on, strict=True):
        if "methods" not in page:
            raise ConfigError(f"{workdir}: is a study or a series; single runs are set side by side.")
        if own != on[0]:
            raise ConfigError(f"{workdir}: was compared on another measure or level than {next(iter(pages))}.")
    kinds = ("reference", "method", "control")
    rows = [
        {**row, "method": f"{n}: {row['method']}"}
        for n, p in zip(names, pages.values(), strict=True)
        for row in p["rows"]
    ]
    told = {name: first[name] for name in ("benchmark", "forgotten", "forgetting", "chance", "generated")}
    told |= {"title": f"{len(pages)} runs side by side", "rows": sorted(rows, key=lambda row: kinds.index(row["kind"]))}
    told["conclusion"] = "\n".join(f"{n}: {p['conclusion']}" for n, p in zip(names, pages.values(), strict=True))
    for part in ("references", "methods", "certificates", "losses"):
        both = ((n, p.get(part, {})) for n, p in zip(names, pages.values(), strict=True))
        told[part] = {f"{n}: {label}": value for n, of in both for label, value in of.items()}
    for label, result in told["methods"].items():  # of models of different runs, these are not drawn together
        told["methods"][label] = {n: of for n, of in result.items() if n not in ("attacks", "patching", "routing")}
    settings = [dict(flatten(page["config"])) for page in pages.values()]
    differing = [
        key for key in dict.fromkeys(k for s in settings for k in s) if len({s.get(key) for s in settings}) > 1
    ]
    of_runs = {n: {key: s[key] for key in differing if key in s} for n, s in zip(names, settings, strict=True)}
    told |= {"changed": set(names), "changed_title": "Settings in which the runs differ"}
    seeds = ", ".join(dict.fromkeys(str(page["config"]["seed"]) for page in pages.values()))
    return told | {"config": {"evaluation": first["config"]["evaluation"], "seed": seeds, **of_runs}}


def _short_names(workdirs: Sequence[str]) -> list[str]:
    short = [Path(workdir).name for workdir in workdirs]
    return short if len(set(short)) == len(short) else list(workdirs)


def changed_settings(config: Mapping[str, Any]) -> set[str] | None:
    """Dotted names of the settings of config.json that are not the default; None if an earlier version wrote it."""
    try:
        return _changed(resolve(ExperimentConfig, config), "")
    except ConfigError:
        return None


def _changed(section: Any, prefix: str) -> set[str]:
    names: set[str] = set()
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), prefix + field.name
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(value):
            names |= _changed(value, f"{name}.")
            if isinstance(made, str) and made != getattr(value, "name", made):  # another kind than the usual one
                names |= {f"{name}.name", f"{name}.benchmark"}
        elif value != made:
            names.add(name)
    return names
