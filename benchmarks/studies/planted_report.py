"""What the study of planted experts tells of its results: claims, tables and figures.

Results are of a planting (its shape, seed and number of experts): what was found there, and under "calibrate planted"
and the like what each way to unlearn gave.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from claims import PAGE, claim, interval

from trace_jax.io.environment import describe

RULES = ("difference", "ratio", "log_odds", "cumulative", "affinity", "sensitivity", "random")  # of the package
LEVEL = 0.35  # forget accuracy at which utilities are compared; chance is .25
PER_USE = "sensitivity per use"  # mean |d NLL / d gate| over the tokens that use an expert, not over all
USED = ("difference", "sensitivity")  # rules whose experts are calibrated on, and trained alone

WAYS = (
    ("calibrate", "nothing"),
    *(("calibrate", which) for which in ("planted", *USED, "random", "all")),
    *(("train", which) for which in ("planted", *USED, "random")),
)


def report(results: Any, controls: Any, seeds: Any, seconds: float, settings: Any) -> dict[str, Any]:
    """The study's JSON. `controls`: of each (shape, seed), what relearning teaches a model that never knew."""
    made, held = tables(results, controls), {unit: of for unit, of in results.items() if "calibrate nothing" in of}
    told = {"question": 3, "name": "planted", "title": "Why these experts: planted ground truth"}
    told["command"] = "python benchmarks/studies/planted.py --output benchmarks/results/studies/planted.json"
    told |= {"seconds": seconds, "seeds": seeds, "environment": describe(), "settings": settings}
    told |= {"claims": claims(held), "tables": made, "figures": figures(made)}
    raw = {str(unit): of for unit, of in results.items()}
    return rounded(told | {"raw": {"plantings": raw, "never knew": {str(model): of for model, of in controls.items()}}})


def cell(values: Iterable[float | None]) -> dict[str, float | None] | None:
    """The mean over seeds with Student's interval; None where there is no value."""
    there = [value for value in values if value is not None]
    return interval(there, digits=5) | {"n": len(there)} if there else None


def at(tree: Any, *path: str) -> Any:
    """An entry of nested mappings; None where one is missing on the way."""
    for name in path:
        tree = None if tree is None else tree.get(name)
    return tree


def less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


NAMES = {"planted": "C*", "random": "random others", "nothing": "nothing (uniform)", "all": "all experts"}
PLACES = {
    "By sensitivity more of C* is found than by the difference of frequencies.": PAGE,
    "The rule by difference ranks the experts that hold the forget text above others that it reaches.": PAGE,
    "The rule by sensitivity ranks the experts that hold the forget text above others that it reaches.": PAGE,
    "Training the experts by sensitivity alone keeps more than training all.": PAGE,
    "Calibrating on C* keeps more than the uniform retain loss.": PAGE,
    "Calibrating on C* keeps more than on random others.": PAGE,
    "Training C* alone keeps more than training all.": PAGE,
    "Training C* alone leaves less to be brought back than training all uniformly.": PAGE,
}
Results = Mapping[Any, dict[str, Any]]


def kept(of: dict[str, Any], way: str, name: str = "utility") -> float | None:
    """On test, where forget accuracy is at the level."""
    return at(of, way, "chosen", "test", name)


def risen(of: dict[str, Any], way: str) -> float | None:
    """How far relearning brings forget accuracy back."""
    return less(at(of, way, "relearnt", "after"), at(of, way, "relearnt", "before"))


def claims(results: Results) -> list[dict[str, Any]]:
    """Each of a number of a planting that held the forget text, averaged over those of a seed."""
    ranked, uniform = "probability that a planted expert ranks above one that is not", "calibrate nothing"
    utility = f"mean utility on test at forget accuracy {LEVEL:g}, difference"
    listed: list[tuple[str, str, float, Callable[[Any], float | None]]] = [
        (
            f"The rule by {rule} ranks the experts that hold the forget text above others that it reaches.",
            ranked, 0.5, lambda of, r=rule: of["after"]["rules"][r]["auc"],
        )
        for rule in ("difference", "affinity", "sensitivity", PER_USE)
    ]  # fmt: skip
    for rule in ("sensitivity", PER_USE):
        says = f"By {rule} more of C* is found than by the difference of frequencies."
        listed.append(
            (
                says, "precision with as many experts as C* has, difference", 0.0,
                lambda of, r=rule: less(*(of["after"]["rules"][name]["precision"] for name in (r, "difference"))),
            )
        )  # fmt: skip
        says = f"It is what was planted that {rule} sees, not what was there before."
        seen = f"{ranked}, after planting minus before"
        listed.append(
            (says, seen, 0.0, lambda of, r=rule: less(*(of[p]["rules"][r]["auc"] for p in ("after", "before"))))
        )

    def compare(says: str, way: str, other: str) -> None:
        listed.append((says, utility, 0.0, lambda of: less(kept(of, way), kept(of, other))))

    for which in ("planted", *USED, "random", "all"):
        name = NAMES.get(which, f"the experts by {which}")
        compare(f"Calibrating on {name} keeps more than the uniform retain loss.", f"calibrate {which}", uniform)
        if which in ("planted", *USED):
            compare(
                f"Calibrating on {name} keeps more than on random others.", f"calibrate {which}", "calibrate random"
            )
        if which != "all":
            compare(f"Training {name} alone keeps more than training all.", f"train {which}", uniform)
    back = "rise of forget accuracy under relearning, uniform's minus its own"
    for which in ("planted", *USED):
        name = NAMES.get(which, f"the experts by {which}")
        for way, does in (
            (f"calibrate {which}", f"Calibrating on {name}"),
            (f"train {which}", f"Training {name} alone"),
        ):
            says = f"{does} leaves less to be brought back than training all uniformly."
            listed.append((says, back, 0.0, lambda of, w=way: less(risen(of, uniform), risen(of, w))))
    made = []
    for says, measure, bound, value in listed:
        seeds: dict[int, list[float]] = {}
        for unit, of in results.items():
            if (one := value(of)) is not None:
                seeds.setdefault(unit.seed, []).append(one)
        if seeds:
            over = f"{len(seeds)} seeds, {sum(map(len, seeds.values()))} planted models"
            means = [float(np.mean(several)) for several in seeds.values()]
            made.append(claim(says, measure, means, over, bound=bound, place=PLACES.get(says)))
    return made


