"""What an evaluation asks, asked in another way: behind solved examples, with more of the true text, in other words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trace_jax.config import ConfigError
from trace_jax.data.benchmark import Item
from trace_jax.data.probes import Prompts, prompts_of
from trace_jax.data.rows import Rows
from trace_jax.data.sources import DataError, read_records
from trace_jax.data.tokenizer import Vocabulary, encode_pairs, start_and_end

BLANK_LINE = "\n\n"  # between examples, as in lm-eval
_COLUMNS = (("prompt", "continuation"), ("question", "answer"))


def items_with_examples(
    items: Sequence[Item], solved: Sequence[Item], count: int, rng: np.random.Generator
) -> list[Item]:
    """The items, each behind `count` of `solved` with their right options, drawn for it and joined by blank lines.

    An example is never of the item's own group, and none of the item's options stands in it: what was forgotten can't
    be copied.

    Raises:
      ConfigError: fewer than `count` are left for an item.
    """
    statements = [(_statement(s), s.group) for s in solved]
    found = []
    for item in items:
        options = [option.strip() for option in item.options]
        usable = [text for text, group in statements if group != item.group and not any(o in text for o in options)]
        found.append(_behind(item, [usable[i] for i in _draw(len(usable), count, rng)], BLANK_LINE))
    return found


def items_with_statements(items: Sequence[Item], share: float) -> list[Item]:
    """The items, each behind true statements about its group: the share (rounded up) of the group's other items that
    comes first, solved. Items that are alone in their group stay as they are."""
    found = []
    for item in items:
        others = [other for other in items if other.group == item.group and other is not item]
        texts = [f"{_statement(other)}." for other in others[: int(np.ceil(share * len(others)))]]
        found.append(_behind(item, texts, " "))
    return found


def prompts_with_examples(
    prompts: Prompts, others: Prompts, count: int, rng: np.random.Generator, separator: Sequence[int]
) -> Prompts:
    """The prompts, each behind `count` of `others` with their continuations, drawn for it, `separator` in between.

    The start mark stands once, at the beginning. What contains the prompt's own continuation is no example.

    Raises:
      ConfigError: fewer than `count` are left for a prompt.
    """
    texts = [[*prompt[1:], *rest] for prompt, rest in _pairs(others)]
    written = [np.array(text, np.int32).tobytes() for text in texts]
    pairs = []
    for prompt, continuation in _pairs(prompts):
        asked = np.array(continuation, np.int32).tobytes()
        usable = [text for text, seen in zip(texts, written, strict=True) if asked not in seen]
        drawn = [token for i in _draw(len(usable), count, rng) for token in (*usable[i], *separator)]
        pairs.append(([prompt[0], *drawn, *prompt[1:]], continuation))
    return prompts_of(pairs)


def longer_prompts(prompts: Prompts, rows: Rows, share: float, end_mark: int) -> Prompts:
    """The chunks of `rows` that `prompts` begin, cut in two: `share` of the text is given, the rest is to come.

    At least one token is given, and at least one is to come; the end mark isn't text.

    Args:
      rows: the forget rows, in which every prompt with its continuation is the beginning of a chunk.
    """
    beginnings = [(*prompt, *continuation) for prompt, continuation in _pairs(prompts)]
    lengths, chunks = {len(beginning) for beginning in beginnings}, {}
    for tokens, segments in zip(rows.tokens, rows.segments, strict=True):
        for segment in range(1, segments.max() + 1):
            chunk = tokens[segments == segment].tolist()
            for length in lengths:
                chunks.setdefault(tuple(chunk[:length]), chunk)
    pairs = []
    for beginning in beginnings:
        start, *text = chunks[beginning]
        text = text[:-1] if text[-1] == end_mark else text
        cut = min(max(1, int(share * len(text))), len(text) - 1)
        pairs.append(([start, *text[:cut]], text[cut:]))
    return prompts_of(pairs)


def read_paraphrases(source: str) -> list[tuple[str, str]]:
    """(what is asked, what should come) of every row {"prompt", "continuation"} or {"question", "answer"} of a source.

    The second follows the first as it is: white space in between belongs to one of them.

    Raises:
      DataError: nothing there (`read_records`), or a row of another form. No text is quoted.
    """
    pairs = []
    for number, record in enumerate(read_records(source), 1):
        names = next((names for names in _COLUMNS if all(isinstance(record.get(n), str) for n in names)), None)
        if names is None:
            raise DataError(
                f"{source}: row {number} has {', '.join(map(str, record)) or 'nothing'}; expected the texts prompt and "
                "continuation, or question and answer."
            )
        pairs.append((record[names[0]], record[names[1]]))
        if not all(text.strip() for text in pairs[-1]):
            raise DataError(f"{source}: row {number} has an empty {names[0]} or {names[1]}; both need text.")
    return pairs


def written_prompts(pairs: Sequence[tuple[str, str]], vocabulary: Vocabulary) -> Prompts:
    """Prompts of pairs of texts, which are read as one text; a token with characters of both is to come."""
    start, _ = start_and_end(vocabulary.special)
    encoded = encode_pairs(vocabulary, pairs)
    cut = [(e.tokens[: e.first_target].tolist(), e.tokens[e.first_target :].tolist()) for e in encoded]
    return prompts_of([([start, *before], after) for before, after in cut])


def separator_tokens(vocabulary: Vocabulary) -> list[int]:
    """The tokens of a blank line as it stands after text."""
    before, both = (vocabulary.tokenizer.encode(t, add_special_tokens=False).ids for t in ("a", "a" + BLANK_LINE))
    return both[len(before) :]


def continuation_rows(prompts: Prompts) -> Rows:
    """Every prompt with its continuation as a row, of which only the tokens of the continuation are scored."""
    pairs = _pairs(prompts)
    shape = (len(pairs), max(len(prompt) + len(continuation) for prompt, continuation in pairs))
    tokens, segments, valid = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, (prompt, continuation) in enumerate(pairs):
        end = len(prompt) + len(continuation)
        tokens[row, :end], segments[row, :end] = [*prompt, *continuation], 1
        valid[row, len(prompt) - 1 : end - 1] = True
    return Rows(tokens, segments, valid, np.zeros(len(pairs), np.int32))


def _statement(item: Item) -> str:
    return item.prompt + item.options[item.answer]


def _behind(item: Item, texts: Sequence[str], separator: str) -> Item:
    prompt = separator.join([*texts, item.prompt])
    return Item(prompt, item.options, item.answer, item.group)


def _draw(available: int, count: int, rng: np.random.Generator) -> list[int]:
    if available < count:
        raise ConfigError(
            f"examples = {count}: only {available} can stand before one of the queries; of its own group, and with its "
            f"answer in them, none may. Ask for at most {available}, or give more data."
        )
    return rng.choice(available, count, replace=False).tolist()


def _pairs(prompts: Prompts) -> list[tuple[list[int], list[int]]]:
    """(tokens of the prompt, tokens of the continuation) without padding."""
    counts = [prompts.prompt.shape[1]] * len(prompts) if prompts.lengths is None else prompts.lengths[:, 0].tolist()
    given = [row[:count] for row, count in zip(prompts.prompt.tolist(), counts, strict=True)]
    return list(zip(given, prompts.unpadded(prompts.continuation), strict=True))
