"""Question 2 of the study: does damage follow routing or words, and where does re-weighting the retain set pay?

    python benchmarks/studies/damage.py --workdir runs/studies/damage --output benchmarks/results/studies/damage.json

First, a small mixture is trained on the graded domains of graded.py, and forgets several of them in turn with a uniform
retain loss; how much the held-out loss of each other domain rises, at equal forgetting, is set against how near it was
to the forgotten one by routing, words, hidden states and gradients of the model before. Then, one topic is forgotten
from retain sets in which a near, a middling or a far domain is rare or common, with uniform and weighted retain losses.

Whatever is done is kept in the workdir and found again.
"""

import argparse
import collections
import functools
import itertools
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any, NamedTuple

import graded
import jax
import numpy as np
from damage_report import report
from nearness import features, nearness
from safetensors.numpy import load_file, save_file

import trace_jax as tj
from trace_jax.evaluation.likelihood import score_rows
from trace_jax.io.files import read_json, replacing, write_json
from trace_jax.io.progress import quiet
from trace_jax.models.architecture import flatten, unflatten
from trace_jax.parallel.processes import usable_cores, worker_pool
from trace_jax.unlearning.loop import Evaluated

FEW = {"name": "difference", "top": 4}
ROWS = {"name": "matching", "unit": "row", "apply": "sampling"}
WEIGHTINGS = {
    "uniform": {"name": "uniform"},
    "few experts": {**ROWS, "rule": FEW},
    "all experts": {**ROWS, "rule": {"name": "all"}},
    "n-grams": {"name": "ngram", "apply": "sampling"},
    "hidden states": {"name": "hidden", "apply": "sampling"},
    "gradients": {"name": "gradient", "apply": "sampling"},
}


class Design(NamedTuple):
    """What the study varies, and its sizes."""

    shapes: tuple[tuple[str, tj.ModelConfig], ...]
    topics: tuple[str, ...]
    training: tj.TrainingConfig
    train_rows: int = 160  # of a domain
    held_rows: int = 24  # of a domain; half of them to choose by
    row_length: int = 128
    domains: tuple[str, ...] = ()  # empty: all
    level: float = 1.0  # rise of the forgotten rows' NLL, nats a token, at which damage is read
    real_level: float = 0.3  # the same of real text, whose relatives hold it back
    steps: int = 60
    alpha: float = 16.0
    learning_rate: float = 1e-3
    # the map
    map_shape: str = "quickstart"
    map_seeds: int = 4
    map_topic: str = "hazard"
    map_domains: tuple[str, ...] = ("same sentences and values", "other relations", "kitchen tables")
    map_shares: tuple[float, ...] = (0.005, 0.02, 0.07, 0.2)
    map_alphas: tuple[float, ...] = (16.0, 48.0)
    map_rows: int = 800
    weightings: tuple[str, ...] = tuple(WEIGHTINGS)

    def level_of(self, topic: str) -> float:
        return self.real_level if topic in graded.ERAS else self.level


FINE = tj.ModelConfig(num_layers=3, num_experts=64, experts_per_token=4, expert_hidden_size=32)
FULL = Design(
    shapes=(("quickstart", tj.ModelConfig()), ("fine-grained", FINE)),
    topics=("hazard", "people", "recipes", "Polk, 1845-1848"),
    training=tj.TrainingConfig(steps=600),
)


class World(NamedTuple):
    """What the units of one seed and shape share."""

    model: tj.Model
    train: dict[str, tj.Rows]
    held: dict[str, tj.Rows]


def target_path(workdir: Path, seed: int, shape: str) -> Path:
    return workdir / f"seed-{seed}" / shape / "target.safetensors"


@functools.lru_cache(maxsize=1)
def corpora(design: Design, seed: int) -> tuple[Any, dict[str, tj.Rows], dict[str, tj.Rows]]:
    """(tokenizer, training rows, held-out rows) of every domain, drawn for the seed."""
    domains = graded.make_domains(seed)
    domains = {name: domains[name] for name in design.domains or domains}
    rng = np.random.default_rng([seed, 3])
    tokenizer = tj.train_tokenizer(
        [t[:20_000] for d in domains.values() for t in d.train[:200]], dict(design.shapes)[design.map_shape].vocab_size
    )
    parts: list[dict[str, tj.Rows]] = [{}, {}]
    for name, domain in domains.items():
        for part, texts, count in zip(parts, domain, (design.train_rows, design.held_rows), strict=True):
            rows = tj.pack(texts, tokenizer, row_length=design.row_length)
            if len(rows) < count:
                raise ValueError(f"domain {name!r} has {len(rows)} rows, and {count} are needed; make more pages.")
            part[name] = rows.take(rng.permutation(len(rows))[:count])
    return tokenizer, *parts


