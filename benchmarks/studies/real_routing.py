"""Real routing: how much of the gap between forget and retain frequencies weights close, and what that costs.

    git clone https://github.com/deepseek-ai/ESFT
    python benchmarks/studies/real_routing.py --workdir runs/studies/real_routing --esft ESFT

ESFT's authors published which experts a model of DeepSeek-V2-Lite's class (26 layers of 64 experts, 6 a token) chose
for the prompts of four tasks. Other captures, as `trace-jax diagnose` takes them, one a task: `--captures A.npz B.npz
... --num-experts E`. Each task is forgotten in turn, and the others are retained. Nothing is trained: what is measured
is the match, at an equal effective sample of the retain tokens.

Half of the forget rows choose the experts and make the weights, the other half judges them: "closed" is the share of
sum |f - f^F| that weights close, f^F being the frequencies of the half that they never saw. Each seed is a split, read
in both directions.
"""

import argparse
import dataclasses
import functools
import os
import time
from concurrent.futures import as_completed
from pathlib import Path

import numpy as np
from claims import PAGE, claim, interval
from scipy.optimize import brentq

import trace_jax as tj
from trace_jax.io.environment import describe
from trace_jax.io.files import encode, read_json, replacing, write_json
from trace_jax.parallel.processes import usable_cores, worker_pool
from trace_jax.routing.calibration import match_frequencies, weighted_frequency
from trace_jax.routing.config import Matching, random_like
from trace_jax.routing.diagnosis import MIN_ROWS
from trace_jax.routing.solver import concentrated, effective_sample_size
from trace_jax.routing.statistics import Assignments, ExpertStatistics

SIZES = (0.5, 0.3, 0.2, 0.1, 0.05)  # effective samples, shares of the retain tokens
SIZE = SIZES.index(0.2)  # the package's default, of which claims are made
CAP = Matching().max_weight  # for all
TASKS = ("intent", "law", "summary", "translation")  # of ESFT
UNITS = ("token", "row")
CALIBRATORS = {"chi2": "chi-square", "kl": "entropy", "strength": "entropy, weaker targets"}
RULES = {
    "difference": "4 by difference",
    "ratio": "ratio above 3",
    "log_odds": "z-score above 5",
    "all": "all experts",
    "random": "4 at random",
}
METHODS = [("difference", calibrator, unit) for calibrator in ("chi2", "kl") for unit in UNITS]
METHODS += [("difference", "strength", "token")]  # of rows no weights match exactly, as the road needs
METHODS += [(rule, "chi2", unit) for rule in list(RULES)[1:] for unit in UNITS]
METHODS += [("unigram", "none", unit) for unit in UNITS]
OVER = ("selected", "critical", "untouched", "all")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Closed gap against effective sample on recorded routing.")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/studies/real_routing.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="splits of the forget rows")
    parser.add_argument("--esft", type=Path, help="a clone of github.com/deepseek-ai/ESFT")
    parser.add_argument("--captures", type=Path, nargs="+", default=[], help="one file a task, in place of --esft")
    parser.add_argument("--num-experts", type=int, default=64)
    options = parser.parse_args(argv)
    if bool(options.esft) == bool(options.captures) or len(options.captures) == 1:
        parser.error("give a clone by --esft, or at least two files by --captures")
    captures, experts = options.captures or captures_of_esft(options.esft, options.workdir), options.num_experts
    jobs = [(task, seed, half) for seed in options.seeds for half in (0, 1) for task in range(len(captures))]
    jobs += [(task, None, 0) for task in range(len(captures))]  # in sample, on all rows
    found, started = {}, time.perf_counter()
    for done, (job, measured) in enumerate(worked(jobs, captures, experts, options.workdir), start=1):
        found[job] = measured
        seconds = time.perf_counter() - started
        about = f"{captures[job[0]].stem} {job[1:]}: {measured['seconds']:.0f} s"
        print(f"{done}/{len(jobs)} {about}, {seconds:.0f} s in all", flush=True)
    study = result(found, [path.stem for path in captures], options.seeds)
    sources = f"--esft {options.esft.name}" if options.esft else f"--captures {' '.join(map(str, captures))}"
    command = f"python benchmarks/studies/real_routing.py --workdir {options.workdir} {sources}"
    total = sum(measured["seconds"] for measured in found.values()) / workers()
    study |= {"command": command, "seconds": total, "seeds": options.seeds, "environment": describe()}
    write_json(options.output, encode(study, digits=5))


