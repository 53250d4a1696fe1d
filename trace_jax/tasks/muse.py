"""MUSE's four scores (2407.06460) from what a model wrote and how likely it found texts.

Two programs compute them and differ in every score. Each is followed to the letter, as a profile of its own:

  "muse"             github.com/swj0419/muse_bench at fcd6651 (metrics/{verbmem,knowmem,privleak,logger}.py, eval.py)
  "open_unlearning"  github.com/locuslab/open-unlearning at d3d7cf9 (src/evals/metrics/{utils,privacy,mia/*}.py,
                     src/data/{utils,qa,pretraining}.py, configs/eval/muse_metrics, configs/model/Llama-2-7b-hf.yaml)

Numbers of the two can't be compared with each other. Everything here is on outputs; `muse_task` makes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from trace_jax.config import fingerprint
from trace_jax.data.sources import DataError, part, read_records, revision_and_content
from trace_jax.evaluation import intervals
from trace_jax.evaluation.config import MuseConfig
from trace_jax.evaluation.intervals import Interval
from trace_jax.evaluation.likelihood import score_sequences
from trace_jax.evaluation.measurement import Measurement, named
from trace_jax.evaluation.membership import AUC_UNTRAINED, min_k_scores, privleak, privleak_auc
from trace_jax.evaluation.rouge import rouge_l
from trace_jax.evaluation.task import SPLIT, TaskScores
from trace_jax.models.generate_text import continue_tokens
from trace_jax.models.model import Model

VERBMEM_TOKENS, KNOWMEM_TOKENS = 128, 32  # new tokens at most
STOPS = ("\n\n", "\nQuestion", "Question:")  # what ends an answer

# What transformers makes of decoded text with clean_up_tokenization_spaces=True, in this order.
_CLEANED = {" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'", " n't": "n't"}
_CLEANED |= {" 'm": "'m", " 's": "'s", " 've": "'ve", " 're": "'re"}


@dataclasses.dataclass(frozen=True)
class Profile:
    """Where the two evaluators differ.

    Attributes:
      prefix: of its measurements' names.
      scale: of VerbMem and KnowMem, as it prints them.
      stem: whether ROUGE stems words.
      member_is_high: direction of the AUC: near 1 for a model that remembers the forget texts, or near 0.
    """

    name: Literal["muse", "open_unlearning"]
    prefix: str
    scale: float
    stem: bool
    member_is_high: bool


PROFILES = {
    "muse": Profile("muse", "muse_", scale=100.0, stem=False, member_is_high=False),
    "open_unlearning": Profile("open_unlearning", "muse_ou_", scale=1.0, stem=True, member_is_high=True),
}


# --- texts


def knowmem_prompt(question: str, examples: Sequence[tuple[str, str]]) -> str:
    """All (question, answer) `examples`, then the question; it ends in "Answer: ", with the space. In both profiles."""
    before = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in examples)
    return f"{before}Question: {question}\nAnswer: "


def clean_up(decoded: str) -> str:
    """Decoded tokens as both evaluators read them: without the spaces that English doesn't have, such as " n't"."""
    for old, new in _CLEANED.items():
        decoded = decoded.replace(old, new)
    return decoded


def prediction(decoded: str, profile: Profile, *, stops: Sequence[str] = (), end: str = "") -> str:
    """What is scored of the new tokens, decoded without special tokens.

    Args:
      stops: the text is cut at the first of them; `STOPS` in KnowMem, none in VerbMem.
      end: the end token as text; open-unlearning cuts there too, should it be written out.
    """
    text = clean_up(decoded)
    if profile.name == "muse":
        return _cut(text, stops)
    return _cut(text, (end, *stops) if end else stops).strip()


def truth_after(prompt: str, whole: str) -> str:
    """open-unlearning's ground truth: the decoded labels without the decoded prompt, wherever it stands in them.

    Where decoding makes other text of the prompt alone than of both together, nothing is taken away.
    """
    return clean_up(whole).replace(clean_up(prompt), "").strip()


def rouge_scores(predictions: Sequence[str], truths: Sequence[str], profile: Profile) -> np.ndarray:
    """What VerbMem and KnowMem are the mean of, f64 [N]: ROUGE-L F-measure on the profile's scale."""
    return profile.scale * rouge_l(predictions, truths, stem=profile.stem)