def tables(results: Results, controls: dict[tuple[str, int], dict[str, float]]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for unit, of in results.items():
        groups.setdefault((unit.shape, unit.size), []).append(of)
    planting, finding, unlearning = [], [], []
    for (shape, size), ofs in groups.items():
        known = [cell(of[p]["known"][n] for of in ofs) for n in ("forget", "neighbour") for p in ("before", "after")]
        planting.append([shape, size, cell(of["reached"] for of in ofs), ofs[0]["experts_of_model"], *known])
        for rule in (*RULES, PER_USE):
            ranked = [
                cell(of[place]["rules"][rule][name] for of in ofs)
                for place, name in (("after", "precision"), ("before", "auc"), ("after", "auc"))
            ]
            usual = [cell(at(of, "defaults", rule, n) for of in ofs) for n in ("precision", "recall", "selected")]
            finding.append([shape, size, rule, *ranked, *usual])
        for what, which in WAYS:
            way = f"{what} {which}"
            if made := [of for of in ofs if way in of]:
                reached = f"{sum(of[way]['chosen'] is not None for of in made)} of {len(made)}"
                numbers = [cell(kept(of, way, name) for of in made) for name in ("utility", "neighbour", "general")]
                gain = cell(less(kept(of, way), kept(of, "calibrate nothing")) for of in made)
                back = cell(at(of, way, "relearnt", "before") for of in made), cell(risen(of, way) for of in made)
                unlearning.append([shape, size, what, NAMES.get(which, which), reached, *numbers, gain, *back])
    taught = []
    for shape in dict.fromkeys(shape for shape, _ in controls):
        own = [one for (name, _), one in controls.items() if name == shape]
        taught.append([shape, *(cell(one[place] for one in own) for place in ("before", "after"))])
    known = ["forget accuracy before", "after", "neighbour accuracy before", "after"]
    found = ["precision, as many as C*", "AUC before planting", "AUC after", "precision as set", "recall as set"]
    read = ["mean utility", "neighbour accuracy", "general utility", "gain over uniform", "forget accuracy", "rise"]
    titled = (
        ("What a few experts can hold", ["model", "planted", "reached", "experts", *known], planting),
        ("Where the rules look", ["model", "planted", "rule", *found, "selected as set"], finding),
        (
            f"Forget accuracy {LEVEL:g}, then relearning",
            ["model", "planted", "what", "on", "reached", *read],
            unlearning,
        ),
        ("What relearning teaches a model that never knew", ["model", "before", "after"], taught),
    )
    return [{"title": title, "columns": columns, "rows": rows} for title, columns, rows in titled]


def bars(name: str, title: str, caption: str, y: str, points: Iterable[tuple[str, str, Any]]) -> dict[str, Any]:
    """A figure of (series, place, cell); places that a series lacks are left out of all."""
    by_series: dict[str, dict[str, Any]] = {}
    for series, place, value in points:
        by_series.setdefault(series, {})[place] = value
    places = [x for x in next(iter(by_series.values()), {}) if all(cells.get(x) for cells in by_series.values())]
    drawn = []
    for label, cells in by_series.items():
        shown = [cells[x] | ({"low": None, "high": None} if cells[x]["n"] < 3 else {}) for x in places]
        columns = {key: [cell[of] for cell in shown] for key, of in (("y", "value"), ("low", "low"), ("high", "high"))}
        drawn.append({"name": label, "x": places, **columns})
    about = {
        "name": f"planted_{name}",
        "title": title,
        "caption": f"{caption} Mean over seeds, from three on with Student's interval.",
    }
    return {**about, "kind": "bars", "x": y, "y": "", "series": drawn}


def figures(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    _, finding, unlearning, _ = (table["rows"] for table in made)
    of = [(f"{row[0]}, {row[1]} planted", f"{row[2]}: {row[3]}", row[8], row[10]) for row in unlearning]
    uniform = f"calibrate: {NAMES['nothing']}"
    found = "Of the experts that a rule ranks highest, as many in each layer as were planted there, the share that was."
    gain = f"Mean utility on test where forget accuracy is {LEVEL:g}, less that of the uniform retain loss."
    rise = "Rise of forget accuracy on facts that the relearnt pages do not state."
    return [
        bars(
            "found", "Which rule finds the experts that hold the forget text", found, "share of C* found",
            ((f"{row[0]}, {row[1]} planted", row[2], row[3]) for row in finding if row[1] > 1),
        ),
        bars(
            "kept", "What it is worth to know them", gain, "gain of mean utility",
            ((series, way, value) for series, way, value, _ in of if way != uniform),
        ),
        bars(
            "relearnt", "What relearning brings back", rise, "rise of forget accuracy",
            ((series, way, value) for series, way, _, value in of),
        ),
    ]  # fmt: skip


def rounded(value: Any) -> Any:
    """Numbers with five digits behind the point, which is more than 120 questions can say."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(one) for one in value]
    return round(value, 5) if isinstance(value, float) else value
