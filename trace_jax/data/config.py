"""Which corpus is unlearned from: an embedded benchmark, or the user's own text."""

from __future__ import annotations

import dataclasses
from typing import Any

from trace_jax.config import ConfigError, Section, option

BENCHMARKS = ("handbook", "presidents", "text")
# What each benchmark reads of the settings below that are None unless given, and its defaults; ... where there is none.
_READS: dict[str, dict[str, Any]] = {
    "handbook": {"forget_substances": 60, "neighbour_substances": 150, "retain_rows": 2000, "neighbour_share": 0.02},
    "presidents": {"retain_rows": 2000, "neighbour_share": 0.02},
    "text": {"forget": ..., "retain": ..., "neighbour": "", "holdout": "", "min_length": 0, "allow_overlap": False},
}


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """Settings of the corpora. Those that another benchmark reads are None."""

    benchmark: str = option("handbook", help="corpus", choices=BENCHMARKS)
    row_length: int = option(128, help="tokens per row, S", minimum=8)
    vocab_size: int | None = option(
        None, help="size of the byte-level BPE that is trained; the model's, unless given", minimum=300
    )
    seed: int = option(0, help="seed of generated text, of splits and of batch order", minimum=0)
    forget_substances: int | None = option(None, help="substances of the forget topic", minimum=4)
    neighbour_substances: int | None = option(None, help="substances of the neighbour topic", minimum=4)
    retain_rows: int | None = option(None, help="rows of the unlearner's retain corpus", minimum=1)
    neighbour_share: float | None = option(
        None, help="share of those rows that is neighbour text", minimum=0.0, maximum=1.0
    )
    forget: str | tuple[str, ...] | None = option(
        None, help="JSONL file, text file, directory, huggingface: or tfds: name to forget; a list: each is a topic"
    )
    retain: str | None = option(None, help="JSONL file, text file, directory, huggingface: or tfds: name to keep")
    neighbour: str | None = option(None, help="text close to the forget set that must survive; empty = none")
    holdout: str | None = option(
        None, help="text like the forget set that no model has seen, for membership; empty = none"
    )
    min_length: int | None = option(
        None, help="shorter texts (characters, white space around them not counted) are left out", minimum=0
    )
    allow_overlap: bool | None = option(None, help="accept documents that stand in both forget and retain")

    def __post_init__(self):
        super().__post_init__()
        reads, benchmark = _READS[self.benchmark], f"when benchmark is {self.benchmark!r}"
        for name in sorted(set().union(*_READS.values())):
            value = getattr(self, name)
            if name not in reads and value is not None:
                raise ConfigError(f"{name} = {value!r} would have no effect: it is not read {benchmark}.")
            if name in reads and value is None:
                if reads[name] is ...:
                    raise ConfigError(f"{name} is needed {benchmark}: a source of text")
                object.__setattr__(self, name, reads[name])

    @property
    def forget_sources(self) -> tuple[str, ...]:
        """Where each forget topic is read from."""
        return (self.forget,) if isinstance(self.forget, str) else self.forget or ()