def _cut(text: str, words: Sequence[str]) -> str:
    for word in words:
        text = text.split(word)[0]
    return text


# --- PrivLeak


def min_k_score(log_prob: np.ndarray, profile: Profile) -> float:
    """Min-40 % Prob of one text (`membership.min_k_scores`) from log_prob [n] of every token but the first, nats.

    open-unlearning leaves out the last one, and computes in float32.
    """
    if profile.name == "muse":
        return float(min_k_scores([log_prob])[0])
    return float(min_k_scores([log_prob[:-1]], dtype=np.float32)[0])


# What open-unlearning cuts, in tokens: prompts of KnowMem (with their marks) and other texts (without).
_PROMPT, _TEXT = 512, 2048
_SETS = ("forget", "retain")  # of KnowMem
_SIDES = ("forget", "holdout")  # of PrivLeak

Ids = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MuseData:
    """What is asked. `verbmem` is (prompt, truth); `questions` and `examples` are (question, answer) per set of
    KnowMem; `texts` per side of PrivLeak."""

    verbmem: tuple[tuple[str, str], ...]
    questions: Mapping[str, tuple[tuple[str, str], ...]]
    examples: Mapping[str, tuple[tuple[str, str], ...]]
    texts: Mapping[str, tuple[str, ...]]


def read_muse(base: str) -> MuseData:
    """The data of a MUSE corpus: configs verbmem (prompt, gt), knowmem (question, answer) and privleak (text).

    Raises:
      DataError: something is missing, or isn't text.
    """

    def read(config: str, split: str, *columns: str) -> tuple[tuple[str, ...], ...]:
        source = part(base, config, split)
        records = read_records(source)
        return tuple(_fields(record, columns, f"{source} row {n}") for n, record in enumerate(records, start=1))

    pairs: Any = {split: read("knowmem", split, "question", "answer") for s in _SETS for split in _splits(s)}
    verbmem: Any = read("verbmem", "forget", "prompt", "gt")
    return MuseData(
        verbmem=verbmem,
        questions={s: pairs[_splits(s)[0]] for s in _SETS},
        examples={s: pairs[_splits(s)[1]] for s in _SETS},
        texts={side: tuple(text for (text,) in read("privleak", side, "text")) for side in _SIDES},
    )


def _splits(name: str) -> tuple[str, str]:
    return f"{name}_qa", f"{name}_qa_icl"


def _fields(record: Mapping[str, Any], columns: Sequence[str], origin: str) -> tuple[str, ...]:
    for column in columns:
        value = record.get(column)
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"{origin}: {column} is {'empty' if isinstance(value, str) else 'no text'}; expected text in the "
                f"columns {', '.join(columns)} (there are {', '.join(sorted(record))})."
            )
    return tuple(record[column] for column in columns)


