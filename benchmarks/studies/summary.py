"""What a finished `trace-jax study` says to a question of docs/results.md: claims, tables and figures as one JSON.

python benchmarks/studies/summary.py --question main runs/handbook_study

Settings were chosen on the tuning seeds; all numbers are of the seeds that are reported, on the test split. Intervals
are Student's over seeds, of quantities that are paired by seed.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from claims import PAGE, README, claim, interval

from trace_jax.evaluation.fronts import MEAN, Front, crossings
from trace_jax.io.files import decode, replacing
from trace_jax.run.study import METHODS

RESULTS = Path(__file__).resolve().parents[1] / "results" / "studies"
IDLE = 300.0  # seconds without a step or an evaluation after which a study counts as paused
BOTH = "uniform", "trace_rows"
PUT_BACK = 4  # experts of each layer
ROUTED = "membership_routing_auc"
LEVELS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
Seeds = Mapping[int, Any]


class Study:
    """A study's directory, read once. Utilities are relative to the target model's."""

    def __init__(self, path: Path):
        self.path, self.told = path, json.loads((path / "study.json").read_text())
        self.config = json.loads((path / "config.json").read_text())["config"]
        self.seeds, (self.level, *_) = self.config["study"]["seeds"], self.config["evaluation"]["levels"]
        self.utilities = [*self.told["board"]["utilities"], MEAN]
        self.compared = {(c.get("variant", ""), c["reading"]): c for c in reversed(self.told["comparisons"])}
        self.variants = list(dict.fromkeys(variant for variant, _ in reversed(self.compared)))

    def result(self, method: str, variant: str = "", reading: str = "first") -> Mapping[str, Any]:
        """What `compare` says of a method at the first level."""
        return next(r for r in self.compared[variant, reading]["results"] if r["method"] == method)

    def methods(self) -> list[tuple[str, str]]:
        """(variant, method)."""
        return [(v, r["method"]) for v in self.variants for r in self.compared[v, "first"]["results"]]

    def runs(self, method: str, variant: str = "") -> Seeds:
        """The runs of the setting that counts where a run first comes down to the level, by seed."""
        which = method, variant, self.result(method, variant)["setting"]
        runs = self.told["runs"]
        return {r["seed"]: r for r in runs if (r["method"], r.get("variant", ""), r["setting"]) == which}

    def at(self, method: str, variant: str = "", *, name: str = MEAN, level: float | None = None) -> Seeds:
        """A utility where a run first comes down to a level, by seed; seeds that do not are left out."""
        found = {}
        for seed, run in self.runs(method, variant).items():
            front, at = decode(Front, run["test"]), self.level if level is None else level
            if front.forgetting.min() <= at:
                found[seed] = float(crossings(front.forgetting[None], at)(front.utilities[name][None])[0])
        return found

    def numbers(self, name: str, method: str, variant: str = "") -> Seeds:
        """A number of a run's `robustness`, by seed."""
        runs = self.runs(method, variant).items()
        return {seed: run["robustness"][name] for seed, run in runs if name in run["robustness"]}


def seconds(path: Path) -> float:
    """How long studies ran, pauses left out, by the times of the steps and evaluations that their runs wrote down."""
    times: list[float] = []
    for file in path.glob("**/seed-*/**/metrics.jsonl"):
        lines = (json.loads(line) for line in file.read_text().splitlines())
        times += [line["time"] for line in lines if "time" in line]
    times.sort()
    return sum(gap for a, b in itertools.pairwise(times) if (gap := b - a) < IDLE)


def difference(ours: Seeds, others: Seeds) -> Seeds:
    return {seed: ours[seed] - others[seed] for seed in ours if seed in others}


def over_variants(study: Study, of_variant: Callable[[str], Seeds]) -> np.ndarray:
    """Of each seed the mean over variants."""
    found = [of_variant(variant) for variant in study.variants]
    each = ([numbers[seed] for numbers in found if seed in numbers] for seed in study.seeds)
    return np.array([np.mean(one) for one in each if one], np.float64)


