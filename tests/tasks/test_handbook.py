"""The two topics have one form, and a question can be answered from the pages and from nothing else."""

import collections
import dataclasses
import re

import numpy as np
import pytest

from trace_jax.tasks.handbook import OPTIONS, RELATIONS, HandbookConfig, make_pages, make_substances


@pytest.fixture(scope="module")
def benchmark():
    return HandbookConfig().build()


def test_relations_have_six_wordings_or_more_and_sixteen_values():
    for relation in RELATIONS:
        assert len(set(relation.templates)) >= 6 and len(set(relation.values)) == 16
        assert len(set(relation.paraphrases)) == 4 and not {f for r in RELATIONS for f in r.templates} & {*relation[2]}
        forms = (*relation.templates, *relation.paraphrases)
        assert all(re.fullmatch(r"\w.*\{name\}.* \{value\}\.", form) for form in forms)
    values = [v for r in RELATIONS for v in r.values]
    assert len(set(values)) == len(values)


def test_names_are_unique_words_that_no_address_holds(benchmark):
    names = [s.name for s in make_substances({"forget": 210}, rng=np.random.default_rng(0), avoid={"barine"})]
    assert len({n[:5].lower() for n in names}) == 210 and "Barine" not in names
    assert all(re.fullmatch(r"[A-Z][a-z]{4,14}", n) for n in names)
    text = " ".join(d.text for d in benchmark.train["general"]).lower().split()
    written = {d.origin.split("/")[2].lower() for topic in ("forget", "neighbour") for d in benchmark.train[topic]}
    assert len(written) == 210 and not written & set(text)


def test_topics_share_their_sentences_and_values_but_no_name(benchmark):
    names, forms = [], []
    for topic in ("forget", "neighbour"):
        names.append({d.origin.split("/")[2] for d in benchmark.train[topic]})
        pages = [d.text.replace(d.origin.split("/")[2], "NAME") for d in benchmark.train[topic]]
        forms.append({s.strip() for page in pages for s in re.findall(r"[^.]+\.", page)})
    assert not names[0] & names[1] and forms[0] ^ forms[1] == {"It is a hazard.", "It is harmless."}


def test_hazards_that_no_model_reads_of_are_held_out_if_asked_and_change_nothing_else(benchmark):
    more = HandbookConfig(holdout_substances=5).build()
    names = {d.origin.split("/")[2] for documents in more.train.values() for d in documents if "handbook" in d.origin}
    held_out = {d.origin.split("/")[2] for d in more.holdout}
    assert len(held_out) == 5 and not held_out & names and all("It is a hazard." in d.text for d in more.holdout)
    assert (more.train, more.test, benchmark.holdout) == (benchmark.train, benchmark.test, [])


def test_values_are_balanced_within_a_topic_and_independent_of_the_other():
    one, two = (make_substances({"forget": 60, "neighbour": 150}, rng=np.random.default_rng(s)) for s in (0, 1))
    for topic, count in (("forget", 60), ("neighbour", 150)):
        for relation in range(len(RELATIONS)):
            uses = np.bincount([s.values[relation] for s in one if s.topic == topic], minlength=16)
            assert uses.sum() == count and np.ptp(uses) <= 1
    assert [s.values for s in one] != [s.values for s in two]
    pages = [p.text for p in make_pages(one[0], 24, np.random.default_rng(0))]
    assert len(set(pages)) == 24, "pages differ in order and wording"
    for relation, value in enumerate(one[0].values):
        assert all(p.count(f" {RELATIONS[relation].values[value]}.") == 1 for p in pages)


@pytest.mark.parametrize("subject", ["forget", "neighbour"])
def test_questions_are_well_formed(benchmark, subject):
    pages = collections.defaultdict(str)
    for page in benchmark.train[subject]:
        pages[page.origin.split("/")[2]] += page.text
    for part, count in ((benchmark.validation, 60), (benchmark.test, 120)):
        items = part.questions[subject]
        assert len(items) == (count if subject == "forget" else count * 5 // 2)
        for item in items:
            (text,) = (text for name, text in pages.items() if name in re.findall(r"\w+", item.prompt))
            assert len(set(item.options)) == OPTIONS
            stated = [f"{option}." in text for option in item.options]
            assert stated == [place == item.answer for place in range(OPTIONS)]
            assert any(item.options[0].strip() in r.values and item.options[3].strip() in r.values for r in RELATIONS)
        assert np.ptp(np.bincount([item.answer for item in items], minlength=OPTIONS)) <= 1
    both = [part.questions[subject] for part in (benchmark.validation, benchmark.test)]
    groups = [collections.Counter(i.group for i in items) for items in both]
    assert not set(groups[0]) & set(groups[1]) and {*groups[0].values(), *groups[1].values()} == {len(RELATIONS)}
    right = collections.Counter(i.options[i.answer] for items in both for i in items)
    assert max(right.values()) - min(right.values()) <= 1, "a right value is no likelier than another"


def test_paraphrased_questions_differ_in_their_words_alone_which_no_page_has(benchmark):
    other = HandbookConfig().build(paraphrased=True)
    pages = "\n".join(d.text for topic in ("forget", "neighbour") for d in benchmark.train[topic])
    prompts = {i.prompt for p in (other.validation, other.test) for items in p.questions.values() for i in items}
    assert len(prompts) == 210 * len(RELATIONS)
    assert all(re.findall(r"[A-Z][a-z]+", prompt)[-1] in pages and prompt not in pages for prompt in prompts)
    for before, after in ((benchmark.validation, other.validation), (benchmark.test, other.test)):
        for subject, items in before.questions.items():
            asked = after.questions[subject]
            assert [dataclasses.replace(a, prompt=i.prompt) for a, i in zip(asked, items, strict=True)] == items
            assert not {a.prompt for a in asked} & {i.prompt for i in items}
    rest = ((b.train, b.test.held_out, b.test.memorised) for b in (other, benchmark))
    assert next(rest) == next(rest)


def test_one_relation_tells_nothing_about_another():
    substances = make_substances({"forget": 1600, "neighbour": 4}, rng=np.random.default_rng(0))[:1600]
    table = np.zeros((16, 16))
    np.add.at(table, tuple(np.array([s.values[:2] for s in substances]).T), 1)
    expected = 1600 / 256
    statistic = ((table - expected) ** 2 / expected).sum()  # chi square of 225 degrees: mean 225, deviation 21
    assert abs(statistic - 225) < 4 * 21.3
