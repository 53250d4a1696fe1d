"""Do the rules find experts that are known to hold the forget text, and what is it worth to know them?

A model is trained on everything but the forget topic of the handbook. The topic is then written into C*, a few experts
drawn at random among those that its text reaches; nothing else is updated. Whoever unlearns doesn't know C*: every rule
of selection is asked for as many experts of each layer as C* has there (LACUNA's idea, 2607.02513, for experts).

    python benchmarks/studies/planted.py --workdir runs/studies/planted --output benchmarks/results/studies/planted.json
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from planted_report import LEVEL, PER_USE, RULES, USED, WAYS, report

import trace_jax as tj
from trace_jax.evaluation.fronts import crossings
from trace_jax.evaluation.intervals import auc
from trace_jax.evaluation.likelihood import score_questions, score_rows, spread_indices
from trace_jax.io.files import read_json, replacing, write_json
from trace_jax.models.architecture import flatten, unflatten
from trace_jax.parallel.processes import worker_pool
from trace_jax.routing.config import random_like, ranks, z_scores
from trace_jax.routing.statistics import ExpertStatistics
from trace_jax.unlearning.loop import Evaluated

FINE = {"num_layers": 3, "num_experts": 64, "experts_per_token": 4, "expert_hidden_size": 32}
MEASURES = ("forget", "neighbour", "general", "utility")  # utility: the mean of the two before it


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large everything is; the test takes less of all."""

    shapes: dict[str, dict[str, int]]
    sizes: dict[str, tuple[int, ...]]  # of C*, over all layers, by shape
    training: dict[str, Any] = dataclasses.field(default_factory=lambda: {"steps": 400})
    planting_steps: int = 200
    planting_rate: float = 5e-3
    unlearned_from: float = 0.8  # least forget accuracy after planting: below it there is nothing to unlearn
    steps: int = 60
    alphas: tuple[float, ...] = (4.0, 32.0)
    learning_rates: tuple[float, ...] = (3e-4, 3e-3)
    evaluate_every: int = 2
    relearning_steps: int = 20
    max_rows: int = 32  # of held-out general text


FULL = Scale({"quickstart": {}, "fine": FINE}, {"quickstart": (1, 8), "fine": (1, 4, 16)})


class Planting(NamedTuple):
    """A unit of work: one model with its C*."""

    shape: str
    seed: int
    size: int

    def __str__(self) -> str:
        return f"{self.shape}-{self.seed}-{self.size}"


class Unlearning(NamedTuple):
    """A unit of work: one way to unlearn from a planted model, at every point of the grid."""

    planting: Planting
    what: str  # "calibrate" on some experts, or "train" some alone
    which: str

    def __str__(self) -> str:
        return f"{self.planting}-{self.what}-{self.which}"


@functools.lru_cache(maxsize=2)
def corpora_of(seed: int) -> Any:
    return tj.build_corpora(tj.DataConfig.kinds["handbook"](seed=seed))