@functools.lru_cache(maxsize=1)
def world(design: Design, workdir: Path, seed: int, shape: str) -> World:
    """The target model and its corpora; trained where it isn't kept."""
    tokenizer, train, held = corpora(design, seed)
    config, path = dict(design.shapes)[shape], target_path(workdir, seed, shape)
    if path.exists():
        params = unflatten({name: jax.numpy.asarray(x) for name, x in load_file(path).items()})
        return World(tj.Model(config, params, tokenizer), train, held)
    rows = tj.Rows.concatenate(list(train.values()))
    model = tj.train(config, rows, config=design.training, tokenizer=tokenizer, seed=seed, verbose=False)
    with replacing(path) as temporary:
        save_file({name: np.asarray(x) for name, x in flatten(model.params).items()}, temporary)
    return World(model, train, held)


def mean_nll(model: tj.Model, rows: tj.Rows) -> float:
    return float(score_rows(model, rows).sum(dtype=np.float64) / rows.valid.sum())


def by_domain(model: tj.Model, parts: Mapping[str, tj.Rows]) -> dict[str, float]:
    """Mean NLL of each, of one pass over all."""
    nll = score_rows(model, tj.Rows.concatenate(list(parts.values()))).sum(axis=1, dtype=np.float64)
    ends = np.cumsum([len(rows) for rows in parts.values()])[:-1]
    return {n: float(x.sum() / parts[n].valid.sum()) for n, x in zip(parts, np.split(nll, ends), strict=True)}


# --- unlearning


def crossing(rows: Sequence[Mapping[str, Any]], level: float) -> dict[str, float] | None:
    """The numbers of the evaluations `rows` where "forget" first rises to `level`, interpolated; None: never."""
    for before, after in itertools.pairwise(rows):
        if before["forget"] < level <= after["forget"]:
            share = (level - before["forget"]) / (after["forget"] - before["forget"])
            return {name: before[name] + share * (after[name] - before[name]) for name in before}
    return None


