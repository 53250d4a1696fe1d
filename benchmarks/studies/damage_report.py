"""What the units of damage.py say: claims with intervals over seeds, tables and figures, all from kept numbers."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from claims import PAGE, README, claim, interval
from graded import ERAS
from scipy.stats import spearmanr

from trace_jax.io.environment import describe

COSINE = "routing, cosine"
ALL, FEW, RANDOM = "routing, all experts", "routing, few critical experts", "routing, few random experts"
WORDS, WORDS_TOO, STATES, STATES_TOO, GRADIENT, SIZES = (
    *("n-gram ratio", "n-grams, projected as routing", "hidden states", "hidden states, projected as routing"),
    *("gradient", "gradient, absolute values"),
)
NEAR = "near", "middling", "far"  # the map's domains, in order


def report(design: Any, seeds: Sequence[int], kept: Mapping[str, Mapping[tuple, Any]]) -> dict[str, Any]:
    """The study's JSON but for its seconds."""
    targets, correlations = kept["target"], correlation_table(design, seeds, kept)
    names = list(next(iter(targets.values()))["held_out_nll"])
    claims, tables, figures = prediction(design, seeds, kept, correlations, names)
    gains = gain_table(design, seeds[: design.map_seeds], kept["map"])
    for made, more in zip((claims, tables, figures), payment(design, gains), strict=True):
        made += more
    seconds = sum(unit["seconds"] for units in kept.values() for unit in units.values())
    raw = {
        "domains": names,
        "held_out_nll": {" ".join(map(str, u)): _rounded(t["held_out_nll"]) for u, t in targets.items()},
        "damage": {" / ".join(map(str, u)): _rounded(x["damage"]) for u, x in kept["damage"].items()},
        "correlations": {p: [round(float(x), 4) for x in of.ravel()] for p, of in correlations.items()},
        "correlations_over": "seeds x shapes x topics",
        "gains": gains,
        "core_seconds": round(seconds),
        "level": {topic: design.level_of(topic) for topic in design.topics},
    }
    return {
        "question": 2,
        "name": "damage",
        "title": "Does damage follow routing or words?",
        "command": "python benchmarks/studies/damage.py --workdir runs/studies/damage "
        "--output benchmarks/results/studies/damage.json",
        "seeds": list(seeds),
        "environment": describe(),
        "claims": claims,
        "tables": tables,
        "figures": figures,
        "raw": raw,
    }


def _rounded(values: Mapping[str, float] | None) -> dict[str, float] | None:
    return None if values is None else {name: round(x, 4) for name, x in values.items()}


# --- what predicts damage


def correlation_table(
    design: Any, seeds: Sequence[int], kept: Mapping[str, Mapping[tuple, Any]], *, own_kind: bool = False
) -> dict[str, np.ndarray]:
    """By predictor f64 [seeds, shapes, topics]: Spearman's over domains, or over those that are real or generated as
    the topic is; NaN where the level was not reached, or there are fewer than three.
    """
    shapes = [shape for shape, _ in design.shapes]
    size, found = (len(seeds), len(shapes), len(design.topics)), {}
    for place in itertools.product(*map(range, size)):
        seed, shape, topic = seeds[place[0]], shapes[place[1]], design.topics[place[2]]
        names = list(kept["target"][seed, shape]["held_out_nll"])
        damage = kept["damage"][seed, shape, topic]["damage"]
        among = [n for n in names if n != topic and (not own_kind or (n in ERAS) == (topic in ERAS))]
        use = [names.index(n) for n in among]
        for predictor, values in kept["nearness"][seed, shape][topic].items():
            of = found.setdefault(predictor, np.full(size, np.nan))
            if damage is not None and len(among) >= 3:
                rise = [damage[n] for n in among]
                of[place] = np.mean([spearmanr(row[use], rise)[0] for row in np.atleast_2d(np.asarray(values))])
    return found


def by_seed(values: np.ndarray) -> np.ndarray:
    """f64 [seeds]: mean over topics, then over shapes, of what there is."""
    return np.nanmean(np.nanmean(values, axis=2), axis=1)


