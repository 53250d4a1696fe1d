"""TOFU (2401.06121): four sets of questions, what a model says to them, and the benchmark's numbers.

An answer is scored as it was trained on, "Question: ...\\nAnswer: ..." unless the settings say otherwise, with the end
token as its last one. `log_prob` is the mean log-probability of its tokens: the logarithm of its length-normalised
probability P(answer | question)^(1/length). What is written is greedy, and ends at an end token or after
`max_new_tokens`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy
from jax.sharding import Mesh

from trace_jax.config import fingerprint, option
from trace_jax.data.corpora import Benchmark, DataConfig, Part
from trace_jax.data.sources import DataError, located, part, read_records, read_source, revision_and_content, text_of
from trace_jax.evaluation import intervals
from trace_jax.evaluation.intervals import Interval, Measurement, named
from trace_jax.evaluation.likelihood import score_sequences, spread_indices
from trace_jax.evaluation.probes import MEMORIZED, rouge_recalls
from trace_jax.evaluation.task import HALF, SPLIT, Scoreboard, Task, TaskScores, TofuConfig, half_outcomes, halves
from trace_jax.models.generate import continue_tokens
from trace_jax.models.model import Model, TextCodec, start_and_end
from trace_jax.models.sharding import pad
from trace_jax.tasks.text import TEXT_BOARD, hold_out

# --- the corpora of a model that is trained here

RETAIN = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}


class TofuCorpora(DataConfig, name="tofu", kw_only=True):
    """TOFU for a model that is trained from scratch: on the forget set, on the retain set, and on the real authors and
    world facts, which the published protocol's models know from pretraining; unlearning retains on the retain set
    alone. Pairs are seen about equally often. What `text` holds out of the retain set are pairs that are not
    among the 400 that evaluation asks.
    """

    forgotten = "the forget authors"
    board = TEXT_BOARD  # where evaluation.tofu is off, or the model can't be read on it

    data: str = option("huggingface:locuslab/TOFU", help="the data set; a directory has forget10/train.jsonl and so on")
    forget: str = option("forget10", help="the forget set", choices=tuple(RETAIN))

    @property
    def forget_sources(self) -> tuple[str, ...]:
        return self.sources[:1]

    @property
    def sources(self) -> tuple[str, ...]:
        names = self.forget, RETAIN[self.forget], "retain_perturbed", "real_authors", "world_facts"
        return tuple(part(self.data, name, "train") for name in names)

    def located(self) -> "TofuCorpora":
        return dataclasses.replace(self, data=located(self.data))

    def build(self) -> Benchmark:
        """Reads forget set, retain set, real authors and world facts, and which retain pairs are asked."""
        forget, retain, asked, *known = (read_source(source)[0] for source in self.sources)
        held = hold_out(retain, "retain", {d.hash for d in (*asked, *forget)}, np.random.default_rng([self.seed, 0]))
        train = {"general": held.train, "known": [d for several in known for d in several], "forget": forget}
        sizes = {name: sum(len(d.text) + len(d.answer or "") for d in several) for name, several in train.items()}
        return Benchmark(
            train=train,
            mixture={name: size / sum(sizes.values()) for name, size in sizes.items()},
            validation=Part({"general": held.validation}),
            test=Part({"general": held.test}),
            unretained=("known",),
        )


# --- formulas: log_prob f64 [N] of an answer, `wrong` f64 [N, W] of its wrong answers, NaN where there are fewer than W


def probability_among(log_prob: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """p(answer) / (p(answer) + sum of p(wrong)), f64 [N]: the probability of real authors and world facts.

    The code of TOFU and of open-unlearning takes length-normalised probabilities here, the paper's formula plain ones.
    """
    wrong = np.nan_to_num(wrong, nan=-np.inf)
    return scipy.special.softmax(np.concatenate([log_prob[:, None], wrong], axis=1), axis=1)[:, 0]


def log_truth_ratio(
    correct: np.ndarray, wrong: np.ndarray, wrong_mean: Literal["geometric", "arithmetic"] = "geometric"
) -> np.ndarray:
    """log(p(wrong) / p(correct)) of each item, f64 [N]: towards -inf the model knows better, at 0 it can't tell.

    `correct` is of the paraphrased answer (of the answer, for real authors and world facts). p(wrong): the "geometric"
    mean of the wrong answers' probabilities (TOFU's aggregate_eval_stat.py, which makes its leaderboard, and
    open-unlearning) or the "arithmetic" one (TOFU's paper, and the utility in its utils.py).
    """
    if wrong_mean == "geometric":
        return np.nanmean(wrong, axis=1) - correct
    counts = np.isfinite(wrong).sum(axis=1)
    return scipy.special.logsumexp(np.nan_to_num(wrong, nan=-np.inf), axis=1) - np.log(counts) - correct


def aggregated(
    log_ratio: np.ndarray, aggregator: Literal["closer_to_1_better", "true_better", "prob_mean"]
) -> np.ndarray:
    """What is averaged over items of the truth ratio R = p(wrong) / p(correct), f64 [N] in 0..1.

    "closer_to_1_better": min(R, 1/R), for forget questions. "true_better": max(0, 1 - R), for all others.
    "prob_mean": 1 / (1 + R) = p(correct) / (p(correct) + p(wrong)) (open-unlearning, 2506.12618, which adds 1e-10 to
    denominators: that makes R nearly 0, "true", where a broken model gives every answer less).
    """
    if aggregator == "closer_to_1_better":
        return np.exp(-np.abs(log_ratio))
    if aggregator == "true_better":
        return -np.expm1(np.minimum(log_ratio, 0.0))
    return scipy.special.expit(-log_ratio)


def harmonic_mean(values: np.ndarray) -> np.ndarray:
    """Harmonic mean over the last axis of non-negative values; 0 where one of them is 0."""
    with np.errstate(divide="ignore"):
        return values.shape[-1] / (1 / values).sum(axis=-1)


def model_utility(sets: Sequence[np.ndarray], *, resamples: int = 1000, seed: int = 0) -> Interval:
    """Harmonic mean of the means of all columns of all sets, with a bootstrap interval over the items within each set.

    `sets`: `_COLUMNS` of retain, real authors and world facts, f64 [N, 3] each; one of fewer than two has no interval.
    """
    value, n = float(harmonic_mean(np.concatenate([values.mean(axis=0) for values in sets]))), sum(map(len, sets))
    if min(map(len, sets)) < 2:
        return Interval(value, math.nan, math.nan, n)
    draws = intervals.resample_sides([*map(len, sets)], resamples=resamples, seed=seed)
    means = [np.concatenate([c @ x / len(x) for c, x in zip(counts, sets, strict=True)], axis=1) for counts in draws]
    return intervals.quantile_interval(value, harmonic_mean(np.concatenate(means)), n)


# --- the task

SETS = ("forget", "retain", "real_authors", "world_facts")
_COLUMNS = ("probability", "rougeL_recall", "truth_ratio")  # what model utility averages over the questions of a set
_HALVES = {f"tofu_{name}_{column}": "tofu_model_utility_half" for name in SETS[1:] for column in _COLUMNS}
_PARAPHRASED = ("forget", "retain")  # sets whose truth ratio is about a paraphrase of the answer
_NO_RETRAINED = (
    "no forget quality: it compares with the truth ratios of a model that was trained without the forget set "
    "(target.retrained, model.retrained, or evaluate --retrained)"
)


class Question(NamedTuple):
    """A question with its answer, the right answer of the truth ratio, and wrong answers (at least one)."""

    question: str
    answer: str
    correct: str
    wrong: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TofuTask(Task):
    """TOFU's four sets. Make one with `tofu_task`."""

    config: TofuConfig
    sets: Mapping[str, Sequence[Question]]
    revision: str  # of the published data set, if it is one, and the hash of all that was read
    name: str = "tofu"
    quick: bool = True
    generates: bool = True
    # Of forget quality the statistic, not the p-value: lower is more forgotten, its scale doesn't depend on the number
    # of questions, and between two evaluations a line can be drawn, where p goes through tens of powers of ten.
    board = Scoreboard(
        "tofu_forget_ks_half", {"tofu_model_utility_half": True}, {"tofu_forget": "tofu_forget_ks_half", **_HALVES}
    )

    @property
    def identity(self) -> str:
        """Hash of every question and answer and of the settings."""
        return fingerprint(self.config, self.sets)

    def score(self, model: Model, *, batch_size: int, mesh: Mesh | None) -> TaskScores:
        """Arrays by "SET/NAME", f64 over the N questions of a set: answer [N], correct [N], wrong [N, W] (mean
        log-probabilities, NaN where a question has fewer than W wrong answers), rouge [N, 2] (`rouge_recalls`), and of
        the forget set extraction_strength [N] and exact_memorization [N].
        """
        arrays, items = {}, {}
        codec, (start, end) = TextCodec.of(model), start_and_end(model.special)
        for name, questions in self.sets.items():
            prompts = [self.config.prompt.format(question=q.question) for q in questions]
            encoded = codec.pairs([
                (prompt, self.config.answer.format(answer=answer))
                for q, prompt in zip(questions, prompts, strict=True)
                for answer in (q.answer, q.correct, *q.wrong)
            ])  # fmt: skip
            sequences = [[start, *e.tokens.tolist(), end] for e in encoded]
            first = [1 + e.first_target for e in encoded]
            each = iter(score_sequences(model, sequences, first, batch_size=batch_size, mesh=mesh))
            scores = [[next(each) for _ in (q.answer, q.correct, *q.wrong)] for q in questions]
            means = [[one.log_prob.mean(dtype=np.float64) for one in several] for several in scores]
            answer, correct, *wrong = pad(means, fill=np.nan, dtype=np.float64).T.copy()
            own = {"wrong": np.stack(wrong, axis=1), "answer": answer, "correct": correct}
            if name == "forget":
                greedy = [of_answer.greedy for of_answer, *_ in scores]
                own |= {name: memorised(greedy) for name, memorised in MEMORIZED.items()}
            ids = [[start, *e.tokens.tolist()] for e in codec.pairs([(prompt, "") for prompt in prompts])]
            settings = {"max_new_tokens": self.config.max_new_tokens, "batch_size": batch_size, "mesh": mesh}
            written = [one.text.strip() for one in continue_tokens(model, ids, **settings)]
            own["rouge"] = rouge_recalls(written, [q.answer for q in questions])
            items[name] = [
                {"question": q.question, "generation": text, "ground_truth": q.answer}
                | {key: np.where(np.isnan(of[i]), np.array(None), of[i]).tolist() for key, of in own.items()}
                for i, (q, text) in enumerate(zip(questions, written, strict=True))
            ]
            arrays |= {f"{name}/{key}": values for key, values in own.items()}
        return TaskScores(arrays, items)

    def measure(self, scores: TaskScores, *, original, retrained, **resampling: Any) -> list[Measurement]:
        """Forget quality first (it needs the retrained model), model utility, then what they are made of."""
        arrays, ratio, measurements = scores.arrays, _forget_ratio(scores), []
        if retrained is not None:
            # Near 1 the two can't be told apart. The test sees ranks alone: ratios, their inverses (as TOFU's code has
            # them) and their logarithms give the same.
            both = np.stack([ratio, _forget_ratio(retrained)])
            parts = [("_half", split, both[:, half]) for split, half in halves(len(ratio)).items()]
            for suffix, split, asked in [("", SPLIT, both), *parts]:
                test: Any = scipy.stats.ks_2samp(*asked)
                n, against = asked.shape[1], "truth ratios against the retrained model's; no interval"
                for key, value, kind in (("quality", test.pvalue, "p-value"), ("ks", test.statistic, "statistic")):
                    name, comment = f"tofu_forget_{key}{suffix}", f"{kind}, Kolmogorov-Smirnov test of {n} {against}"
                    measurements.append(Measurement(float(value), np.nan, np.nan, n, name, split, comment))
        utility: dict[str, list[np.ndarray]] = {"": [], "_arithmetic": []}  # by the mean of wrong answers
        means: dict[str, np.ndarray] = {}  # what is averaged over the questions of a set
        for name in SETS:
            columns, arithmetic = _columns(arrays, name), _columns(arrays, name, "arithmetic")
            utility[""].append(columns)
            utility["_arithmetic"].append(arithmetic)
            means |= {f"{name}_{column}": x for column, x in zip(_COLUMNS, columns.T, strict=True)}
            means[f"{name}_truth_ratio_arithmetic"] = arithmetic[:, 2]
            means[f"{name}_rouge1_recall"] = arrays[f"{name}/rouge"][:, 0]
        means["forget_truth_ratio_prob_mean"] = aggregated(ratio, "prob_mean")
        means |= {f"forget_{key}": arrays[f"forget/{key}"] for key in MEMORIZED}
        for suffix, (_, *parts) in utility.items():  # forget questions don't count
            measurements.append(named(f"tofu_model_utility{suffix}", SPLIT, model_utility(parts, **resampling)))
        for split in halves(min(map(len, utility[""]))):
            own = [columns[halves(len(columns))[split]] for columns in utility[""][1:]]
            measurements.append(named("tofu_model_utility_half", split, model_utility(own, **resampling), HALF))
        for name, values in means.items():
            note = _NO_RETRAINED if retrained is None and name == "forget_truth_ratio" else ""
            measurements.append(named(f"tofu_{name}", SPLIT, intervals.bootstrap_mean(values, **resampling), note))
        return [dataclasses.replace(one, revision=self.revision) for one in measurements]

    def outcomes(self, scores: TaskScores, original, retrained: TaskScores | None) -> dict[str, np.ndarray]:
        """`question` and `score` of the halves: what model utility averages; and log R of forget questions, with the
        retrained model's as `reference`.
        """
        asked, outcomes = {name: [q.question for q in questions] for name, questions in self.sets.items()}, {}
        for name in SETS[1:]:
            for column, score in zip(_COLUMNS, _columns(scores.arrays, name).T, strict=True):
                outcomes |= half_outcomes(f"tofu_{name}_{column}", asked[name], score=score)
        if retrained is not None:
            ratios = {"score": _forget_ratio(scores), "reference": _forget_ratio(retrained)}
            outcomes |= half_outcomes("tofu_forget", asked["forget"], **ratios)
        return outcomes


def _forget_ratio(scores: TaskScores) -> np.ndarray:
    return log_truth_ratio(scores.arrays["forget/correct"], scores.arrays["forget/wrong"])


def _columns(
    arrays: Mapping[str, np.ndarray], name: str, wrong_mean: Literal["geometric", "arithmetic"] = "geometric"
) -> np.ndarray:
    """`_COLUMNS` of each question of a set, f64 [N, 3]."""
    answer, correct, wrong = (arrays[f"{name}/{key}"] for key in ("answer", "correct", "wrong"))
    probability = np.exp(answer) if name in _PARAPHRASED else probability_among(answer, wrong)
    ratio = log_truth_ratio(correct, wrong, wrong_mean)
    truth = aggregated(ratio, "closer_to_1_better" if name == "forget" else "true_better")
    return np.stack([probability, arrays[f"{name}/rouge"][:, 1], truth], axis=1)


def tofu_task(config: TofuConfig) -> TofuTask:
    """Reads the four sets."""
    places = {name: part(config.data, f"{name}_perturbed", "train") for name in SETS[1:]}
    places = {"forget": part(config.data, f"{config.forget}_perturbed", "train")} | places
    sets = {
        name: [_question(row, name, f"{source}:{i}") for i, row in enumerate(read_records(source), start=1)]
        for name, source in places.items()
    }
    revision = revision_and_content(places["forget"], fingerprint(sets))
    most = config.max_questions
    asked = {name: tuple(s[i] for i in spread_indices(len(s), most or len(s))) for name, s in sets.items()}
    return TofuTask(config, asked, revision)


def _question(row: Mapping[str, Any], name: str, origin: str) -> Question:
    columns = ("question", "answer", "paraphrased_answer" if name in _PARAPHRASED else "answer")
    question, answer, correct = (text_of(row, column, origin) for column in columns)
    wrong = row.get("perturbed_answer")
    wrong = [wrong] if isinstance(wrong, str) else wrong
    if not isinstance(wrong, Sequence) or not wrong or not all(isinstance(one, str) and one.strip() for one in wrong):
        raise DataError(f"{origin}: perturbed_answer is missing or no list of texts; expected the wrong answers.")
    return Question(question, answer, correct, tuple(wrong))
