"""MUSE: its scores by hand, and the task from files to measurements against both evaluators written out."""

import json

import numpy as np
import pytest
import tiny_checkpoints
import torch
from rouge_score import rouge_scorer
from sklearn.metrics import auc, roc_auc_score, roc_curve
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from tests.tiny import write_lines
from trace_jax.checkpoints.pretrained import load_pretrained
from trace_jax.config import ConfigError, resolve
from trace_jax.data.rows import train_tokenizer
from trace_jax.data.sources import DataError
from trace_jax.evaluation.membership import privleak, privleak_auc
from trace_jax.evaluation.task import EvaluationConfig, MuseConfig
from trace_jax.models.model import SpecialTokens, TextCodec
from trace_jax.tasks.benchmarks import build_tasks
from trace_jax.tasks.muse import STOPS, clean_up, muse_task, prediction, read_muse, truth_after

MUSE, OU = "muse", "open_unlearning"
NAMES = ["river", "stones", "stone", "clouds", "cloud", "tigers", "violin", "harbour", "window", "n't", "'s"]
WORDS = [*NAMES, "Question:", "Answer:"]
BOS, EOS = 1, 2


@pytest.mark.parametrize(
    ("text", "cut"),
    [("a b\n\nc", "a b"), ("a\nb\nQuestion x", "a\nb"), ("aQuestion: x\n\ny", "a"), ("\n\nx", ""), ("", "")],
)
def test_answers_end_at_the_first_stop(text, cut):
    assert prediction(text, MUSE, stops=STOPS) == cut and prediction(text, MUSE) == text
    assert prediction(text, OU, stops=STOPS) == cut.strip()
    # open-unlearning strips, and cuts at a written end
    assert [prediction(" a</s>b", profile, end="</s>") for profile in (MUSE, OU)] == [" a</s>b", "a"]


def test_spaces_are_cleaned_up_as_transformers_does():
    text = "He does n't , he 'd . I 'm , we 've , they 're ! Is it Tom 's ? A ' b"
    assert clean_up(text) == PreTrainedTokenizerFast.clean_up_tokenization(None, text)
    assert prediction("do n't", MUSE) == "don't"


def test_the_truth_of_open_unlearning_is_the_whole_without_the_prompt():
    assert truth_after("Answer: ", "Answer: Harry ") == "Harry"
    assert truth_after("Answer: ", "Answer: ") == ""  # where the prompt alone fills the row
    assert truth_after("", "Harry") == "Harry"
    # The full stop takes the prompt's space away, so that the prompt isn't found and all of it is the truth.
    assert truth_after("Answer: ", "Answer: .5 kg") == "Answer:.5 kg"


def test_privleak_is_that_of_both_evaluators_on_random_scores_with_ties():
    rng = np.random.default_rng(0)
    sides, retrained = ((rng.gamma(1.0, 2.0, 30).round(1), rng.gamma(1.0, shift, 25).round(1)) for shift in (2.5, 2.0))
    sides[1][:5] = sides[0][:5]
    labels = [0] * 30 + [1] * 25
    auc, reference = (roc_auc_score(labels, -np.concatenate(both)) for both in (sides, retrained))
    assert privleak_auc(sides, MUSE, resamples=100).value == pytest.approx(auc, abs=1e-9)
    found = privleak(sides, retrained, MUSE, resamples=100)
    assert found.value == pytest.approx((auc - reference) / reference * 100, abs=1e-7)
    assert found.low < found.value < found.high and found.n == 55
    auc, reference = (roc_auc_score(labels, np.concatenate(both)) for both in (sides, retrained))
    for other, ref in ((retrained, reference), (None, 0.5)):
        expected = ((1 - auc) - (1 - ref)) / (1 - ref + 1e-10) * 100
        assert privleak(sides, other, OU, resamples=100).value == pytest.approx(expected, abs=1e-7)


# --- the task


def write(directory, config, split, records):
    write_lines(directory / config / f"{split}.jsonl", records)


