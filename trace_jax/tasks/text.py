"""The user's own text: files to forget, files to keep, and what can be measured on them."""

import collections
import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from trace_jax.config import option
from trace_jax.data.corpora import Benchmark, DataConfig, Part, Split
from trace_jax.data.sources import DataError, Document, located, overlap, read_source
from trace_jax.evaluation.task import Scoreboard
from trace_jax.io.progress import say

MIXTURE = {"general": 0.70, "forget": 0.30}
MIXTURE_WITH_NEIGHBOUR = {"general": 0.35, "neighbour": 0.35, "forget": 0.30}
HELD_OUT_SHARE = 0.1  # of the documents, for validation and again for test
N = 13  # words that passages share; the length at which GPT-3 (2005.14165, appendix C) and others call text shared
_WORDS = 1 << 20  # that are hashed at once
_FEWEST = 3  # documents: one to train on, one for validation, one for test
_PIECES = 30  # into about which a text is split that has too few documents
_NAMES = {"general": "retain", "neighbour": "neighbour"}  # of subjects as people know them

# On running text there is no question to fail, and the verbatim score is too slow to take along the way. Forgetting
# is then the per-token probability of the forget text relative to the original model, exp(NLL_original - NLL): 1 for
# the original, towards 0 as the text becomes unlikely, and comparable between corpora of different difficulty.
TEXT_BOARD = Scoreboard(
    forgetting="forget_probability_ratio",
    utilities={"neighbour_utility": False, "general_utility": False},
    questions={"forget": "cloze_accuracy"},
)


class TextConfig(DataConfig, name="text", kw_only=True):
    """Where text is: a JSONL file, a text file, a directory, a huggingface: or tfds: name (`read_source`)."""

    forgotten = "the forget text"
    board = TEXT_BOARD  # neighbour text is optional; without it the utility is general_utility alone

    forget: str | tuple[str, ...] = option(help="text to forget; a list: each is a topic")
    retain: str = option(help="text to keep")
    neighbour: str = option("", help="text close to the forget set that must survive; empty = none")
    holdout: str = option("", help="text like the forget set that no model has seen, for membership; empty = none")
    min_length: int = option(
        0, help="shorter texts (characters, white space around them not counted) are left out", minimum=0
    )
    allow_overlap: bool = option(False, help="accept documents that stand in both forget and retain")

    @property
    def forget_sources(self) -> tuple[str, ...]:
        return (self.forget,) if isinstance(self.forget, str) else self.forget

    @property
    def sources(self) -> tuple[str, ...]:
        return (*self.forget_sources, *filter(None, (self.retain, self.neighbour, self.holdout)))

    def located(self) -> "TextConfig":
        paths = {name: located(getattr(self, name)) for name in ("retain", "neighbour", "holdout")}
        forget = tuple(map(located, self.forget_sources))
        return dataclasses.replace(self, forget=forget[0] if isinstance(self.forget, str) else forget, **paths)

    def build(self) -> Benchmark:
        """Forget text is trained on whole; of retain ("general") and neighbour text whole documents are held out."""
        if not self.forget_sources:
            raise DataError("forget is an empty list; name at least one source to forget.")
        topics = [read_source(path, min_length=self.min_length) for path in self.forget_sources]
        paths = {"general": self.retain, "neighbour": self.neighbour, "holdout": self.holdout}
        paths = {name: path for name, path in paths.items() if path or name == "general"}
        sources = {name: read_source(path, min_length=self.min_length) for name, path in paths.items()}
        left_out = {"forget": sum(short for _, short in topics)} | {name: short for name, (_, short) in sources.items()}
        forget = [document for documents, _ in topics for document in documents]
        to_keep = {name: documents for name, (documents, _) in sources.items()}
        holdout = to_keep.pop("holdout", [])
        for subject, documents in to_keep.items():
            if not self.allow_overlap:
                _refuse_overlap("forget", forget, _NAMES[subject], documents)
                _warn_of_shared(forget, _NAMES[subject], documents)
            _refuse_overlap("holdout", holdout, _NAMES[subject], documents)
        _refuse_overlap("holdout", holdout, "forget", forget)

        to_keep = {subject: _enough(documents, _NAMES[subject]) for subject, documents in to_keep.items()}
        # A document that stands twice anywhere stays in training: held out, its twin would give it away.
        counts = collections.Counter(d.hash for several in (forget, *to_keep.values()) for d in several)
        repeated = {key for key, count in counts.items() if count > 1}
        splits = {
            subject: hold_out(documents, _NAMES[subject], repeated, np.random.default_rng([self.seed, order]))
            for order, (subject, documents) in enumerate(to_keep.items())
        }
        return Benchmark(
            train={subject: split.train for subject, split in splits.items()} | {"forget": forget},
            mixture=MIXTURE_WITH_NEIGHBOUR if "neighbour" in to_keep else MIXTURE,
            validation=Part({subject: split.validation for subject, split in splits.items()}),
            test=Part({subject: split.test for subject, split in splits.items()}),
            holdout=holdout,
            topics=tuple(len(documents) for documents, _ in topics),
            left_out={name: count for name, count in left_out.items() if count},
        )


def _refuse_overlap(left_name: str, left: Sequence[Document], right_name: str, right: Sequence[Document]) -> None:
    if twins := overlap(left, right):
        one, other = twins[0]
        advice = " or set --config.data.allow_overlap=True" if left_name == "forget" else ""
        raise DataError(
            f"{len(twins)} of {len(left)} {left_name} documents also stand in {right_name}, for example {one.origin} = "
            f"{other.origin}. Remove them from one of the two{advice}."
        )