def prediction(design: Any, seeds: Sequence[int], kept: Any, found: Mapping[str, np.ndarray], names: Sequence[str]):
    """Claims, tables and figures on what predicts damage; `found`: the correlations over all domains."""
    shapes, kind = [shape for shape, _ in design.shapes], correlation_table(design, seeds, kept, own_kind=True)
    reached = int(np.isfinite(found[ALL]).sum())
    over = f"{len(seeds)} seeds (mean of {len(shapes)} models x {len(design.topics)} topics; {{}})"
    everywhere, within = (
        over.format(f"{len(names) - 1} domains"),
        over.format("generated or real domains as the topic is"),
    )
    corr, diff = "Spearman's correlation with damage", "difference of Spearman's correlations with damage"
    claims = [
        claim(
            f"Domains that are near the forgotten one by {name} are damaged more.",
            corr,
            by_seed(found[name]),
            everywhere,
            place=PAGE,
        )
        for name in (ALL, WORDS)
    ]
    pairs = [
        (ALL, WORDS),
        (ALL, WORDS_TOO),
        (COSINE, WORDS),
        (FEW, RANDOM),
        (FEW, ALL),
        (ALL, STATES),
        (ALL, STATES_TOO),
    ]
    pairs += [(GRADIENT, ALL), (SIZES, ALL), (SIZES, WORDS)]
    for first, second in pairs:
        text = f"Damage is predicted better by {first} than by {second}"
        place = PAGE if (first, second) in ((ALL, WORDS), (FEW, RANDOM)) else None
        claims.append(claim(f"{text}.", diff, by_seed(found[first] - found[second]), everywhere, place=place))
        of_kind = by_seed(kind[first] - kind[second])
        text = f"{text}, among domains of the topic's own kind."
        claims.append(claim(text, diff, of_kind, within, place=place))
    rows = []
    for name, of in found.items():
        cells = [interval(np.nanmean(of[:, i], axis=1)) for i in range(len(shapes))]
        topics = [round(float(np.nanmean(of[:, :, t])), 3) for t in range(len(design.topics))]
        rows.append([name, interval(by_seed(of)), interval(by_seed(kind[name])), *cells, *topics])
    columns = ["nearness by", "all domains", "domains of the topic's kind", *(f"all, {shape}" for shape in shapes)]
    title = f"Rank correlation of nearness with damage ({reached} of {found[ALL].size} runs reached the level)"
    tables = [{"title": title, "columns": [*columns, *(f"all, forgotten: {t}" for t in design.topics)], "rows": rows}]
    for topic in design.topics:
        tables.append(_domain_table(shapes, seeds, kept, topic, names))
    main, series = [ALL, COSINE, FEW, RANDOM, WORDS, WORDS_TOO, STATES, STATES_TOO, GRADIENT, SIZES], []
    for name, table in (("all domains", found), ("domains of the topic's kind", kind)):
        of = [interval(by_seed(table[predictor])) for predictor in main]
        series.append({"name": name, "x": main, **{y: [x[key] for x in of] for y, key in _ENDS}})
    title = "What predicts which domains are damaged"
    caption = "Rank correlation over domains of damage with nearness to the forgotten domain; intervals over seeds."
    axes = {"x": "Spearman's correlation", "y": ""}
    figures = [
        {"name": "damage_predictors", "title": title, "caption": caption, "kind": "bars", **axes, "series": series}
    ]
    figures.append(_points(design, shapes, seeds, kept, names))
    return claims, tables, figures


_ENDS = ("y", "value"), ("low", "low"), ("high", "high")


