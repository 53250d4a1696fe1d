"""What is asked about Polk's messages is to be known from them alone."""

import re

import numpy as np
import pytest

from trace_jax.data.sources import Document
from trace_jax.tasks import presidents as module
from trace_jax.tasks.presidents import OPTIONS, held_out_addresses, knowledge_questions


@pytest.fixture(scope="module")
def benchmark():
    return module.PresidentsConfig().build()


def year_of(document):
    return int(document.origin.split("/")[1][:4])


def test_documents_are_who_they_should_be(benchmark):
    assert [d.origin for d in benchmark.train["forget"]] == [f"addresses/{y}-Polk-1" for y in (1845, 1846, 1847)]
    assert [d.origin for d in benchmark.holdout] == ["addresses/1848-Polk-1"]
    sets = (benchmark.train, benchmark.validation.held_out, benchmark.test.held_out)
    neighbours, general = ({year_of(d) for part in sets for d in part[name]} for name in ("neighbour", "general"))
    assert neighbours == set(range(1829, 1865)) - {1845, 1846, 1847, 1848} and min(general) >= 1901


def test_held_out_addresses_are_whole_and_stand_alone_in_their_year():
    addresses = [a for a in module.load_addresses() if a.year >= 1901]
    split = held_out_addresses(addresses, seed=0)
    assert [*map(len, split)] == [len(addresses) - 21, 7, 14]
    years = [[year_of(d) for d in part] for part in split]
    assert not set(years[0]) & {*years[1], *years[2]} and not set(years[1]) & set(years[2])
    assert max(years[1]) - min(years[1]) > 70 and max(years[2]) - min(years[2]) > 90
    assert held_out_addresses(addresses, seed=0) == split != held_out_addresses(addresses, seed=1)
    with pytest.raises(ValueError, match="21 addresses can't be held out of"):
        held_out_addresses(addresses[:10], seed=0)


def test_answers_occur_in_the_forget_documents_only(benchmark):
    forget = "\n".join(d.text for d in benchmark.train["forget"])
    elsewhere = "\n".join(d.text for source in ("general", "neighbour") for d in benchmark.train[source])
    validation, test = (part.questions["forget"] for part in (benchmark.validation, benchmark.test))
    items = [*validation, *test]
    assert len(items) >= 100 and not {i.group for i in validation} & {i.group for i in test}
    assert np.ptp(np.bincount([i.answer for i in items], minlength=OPTIONS)) <= 1, "places are balanced"
    for item in items:
        assert f"{item.prompt}{item.options[item.answer]}" in forget
        assert len(set(item.options)) == OPTIONS and 8 <= len(item.prompt.split(" ")) <= 36
        for option in item.options:
            assert option.strip() in forget and option.strip() not in elsewhere
            assert option.strip() not in item.prompt
        kinds = {option[1].isalpha() + 2 * (option[1] == "$") for option in item.options}
        assert len(kinds) == 1


def test_a_case_by_hand():
    start = "It was said that in the year of the great flood the town of"
    towns = ("Alpha", "Brava", "Carla", "Delta")
    forget = [Document(f"{start} {t} fell.\n\nWe think that {t} rose.", t) for t in towns]
    forget.append(Document(f"{start} Paris fell.\n\nWe think that Paris rose.", "Paris"))
    items = knowledge_questions(forget, [Document("They saw Paris.", "x")], rng=np.random.default_rng(0))
    assert {i.prompt for i in items} == {start} and sorted(i.answer for i in items) == [0, 1, 2, 3]
    for options in ([i.options[i.answer] for i in items], *(i.options for i in items)):
        assert sorted(option.strip() for option in options) == list(towns)


def test_corpora_have_the_four_scores(presidents):
    for probes in (presidents.validation, presidents.test):
        assert set(probes.questions) == {"forget"} and set(probes.text) == {"general", "neighbour", "forget"}
        assert set(probes.prompts) == {"forget"} and set(probes.members) == {"forget", "holdout"}
    prompts = [p.prompts["forget"] for p in (presidents.validation, presidents.test)]
    assert prompts[0].prompt.shape[1] == prompts[0].continuation.shape[1] == 32
    assert (prompts[0].prompt[:, 0] == 1).all()
    whole = [{tuple(p) + tuple(c) for p, c in zip(x.prompt, x.continuation, strict=True)} for x in prompts]
    assert not whole[0] & whole[1]
    trained = {tuple(row[:64]) for row in presidents.forget.tokens}
    assert whole[0] | whole[1] <= trained, "a prompt must stand where it stood in training"
    assert sum(presidents.retrain_mixture.values()) == pytest.approx(1) and "forget" not in presidents.retrain_mixture
    text = presidents.tokenizer.decode(presidents.forget.tokens[0].tolist())
    assert re.match("Fellow-Citizens of the Senate", text)