def captures_of_esft(clone: Path, workdir: Path) -> list[Path]:
    """The clone's files as captures. A file is a layer, a line a prompt: six experts of each token, then the gates."""
    captures = []
    for task in TASKS:
        captures.append(workdir / "captures" / f"{task}.npz")
        if captures[-1].exists():
            continue
        layers = []
        for layer in range(1, 27):
            file = clone / "results" / "expert_scores" / task / f"expert_weights_{layer}.txt"
            rows = [line.split("\t\t")[0].split("\t") for line in file.read_text().splitlines()]
            layers.append([np.array(row, np.uint8).reshape(-1, 6) for row in rows])
        captures[-1].parent.mkdir(parents=True, exist_ok=True)
        ids, lengths = np.stack([np.concatenate(layer) for layer in layers]), [len(row) for row in layers[0]]
        with replacing(captures[-1]) as temporary:
            np.savez_compressed(temporary, expert_ids=ids, row_lengths=lengths)
    return captures


# --- a unit of work: one task forgotten, one half of its rows


def workers() -> int:
    return min(2, usable_cores())


def worked(jobs, captures: list[Path], experts: int, workdir: Path):
    """(job, what was measured) as they come; what is in the workdir is read."""
    kept = {
        job: workdir / "units" / "-".join(map(str, (captures[job[0]].stem, *job[1:], "of", *SIZES))) for job in jobs
    }
    todo, measure = [], functools.partial(unit, captures, experts)
    for job, path in kept.items():
        if (measured := read_json(f"{path}.json")) is None:
            todo.append(job)
        else:
            yield job, measured
    if workers() == 1:
        answers = ((job, measure(*job)) for job in todo)
    else:
        answers = side_by_side(measure, todo)
    for job, measured in answers:
        kept[job].parent.mkdir(parents=True, exist_ok=True)
        write_json(f"{kept[job]}.json", measured)
        yield job, measured