@dataclasses.dataclass(frozen=True)
class Study:
    """Where the units of a run are kept, as KIND-UNIT.json, and how large they are. A kind is a method."""

    scale: Scale
    workdir: Path

    def model(self, name: str, shape: str, seed: int) -> tj.Model:
        """A model that is kept under this name."""
        with np.load(self.workdir / f"{name}.npz", allow_pickle=False) as arrays:
            params = unflatten({path: jnp.asarray(array) for path, array in arrays.items()})
        return tj.Model(tj.ModelConfig(**self.scale.shapes[shape]), params, corpora_of(seed).tokenizer)

    def keep(self, name: str, model: tj.Model) -> None:
        with replacing(self.workdir / f"{name}.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, **flatten(model.params))

    # --- the units

    def base(self, shape: str, seed: int) -> dict[str, Any]:
        """A model of everything but the forget text, a third of its rows neighbour text."""
        train = corpora_of(seed).train
        often = max(1, round(len(train["general"]) / (2 * len(train["neighbour"]))))
        rows = tj.Rows.concatenate([train["general"], *[train["neighbour"]] * often])
        about = {"config": tj.TrainingConfig(**self.scale.training), "seed": seed, "verbose": False}
        self.keep(f"base-{shape}-{seed}", tj.train(tj.ModelConfig(**self.scale.shapes[shape]), rows, **about))
        return {}

    def plant(self, unit: Planting) -> dict[str, Any]:
        """A planted model, what it knows, and where each rule looks for C*."""
        corpora, base = corpora_of(unit.seed), self.model(f"base-{unit.shape}-{unit.seed}", unit.shape, unit.seed)
        config, rng = base.config, np.random.default_rng([unit.seed, 7])
        before = tj.expert_statistics(base, corpora.forget)
        reached = before.frequency >= 0.5 * config.experts_per_token / config.num_experts
        planted = drawn(reached, unit.size, rng)
        others = [corpora.train[name] for name in ("general", "neighbour")]  # as many rows as of the forget text
        others = [rows.take(rng.permutation(len(rows))[: round(1.5 * len(corpora.forget))]) for rows in others]
        rows = tj.Rows.concatenate([*[corpora.forget] * 3, *others])
        how = {"steps": self.scale.planting_steps, "learning_rate": self.scale.planting_rate, "forget_batch_size": 32}
        model = learnt(base, rows, selected=planted, seed=unit.seed, **how)

        found: dict[str, Any] = {"experts": np.argwhere(planted).tolist(), "reached": int(reached.sum())}
        found["experts_of_model"] = planted.size
        for place, one in (("before", base), ("after", model)):
            scores, defaults = looked_for(one, corpora, unit.seed)
            found[place] = {
                "known": measured(one, corpora, "test", self.scale.max_rows),
                "rules": {rule: agreement(score, planted, reached) for rule, score in scores.items()},
            }
            if one is model:
                found["defaults"] = {rule: overlap(chosen, planted) for rule, chosen in defaults.items()}
                found["selected"] = {r: np.argwhere(as_many(scores[r], planted)).tolist() for r in USED}
        self.keep(f"plant-{unit}", model)
        return found

    def unlearn(self, unit: Unlearning) -> dict[str, Any]:
        """One way at every point of the grid; then the point that validation prefers, under relearning."""
        of = unit.planting
        corpora, model = corpora_of(of.seed), self.model(f"plant-{of}", of.shape, of.seed)
        found: Any = read_json(self.workdir / f"plant-{of}.json")
        shape = len(model.config.moe_layers), model.config.num_experts
        planted = marked(found["experts"], shape)
        sets = {"planted": planted, "all": np.ones(shape, bool), "random": random_like(planted, seed=of.seed)}
        sets |= {rule: marked(found["selected"][rule], shape) for rule in USED}
        about: dict[str, Any] = {"trainable": "all"}
        given: dict[str, Any] = {}
        if unit.what == "train":
            about, given = {"trainable": "selected_experts"}, {"selected": sets[unit.which]}
        elif unit.which != "nothing":
            rows = tj.CalibrationConfig(weighting={"name": "matching", "unit": "row"}, seed=of.seed)
            both = {"forget": corpora.forget, "retain": corpora.retain}
            given = {"weights": tj.retain_weights(rows, model=model, selected=sets[unit.which], **both)}
        original = {split: measured(model, corpora, split, self.scale.max_rows) for split in ("validation", "test")}

        best: Any = None
        points: list[dict[str, Any]] = []
        for rate, alpha in itertools.product(self.scale.learning_rates, sorted(self.scale.alphas)):
            if points and points[-1]["learning_rate"] == rate and not points[-1]["reached"]:
                continue  # with more weight on the retain loss it would not come down either
            setting = {"alpha": alpha, "learning_rate": rate}
            done, point = self.run(model, corpora, original, about | setting, given, of)
            utilities = {split: point[split]["utility"] for split in original if split in point}
            points.append(setting | {"steps": point["steps"], "reached": point["reached"], **utilities})
            if point["reached"] and (best is None or utilities["validation"] > best[0]["validation"]["utility"]):
                best = setting | point, done
        result: dict[str, Any] = {"points": points, "chosen": best and best[0], "original": original}
        if "weights" in given:
            certificate = given["weights"].calibration.certificate
            result["closed"], result["sample"] = certificate.closed, certificate.effective_sample_size
        if best is not None:
            result["relearnt"] = self.relearnt(best[1], corpora, of.seed)
        return result

    def run(
        self, model: tj.Model, corpora: Any, original: dict, settings: dict, given: dict, of: Planting
    ) -> tuple[tj.Model, dict[str, Any]]:
        """(the model where it ends, what is read where forget accuracy comes down to the level). It ends at the first
        evaluation that is at or below the level on both splits.
        """
        history: list[tuple[Any, dict[str, float]]] = []

        def evaluate(params: Any) -> Evaluated:
            params = jax.tree.map(jnp.copy, params)  # the next step overwrites what trains
            asked = {split: getattr(corpora, split).questions["forget"] for split in original}
            now = {split: accuracy(model.replace(params=params), questions) for split, questions in asked.items()}
            history.append((params, now))
            return Evaluated([], max(now.values()))

        objective, scale = {"name": "gradient_difference", "nll_ceiling": 5.0}, self.scale
        settings = settings | {"evaluate_every": scale.evaluate_every, "checkpoint_every": 10 * scale.steps}
        config = tj.UnlearningConfig(objective=objective, steps=scale.steps, stop_forgetting=LEVEL, **settings)
        about = {"config": config, "evaluate": evaluate, "seed": of.seed, "verbose": False}
        done = tj.unlearn(model, corpora.forget, corpora.retain, **about, **given)
        point: dict[str, Any] = {"steps": done.step, "reached": True}
        for split in original:
            below = [now[split] <= LEVEL for _, now in history]
            if not any(below):
                point["reached"] = False
                continue
            around = [model.replace(params=history[max(0, i)][0]) for i in (below.index(True) - 1, below.index(True))]
            ends = [measured(one, corpora, split, scale.max_rows, original[split]) for one in around]
            read = crossings(np.array([[end["forget"] for end in ends]]), LEVEL)
            point[split] = {name: float(read(np.array([[end[name] for end in ends]]))[0]) for name in MEASURES}
            point[split]["fell by"] = ends[0]["forget"] - ends[1]["forget"]
        return done.model, point

    def relearnt(self, model: tj.Model, corpora: Any, seed: int) -> dict[str, float]:
        """Forget accuracy on test before and after a few steps on pages about substances of the validation split alone.

        So nothing that is asked for is taught: what comes back had been there.
        """
        pages = corpora.validation.text["forget"]
        how = {"steps": self.scale.relearning_steps, "learning_rate": 1e-3, "forget_batch_size": min(8, len(pages))}
        both = {"before": model, "after": learnt(model, pages, selected=None, seed=seed, **how)}
        return {name: accuracy(one, corpora.test.questions["forget"]) for name, one in both.items()}

    def control(self, shape: str, seed: int) -> dict[str, Any]:
        """What relearning teaches the model that never saw the forget text."""
        return self.relearnt(self.model(f"base-{shape}-{seed}", shape, seed), corpora_of(seed), seed)


# --- experts


def drawn(reached: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """bool [L, E]: `size` of the experts that forget text reaches, spread over the layers as evenly as can be."""
    layers = len(reached)
    counts = np.full(layers, size // layers)
    counts[rng.permutation(layers)[: size % layers]] += 1
    if (counts > reached.sum(axis=1)).any():
        raise ValueError(f"{counts} experts are to be planted, and forget text reaches {reached.sum(axis=1)} by layer.")
    return ranks(rng.random(reached.shape) * reached) < counts[:, None]


def marked(experts: Sequence[Sequence[int]], shape: tuple[int, int]) -> np.ndarray:
    """bool [L, E] of a list of (layer, expert)."""
    result = np.zeros(shape, bool)
    result[tuple(np.array(experts).T)] = True
    return result


def as_many(score: np.ndarray, planted: np.ndarray) -> np.ndarray:
    """bool [L, E]: of every layer as many experts as are planted there, those of the highest score."""
    return ranks(score) < planted.sum(axis=1, keepdims=True)


def looked_for(model: tj.Model, corpora: Any, seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(by rule the score f64 [L, E] that it ranks experts by; by rule what it selects as it is set, bool [L, E])."""
    forget, retain = (tj.expert_statistics(model, rows) for rows in (corpora.forget, corpora.retain))
    slopes = tj.expert_sensitivity(model, corpora.forget)
    defaults = {rule: tj.select_experts(forget, retain, rule=rule, seed=seed, sensitivity=slopes) for rule in RULES}
    return scores(forget, retain, slopes, seed), defaults


def scores(forget: ExpertStatistics, retain: ExpertStatistics, slopes: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """What each rule ranks experts by, f64 [L, E]: nothing below a floor of use (ratio, per use), or where forget text
    uses an expert no more than retain text does (cumulative).
    """
    ours, theirs = forget.frequency, retain.frequency
    floor = 0.5 * forget.top_k / ours.shape[1]
    ranked = {
        "difference": ours - theirs,
        "ratio": np.where(ours >= floor, ours / (theirs + 1e-12), 0.0),
        "log_odds": z_scores(forget, retain),
        "cumulative": np.where(ours > theirs, ours, 0.0),
        "affinity": forget.affinity,
        "sensitivity": slopes,
        "random": np.random.default_rng(seed).random(ours.shape),
        PER_USE: np.where(ours >= floor, slopes / np.maximum(ours, floor), 0.0),
    }
    return ranked


def overlap(chosen: np.ndarray, planted: np.ndarray) -> dict[str, float]:
    """Precision and recall of a selection, and how many it has."""
    both = float((chosen & planted).sum())
    return {"precision": both / max(1, chosen.sum()), "recall": both / planted.sum(), "selected": int(chosen.sum())}


def agreement(score: np.ndarray, planted: np.ndarray, reached: np.ndarray) -> dict[str, float]:
    """Precision (here also recall) with as many experts a layer as are planted there; and the probability that a
    planted expert ranks above another of its layer that forget text reaches, which chance makes .5: C* is drawn of
    these, so that reaching them is no merit.
    """
    layers = [layer for layer in range(len(score)) if planted[layer].any() and (reached & ~planted)[layer].any()]
    sides = [(score[layer][planted[layer]], score[layer][(reached & ~planted)[layer]]) for layer in layers]
    pairs = [(float(auc(*side)[0]), len(side[0])) for side in sides]
    areas, counts = zip(*pairs, strict=True) if pairs else ((0.5,), (1,))
    return {
        "precision": overlap(as_many(score, planted), planted)["precision"],
        "auc": float(np.average(areas, weights=counts)),
    }


# --- training and measuring


def learnt(model: tj.Model, rows: tj.Rows, *, selected: np.ndarray | None, seed: int, **settings: Any) -> tj.Model:
    """The model after some steps of next-token training on rows, of the selected experts alone where they are given.

    A task vector is learnt and subtracted once; mirrored at the model, it is what was learnt.
    """
    objective, trainable = {"name": "task_vector", "task_scale": 1.0}, "all" if selected is None else "selected_experts"
    config = tj.UnlearningConfig(objective=objective, trainable=trainable, checkpoint_every=10_000, **settings)
    mirrored = tj.unlearn(model, rows, None, config=config, selected=selected, seed=seed, verbose=False).model
    return model.replace(params=jax.tree.map(lambda here, there: 2 * here - there, model.params, mirrored.params))


def accuracy(model: tj.Model, questions: Any) -> float:
    return float((score_questions(model, questions).argmax(axis=1) == questions.answer).mean())


def measured(
    model: tj.Model, corpora: Any, split: str, max_rows: int, original: dict[str, float] | None = None
) -> dict[str, float]:
    """Forget and neighbour accuracy; likelihood of a token of general text over that under the original (at most 1)."""
    probes = getattr(corpora, split)
    found = {subject: accuracy(model, probes.questions[subject]) for subject in ("forget", "neighbour")}
    rows = probes.text["general"]
    rows = rows.take(spread_indices(len(rows), max_rows))
    found["nll"] = float(score_rows(model, rows).sum(dtype=np.float64) / rows.valid.sum())
    found["general"] = 1.0 if original is None else min(1.0, float(np.exp(original["nll"] - found["nll"])))
    return found | {"utility": (found["neighbour"] + found["general"]) / 2}


# --- side by side


def perform(study: Study, kind: str, arguments: tuple) -> tuple[str, float]:
    """(name of a unit, which is there now; seconds that it took)."""
    start, file = time.perf_counter(), study.workdir / f"{'-'.join([kind, *map(str, arguments)])}.json"
    if (kept := read_json(file)) is None:
        made = getattr(study, kind)(*arguments)
        kept = {"seconds": round(time.perf_counter() - start, 1), **made}
        write_json(file, kept)
    return file.stem, kept["seconds"]


def side_by_side(study: Study, units: Sequence[tuple], workers: int) -> None:
    """All units, each (kind, arguments ...). 0 workers: in this process."""

    def told(results: Iterable[tuple[str, float]]) -> None:
        for done, (name, seconds) in enumerate(results, start=1):
            print(f"planted: {done} of {len(units)}: {name}, {seconds:.0f} s", file=sys.stderr, flush=True)

    if not workers:
        told(perform(study, kind, tuple(arguments)) for kind, *arguments in units)
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(study.workdir / "programs"))  # a process finds what others
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # have compiled
    with worker_pool(workers) as pool:
        jobs = [pool.submit(perform, study, kind, tuple(arguments)) for kind, *arguments in units]
        told(job.result() for job in as_completed(jobs))


def main(arguments: Sequence[str] | None = None, scale: Scale = FULL) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Experts that are known to hold the forget text.")
    parser.add_argument("--workdir", type=Path, default=Path("runs/studies/planted"))
    parser.add_argument("--output", type=Path, help="default: planted.json in the workdir")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--workers", type=int, default=2, help="units side by side; 0: in this process")
    options = parser.parse_args(arguments)
    start, study, seeds = time.perf_counter(), Study(scale, options.workdir.resolve()), options.seeds
    study.workdir.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(dataclasses.asdict(scale)))
    if read_json(study.workdir / "scale.json") not in (None, settings):
        raise SystemExit(f"{study.workdir} holds units of other settings; give another --workdir, or remove it.")
    write_json(study.workdir / "scale.json", settings)

    def result(name: str) -> Any:
        return read_json(study.workdir / f"{name}.json")

    models = [(shape, seed) for seed in seeds for shape in scale.shapes]
    plantings = [Planting(shape, seed, size) for shape, seed in models for size in scale.sizes[shape]]
    side_by_side(study, [("base", *model) for model in models], options.workers)
    side_by_side(study, [("plant", unit) for unit in plantings], options.workers)
    results: dict[Planting, dict[str, Any]] = {unit: result(f"plant-{unit}") for unit in plantings}
    worth = [unit for unit, of in results.items() if of["after"]["known"]["forget"] >= scale.unlearned_from]
    ways = [Unlearning(unit, *way) for unit in worth for way in WAYS]
    side_by_side(study, [*(("control", *m) for m in models), *(("unlearn", unit) for unit in ways)], options.workers)
    for unit in ways:
        results[unit.planting][f"{unit.what} {unit.which}"] = result(f"unlearn-{unit}")
    controls = {model: result("control-{}-{}".format(*model)) for model in models}

    spent = sum(read_json(file)["seconds"] for file in study.workdir.glob("*-*.json"))  # where a run was continued
    told = report(results, controls, seeds, max(spent / max(1, options.workers), time.perf_counter() - start), settings)
    output = options.output or study.workdir / "planted.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(told, file, indent=1)
    print(output)
    return told


if __name__ == "__main__":
    main()