def paired(ours: Seeds, others: Seeds) -> np.ndarray:
    """Differences, of the seeds that both have."""
    return values(difference(ours, others))


def gain(ours: Seeds, others: Seeds) -> np.ndarray:
    return np.array([ours[seed] / others[seed] - 1 for seed in ours if seed in others], np.float64)


def values(numbers: Seeds) -> np.ndarray:
    return np.array(list(numbers.values()), np.float64)


def figure(name: str, title: str, caption: str, kind: str, x: str, y: str, series: Sequence[Any], **more: Any) -> dict:
    """`series`: (name, x, arrays of seeds' values) each; what has none is left out."""
    drawn = []
    for label, places, arrays in series:
        points = [(place, interval(array)) for place, array in zip(places, arrays, strict=True) if len(array)]
        ends = {"y": "value", "low": "low", "high": "high"}
        columns = {key: [point[end] for _, point in points] for key, end in ends.items()}
        if set(columns["low"]) <= {None}:  # of one seed
            columns = {"y": columns["y"]}
        drawn.append({"name": label, "x": [place for place, _ in points], **columns})
    about = {"name": name, "title": title, "caption": caption, "kind": kind, "x": x, "y": y}
    return about | {"series": drawn} | more


CHOSEN = ("setting", "seeds", "widest bracket")


def chosen(result: Mapping[str, Any]) -> list[Any]:
    """Cells that say how a method's number came about."""
    missed = f", {len(result['missed'])} missed" if result["missed"] else ""
    return [result["setting"], f"{len(result['seeds'])}{missed}", result["bracket"]]


# --- question 5


def main_table(studies: Sequence[Study]) -> dict[str, Any]:
    made: dict[str, Any] = {"claims": [], "tables": [], "figures": [], "leaderboard": []}
    how = "Where a run first comes down to the level; settings chosen on seeds of their own; intervals over seeds."
    for study in studies:
        benchmark = study.told["name"].removesuffix("_study")
        methods = [r["method"] for r in study.compared["", "first"]["results"]]
        gains = {method: gain(study.at(method), study.at("uniform")) for method in methods}
        best = {m: study.result(m, reading="best")["over_seeds"]["gains"].get(MEAN) for m in methods}
        for method in (m for m in ("trace_rows", "trace") if m in methods):
            text = f"On {benchmark}, `{method}` keeps more than tuned uniform at the same forgetting"
            first = method == "trace_rows" and benchmark in ("handbook", "presidents")
            made["claims"].append(claim(text, "gain in mean utility", gains[method], place=README if first else PAGE))
            if best[method] is not None:
                text = f"On {benchmark}, so does `{method}` at the best evaluation at or below the level"
                made["claims"].append(claim(text, "gain in mean utility", best[method]))
        others = {
            "random_experts": "Selected experts keep more than as many random ones",
            "ngram": "Matching experts keeps more than the n-gram ratio with the same sample",
            "hidden": "Matching experts keeps more than matching hidden states",
            "uniform_2x": "Twice the steps do not give uniform what weights give",
            "oracle": "The oracle, told which rows are neighbours, keeps more",
            "token_weights": "Weights on uniformly drawn rows do not give what drawn rows give",
            "permuted": "Shuffled weights do not give what weights give",
        }
        for other, text in others.items():
            if other in methods:
                differences = paired(study.at("trace_rows"), study.at(other)) * (-1 if other == "oracle" else 1)
                measure = "difference in mean utility " + ("to" if other == "oracle" else "of") + " `trace_rows`"
                on_page = PAGE if other in ("random_experts", "ngram") else None
                made["claims"].append(claim(f"On {benchmark}: {text}", measure, differences, place=on_page))
        names = [name.replace("_", " ") for name in study.utilities]
        rows = []
        for method in methods:
            result = study.result(method)
            at = [interval(values(study.at(method, name=name))) for name in study.utilities]
            second = interval(best[method]) if best[method] else None
            rows.append([f"`{method}`", *chosen(result), *at, interval(gains[method]), second])
            numbers = dict(zip(names[:-1], at, strict=False)) | {"gain over uniform": interval(gains[method])}
            numbers["seconds a step"] = round(study.told["seconds_per_step"][method] * METHODS[method].steps, 3)
            entry = {"benchmark": benchmark, "about": how, "method": f"`{method}`", "setting": result["setting"]}
            made["leaderboard"].append(entry | {"seeds": len(result["seeds"]), "score": at[-1], "numbers": numbers})
        columns = ["method", *CHOSEN, *names, "gain", "gain at the best evaluation"]
        title = f"{benchmark.capitalize()}, where a run first comes down to a forgetting of {study.level:g}"
        made["tables"].append({"title": title, "columns": columns, "rows": rows})
        shown = [method for method in methods if method != "uniform"]
        caption = "Gain in mean utility over tuned uniform at the same forgetting, with 95 % intervals over seeds."
        series = [("gain over tuned uniform", shown, [gains[method] for method in shown])]
        title = f"What each method keeps, {benchmark}"
        made["figures"].append(figure(f"main_{benchmark}", title, caption, "bars", "gain in mean utility", "", series))
        lines = [m for m in ("uniform", "trace_rows", "trace", "random_experts", "ngram", "oracle") if m in methods]
        reached = {m: [values(study.at(m, level=level)) for level in LEVELS] for m in lines}
        series = [(m, LEVELS, [at if len(at) > 2 else at[:0] for at in each]) for m, each in reached.items()]
        caption = "Mean over the seeds that come down so far, three or more, where each first does; left is forgotten."
        about = "lines", "forgetting score", "mean utility"
        title = f"Utility on the way down, {benchmark}"
        made["figures"].append(figure(f"fronts_{benchmark}", title, caption, *about, series))
    return made