def _warn_of_shared(forget: Sequence[Document], name: str, documents: Sequence[Document]) -> None:
    if shared := shared_ngrams(forget, documents):
        sharing, holding, ngrams, (one, other) = shared
        say(
            f"warning: {sharing} of {len(forget)} forget documents share {N} or more words in a row with {name} "
            f"({holding} of its {len(documents)} documents, {ngrams:,} such runs), for example "
            f"{one.origin} and {other.origin}: {name} would teach again what is to be forgotten."
        )


def hold_out(documents: Sequence[Document], name: str, repeated: Collection[str], rng: np.random.Generator) -> Split:
    """Draws a tenth of the documents, at least one, for validation and again for test; none of a `repeated` hash."""
    eligible = [i for i, d in enumerate(documents) if d.hash not in repeated]
    each = min(max(1, round(len(documents) * HELD_OUT_SHARE)), len(eligible) // 2)
    if not each or len(documents) - 2 * each < 1:
        raise DataError(
            f"{name}: {len(documents)} documents, {len(eligible)} of them unlike all others; at least {_FEWEST} "
            "different documents (or paragraphs of one text) are needed, one each to train on, to tune on and to test."
        )
    drawn = [eligible[i] for i in rng.permutation(len(eligible))[: 2 * each]]
    rest = sorted({*range(len(documents))} - {*drawn})
    return Split(*([documents[i] for i in sorted(part)] for part in (rest, drawn[:each], drawn[each:])))


def _enough(documents: list[Document], name: str) -> list[Document]:
    """The documents, or their pieces where they are too few."""
    if len(documents) >= _FEWEST:
        return documents
    size = max(1, sum(len(d.text) for d in documents) // _PIECES)
    pieces = [p for d in documents for p in ([d] if d.answer is not None else split_at_paragraphs(d, size))]
    if (count := len(documents)) < len(pieces):
        say(f"{name}: {count} documents are split into {len(pieces)} pieces at paragraph ends; some are held out")
    return pieces


def split_at_paragraphs(document: Document, size: int) -> list[Document]:
    """Pieces of whole paragraphs (ended by an empty line, or else by a line end), each of `size` characters or more."""
    separator = "\n\n" if "\n\n" in document.text else "\n"
    path, _, first = document.origin.rpartition(":")
    pieces, current, start, line = [], "", int(first), int(first)
    for paragraph in document.text.split(separator):
        current = f"{current}{separator}{paragraph}" if current else paragraph
        line += paragraph.count("\n") + separator.count("\n")
        if len(current) >= size and current.strip():
            pieces.append(Document(current, f"{path}:{start}"))
            current, start = "", line
    if current.strip():
        pieces.append(Document(current, f"{path}:{start}"))
    return pieces


# --- passages that two sets of documents share: runs of words, found by hashes of all runs of a length


def shared_ngrams(
    left: Sequence[Document], right: Sequence[Document]
) -> tuple[int, int, int, tuple[Document, Document]] | None:
    """How much of `left` also stands in `right`: how many documents of both share runs of `N` words, whatever their
    case and white space, the number of different runs, and the first pair that does; None where none do.
    """
    numbers = {word: i for i, word in enumerate(dict.fromkeys(w for d in left for w in _words(d)), start=1)}
    keys = np.random.default_rng(0).integers(1 << 64, size=len(numbers) + 1, dtype=np.uint64)
    known, owners = map(np.concatenate, zip(*_hashes(left, numbers, keys), strict=True))
    order = np.argsort(known, kind="stable")
    known, owners = known[order], owners[order]
    found, holders = [], []
    for hashes, documents in _hashes(right, numbers, keys):
        place = np.searchsorted(known, hashes)
        same = np.append(known, np.uint64(0))[place] == hashes
        found.append(place[same])
        holders.append(documents[same])
    found, holders = np.concatenate(found), np.concatenate(holders)
    if not len(found):
        return None
    ngrams = np.unique(known[found])
    sharing = np.unique(owners[np.isin(known, ngrams)])
    example = left[int(owners[found[0]])], right[int(holders[0])]
    return len(sharing), len(np.unique(holders)), len(ngrams), example


def _words(document: Document) -> list[str]:
    return f"{document.text} {document.answer or ''}".casefold().split()


def _hashes(
    documents: Sequence[Document], numbers: dict[str, int], keys: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(hash u64, index of its document) of every run of `N` words that all have a number, in parts."""
    factors = np.random.default_rng(1).integers(1 << 63, size=N, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    words, ends, first = [], [], 0
    for index, document in enumerate(documents):
        words.extend(map(numbers.get, _words(document), itertools.repeat(0)))
        words.append(0)  # no run goes on into the next
        ends.append(len(words))
        if len(words) > _WORDS or index == len(documents) - 1:
            numbered = np.array(words + [0] * N)
            starts = np.flatnonzero(np.convolve(numbered == 0, np.ones(N), "valid") == 0)
            hashes = np.zeros(len(starts), np.uint64)
            for offset in range(N):
                hashes += keys[numbered[starts + offset]] * factors[offset]
            yield hashes, first + np.searchsorted(ends, starts, side="right")
            words, ends, first = [], [], index + 1
