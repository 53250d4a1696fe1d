"""Byte-level BPE: trained on the training documents of a corpus, able to encode any text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trace_jax.config import ConfigError
from trace_jax.data.sources import Document

PAD, BOS, EOS = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
_SMALLEST = len(SPECIAL_TOKENS) + 256


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A document as token ids, without BOS and EOS.

    tokens: i32 [n]. first_target: index of the first token that carries loss (0 for plain text; where the answer
    starts for a question with an answer).
    """

    tokens: np.ndarray
    first_target: int = 0


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE; the same texts in the same order give the same vocabulary.

    Ids 0, 1, 2 are padding, BOS and EOS and the next 256 the bytes, so that every text can be encoded and decoded
    without loss. The vocabulary is smaller than `vocab_size` where the texts hold too few different words.

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
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids i32 [n] of each text, no special tokens: "<eos>" written in a text is five characters, not the end."""
    tokenizer.encode_special_tokens = True
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.asarray(e.ids, np.int32) for e in encodings]


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[Encoded]:
    """Encodes documents; a question and its answer are encoded apart, so that the boundary falls between tokens."""
    texts = encode_texts(tokenizer, [d.text for d in documents])
    answers = encode_texts(tokenizer, [d.answer or "" for d in documents])
    return [
        Encoded(np.concatenate([text, answer]), first_target=0 if document.answer is None else len(text))
        for document, text, answer in zip(documents, texts, answers, strict=True)
    ]