# --- question 4


def dose(studies: Sequence[Study]) -> dict[str, Any]:
    (study,) = studies
    names = {"trace_rows": "selected experts", "random_experts": "as many random ones"}
    names["least_experts"] = "as many of the least critical"
    tops = dict(sorted(((v, int(v.split()[-1])) for v in study.variants), key=lambda pair: pair[1]))
    uniform, measure = study.at("uniform", study.variants[0]), "difference in mean utility"
    kept = {(v, m): study.at(m, v) for v, m in itertools.product(tops, names)}
    gains = {which: gain(found, uniform) for which, found in kept.items()}
    claims = []
    for method, other in (("random_experts", "random"), ("least_experts", "least critical")):
        average = over_variants(study, lambda v, m=method: difference(kept[v, "trace_rows"], kept[v, m]))
        text = f"Over all numbers of experts, selected ones keep more than {other} ones"
        claims.append(claim(text, f"mean {measure}", average, place=PAGE))
        for variant, k in tops.items():
            apart = paired(kept[variant, "trace_rows"], kept[variant, method])
            text = f"With {k} of 64 experts a layer, selected ones keep more than {other} ones"
            claims.append(claim(text, measure, apart))
    first, *_, last = tops
    slope = paired(kept[last, "trace_rows"], kept[first, "trace_rows"])
    text = f"{tops[last]} selected experts a layer keep more than {tops[first]}"
    claims.append(claim(text, measure, slope, place=PAGE))
    columns = ["experts a layer", "weights by", *CHOSEN, "mean utility", "gain over uniform"]
    rows = [
        [k, names[m], *chosen(study.result(m, v)), interval(values(kept[v, m])), interval(gains[v, m])]
        for (v, k), m in itertools.product(tops.items(), names)
    ]
    series = [(label, list(tops.values()), [gains[v, m] for v in tops]) for m, label in names.items()]
    caption = "Gain in mean utility over tuned uniform at the same forgetting, by how many experts are matched."
    about = "lines", "experts matched of 64 a layer", "gain in mean utility"
    title = "Does it matter which experts, and how many?"
    tables = [{"title": "By the number of experts", "columns": columns, "rows": rows}]
    return {"claims": claims, "tables": tables, "figures": [figure("dose", title, caption, *about, series, log_x=True)]}