def _mean_over_seeds(kept: Any, shapes: Sequence[str], seeds: Sequence[int], topic: str, names: Sequence[str]):
    """(damage [N], ranks from 0 to 1 of nearness [N] by predictor), means over the runs that reached the level."""
    rises, ranks = [], {}
    others = [i for i, name in enumerate(names) if name != topic]
    for seed, shape in itertools.product(seeds, shapes):
        if (damage := kept["damage"][seed, shape, topic]["damage"]) is None:
            continue
        rises.append([damage[names[i]] for i in others])
        for name in (ALL, FEW, WORDS, STATES, GRADIENT):
            values = np.asarray(kept["nearness"][seed, shape][topic][name])[others]
            ranks.setdefault(name, []).append(values.argsort().argsort() / (len(others) - 1))
    if not rises:
        return [names[i] for i in others], np.full(len(others), np.nan), {}
    means = {name: np.mean(of, axis=0) for name, of in ranks.items()}
    return [names[i] for i in others], np.mean(rises, axis=0), means


def _domain_table(shapes: Sequence[str], seeds: Sequence[int], kept: Any, topic: str, names: Sequence[str]) -> dict:
    others, rise, ranks = _mean_over_seeds(kept, shapes, seeds, topic, names)
    order = np.argsort(-rise)
    rows = [[others[i], round(float(rise[i]), 3), *(round(float(r[i]), 2) for r in ranks.values())] for i in order]
    columns = ["domain", "damage (nats/token)", *(f"rank of nearness: {name}" for name in ranks)]
    return {"title": f"Damage by domain, forgotten: {topic}", "columns": columns, "rows": rows if ranks else []}


def _points(design: Any, shapes: Sequence[str], seeds: Sequence[int], kept: Any, names: Sequence[str]) -> dict:
    series = []
    for name in (ALL, WORDS):
        x, y = [], []
        for topic in design.topics:
            _, rise, ranks = _mean_over_seeds(kept, shapes, seeds, topic, names)
            if ranks:
                x += [round(float(v), 3) for v in ranks[name]]
                y += [round(float(v), 4) for v in rise]
        series.append({"name": name, "x": x, "y": y})
    caption = (
        "Every point is a domain and a forgotten topic; means over seeds and models. Nearness as a rank from 0 to 1."
    )
    about = {
        "title": "Damage against nearness",
        "caption": caption,
        "x": "rank of nearness",
        "y": "damage (nats/token)",
    }
    return {"name": "damage_by_nearness", "kind": "points", **about, "series": series}


# --- where re-weighting pays


def gain_table(design: Any, seeds: Sequence[int], units: Mapping[tuple, Any]) -> dict[str, Any]:
    """By "domain / share / weighting": utilities on test, by seed, at the alpha that is best on validation, of uniform
    as of others. Utility is exp(-damage), at most 1. Alpha None: no alpha reached the level in all seeds.
    """

    def utilities(damage: Mapping[str, float], split: str) -> list[float]:
        return [float(np.exp(-max(0.0, damage[f"{of} {split}"]))) for of in ("domain", "general")]

    table = {}
    for domain, share, weighting in itertools.product(design.map_domains, design.map_shares, design.weightings):
        cells = [units[seed, domain, share, weighting] for seed in seeds]
        choices = {}
        for alpha in cells[0]["runs"]:
            damages = [cell["runs"][alpha]["damage"] for cell in cells]
            if all(d is not None for d in damages):
                choices[alpha] = float(np.mean([utilities(d, "validation") for d in damages]))
        entry: dict[str, Any] = {
            "domain_share": round(float(np.mean([cell["domain_share"] for cell in cells])), 4),
            "effective_sample": round(float(np.mean([cell["effective_sample"] for cell in cells])), 3),
            "alpha": None,
        }
        if choices:
            alpha = max(choices, key=lambda a: choices[a])
            test = np.array([utilities(cell["runs"][alpha]["damage"], "test") for cell in cells])
            entry |= {"alpha": alpha, "domain": test[:, 0].round(4).tolist(), "general": test[:, 1].round(4).tolist()}
        table[_key(domain, share, weighting)] = entry
    return table


def _key(domain: str, share: float, weighting: str) -> str:
    return f"{domain} / {share:g} / {weighting}"