def make_data(directory):
    """Small sets of the published columns; prompts and texts beyond what open-unlearning cuts are among them."""
    rng = np.random.default_rng(0)

    def words(count):
        return " ".join(rng.choice(NAMES, count))

    write(directory, "verbmem", "forget", [{"prompt": words(n), "gt": words(n + 60)} for n in (9, 30)])
    for name, length, several in (("forget", 3, (3, 4)), ("retain", 24, (3, 71, 130))):
        pairs = [{"question": words(length), "answer": words(2)} for _ in range(10)]
        write(directory, "knowmem", f"{name}_qa_icl", pairs)
        write(directory, "knowmem", f"{name}_qa", [{"question": words(n), "answer": words(7)} for n in several])
    sizes = {"forget": (20, 3, 1700), "holdout": (25, 40, 5)}
    for side, several in sizes.items():
        write(directory, "privleak", side, [{"text": words(n)} for n in several])
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("muse"))


@pytest.fixture(scope="module")
def tokenizer():
    """As Llama's: it puts BOS before a text by itself."""
    found = train_tokenizer([" ".join(WORDS) + "\n\nQuestion: x\nAnswer: y"] * 4, 400)
    found.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return found


@pytest.fixture(scope="module")
def reference(tokenizer):
    """transformers' own model, which mostly writes whole words, and tokenizer."""
    changes = {"num_hidden_layers": 2, "vocab_size": 400, "sliding_window": None, "max_position_embeddings": 4096}
    model = tiny_checkpoints.build("mixtral", **changes)
    whole = [n for n in range(259, 400) if (tokenizer.id_to_token(n) or "").strip("Ġ") in [*WORDS, "ĊĊ"]]
    model.lm_head.weight[whole] *= 4
    marks = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)


@pytest.fixture(scope="module")
def task(data):
    return muse_task(MuseConfig(str(data)))


@pytest.fixture(scope="module")
def scores(task, reference, tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    tiny_checkpoints.save(reference[0], "mixtral", directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return task.score(load_pretrained(directory), batch_size=2, mesh=None)


def measured(task, scores, retrained=None):
    found = task.measure(scores, original=scores, retrained=retrained, resamples=100, seed=0)
    found = [m for m in found if not m.name.endswith("_half")]
    assert len({m.name for m in found}) == len(found)
    return {m.name: m for m in found}


# --- the two evaluators with transformers, one text at a time


class Naive:
    def __init__(self, model, tokenizer, directory):
        self.model, self.tokenizer, self.directory = model, tokenizer, directory

    def read(self, config, split):
        return [json.loads(line) for line in (self.directory / config / f"{split}.jsonl").read_text().split("\n")[:-1]]

    def decode(self, ids):
        decoded = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return self.tokenizer.clean_up_tokenization(decoded)

    def write(self, ids, count):
        options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": EOS}
        output = self.model.generate(torch.tensor([ids]), **options)
        return self.decode(output[0, len(ids) :])

    def log_probs(self, ids):
        logits = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return np.array([logits[i, token].item() for i, token in enumerate(ids[1:])], np.float32)

    def examples(self, name):
        pairs = self.read("knowmem", f"{name}_qa_icl")
        return "".join(f"Question: {p['question']}\nAnswer: {p['answer']}\n\n" for p in pairs)

    def rouge(self, pairs, stops=()):
        scores = []
        for text, truth in pairs:
            for word in stops:
                text = text.split(word)[0]
            scores.append(self.scorer.score(truth, self.stripped(text))["rougeL"].fmeasure)
        return np.mean(scores) * self.scale

    def sides(self):
        return [[self.score(d["text"]) for d in self.read("privleak", side)] for side in ("forget", "holdout")]


class NaiveMuse(Naive):
    scorer, scale, stripped = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False), 100, staticmethod(str)

    def verbmem(self):
        pairs = (
            [self.tokenizer(d[key])["input_ids"] for key in ("prompt", "gt")] for d in self.read("verbmem", "forget")
        )
        return self.rouge((self.write(prompt, 128), self.decode(truth[:128])) for prompt, truth in pairs)

    def knowmem(self, name):
        pairs = []
        for d in self.read("knowmem", f"{name}_qa"):
            prompt = self.examples(name) + f"Question: {d['question']}\nAnswer: "
            pairs.append((self.write(self.tokenizer(prompt)["input_ids"], 32), d["answer"]))
        return self.rouge(pairs, ("\n\n", "\nQuestion", "Question:"))

    def score(self, text):
        log_probs = [float(x) for x in self.log_probs(self.tokenizer(text)["input_ids"])]
        return float(-np.mean(np.sort(log_probs)[: int(len(log_probs) * 0.4)]))

    def auc(self):
        forget, holdout = self.sides()
        false, true, _ = roc_curve([0] * len(forget) + [1] * len(holdout), -np.array(forget + holdout))
        return auc(false, true)


class NaiveOpenUnlearning(Naive):
    scorer, scale, stripped = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True), 1, staticmethod(str.strip)

    def verbmem(self):
        pairs = []
        for d in self.read("verbmem", "forget"):
            prefix = self.tokenizer(d["prompt"])["input_ids"]
            whole = self.tokenizer(d["prompt"] + " " + d["gt"])["input_ids"][: len(prefix) + 2048]
            truth = self.decode(whole[len(prefix) :]).replace(self.decode(prefix), "").strip()
            pairs.append((self.write(prefix, 128), truth))
        return self.rouge(pairs, ("<eos>",))

    def knowmem(self, name):
        pairs = []
        for d in self.read("knowmem", f"{name}_qa"):
            prompt = self.examples(name) + "Question: " + d["question"] + "\n" + "Answer: "
            cut = {"max_length": 512, "truncation": True, "add_special_tokens": True}
            prefix, whole = (self.tokenizer(t, **cut)["input_ids"] for t in (prompt, prompt + d["answer"]))
            whole = whole if whole[-1] == EOS else [*whole, EOS]
            truth = self.decode(whole).replace(self.decode(prefix), "").strip()
            pairs.append((self.write(prefix, 32), truth))
        return self.rouge(pairs, ("<eos>", "\n\n", "\nQuestion", "Question:"))

    def score(self, text):
        ids = self.tokenizer(text)["input_ids"][: len(self.tokenizer("")["input_ids"]) + 2048]
        log_probs = self.log_probs(ids)[:-1]
        return -np.mean(np.sort(log_probs)[: max(1, int(len(log_probs) * 0.4))])

    def auc(self):
        forget, holdout = self.sides()
        return roc_auc_score([0] * len(forget) + [1] * len(holdout), forget + holdout)