# --- questions 7 and 9


def by_variant(study: Study, title: str, what: str) -> dict[str, Any]:
    """What `trace_rows` gains in each variant."""
    gains = {v: gain(study.at("trace_rows", v), study.at("uniform", v)) for v in study.variants}
    claims = [
        claim(f"{what.format(v)}, `trace_rows` keeps more than tuned uniform", "gain in mean utility", g, place=PAGE)
        for v, g in gains.items()
    ]
    rows = []
    for variant, method in itertools.product(study.variants, BOTH):
        gained, best = [None, None], study.result(method, variant, "best")
        if method != "uniform":
            gained = [interval(gains[variant]), interval(best["over_seeds"]["gains"][MEAN])]
        at = interval(values(study.at(method, variant)))
        rows.append([variant, f"`{method}`", *chosen(study.result(method, variant)), at, *gained, len(best["seeds"])])
    columns = ["", "method", *CHOSEN, "mean utility", "gain", "gain at the best evaluation below", "seeds there"]
    series = [("gain of trace_rows over tuned uniform", list(gains), list(gains.values()))]
    caption = "Gain in mean utility at the same forgetting, with 95 % intervals over seeds."
    drawn = figure(study.told["name"], title, caption, "bars", "gain in mean utility", "", series)
    tables = [{"title": f"Where a run first comes down to {study.level:g}", "columns": columns, "rows": rows}]
    return {"claims": claims, "tables": tables, "figures": [drawn]}


def trainable(studies: Sequence[Study]) -> dict[str, Any]:
    (study,) = studies
    made = by_variant(study, "What routing weights gain, by what trains", "Where this trains: {}")
    first, *others = study.variants
    for method, variant in itertools.product(("uniform", "trace_rows"), others):
        lost = paired(study.at(method, variant), study.at(method, first))
        text = f"With `{method}`, training {variant} keeps more than training {first}"
        made["claims"].append(claim(text, "difference in mean utility", lost))
    return made


def objectives(studies: Sequence[Study]) -> dict[str, Any]:
    (study,) = studies
    made = by_variant(study, "What routing weights gain, by objective", "With `{}`")
    forgetting = study.told["board"]["forgetting"]
    measure = forgetting.replace("_", " ")
    names = dict.fromkeys(name for run in study.told["runs"] for name in run["robustness"])
    attacks = [name.split(".")[1] for name in names if name.startswith("attack.") and name.endswith(".unlearned")]

    def under(attack: str, method: str, variant: str, model: str = "unlearned") -> Seeds:
        return study.numbers(f"attack.{attack}.{model}", method, variant)

    rows = []
    for variant, method in itertools.product(study.variants, BOTH):
        all_of = [
            study.numbers(f"unlearned.{forgetting}", method, variant),
            *(under(a, method, variant) for a in attacks),
        ]
        rows.append([variant, f"`{method}`", *(interval(values(n)) if n else None for n in all_of)])
    for attack in attacks:
        name = attack.replace("_", " ")
        less = over_variants(study, lambda v, a=attack: difference(under(a, "trace_rows", v), under(a, "uniform", v)))
        text = f"Over objectives, {name} brings back less from `trace_rows` than from uniform"
        on_page = PAGE if attack == "relearning" else None
        made["claims"].append(claim(text, f"difference in {measure}", less, holds="below", place=on_page))
        for method in BOTH if f"attack.{attack}.retrained" in names else ():
            more = over_variants(
                study, lambda v, a=attack, m=method: difference(under(a, m, v), under(a, m, v, "retrained"))
            )
            text = f"After {name}, a model unlearned with `{method}` knows more than one that never knew"
            made["claims"].append(claim(text, f"difference in {measure}", more))

    def known(method: str, variant: str) -> list[Seeds]:
        return [study.numbers(f"{model}.{ROUTED}", method, variant) for model in ("unlearned", "retrained")]

    for method in BOTH:
        text = f"Routing tells forget text from unseen text in a model unlearned with `{method}`"
        text, place = f"{text} better than in one that never knew", PAGE if method == "uniform" else None
        more = over_variants(study, lambda v, m=method: difference(*known(m, v)))
        made["claims"].append(claim(text, "AUC, less the retrained model's", more, place=place))
    for row, (variant, method) in zip(rows, itertools.product(study.variants, BOTH), strict=True):
        row += [interval(values(numbers)) for numbers in known(method, variant)]
    columns = ["objective", "method", "before the attack", *(attack.replace("_", " ") for attack in attacks)]
    columns += ["membership by routing, AUC", "the same of the control"]
    title = f"{measure.capitalize()} of the model that is kept, before and under attack at its strongest"
    made["tables"].append({"title": title, "columns": columns, "rows": rows})
    shown = list(study.variants)
    series = [(m, shown, [values(under("relearning", m, v)) for v in shown]) for m in BOTH]
    caption = f"{measure.capitalize()} after relearning, at its strongest; 95 % intervals over seeds."
    title = "What relearning brings back, by objective"
    made["figures"].append(figure("relearning", title, caption, "bars", measure, "", series))
    return made