@dataclasses.dataclass(frozen=True)
class MuseTask:
    """MUSE with the profiles of `config`. Make one with `muse_task`.

    `revision` is that of the published data set, if it is one, and the hash of all that was read.
    """

    config: MuseConfig
    data: MuseData
    identity: str
    revision: str
    name: str = "muse"
    quick: bool = False

    def score(self, model: Model, *, batch_size: int, mesh: Mesh | None) -> TaskScores:
        """Continues the prompts greedily and scores the texts. What both profiles ask is computed once."""
        reader = Reader(model)
        profiles = [PROFILES[name] for name in self.config.profiles]
        asked = {p.name: _Asked(self.data, reader, p) for p in profiles}
        run: dict[str, Any] = {"batch_size": batch_size, "mesh": mesh}
        every = list(asked.values())
        limit = VERBMEM_TOKENS
        written = _continued(model, [i for a in every for i in a.verbmem], limit, (), **run)
        limit = KNOWMEM_TOKENS
        answers = _continued(model, [i for a in every for s in _SETS for i in a.knowmem[s]], limit, STOPS, **run)
        log_probs = _log_probs(model, [i for a in every for side in _SIDES for i in a.texts[side]], **run)
        arrays: dict[str, np.ndarray] = {}
        items: dict[str, Sequence[Mapping[str, Any]]] = {}
        for profile in profiles:
            here, keep = asked[profile.name], _Keep(profile, reader, arrays, items)
            keep.rouge("verbmem", [written[i] for i in here.verbmem], here.truths["verbmem"], ())
            for s in _SETS:
                found = [answers[i] for i in here.knowmem[s]]
                keep.rouge(f"knowmem_{s}", found, here.truths[f"knowmem_{s}"], STOPS)
            for side in _SIDES:
                keep.min_k(side, [log_probs[i] for i in here.texts[side]])
        return TaskScores(arrays, items)

    def measure(
        self,
        scores: TaskScores,
        *,
        original: TaskScores | None,
        retrained: TaskScores | None,
        resamples: int,
        seed: int,
    ) -> list[Measurement]:
        """The scores of each profile with their intervals. The original model's are not needed."""
        sampling: dict[str, Any] = {"resamples": resamples, "seed": seed}
        found: list[Measurement] = []

        def add(name: str, interval: Interval, note: str = "") -> None:
            full = f"{profile.prefix}{name}"
            found.append(named(full, SPLIT, interval, note, profile=profile.name, revision=self.revision))

        for profile in (PROFILES[name] for name in self.config.profiles):
            for name in ("verbmem", *(f"knowmem_{s}" for s in _SETS)):
                values = scores.arrays[f"{profile.prefix}{name}"]
                add(name, intervals.bootstrap_mean(values, **sampling))
            sides, reference = _sides(scores, profile), _sides(retrained, profile) if retrained else None
            note = f"near {int(profile.member_is_high)} the forget texts are remembered"
            leak = privleak(sides, reference, profile.name, **sampling)
            if reference is None:
                note += "; no retrained model to compare with" + (", so no PrivLeak" if leak is None else "")
            elif leak is None:
                note += "; the retrained model's AUC is zero, so no PrivLeak"
            auc = privleak_auc(sides, profile.name, **sampling)
            add("privleak_auc", auc, note)
            if leak is not None:
                assumed = f"AUC_retrain = {AUC_UNTRAINED} assumed: no retrained model" if reference is None else ""
                add("privleak", leak, assumed)
        return found


def muse_task(config: MuseConfig) -> MuseTask:
    """Reads the data. Raises `DataError` (`read_muse`)."""
    data = read_muse(config.data)
    content = fingerprint(dataclasses.asdict(data))
    revision = revision_and_content(part(config.data, "verbmem", "forget"), content)
    return MuseTask(config, data, fingerprint("muse", config.profiles, content), revision)


