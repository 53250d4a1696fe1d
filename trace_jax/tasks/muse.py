"""MUSE's four scores (2407.06460) from what a model wrote and how likely it found texts.

Two programs compute them and differ in every score. Each is followed to the letter, as a profile of its own:

  "muse"             github.com/swj0419/muse_bench at fcd6651 (metrics/{verbmem,knowmem,privleak,logger}.py, eval.py)
  "open_unlearning"  github.com/locuslab/open-unlearning at d3d7cf9 (src/evals/metrics/{utils,privacy,mia/*}.py,
                     src/data/{utils,qa,pretraining}.py, configs/eval/muse_metrics, configs/model/Llama-2-7b-hf.yaml)

Numbers of the two can't be compared with each other. Everything here is on outputs; `muse_task` makes them.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from trace_jax.config import fingerprint
from trace_jax.data.sources import part, read_records, revision_and_content, text_of
from trace_jax.evaluation import intervals
from trace_jax.evaluation.intervals import Interval, Measurement, named
from trace_jax.evaluation.likelihood import score_sequences
from trace_jax.evaluation.membership import AUC_UNTRAINED, SIDES, min_k_scores, privleak, privleak_auc
from trace_jax.evaluation.probes import rouge_l
from trace_jax.evaluation.task import HALF, SPLIT, MuseConfig, Scoreboard, Task, TaskScores, half_outcomes, halves
from trace_jax.models.generate import continue_tokens
from trace_jax.models.model import Model, TextCodec

VERBMEM_TOKENS, KNOWMEM_TOKENS = 128, 32  # new tokens at most
STOPS = ("\n\n", "\nQuestion", "Question:")  # what ends an answer
_PROMPT, _TEXT = 512, 2048  # tokens at which open-unlearning cuts prompts of KnowMem (with their marks) and other texts
_SETS = ("forget", "retain")  # of KnowMem
_KNOWMEM = tuple(f"knowmem_{name}" for name in _SETS)
_ASKED = ("verbmem", *_KNOWMEM)

# What transformers makes of decoded text with clean_up_tokenization_spaces=True, in this order.
_CLEANED = {" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'", " n't": "n't"}
_CLEANED |= {" 'm": "'m", " 's": "'s", " 've": "'ve", " 're": "'re"}


PREFIXES = {"muse": "muse_", "open_unlearning": "muse_ou_"}  # of the measurements' names of each profile


def clean_up(decoded: str) -> str:
    """Decoded tokens as both evaluators read them: without the spaces that English doesn't have, such as " n't"."""
    for old, new in _CLEANED.items():
        decoded = decoded.replace(old, new)
    return decoded


def prediction(decoded: str, profile: str, *, stops: Sequence[str] = (), end: str = "") -> str:
    """What is scored of the new tokens, decoded without special tokens: the text before the first of `stops`.

    open-unlearning cuts at `end` too, the end token as text, should it be written out.
    """
    text = clean_up(decoded)
    for word in (end, *stops) if end and profile != "muse" else stops:
        text = text.split(word)[0]
    return text if profile == "muse" else text.strip()


def truth_after(prompt: str, labels: str) -> str:
    """open-unlearning's ground truth: the decoded labels without the decoded prompt, wherever it stands in them.

    Where decoding makes other text of the prompt alone than of both together, nothing is taken away.
    """
    return clean_up(labels).replace(clean_up(prompt), "").strip()


def read_muse(base: str) -> dict[str, Any]:
    """The data of a MUSE corpus: pairs (prompt, truth) of "verbmem", pairs (question, answer) of "questions" and
    "examples" by set of KnowMem, and "texts" by side of PrivLeak.
    """

    def read(config: str, split: str, *columns: str) -> tuple[tuple[str, ...], ...]:
        source = part(base, config, split)
        numbered = enumerate(read_records(source), start=1)
        return tuple(tuple(text_of(record, c, f"{source} row {n}") for c in columns) for n, record in numbered)

    pairs = ("question", "answer")
    return {
        "verbmem": read("verbmem", "forget", "prompt", "gt"),
        "questions": {s: read("knowmem", f"{s}_qa", *pairs) for s in _SETS},
        "examples": {s: read("knowmem", f"{s}_qa_icl", *pairs) for s in _SETS},
        "texts": {side: tuple(text for (text,) in read("privleak", side, "text")) for side in SIDES},
    }