# --- question 1


def patching(studies: Sequence[Study]) -> dict[str, Any]:
    made: dict[str, Any] = {"claims": [], "tables": [], "figures": []}
    rows, drift, kinds = [], [], ("critical", "random", "least")
    for study, method in itertools.product(studies, ("uniform", "trace")):
        model, utility = study.told["name"].removeprefix("patching_"), next(iter(study.told["board"]["utilities"]))
        measure, on = utility.replace("_", " "), f"On the {model} model"
        lost = paired(study.numbers(f"target.{utility}", method), study.numbers(f"unlearned.{utility}", method))
        ratio, apart = (values(study.numbers(f"drift.{name}", method)) for name in ("ratio", "difference"))
        text = f"{on}, experts that forget text uses more drift further ({method})"
        on_page = PAGE if method == "uniform" else None
        of_ratio = "Spearman correlation of drift and frequency ratio"
        made["claims"].append(claim(text, of_ratio, ratio, place=on_page))
        drift.append([model, f"`{method}`", *map(interval, (ratio, apart, lost))])
        names = {name for run in study.runs(method).values() for name in run["robustness"]}
        curve = [name.split(".") for name in names if name.startswith("returned.critical.") and name.endswith(utility)]
        sizes = sorted(int(size) for _, _, size, _ in curve)
        back = {
            (k, s): study.numbers(f"returned.{k}.{s}.{utility}", method) for k, s in itertools.product(kinds, sizes)
        }
        rows += [[model, f"`{method}`", s, *(interval(values(back[kind, s])) for kind in kinds)] for s in sizes]
        for size, other in ((PUT_BACK, "random"), (PUT_BACK, "least critical"), (sizes[-1], "random")):
            more = paired(back["critical", size], back[other.split()[0], size])
            text = f"{on}, {size} critical experts a layer bring back more than {size} {other} ones ({method})"
            place = on_page if other == "random" else None
            made["claims"].append(claim(text, f"difference in returned {measure}", more, place=place))
        forgotten = study.told["board"]["forgetting"]
        too = study.numbers(f"returned.critical.{PUT_BACK}.{forgotten}", method)
        text = f"{on}, {PUT_BACK} critical experts a layer bring back more of the neighbours than of the forgotten"
        net = paired(back["critical", PUT_BACK], too)
        measured = f"returned {measure} less returned {forgotten.replace('_', ' ')}"
        made["claims"].append(claim(f"{text} ({method})", measured, net, place=on_page))
        if method == "uniform":
            forgot = {size: study.numbers(f"returned.critical.{size}.{forgotten}", method) for size in sizes}
            names = {"critical": "critical experts", "random": "random ones", "least": "least critical ones"}
            series = [(name, sizes, [values(back[kind, s]) for s in sizes]) for kind, name in names.items()]
            series.append(("critical: what was forgotten", sizes, [values(forgot[size]) for size in sizes]))
            title, y = f"What returns with original experts, {model} model", "returned accuracy"
            caption = (
                f"{measure.capitalize()} and, of critical experts, {forgotten.replace('_', ' ')} that return when so"
            )
            caption += (
                " many experts of each layer get their first weights back; unlearned with the uniform retain loss."
            )
            about = "lines", "experts of each layer put back"
            made["figures"].append(figure(f"patching_{model}", title, caption, *about, y, series, log_x=True))
    columns = ["model", "method", "drift and ratio", "drift and difference", "utility lost"]
    title = "Spearman correlation of the experts' drift with how much more forget text uses them"
    made["tables"].append({"title": title, "columns": columns, "rows": drift})
    columns = ["model", "method", "experts of each layer", "critical", "random", "least critical"]
    made["tables"].append(
        {"title": "What returns when original experts are put back", "columns": columns, "rows": rows}
    )
    return made