class Reader:
    """A model's tokenizer as transformers uses it: whole texts, marks that are written out read as marks.

    A text starts with what the tokenizer itself puts before one (add_special_tokens=True in both evaluators): the BOS
    of Llama, Mixtral and DeepSeek, nothing for OLMoE and Qwen. A tokenizer that doesn't say (one that was trained
    here) leaves it to the model's BOS. A text that starts with the mark already doesn't get a second one.
    """

    def __init__(self, model: Model):
        if model.tokenizer is None:
            raise ValueError("the model has no tokenizer; MUSE's texts can't be read.")
        tokenizer = Tokenizer.from_str(model.tokenizer.to_str())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = False
        self._tokenizer = tokenizer
        self.start = _start(tokenizer, model.special.bos)
        self._eos = model.special.eos[:1]
        self.end = tokenizer.decode(list(self._eos), skip_special_tokens=False) if self._eos else ""

    def ids(self, text: str) -> Ids:
        """Token ids with the start mark."""
        ids = tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
        return ids if ids[: len(self.start)] == self.start else self.start + ids

    def with_end(self, ids: Ids) -> Ids:
        """`ids` with the end token, if it isn't there."""
        return ids if ids[-1:] == self._eos else ids + self._eos

    def text(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


def _start(tokenizer: Tokenizer, bos: int | None) -> Ids:
    if tokenizer.post_processor is None:
        return () if bos is None else (bos,)
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    marked = tokenizer.encode("a", add_special_tokens=True).ids
    return tuple(marked[: next(n for n in range(len(marked) + 1) if marked[n : n + len(plain)] == plain)])


class _Asked:
    """Everything as token ids, and the truths as text, for one profile."""

    def __init__(self, data: MuseData, reader: Reader, profile: Profile):
        to_the_letter = profile.name == "muse"
        self.verbmem = [reader.ids(prompt) for prompt, _ in data.verbmem]
        truth = _muse_truth if to_the_letter else _open_unlearning_truth
        self.truths = {"verbmem": [truth(reader, *pair) for pair in data.verbmem]}
        self.knowmem, self.texts = {}, {}
        for s in _SETS:
            prompts = [knowmem_prompt(question, data.examples[s]) for question, _ in data.questions[s]]
            answers = [answer for _, answer in data.questions[s]]
            whole = [reader.ids(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
            ids = [reader.ids(prompt) for prompt in prompts]
            if not to_the_letter:
                ids, whole = ([i[:_PROMPT] for i in several] for several in (ids, whole))
                both = zip(ids, map(reader.with_end, whole), strict=True)
                answers = [truth_after(reader.text(prompt), reader.text(i)) for prompt, i in both]
            self.knowmem[s], self.truths[f"knowmem_{s}"] = ids, answers
        for side in _SIDES:
            several = [reader.ids(text) for text in data.texts[side]]
            self.texts[side] = several if to_the_letter else [i[: len(reader.start) + _TEXT] for i in several]


def _muse_truth(reader: Reader, prompt: str, truth: str) -> str:
    """The first tokens of the truth alone, of which its start mark is one."""
    return clean_up(reader.text(reader.ids(truth)[:VERBMEM_TOKENS]))


def _open_unlearning_truth(reader: Reader, prompt: str, truth: str) -> str:
    """What follows as many tokens as the prompt has, in prompt and truth joined by a space."""
    length = len(reader.ids(prompt))
    labels = reader.ids(f"{prompt} {truth}")[length : length + _TEXT]
    return truth_after(reader.text(reader.ids(prompt)), reader.text(labels))


@dataclasses.dataclass(frozen=True)
class _Keep:
    """Puts scores of one profile among the arrays and audit items of all."""

    profile: Profile
    reader: Reader
    arrays: dict[str, np.ndarray]
    items: dict[str, Sequence[Mapping[str, Any]]]

    def rouge(self, name: str, tokens: Sequence[np.ndarray], truths: Sequence[str], stops: Sequence[str]) -> None:
        decoded = [self.reader.text(t.tolist()) for t in tokens]
        found = [prediction(t, self.profile, stops=stops, end=self.reader.end) for t in decoded]
        values = rouge_scores(found, truths, self.profile)
        self.arrays[self.profile.prefix + name] = values
        self.items[self._part(name)] = [
            {"id": n, "generation": text, "ground_truth": truth, "rouge_l": float(value)}
            for n, (text, truth, value) in enumerate(zip(found, truths, values, strict=True))
        ]

    def min_k(self, side: str, log_probs: Sequence[np.ndarray]) -> None:
        values = np.array([min_k_score(x, self.profile) for x in log_probs])
        self.arrays[f"{self.profile.prefix}{side}_min_k"] = values
        self.items[self._part(f"privleak_{side}")] = [
            {"id": n, "tokens": len(x), "min_k": float(value)}
            for n, (x, value) in enumerate(zip(log_probs, values, strict=True))
        ]

    def _part(self, name: str) -> str:
        return f"{self.profile.prefix.removeprefix('muse_')}{name}"


def _continued(
    model: Model, prompts: Sequence[Ids], limit: int, stop: Sequence[str], *, batch_size: int, mesh: Mesh | None
) -> dict[Ids, np.ndarray]:
    """New tokens of every different prompt. What follows a stop string is never read, so nothing is written there."""
    different = list(dict.fromkeys(prompts))
    found = continue_tokens(model, different, max_new_tokens=limit, stop=stop, batch_size=batch_size, mesh=mesh)
    return {ids: generated.tokens for ids, generated in zip(different, found, strict=True)}


def _log_probs(model: Model, texts: Sequence[Ids], *, batch_size: int, mesh: Mesh | None) -> dict[Ids, np.ndarray]:
    """Log-probabilities of all tokens but the first of every different text."""
    different = [ids for ids in dict.fromkeys(texts) if ids]
    found = score_sequences(model, different, batch_size=batch_size, mesh=mesh)
    return {(): np.zeros(0, np.float32)} | {i: f.log_prob for i, f in zip(different, found, strict=True)}


def _sides(scores: TaskScores, profile: Profile) -> tuple[np.ndarray, np.ndarray]:
    forget, holdout = (scores.arrays[f"{profile.prefix}{side}_min_k"] for side in _SIDES)
    return forget, holdout
