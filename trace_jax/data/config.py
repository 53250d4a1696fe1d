"""Which corpus is unlearned from: an embedded benchmark, or the user's own text."""

from __future__ import annotations

import dataclasses

from trace_jax.config import Section, option

BENCHMARKS = ("handbook", "presidents", "text")
_HANDBOOK = {"benchmark": ("handbook",)}
_TEXT = {"benchmark": ("text",)}


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """Settings of the corpora."""

    benchmark: str = option("handbook", help="corpus", choices=BENCHMARKS)
    row_length: int = option(128, help="tokens per row, S", minimum=8)
    vocab_size: int | None = option(
        None, help="size of the byte-level BPE that is trained; the model's, unless given", minimum=300
    )
    seed: int = option(0, help="seed of generated text, of splits and of batch order", minimum=0)
    forget_substances: int | None = option(60, help="substances of the forget topic", minimum=4, when=_HANDBOOK)
    neighbour_substances: int | None = option(150, help="substances of the neighbour topic", minimum=4, when=_HANDBOOK)
    retain_rows: int | None = option(
        2000, help="rows of the unlearner's retain corpus", minimum=1, when={"benchmark": ("handbook", "presidents")}
    )
    neighbour_share: float | None = option(
        {"handbook": 0.02, "presidents": 0.02},
        help="share of those rows that is neighbour text",
        minimum=0.0,
        maximum=1.0,
        when={"benchmark": ("handbook", "presidents")},
    )
    forget: str | tuple[str, ...] | None = option(
        help="JSONL file, text file, directory, huggingface: or tfds: name to forget; a list: each is a topic",
        when=_TEXT,
    )
    retain: str | None = option(help="JSONL file, text file, directory, huggingface: or tfds: name to keep", when=_TEXT)
    neighbour: str | None = option("", help="text close to the forget set that must survive; empty = none", when=_TEXT)
    holdout: str | None = option(
        "", help="text like the forget set that no model has seen, for membership; empty = none", when=_TEXT
    )
    min_length: int | None = option(
        0, help="shorter texts (characters, white space around them not counted) are left out", minimum=0, when=_TEXT
    )
    allow_overlap: bool | None = option(False, help="accept documents that stand in both forget and retain", when=_TEXT)

    @property
    def forget_sources(self) -> tuple[str, ...]:
        """Where each forget topic is read from."""
        return (self.forget,) if isinstance(self.forget, str) else self.forget or ()
