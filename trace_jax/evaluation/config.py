"""What is measured while unlearning and after it."""

from __future__ import annotations

import dataclasses

from trace_jax.config import Section, option

_AFTERWARDS = ("max_prompts", "levels", "audit_text", "muse")


@dataclasses.dataclass(frozen=True)
class MuseConfig(Section):
    """MUSE's scores (`evaluation.muse_task`)."""

    data: str = option(
        help="the corpus: huggingface:muse-bench/MUSE-Books, huggingface:muse-bench/MUSE-News, or a directory with "
        "verbmem/forget.jsonl, knowmem/{forget,retain}_qa{,_icl}.jsonl and privleak/{forget,holdout}.jsonl"
    )
    profiles: tuple[str, ...] = option(
        ("muse", "open_unlearning"), help="whose evaluator is followed", choices=("muse", "open_unlearning")
    )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Section):
    """Sizes of the evaluation sets and the levels at which methods are compared."""

    batch_size: int = option(64, help="rows per evaluation batch", minimum=1)
    max_rows: int = option(96, help="most rows of held-out text per score, spread evenly over the documents", minimum=1)
    max_prompts: int = option(48, help="most prompts continued in the verbatim score", minimum=1)
    bootstrap: int = option(1000, help="bootstrap resamples for intervals", minimum=100)
    levels: tuple[float, ...] = option(
        (0.5,), help="forgetting levels at which utility is compared (on the benchmark's own forgetting scale)"
    )
    audit_text: bool = option(
        True, help="keep what was generated, with the true text, beside the scores; never done for text of WMDP"
    )
    muse: MuseConfig | None = None

    def along_the_way(self) -> EvaluationConfig:
        """The same without settings that change nothing of what is measured while unlearning."""
        usual = EvaluationConfig()
        return dataclasses.replace(self, **{name: getattr(usual, name) for name in _AFTERWARDS})