QUESTIONS: dict[str, tuple[int, str, Callable[[Sequence[Study]], dict[str, Any]], tuple[str, ...]]] = {
    "patching": (1, "Do critical experts drift and carry the damage?", patching,
                 ("patching_study.py:quickstart", "patching_study.py:fine")),
    "dose": (4, "How many experts, and which?", dose, ("dose_study.py",)),
    "main": (5, "The main table", main_table, ("handbook_study.py",)),
    "presidents": (5, "Real text alone: presidents", main_table, ("presidents_study.py",)),
    "documents": (5, "Documents as a user has them", main_table, ("documents_study.py",)),
    "objectives": (7, "Objectives, and attacks on what they made", objectives, ("objectives_study.py",)),
    "trainable": (9, "What trains", trainable, ("trainable_study.py",)),
}  # fmt: skip


def summary(question: str, workdirs: Sequence[Path]) -> dict[str, Any]:
    """The JSON of a question, from the studies that answer it."""
    number, title, answer, configs = QUESTIONS[question]
    studies = [Study(path) for path in workdirs]
    environment = json.loads((studies[0].path / "environment.json").read_text())
    environment.pop("command", None)
    tuned = sorted({seed for study in studies for seed in study.config["study"]["tuning_seeds"]})
    runs = {s.told["name"]: [_raw(s, run, v) for v, m in s.methods() for run in s.runs(m, v).values()] for s in studies}
    tried = {s.told["name"]: [[*which, s.result(*which[::-1])["tried"]] for which in s.methods()] for s in studies}
    return {
        "question": number, "name": question, "title": title,
        "command": "; ".join(
            f"trace-jax study --config configs/{config}" for config, _ in zip(configs, studies, strict=False)
        ),
        "seconds": round(sum(seconds(study.path) for study in studies)),
        "seeds": studies[0].seeds, "environment": environment, **answer(studies),
        "raw": {"tuning_seeds": tuned, "tried": tried, "runs": runs},
    }  # fmt: skip


def _raw(study: Study, run: Mapping[str, Any], variant: str) -> dict[str, Any]:
    """What the numbers of a run are made of."""
    about = {"variant": variant, "method": run["method"], "seed": run["seed"], "robustness": run["robustness"]}
    series = {"forgetting": run["test"]["forgetting"]} | {n: run["test"]["utilities"][n] for n in study.utilities[:-1]}
    rounded = {name: [float(f"{value:.4g}") for value in values] for name, values in series.items()}
    return about | {"steps": run["test"]["steps"]} | rounded


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "workdir", nargs="+", type=Path, help="finished studies, in the order of the question's configs"
    )
    parser.add_argument("--question", required=True, choices=tuple(QUESTIONS))
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/studies/QUESTION.json")
    options = parser.parse_args(arguments)
    output = options.output or RESULTS / f"{options.question}.json"
    with replacing(output) as temporary:
        temporary.write_text(json.dumps(summary(options.question, options.workdir), indent=1) + "\n")
    print(f"{options.question}: {output}, {output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