def unlearned(
    design: Design, target: tj.Model, forget: tj.Rows, retain: tj.Rows, held: Mapping[str, tj.Rows], *,
    level: float, alpha: float, seed: int, weights: Any = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Rise of NLL at every evaluation, until the forgotten rows' has risen to the level: of them and of each `held`."""
    parts = {"forget": forget.take(np.arange(min(24, len(forget)))), **held}
    start, rows = by_domain(target, parts), []

    def evaluate(params):
        now = by_domain(target.replace(params=params), parts)
        rows.append({name: now[name] - start[name] for name in now})
        return Evaluated([], forgetting=-rows[-1]["forget"])

    config = tj.UnlearningConfig(
        objective="gradient_difference", alpha=alpha, steps=design.steps, learning_rate=design.learning_rate,
        evaluate_every=2, checkpoint_every=1000, stop_forgetting=-level,
    )  # fmt: skip
    tj.unlearn(target, forget, retain, config=config, weights=weights, seed=seed, evaluate=evaluate, verbose=False)
    return rows


# --- units of work


def train_target(design: Design, workdir: Path, seed: int, shape: str) -> dict[str, Any]:
    of = world(design, workdir, seed, shape)
    return {"held_out_nll": by_domain(of.model, of.held), "trained_nll": by_domain(of.model, of.train)}


def measure(design: Design, workdir: Path, seed: int, shape: str) -> dict[str, Any]:
    """Nearness of every domain to each topic."""
    of = world(design, workdir, seed, shape)
    found = features(of.model, of.train)
    return {t: {n: x.tolist() for n, x in nearness(found, of.train, t, few=FEW["top"]).items()} for t in design.topics}


def damage(design: Design, workdir: Path, seed: int, shape: str, topic: str) -> dict[str, Any]:
    """Damage to every domain but the topic, at equal forgetting; None where that is not reached."""
    of = world(design, workdir, seed, shape)
    others = [name for name in of.train if name != topic]
    retain, held = tj.Rows.concatenate([of.train[n] for n in others]), {n: of.held[n] for n in others}
    about = {"level": design.level_of(topic), "alpha": design.alpha, "seed": seed}
    rows = unlearned(design, of.model, of.train[topic], retain, held, **about)
    return {"forget": [row["forget"] for row in rows], "damage": crossing(rows, about["level"])}


def mapped(design: Design, workdir: Path, seed: int, domain: str, share: float, weighting: str) -> dict[str, Any]:
    """One cell of the map and one weighting, by alpha."""
    of = world(design, workdir, seed, design.map_shape)
    general = [
        name for name in (*graded.ERAS, *graded.FORMS) if name in of.train and name not in (design.map_topic, domain)
    ]
    pool = tj.Rows.concatenate([of.train[n] for n in general])
    count = round(share * design.map_rows)
    rng = np.random.default_rng([seed, 4])
    retain = tj.Rows.concatenate(
        [of.train[domain].take(np.arange(count)), pool.take(rng.permutation(len(pool))[: design.map_rows - count])]
    )
    half, held = design.held_rows // 2, {}
    for split, part in {"validation": np.arange(half), "test": np.arange(half, 2 * half)}.items():
        held[f"domain {split}"] = of.held[domain].take(part)
        held[f"general {split}"] = tj.Rows.concatenate([of.held[n].take(part[: max(1, half // 3)]) for n in general])
    forget = of.train[design.map_topic]
    config = tj.CalibrationConfig(weighting=WEIGHTINGS[weighting], seed=seed)
    weights = tj.retain_weights(config, model=of.model, forget=forget, retain=retain)
    per_row = weights.row_probability
    about = {"domain_share": float(per_row[:count].sum()), "effective_sample": weights.effective_sample_size}
    runs = {}
    for alpha in design.map_alphas:
        about_run = {"level": design.level, "alpha": alpha, "seed": seed, "weights": weights}
        rows = unlearned(design, of.model, forget, retain, held, **about_run)
        runs[f"{alpha:g}"] = {"evaluations": len(rows), "damage": crossing(rows, design.level)}
    return about | {"runs": runs}


KINDS = {"target": train_target, "nearness": measure, "damage": damage, "map": mapped}
Unit = tuple[Any, ...]  # kind, seed, and what else its function takes


def phases(design: Design, seeds: Sequence[int]) -> list[list[Unit]]:
    """Units of which each phase needs the one before."""
    targets = [("target", seed, shape) for seed in seeds for shape, _ in design.shapes]
    after = []  # target by target, so that a worker reads few of them
    for _, *target in targets:
        after += [("nearness", *target), *(("damage", *target, topic) for topic in design.topics)]
    cells = itertools.product(seeds[: design.map_seeds], design.map_domains, design.map_shares, design.weightings)
    return [targets, after, [("map", *cell) for cell in cells]]


def unit_path(workdir: Path, unit: Unit) -> Path:
    kind, seed, *rest = (str(x).replace(",", "").replace(" ", "_") for x in unit)
    return workdir / f"seed-{seed}" / kind / f"{'@'.join(rest)}.json"


def do(design: Design, workdir: Path, unit: Unit) -> float:
    """Makes a unit that isn't kept; seconds of what is kept."""
    path = unit_path(workdir, unit)
    if (kept := read_json(path)) is None:
        start = time.perf_counter()
        with quiet():
            made = KINDS[unit[0]](design, workdir, *unit[1:])
        kept = {"seconds": round(time.perf_counter() - start, 1), **made}
        write_json(path, kept)
    return kept["seconds"]


def do_all(design: Design, workdir: Path, seeds: Sequence[int], workers: int) -> None:
    """Every unit, in order of the phases; `workers` 0: in this process."""
    parts = phases(design, seeds)
    total, done = sum(map(len, parts)), 0

    def told(results: Iterable[tuple[Unit, float]]) -> None:
        nonlocal done
        for unit, seconds in results:
            done += 1
            print(
                f"damage: {done} of {total}: {' '.join(map(str, unit))}, {seconds:.0f} s", file=sys.stderr, flush=True
            )

    if not workers:
        for part in parts:
            told((unit, do(design, workdir, unit)) for unit in part)
        return
    with worker_pool(workers) as pool:
        for part in parts:
            futures = {pool.submit(do, design, workdir, unit): unit for unit in part}
            told((futures[future], future.result()) for future in as_completed(futures))


def collected(design: Design, workdir: Path, seeds: Sequence[int]) -> dict[str, dict[Unit, Any]]:
    """What is kept, by kind and by what else tells a unit apart."""
    found: dict[str, dict[Unit, Any]] = collections.defaultdict(dict)
    for unit in itertools.chain(*phases(design, seeds)):
        found[unit[0]][unit[1:]] = read_json(unit_path(workdir, unit))
    return found


def main(arguments: Sequence[str] | None = None, design: Design = FULL) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/studies/damage"))
    parser.add_argument("--output", type=Path, help="JSON of what was found")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--workers", type=int, default=usable_cores(), help="units side by side; 0: in this process")
    options = parser.parse_args(arguments)
    start, made_by = time.perf_counter(), {"design": repr(design)}
    if read_json(kept := options.workdir / "design.json") not in (None, made_by):
        parser.error(
            f"{options.workdir} keeps units of another design ({kept}); choose another --workdir, or remove it."
        )
    write_json(kept, made_by)
    do_all(design, options.workdir, options.seeds, options.workers)
    made = report(design, options.seeds, collected(design, options.workdir, options.seeds))
    of_units = made["raw"]["core_seconds"] / max(1, options.workers)  # more than this call took where it continued
    made["seconds"] = round(max(time.perf_counter() - start, of_units), 1)
    if options.output:
        write_json(options.output, made)
    return made


if __name__ == "__main__":
    main()