def test_every_number_is_that_of_both_evaluators(task, scores, data, reference):
    found = measured(task, scores)
    for naive, prefix in ((NaiveMuse, "muse_"), (NaiveOpenUnlearning, "muse_ou_")):
        evaluator = naive(*reference, data)
        values = {"verbmem": evaluator.verbmem(), "privleak_auc": evaluator.auc()}
        values |= {f"knowmem_{name}": evaluator.knowmem(name) for name in ("forget", "retain")}
        assert values["verbmem"] > 0 and values["knowmem_forget"] > 0 and 0 < values["privleak_auc"] < 1
        for name, value in values.items():
            assert found[prefix + name].value == pytest.approx(value, abs=1e-6), prefix + name
    theirs = 1 - values["privleak_auc"]
    assert found["muse_ou_privleak"].value == pytest.approx((theirs - 0.5) / (0.5 + 1e-10) * 100, abs=1e-6)
    for part, name in (("verbmem", "muse_verbmem"), ("ou_knowmem_forget", "muse_ou_knowmem_forget")):
        items = scores.items[part]  # which say where each number comes from
        assert [item["id"] for item in items] == list(range(len(items))) and found[name].n == len(items)
        assert np.mean([item["rouge_l"] for item in items]) == pytest.approx(found[name].value)
        assert all(set(item) == {"id", "generation", "ground_truth", "rouge_l"} for item in items)
    json.dumps(scores.items)


def test_what_is_long_is_cut_in_open_unlearning_only(scores, data):
    """512 tokens hold all of the first retain question and answer, part of the second answer, none of the third."""
    answers = [json.loads(x)["answer"] for x in (data / "knowmem/retain_qa.jsonl").read_text().split("\n")[:-1]]
    assert [item["ground_truth"] for item in scores.items["knowmem_retain"]] == answers
    whole, partial, nothing = (item["ground_truth"] for item in scores.items["ou_knowmem_retain"])
    assert whole == clean_up(answers[0]) and 0 < len(partial) < len(clean_up(answers[1])) and nothing == ""
    assert scores.items["ou_privleak_forget"][2]["tokens"] == 2048 < scores.items["privleak_forget"][2]["tokens"]