def payment(design: Any, table: Mapping[str, Any]):
    """Claims, tables and figures of the map."""
    shares, domains = design.map_shares, design.map_domains
    others = [w for w in design.weightings if w != "uniform"]

    def gain(domain: str, share: float, weighting: str, of: str = "domain") -> np.ndarray | None:
        ours, base = table[_key(domain, share, weighting)], table[_key(domain, share, "uniform")]
        if ours["alpha"] is None or base["alpha"] is None:
            return None
        return np.array(ours[of]) - np.array(base[of])

    def mean_gain(domains: Sequence[str], shares: Sequence[float], weighting: str, of: str = "domain"):
        """f64 [seeds], mean over cells that reached the level; None: none did."""
        found = [g for d in domains for s in shares if (g := gain(d, s, weighting, of)) is not None]
        return np.mean(found, axis=0) if found else None

    def less(first: Any, second: Any) -> Any:
        return None if first is None or second is None else first - second

    rare, common, few, near = (
        [s for s in shares if s < 0.05],
        [s for s in shares if s >= 0.05],
        "few experts",
        domains[:1],
    )
    measure, difference = (
        "gain over uniform in the domain's utility exp(-damage)",
        "difference of such gains in utility",
    )
    wanted: list[tuple[str, str, Any, float, str | None]] = []
    for (kind, domain), some in itertools.product(zip(NEAR, domains, strict=False), (rare, common)):
        text = f"a {kind} domain that is {some[0]:.1%} to {some[-1]:.1%} of the retain set"
        found = mean_gain([domain], some, few)
        place = README if (kind, some) == (NEAR[0], rare) else PAGE
        wanted.append((f"Re-weighting by few experts keeps more of {text}.", measure, found, 0.0, place))
    of_few = mean_gain(near, shares, few)
    for other in others:
        if other != few:
            text = f"On the near domain, few experts gain more than {other}."
            wanted.append((text, difference, less(of_few, mean_gain(near, shares, other)), 0.0, None))
    text = "Re-weighting gains more where the near domain is rare than where it is common."
    wanted.append((text, difference, less(mean_gain(near, rare, few), mean_gain(near, common, few)), 0.0, PAGE))
    text = "What re-weighting by few experts costs in general utility is less than 0.01."
    cost = mean_gain(domains, shares, few, "general")
    wanted.append((text, "change of general utility against uniform", cost, -0.01, PAGE))
    over = f"{{}} seeds (forgotten: {design.map_topic}; {design.map_shape})"
    claims = [
        claim(text, of, found, over.format(len(found)), bound=bound, place=place)
        for text, of, found, bound, place in wanted
        if found is not None
    ]
    rows = []
    for domain, share in itertools.product(domains, shares):
        base = table[_key(domain, share, "uniform")]
        cells: list[Any] = [interval(base["domain"]) if base["alpha"] else None]
        for of in ("domain", "general"):
            cells += [None if (g := gain(domain, share, w, of)) is None else interval(g) for w in others]
        rows.append([domain, f"{share:.1%}", *cells])
    columns = ["domain", "share of the retain set", "utility under uniform"]
    columns += [f"gain: {w}" for w in others] + [f"general utility: {w}" for w in others]
    chosen = [[key, e["alpha"], e["domain_share"], e["effective_sample"]] for key, e in table.items()]
    tables = [
        {"title": "Gain of re-weighting over uniform, by nearness and rarity", "columns": columns, "rows": rows},
        {
            "title": "What each weighting did: alpha chosen on validation, share of draws that are the domain",
            "columns": ["domain / share / weighting", "alpha", "share of draws", "effective sample"],
            "rows": chosen,
        },
    ]
    pick: Callable[[Any], Any] = lambda g: None if g is None else round(float(np.mean(g)), 4)  # noqa: E731
    axes = {"x": "share of the retain set", "y": "domain", "x_ticks": [f"{s:.1%}" for s in shares]}
    axes["y_ticks"] = [f"{kind}: {d}" for kind, d in zip(NEAR, domains, strict=False)]
    values = [[pick(gain(d, s, few)) for s in shares] for d in domains]
    title, caption = f"Where re-weighting pays: {few}", "Gain over uniform in the domain's utility at equal forgetting."
    figures = [{"name": "damage_map", "title": title, "caption": caption, "kind": "map", **axes, "values": values}]
    return claims, tables, figures
