"""Text to token ids: with the tokenizer of a checkpoint, or a byte-level BPE trained on a corpus."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from trace_jax.checkpoints.checkpoint import open_checkpoint
from trace_jax.checkpoints.pretrained import read_tokenizer, special_tokens
from trace_jax.config import ConfigError
from trace_jax.data.sources import Document
from trace_jax.models.families import model_config
from trace_jax.models.model import SpecialTokens

PAD, BOS, EOS = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
_SMALLEST = len(SPECIAL_TOKENS) + 256


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, the marks that packing puts around a text, and how many token ids the model knows."""

    tokenizer: Tokenizer
    special: SpecialTokens
    size: int


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A document as token ids, without the marks around it.

    tokens: i32 [n]. first_target: index of the first token that carries loss (0 for plain text; where the answer
    starts for a question with an answer).
    """

    tokens: np.ndarray
    first_target: int = 0


def read_vocabulary(checkpoint: str) -> Vocabulary:
    """The vocabulary of a checkpoint, without its parameters.

    Raises:
      ConfigError: it has no tokenizer.json.
      CheckpointError: it is no checkpoint.
    """
    directory, config_json = Path(checkpoint), open_checkpoint(checkpoint).config
    tokenizer = read_tokenizer(directory)
    if tokenizer is None:
        raise ConfigError(
            f"{directory / 'tokenizer.json'} is missing; it is the tokenizer in the form that every model can be read "
            f"in. transformers makes it: AutoTokenizer.from_pretrained('{directory}').save_pretrained('{directory}')."
        )
    size = model_config(config_json, dtype="float32").vocab_size
    return Vocabulary(tokenizer, special_tokens(directory, config_json), size)


def start_and_end(special: SpecialTokens) -> tuple[int, int]:
    """What a text starts and ends with. Without a BOS it starts with the first EOS, as if another text came before.

    Raises:
      ConfigError: the tokenizer has no EOS.
    """
    if not special.eos:
        raise ConfigError("the checkpoint names no end of text (eos_token_id); it is needed to separate documents.")
    return special.eos[0] if special.bos is None else special.bos, special.eos[0]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE; the same texts in the same order give the same vocabulary.

    Ids 0, 1, 2 are padding, BOS and EOS and the next 256 the bytes, so that every text can be encoded and decoded
    without loss. The vocabulary is smaller than `vocab_size` where the texts hold too few different words. Whoever
    lets the tokenizer add marks gets BOS before a text, as in training.

    Raises:
      ConfigError: `vocab_size` has no room for the bytes and the special tokens.
    """
    if vocab_size < _SMALLEST:
        raise ConfigError(f"vocab_size is {vocab_size}; a byte-level vocabulary needs at least {_SMALLEST}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    start = SPECIAL_TOKENS[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, BOS)])
    return for_plain_text(tokenizer)


def for_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that reads a text whole and as text: "<eos>" written in it is five characters, not the end."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_pairs(vocabulary: Vocabulary, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
    """Each (text, continuation) as the tokens of running text; `first_target` is where the continuation starts.

    Both are encoded at once, since a tokenizer may treat the beginning of a text otherwise. A token that holds
    characters of both belongs to the continuation.

    Raises:
      ConfigError: a token that the model doesn't know; JAX would silently read another embedding.
    """
    texts = [text + continuation for text, continuation in pairs]
    found = []
    for (text, _), encoding in zip(
        pairs, vocabulary.tokenizer.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        ends = [end for _, end in encoding.offsets]
        found.append(Encoded(np.asarray(encoding.ids, np.int32), int(np.searchsorted(ends, len(text), side="right"))))
    special = vocabulary.special
    marks = (*start_and_end(special), special.pad)
    if (largest := max(*marks, *(int(e.tokens.max(initial=0)) for e in found))) >= vocabulary.size:
        raise ConfigError(
            f"the tokenizer gives the id {largest}, but the model knows {vocabulary.size} tokens (vocab_size): it is "
            "the tokenizer of another model."
        )
    return found


def encode_documents(vocabulary: Vocabulary, documents: Sequence[Document]) -> list[Encoded]:
    """Encodes documents; of a question with an answer only the answer carries loss."""
    encoded = encode_pairs(vocabulary, [(d.text, d.answer or "") for d in documents])
    return [
        Encoded(e.tokens, 0 if document.answer is None else e.first_target)
        for document, e in zip(documents, encoded, strict=True)
    ]