def side_by_side(measure, jobs):
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with worker_pool(workers()) as pool:
        futures = {pool.submit(measure, *job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()


def unit(captures: list[Path], experts: int, task: int, seed: int | None, half: int) -> dict:
    """What every method closes at each effective sample, by "RULE/CALIBRATOR/UNIT": one entry a size."""
    started = time.perf_counter()
    texts = [tj.read_capture(path, experts) for path in captures]
    retain, source = joined([text for number, text in enumerate(texts) if number != task])
    making = judging = whole = texts[task]
    if seed is not None:
        rows = np.unique(whole.rows)
        dealt = np.random.default_rng([seed, task]).permutation(np.arange(len(rows)) % 2)
        making, judging = (whole.take(rows[dealt == side]) for side in (half, 1 - half))
    forget, kept, unseen = (statistics(text, experts) for text in (making, retain, judging))
    critical = tj.select_experts(forget, kept, rule="difference", top=min(4, max(1, experts // 4)))
    selected = {"difference": critical, "random": random_like(critical, seed=2 * (seed or 0) + half)}
    selected |= {rule: tj.select_experts(forget, kept, rule=rule) for rule in ("ratio", "log_odds", "all")}
    over = {"critical": critical, "untouched": ~(critical | selected["random"]), "all": selected["all"]}
    before, closed = np.abs(kept.frequency - unseen.frequency), {}
    for rule, calibrator, shared in METHODS:
        own = over | {"selected": selected.get(rule, critical)}
        closed["/".join((rule, calibrator, shared))] = rows = []
        for weights in weightings(rule, calibrator, shared, forget, kept, retain, own["selected"]):
            after = np.abs(weighted_frequency(retain.indices, weights, experts) - unseen.frequency)
            rows.append({name: share_closed(before[where], after[where]) for name, where in own.items()})
            rows[-1] |= {"sample": effective_sample_size(weights), "largest": weights.max()}
            rows[-1]["source"] = np.bincount(source, weights) / len(source)
    noise = np.abs(forget.frequency - unseen.frequency)
    measured = {
        "closed": closed,
        "ceiling": {name: share_closed(before[where], noise[where]) for name, where in over.items()},
        "share": {rule: where.mean() for rule, where in selected.items()},
        "tokens": [len(text.rows) for text in texts],
        "rows": [len(np.unique(text.rows)) for text in texts],
    }
    if seed is None and min(measured["rows"][task], len(np.unique(retain.rows))) >= MIN_ROWS:
        diagnosis = tj.diagnose(whole, retain, num_experts=experts, curve=False)
        measured["diagnosis"] = {name: getattr(diagnosis, name) for name in ("verdict", "held_out", "noise")}
        measured["diagnosis"]["gap"] = before.sum(axis=1).mean()
    return encode(measured | {"seconds": time.perf_counter() - started}, digits=6)


def share_closed(before: np.ndarray, after: np.ndarray) -> float:
    """Of a gap by expert; 0 where there is none, or no expert."""
    return 1 - float(after.sum() / before.sum()) if before.any() else 0.0


def joined(texts: list[Assignments]) -> tuple[Assignments, np.ndarray]:
    """The texts as one, and which of them each token is of."""
    starts = np.cumsum([0, *(text.rows.max() + 1 for text in texts)])
    rows = np.concatenate([text.rows + start for text, start in zip(texts, starts, strict=False)])
    indices = np.concatenate([text.indices for text in texts], axis=1)
    source = np.repeat(np.arange(len(texts)), [len(text.rows) for text in texts])
    return dataclasses.replace(texts[0], indices=indices, rows=rows, documents=rows), source


def statistics(text: Assignments, experts: int) -> ExpertStatistics:
    counts = np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in text.indices])
    return ExpertStatistics(counts, np.full(counts.shape, np.nan), len(text.rows), text.indices.shape[2], text.layers)


def weightings(rule, calibrator, shared, forget, kept, retain, selected) -> list[np.ndarray]:
    """Weights f64 [T] of the retain tokens at each of SIZES."""
    if rule == "unigram":
        return unigram(forget, kept, retain, shared)
    if calibrator == "strength":
        return strength_road(forget, kept, retain, selected)
    settings = Matching(unit=shared, divergence=calibrator, max_weight=CAP)
    solved = match_frequencies(retain, kept.counts, selected, forget.frequency, settings, SIZES)
    return [weights for _, weights, _ in solved]


def strength_road(forget, kept, retain, selected) -> list[np.ndarray]:
    """The former calibrator: entropy balancing of tokens to f^R + s (p - f^R), s <= 1 lowered until the sample is kept
    (to half a percent). Unlike it the largest weight is part of the problem, as for all others here.
    """
    settings = Matching(divergence="kl", max_weight=CAP)
    goal = np.minimum(forget.frequency, settings.max_ratio * kept.frequency)

    @functools.cache
    def at(strength: float) -> np.ndarray:
        target = kept.frequency + strength * (goal - kept.frequency)
        return match_frequencies(retain, kept.counts, selected, target, settings, [0.0])[0][1]

    def over(strength: float, size: float) -> float:
        excess = np.log((effective_sample_size(at(strength)) if strength else 1.0) / size)
        return excess if abs(excess) > 0.005 else 0.0

    weights, low = [], 0.0
    for size in SIZES:
        high = max(min(2 * low, 1.0), 1 / 32)
        while high < 1 and over(high, size) > 0:
            low, high = high, min(2 * high, 1.0)
        low = high if over(high, size) >= 0 else brentq(over, low, high, args=(size,), xtol=1e-6)
        weights.append(at(low))
    return weights


def unigram(forget, kept, retain, shared) -> list[np.ndarray]:
    """Rival: the density ratio of a token's experts, as if each were drawn on its own (of a row, the geometric mean of
    its tokens'), to the power that keeps the sample.
    """
    forget, kept = ((of.counts + 0.5) / (of.tokens + 1) for of in (forget, kept))
    ratio = np.log(forget / kept)
    scores = sum(values[chosen].sum(axis=1) for values, chosen in zip(ratio, retain.indices, strict=True))
    if shared == "token":
        return [concentrated(scores, np.ones(len(scores)), size=size, max_weight=CAP) for size in SIZES]
    lengths = np.bincount(retain.rows).astype(float)
    means = np.bincount(retain.rows, scores)[lengths > 0] / lengths[lengths > 0]
    row = (np.cumsum(lengths > 0) - 1)[retain.rows]
    return [concentrated(means, lengths[lengths > 0], size=size, max_weight=CAP)[row] for size in SIZES]


# --- what was found


def result(found: dict, tasks: list[str], seeds: list[int]) -> dict:
    """Claims, tables and figures; intervals are Student's over the tasks, each the mean of its splits."""

    def closed(method: str, over: str, size: int = SIZE, held_out: bool = True) -> np.ndarray:
        """f64 [tasks]."""
        jobs = [[(task, seed, half) for seed in seeds for half in (0, 1)] for task in range(len(tasks))]
        jobs = jobs if held_out else [[(task, None, 0)] for task in range(len(tasks))]
        return np.array([np.mean([found[job]["closed"][method][size][over] for job in of]) for of in jobs])

    splits = f"{len(tasks)} forgotten tasks, each the mean of {2 * len(seeds)} halves of its rows"
    splits += "; effective sample 0.2, on forget rows that the weights were not made from"
    chi2, kl, strength = (f"difference/{name}/token" for name in CALIBRATORS)
    rows, random, everything = "difference/chi2/row", "random/chi2/token", "all/chi2/token"
    of_critical, of_all = (f"gap closed over {what}" for what in ("the 4 most critical", "all experts"))
    of_others, paired = "gap closed over experts that neither selects", ", difference"
    claims = [
        claim(text, measure, found, splits, place=place, **more)
        for text, measure, found, place, more in (
            ("Chi-square weights of tokens close more than half of the gap of the experts that they match.",
             of_critical, closed(chi2, "critical"), PAGE, {"bound": 0.5}),
            ("Chi-square weights close more than those of entropy balancing.", of_critical + paired,
             closed(chi2, "critical") - closed(kl, "critical"), PAGE, {}),
            ("Chi-square weights close more than those of the former calibrator, which weakens all targets alike.",
             of_critical + paired, closed(chi2, "critical") - closed(strength, "critical"), None, {}),
            ("Weights of tokens close more than weights of rows.", of_critical + paired,
             closed(chi2, "critical") - closed(rows, "critical"), PAGE, {}),
            ("Matching the 4 most critical experts a layer closes more over all experts than matching 4 others at "
             "random.", of_all + paired, closed(chi2, "all") - closed(random, "all"), PAGE, {}),
            ("Matching the 4 most critical also closes more than random ones over the experts that neither matches.",
             of_others + paired, closed(chi2, "untouched") - closed(random, "untouched"), None, {}),
            ("Matching the 4 most critical experts a layer brings the others nearer to the forget text as well.",
             of_others, closed(chi2, "untouched"), None, {}),
            ("Matching all experts closes more over all experts than matching the 4 most critical.",
             of_all + paired, closed(everything, "all") - closed(chi2, "all"), PAGE, {}),
            ("Matching all experts costs the 4 most critical some of their match.", of_critical + paired,
             closed(everything, "critical") - closed(chi2, "critical"), None, {"holds": "below"}),
            ("Matching all experts closes more over all experts than a unigram of experts.", of_all + paired,
             closed(everything, "all") - closed("unigram/none/token", "all"), None, {}),
            ("Matching the 4 most critical experts closes more over them than a unigram of experts.",
             of_critical + paired, closed(chi2, "critical") - closed("unigram/none/token", "critical"), PAGE, {}),
        )
    ]  # fmt: skip

    def named(method: str) -> str:
        rule, calibrator, shared = method.split("/")
        what = "unigram of experts" if rule == "unigram" else f"{RULES[rule]}, {CALIBRATORS[calibrator]}"
        return f"{what}, {shared}s"

    def lines(methods: list[str], over: str) -> list[dict]:
        series = []
        for method in methods:
            ends = [interval(closed(method, over, size)) for size in range(len(SIZES))]
            series.append({"name": named(method), "x": SIZES} | dict(zip(
                ("y", "low", "high"), ([end[name] for end in ends] for name in ("value", "low", "high")), strict=True
            )))  # fmt: skip
        return series

    methods = ["/".join(method) for method in METHODS]
    whole = [found[task, None, 0] for task in range(len(tasks))]
    sources = [[name for name in tasks if name != task] for task in tasks]
    mismatch = [
        [task, *(of["diagnosis"].get(name) for name in ("verdict", "held_out", "noise", "gap")), of["tokens"][number],
         of["rows"][number], *(of["share"][rule] for rule in ("ratio", "log_odds"))]
        for number, (task, of) in enumerate(zip(tasks, whole, strict=True)) if "diagnosis" in of
    ]  # fmt: skip
    going = [
        [task, named(method), *(dict(zip(others, of["closed"][method][SIZE]["source"], strict=True)).get(name)
                                for name in tasks)]
        for task, others, of in zip(tasks, sources, whole, strict=True)
        for method in (chi2, rows, everything, random, "unigram/none/token")
    ]  # fmt: skip
    ceiling = np.array(
        [[np.mean([found[task, seed, half]["ceiling"][over] for seed in seeds for half in (0, 1)])
          for task in range(len(tasks))] for over in OVER[1:]]
    )  # fmt: skip
    tables = [
        {"title": "Mismatch of each task against the others, before any weights",
         "columns": ["forgotten", "verdict", "held-out ratio", "its noise", "gap per layer (0 to 2K)", "tokens", "rows",
                     "experts selected by ratio above 3", "by z-score above 5"], "rows": mismatch},
        {"title": "Share of the gap that weights close, at an effective sample of 0.2, on forget rows not seen",
         "columns": ["weights by", "4 most critical a layer", "neither these nor 4 at random", "all experts",
                     "all experts, rows seen", "largest weight"],
         "rows": [[named(method), *(interval(closed(method, over)) for over in OVER[1:]),
                   interval(closed(method, "all", held_out=False)), interval(closed(method, "largest"))]
                  for method in methods]
         + [["the frequencies of the other half exactly", *(interval(values) for values in ceiling), None, None]]},
        {"title": "Where the weights go at an effective sample of 0.2: share by retained task, all rows seen",
         "columns": ["forgotten", "weights by", *tasks], "rows": going},
    ]  # fmt: skip
    of_tokens = [method for method in methods if method.endswith("token") and method not in (kl, strength)]
    about = f"Mean over {len(tasks)} tasks forgotten in turn, with Student's interval; on forget rows not seen."

    def figure(name: str, title: str, what: str, shown: list[str], over: str) -> dict:
        x, y = "effective sample, share of the retain tokens", "share of their gap closed"
        caption = f"{what} {about}"
        return {"name": name, "title": title, "caption": caption, "kind": "lines", "log_x": True, "x": x, "y": y} | {
            "series": lines(shown, over)
        }

    calibrators = [chi2, kl, strength, rows, "difference/kl/row"]
    figures = [
        figure("closed_by_calibrator", "What a sample buys over the 4 most critical experts, by calibrator and unit",
               "4 experts a layer by difference.", calibrators, "critical"),
        figure("closed_by_rule", "What a sample buys over all experts, by what is matched", "Weights of tokens.",
               of_tokens, "all"),
        figure("closed_critical_by_rule", "What it buys over the 4 most critical experts", "Weights of tokens.",
               of_tokens, "critical"),
    ]  # fmt: skip
    by_task = {
        kind: {method: {over: [closed(method, over, size, kind == "held out") for size in range(len(SIZES))]
                        for over in (*OVER, "sample", "largest")} for method in methods}
        for kind in ("held out", "in sample")
    }  # fmt: skip
    raw = {"tasks": tasks, "sizes": SIZES, "closed": by_task}
    about = {"question": 6, "name": "real_routing", "title": "What do weights reach on a published model's routing?"}
    return about | {"claims": claims, "tables": tables, "figures": figures, "raw": raw}


if __name__ == "__main__":
    main()
