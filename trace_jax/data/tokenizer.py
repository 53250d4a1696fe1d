"""The text codec of a checkpoint, or with a byte-level BPE trained on a corpus; documents as token ids."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from trace_jax.checkpoints.checkpoint import open_checkpoint
from trace_jax.checkpoints.pretrained import read_tokenizer, special_tokens
from trace_jax.config import ConfigError
from trace_jax.data.sources import Document
from trace_jax.models.families import model_config
from trace_jax.models.model import Encoded, TextCodec, whole_text

PAD, BOS, EOS = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
_SMALLEST = len(SPECIAL_TOKENS) + 256


def read_codec(checkpoint: str) -> TextCodec:
    """The codec of a checkpoint, without its parameters.

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
    return TextCodec(tokenizer, special_tokens(directory, config_json), size, directory)


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
    return whole_text(tokenizer, literal=True)


def encode_documents(codec: TextCodec, documents: Sequence[Document]) -> list[Encoded]:
    """Encodes documents; of a question with an answer only the answer carries loss."""
    encoded = codec.pairs([(d.text, d.answer or "") for d in documents])
    return [
        e if d.answer is not None else dataclasses.replace(e, first_target=0)
        for d, e in zip(documents, encoded, strict=True)
    ]