@dataclasses.dataclass(frozen=True)
class MuseTask(Task):
    """MUSE with the profiles of `config`. Make one with `muse_task`."""

    config: MuseConfig
    data: Mapping[str, Any]  # as `read_muse` gives it
    identity: str
    revision: str  # of the published data set, if it is one, and the hash of all that was read
    name: str = "muse"
    quick: bool = True
    generates: bool = True

    @property
    def board(self) -> Scoreboard:
        """KnowMem on forget against KnowMem on retain, of the profile that is named first."""
        halved = {name: f"{PREFIXES[self.config.profiles[0]]}{name}_half" for name in _ASKED}
        return Scoreboard(halved["knowmem_forget"], {halved["knowmem_retain"]: True}, halved)

    def score(self, model: Model, *, batch_size: int, mesh: Mesh | None) -> TaskScores:
        """Continues the prompts greedily and scores the texts. What both profiles ask is computed once."""
        codec, profiles = TextCodec.of(model), self.config.profiles
        end = codec.text(codec.special.eos[:1], special=True)
        arrays: dict[str, np.ndarray] = {}
        items: dict[str, Sequence[Mapping[str, Any]]] = {}
        asked = {profile: _asked(self.data, codec, profile) for profile in profiles}
        # What follows a stop string is never read, so nothing is written there.
        for limit, stops, names in ((VERBMEM_TOKENS, (), ("verbmem",)), (KNOWMEM_TOKENS, STOPS, _KNOWMEM)):
            prompts = list(dict.fromkeys(ids for own in asked.values() for name in names for ids in own[name][0]))
            settings = {"max_new_tokens": limit, "stop": stops, "batch_size": batch_size, "mesh": mesh}
            generated = zip(prompts, continue_tokens(model, prompts, **settings), strict=True)
            written = {ids: codec.text(one.tokens.tolist()) for ids, one in generated}
            for profile, name in itertools.product(profiles, names):
                prompts_here, truths = asked[profile][name]
                texts = [prediction(written[ids], profile, stops=stops, end=end) for ids in prompts_here]
                scale, stem = (100.0, False) if profile == "muse" else (1.0, True)
                values = arrays[full := PREFIXES[profile] + name] = scale * rouge_l(texts, truths, stem=stem)
                items[full.removeprefix("muse_")] = [
                    {"id": n, "generation": text, "ground_truth": truth, "rouge_l": float(value)}
                    for n, (text, truth, value) in enumerate(zip(texts, truths, values, strict=True))
                ]
        most = {profile: None if profile == "muse" else len(codec.start) + _TEXT for profile in profiles}
        ids = {side: [codec.ids(text) for text in self.data["texts"][side]] for side in SIDES}
        texts = dict.fromkeys(i[:n] for n in most.values() for side in SIDES for i in ids[side] if i)
        scored = score_sequences(model, list(texts), batch_size=batch_size, mesh=mesh)
        log_probs = {(): np.zeros(0, np.float32)} | {i: s.log_prob for i, s in zip(texts, scored, strict=True)}
        for profile, side in itertools.product(profiles, SIDES):
            own, prefix = [log_probs[i[: most[profile]]] for i in ids[side]], PREFIXES[profile]
            if profile == "muse":
                values = min_k_scores(own)
            else:  # it leaves out the last token, and computes in float32
                values = min_k_scores([x[:-1] for x in own], dtype=np.float32)
            arrays[f"{prefix}{side}_min_k"] = values
            items[f"{prefix}privleak_{side}".removeprefix("muse_")] = [
                {"id": n, "tokens": len(x), "min_k": float(value)}
                for n, (x, value) in enumerate(zip(own, values, strict=True))
            ]
        return TaskScores(arrays, items)

    def measure(self, scores: TaskScores, *, original, retrained, **resampling: Any) -> list[Measurement]:
        """The scores of each profile with their intervals. The original model's are not needed."""
        measurements: list[Measurement] = []

        def add(name: str, interval: Interval, note: str = "", split: str = SPLIT) -> None:
            full = f"{PREFIXES[profile]}{name}"
            measurements.append(named(full, split, interval, note, profile=profile, revision=self.revision))

        for profile in self.config.profiles:
            for name in _ASKED:
                values = scores.arrays[f"{PREFIXES[profile]}{name}"]
                add(name, intervals.bootstrap_mean(values, **resampling))
                for split, half in halves(len(values)).items():
                    add(f"{name}_half", intervals.bootstrap_mean(values[half], **resampling), HALF, split)
            sides, reference = _sides(scores, profile), _sides(retrained, profile) if retrained else None
            note = f"near {int(profile != 'muse')} the forget texts are remembered"
            leak = privleak(sides, reference, profile, **resampling)
            if reference is None:
                note += "; no retrained model to compare with" + (", so no PrivLeak" if leak is None else "")
            elif leak is None:
                note += "; the retrained model's AUC is zero, so no PrivLeak"
            add("privleak_auc", privleak_auc(sides, profile, **resampling), note)
            if leak is not None:
                assumed = f"AUC_retrain = {AUC_UNTRAINED} assumed: no retrained model" if reference is None else ""
                add("privleak", leak, assumed)
        return measurements

    def outcomes(self, scores: TaskScores, original, retrained) -> dict[str, np.ndarray]:
        """`question` and `score` of the halves of each set, of the profile that is named first."""
        pairs = [self.data["verbmem"], *(self.data["questions"][s] for s in _SETS)]
        prefix, outcomes = PREFIXES[self.config.profiles[0]], {}
        for name, own in zip(_ASKED, pairs, strict=True):
            outcomes |= half_outcomes(name, ["\n".join(pair) for pair in own], score=scores.arrays[prefix + name])
        return outcomes


