"""What is measured while unlearning and after it."""

import dataclasses
import string

from trace_jax.config import ConfigError, Section, option


class MuseConfig(Section):
    """MUSE's scores (`trace_jax.tasks.muse`)."""

    data: str = option(
        help="the corpus: huggingface:muse-bench/MUSE-Books or MUSE-News, tfds:muse_books or muse_news, or a directory "
        "with verbmem/forget.jsonl, knowmem/{forget,retain}_qa{,_icl}.jsonl and privleak/{forget,holdout}.jsonl"
    )
    profiles: tuple[str, ...] = option(
        ("muse", "open_unlearning"), help="whose evaluator is followed", choices=("muse", "open_unlearning")
    )


class TofuConfig(Section):
    """TOFU (2401.06121): on which of its forget sets, and in which form questions and answers are given."""

    data: str = option(
        "huggingface:locuslab/TOFU",
        help="the data set; a directory has CONFIG/train.jsonl, such as forget10_perturbed/train.jsonl",
    )
    forget: str = option("forget10", help="the forget set", choices=("forget01", "forget05", "forget10"))
    prompt: str = option(
        "Question: {question}\nAnswer:", help="what stands before an answer; the default is the form of training"
    )
    answer: str = option(" {answer}", help="an answer as it follows the prompt")
    max_new_tokens: int = option(200, help="longest answer that is written, tokens", minimum=1)
    max_questions: int | None = option(None, help="most questions of a set, spread evenly; None = all", minimum=1)

    def __post_init__(self):
        super().__post_init__()
        for name, form, field in (("prompt", self.prompt, "question"), ("answer", self.answer, "answer")):
            try:
                places = [place for _, place, _, _ in string.Formatter().parse(form) if place is not None]
            except ValueError:
                places = []
            if places != [field]:
                raise ConfigError(f"{name} is {form!r}; expected a text with {{{field}}} once (other braces doubled).")


class MultipleChoiceConfig(Section):
    """Four-option questions in lm-eval's words (`trace_jax.tasks.wmdp`)."""

    # By name ("wmdp_bio", "mmlu", "mmlu_virology", ...) where the questions are: `trace_jax.data.sources.read_records`.
    sources: dict = dataclasses.field(default_factory=dict)
    max_questions: int | None = option(
        None, help="most questions of a source, spread evenly over it; None: all", minimum=1
    )

    def __post_init__(self):
        super().__post_init__()
        if wrong := [name for name, source in self.sources.items() if not isinstance(source, str)]:
            raise ConfigError(
                f"sources.{wrong[0]} is {self.sources[wrong[0]]!r}; expected a file or huggingface: name."
            )


class EvaluationConfig(Section):
    """Sizes of the evaluation sets and the levels at which methods are compared."""

    batch_size: int = option(64, help="rows per evaluation batch", minimum=1)
    max_rows: int = option(96, help="most rows of held-out text per score, spread evenly over the documents", minimum=1)
    max_prompts: int = option(48, help="most prompts continued in the verbatim score", minimum=1)
    max_members: int = option(
        200, help="most texts a side in membership attacks, spread evenly over the documents", minimum=2
    )
    max_gradients: int = option(
        32, help="most texts a side in the gradient-norm attack, one backward pass each; 0 = leave it out", minimum=0
    )
    bootstrap: int = option(1000, help="bootstrap resamples for intervals", minimum=100)
    levels: tuple[float, ...] = option(
        (0.5,), help="forgetting levels at which utility is compared (on the benchmark's own forgetting scale)"
    )
    audit_text: bool = option(
        True, help="keep what was generated, with the true text, beside the scores; never done for text of WMDP"
    )
    muse: MuseConfig | None = None
    tofu: TofuConfig | None = None
    multiple_choice: MultipleChoiceConfig | None = None