def test_measurements_name_their_profile_and_what_they_lack(task, scores):
    found = measured(task, scores)
    assert {m.profile for name, m in found.items() if name.startswith("muse_ou_")} == {"open_unlearning"}
    assert {m.profile for name, m in found.items() if not name.startswith("muse_ou_")} == {"muse"}
    assert all(m.split == "test" and m.n > 0 and m.revision == task.revision for m in found.values())
    assert task.revision.startswith("sha256:")
    assert "muse_privleak" not in found and "no retrained model" in found["muse_privleak_auc"].note
    assert "0.5 assumed" in found["muse_ou_privleak"].note
    with_itself = measured(task, scores, retrained=scores)
    assert with_itself["muse_privleak"].value == with_itself["muse_ou_privleak"].value == 0.0
    assert with_itself["muse_ou_privleak"].note == ""


# --- how texts start


def of_tokenizer(tokenizer, bos=BOS):
    return TextCodec(tokenizer, SpecialTokens(bos=bos, eos=(EOS,)), 100)


def test_a_text_starts_once_as_its_tokenizer_has_it(tokenizer):
    bare, silent, strict = (Tokenizer.from_str(tokenizer.to_str()) for _ in range(3))
    bare.post_processor, silent.post_processor = None, processors.ByteLevel(trim_offsets=False)
    text = tuple(tokenizer.encode("river", add_special_tokens=False).ids)
    assert of_tokenizer(tokenizer).ids("river") == (BOS, *text)
    assert of_tokenizer(tokenizer, bos=None).ids("river") == (BOS, *text), "the tokenizer decides"
    assert of_tokenizer(bare).ids("river") == (BOS, *text), "a bare tokenizer leaves it to the model"
    assert of_tokenizer(bare, bos=None).ids("river") == text
    assert of_tokenizer(silent).ids("river") == text, "Qwen's adds nothing, though its config.json names a BOS"
    strict.encode_special_tokens = True
    strict.enable_truncation(3)
    reader = of_tokenizer(strict)
    assert reader.ids("<bos>river") == reader.ids("river")
    assert len(reader.ids("river stones stone clouds cloud")) > 4, "nothing is cut"
    assert strict.encode_special_tokens and strict.truncation is not None, "or changed for others"
    assert reader.text((BOS, *reader.ids(" lamp"))) == " lamp" and reader.text([EOS], special=True) == "<eos>"


# --- data


def test_the_section_builds_the_task_whose_identity_follows_the_data(data, task, tmp_path):
    (built,) = build_tasks(resolve(EvaluationConfig, {"muse": {"data": str(data)}}))
    assert build_tasks(EvaluationConfig()) == () and built == task and (built.name, built.quick) == ("muse", True)
    with pytest.raises(ConfigError, match="expected one of muse, open_unlearning"):
        MuseConfig(str(data), profiles=("ou",))
    other = make_data(tmp_path)
    write(other, "verbmem", "forget", [{"prompt": "a", "gt": "b"}])
    changed = muse_task(MuseConfig(str(other)))
    assert changed.identity != task.identity and changed.revision != task.revision
    one = muse_task(MuseConfig(str(data), profiles=("open_unlearning",)))
    assert one.identity != task.identity and one.revision == task.revision


def test_data_of_another_form_is_refused(data, tmp_path):
    other = make_data(tmp_path)
    (other / "privleak" / "holdout.jsonl").unlink()
    with pytest.raises(DataError, match=r"privleak/holdout\.jsonl: there is no such file"):
        read_muse(str(other))
    for config, split, rows, message in (
        ("privleak", "holdout", [{"text": "a"}, {"text": " "}], r"holdout\.jsonl row 2: text is empty"),
        ("knowmem", "retain_qa", [{"question": "a", "say": "b"}], r"answer is missing; .* columns are question, say"),
    ):
        write(other, config, split, rows)
        with pytest.raises(DataError, match=message):
            read_muse(str(other))