def muse_task(config: MuseConfig) -> MuseTask:
    """Reads the data. Raises `DataError` (`read_muse`)."""
    data = read_muse(config.data)
    content = fingerprint(data)
    revision = revision_and_content(part(config.data, "verbmem", "forget"), content)
    return MuseTask(config, data, fingerprint("muse", config.profiles, content), revision)


def _asked(data: Mapping[str, Any], codec: TextCodec, profile: str) -> dict[str, tuple[list, list[str]]]:
    """(prompts as token ids, truths as text) of VerbMem and of both sets of KnowMem, as a profile asks."""
    prompts, truths = [codec.ids(prompt) for prompt, _ in data["verbmem"]], []
    for ids, (prompt, truth) in zip(prompts, data["verbmem"], strict=True):
        if profile == "muse":  # the first tokens of the truth alone, of which its start mark is one
            truths.append(clean_up(codec.text(codec.ids(truth)[:VERBMEM_TOKENS])))
        else:  # what follows as many tokens as the prompt has, in prompt and truth joined by a space
            labels = codec.ids(f"{prompt} {truth}")[len(ids) : len(ids) + _TEXT]
            truths.append(truth_after(codec.text(ids), codec.text(labels)))
    asked = {"verbmem": (prompts, truths)}
    for s in _SETS:
        solved = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in data["examples"][s])
        texts = [f"{solved}Question: {question}\nAnswer: " for question, _ in data["questions"][s]]  # with the space
        prompts, truths = [codec.ids(text) for text in texts], [answer for _, answer in data["questions"][s]]
        if profile != "muse":
            prompts = [ids[:_PROMPT] for ids in prompts]
            both = [codec.ids(text + answer)[:_PROMPT] for text, answer in zip(texts, truths, strict=True)]
            eos = codec.special.eos[:1]
            both = [ids if ids[-1:] == eos else ids + eos for ids in both]
            truths = [truth_after(codec.text(ids), codec.text(i)) for ids, i in zip(prompts, both, strict=True)]
        asked[f"knowmem_{s}"] = prompts, truths
    return asked


def _sides(scores: TaskScores, profile: str) -> tuple[np.ndarray, np.ndarray]:
    forget, holdout = (scores.arrays[f"{PREFIXES[profile]}{side}_min_k"] for side in SIDES)
    return forget, holdout
