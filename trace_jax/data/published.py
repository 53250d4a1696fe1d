"""The published data sets that can be built here: columns, rows, where they are, and at which revision.

Rows are those of the data sets' own cards on the hub, unless another source is named; None is not checked.
A revision is a commit of the hub's repository, and stands here only where public code or the hub's pages name it:
all but the last two in github.com/Lemutisme/geo-unlearning, scripts/run_gu_full_matrix.py.
"""

import dataclasses
from collections.abc import Mapping


class DataError(ValueError):
    """Text that can't be used. The message names file and line, what was expected, and what to do."""


TEXT = "text"
TEXT_OR_NULL = "text or null"  # null is kept as empty text
TEXTS = "a list of texts"
INTEGER = "an integer"


@dataclasses.dataclass(frozen=True)
class Subset:
    """One configuration. Columns of its files that aren't named here are not kept."""

    columns: Mapping[str, str]  # name -> TEXT, TEXT_OR_NULL, TEXTS or INTEGER
    rows: Mapping[str, int | None]  # split -> how many there must be


@dataclasses.dataclass(frozen=True)
class Published:
    """A data set of the Hugging Face hub."""

    repository: str
    revision: str
    licence: str
    about: str
    subsets: Mapping[str, Subset]  # by the names of the hub's configurations
    gated: str = ""  # how to ask for access; empty for what anyone may read


_TEXT = {"text": TEXT}
_PAIR = {"question": TEXT, "answer": TEXT}
_QUESTION = {"question": TEXT, "choices": TEXTS, "answer": INTEGER}


def _alike(columns: Mapping[str, str], rows: Mapping[str, int | None], split: str = "train") -> dict[str, Subset]:
    """Configurations of the same columns and one split, by their rows."""
    return {name: Subset(columns, {split: count}) for name, count in rows.items()}


def _muse(*, forget: int, retain1: int, retain2: int, holdout: int, trained: int) -> dict[str, Subset]:
    """What MUSE-Books and MUSE-News have in common."""
    return {
        "raw": Subset(_TEXT, {"forget": forget, "retain1": retain1, "retain2": retain2, "holdout": holdout}),
        "train": Subset(_TEXT, {"forget": trained, "retain1": retain1, "retain2": retain2}),
        "verbmem": Subset({"prompt": TEXT, "gt": TEXT}, {"forget": 100}),
        "knowmem": Subset(_PAIR, {"forget_qa": 100, "forget_qa_icl": 10, "retain_qa": 100, "retain_qa_icl": 10}),
        "privleak": Subset(_TEXT, {"forget": 100, "retain": 100, "holdout": 100}),
    }


def _tofu() -> dict[str, Subset]:
    """Rows of the perturbed sets of real authors and world facts: the viewer's page of a copy, kimperyang/TOFU-C."""
    pairs: dict[str, int | None] = {"full": 4000, "forget01": 40, "forget05": 200, "forget10": 400}
    pairs |= {"retain99": 3960, "retain95": 3800, "retain90": 3600, "real_authors": 100, "world_facts": 117}
    pairs |= dict.fromkeys(("holdout01", "holdout05", "holdout10"))
    wrong = _PAIR | {"perturbed_answer": TEXTS}
    perturbed = {f"{name}_perturbed": pairs[name] for name in ("forget01", "forget05", "forget10")}
    others = {f"{name}_perturbed": pairs[name] for name in ("real_authors", "world_facts")}
    paraphrased = _alike(wrong | {"paraphrased_answer": TEXT}, perturbed | {"retain_perturbed": 400})
    return _alike(_PAIR, pairs) | paraphrased | _alike(wrong, others)


PUBLISHED = {
    "muse_books": Published(
        repository="muse-bench/MUSE-Books",
        revision="051ba90319e920d410d87cfdbd61f25843c1b892",
        licence="cc-by-4.0",
        about="MUSE (arXiv 2407.06460): the Harry Potter books",
        subsets=_muse(forget=4, retain1=12, retain2=13, holdout=3, trained=4),
    ),
    "muse_news": Published(
        repository="muse-bench/MUSE-News",
        revision="506bd5b150b92814d45e4404a82f120ab2d748bf",
        licence="cc-by-4.0",
        about="MUSE (arXiv 2407.06460): news",
        subsets=_muse(forget=889, retain1=1777, retain2=1778, holdout=3043, trained=3554)
        | {
            "scal": Subset(_TEXT, {"forget_1": 889, "forget_2": 1778, "forget_3": 2667, "forget_4": 3554}),
            "sust": Subset(_TEXT, {"forget_1": 889, "forget_2": 889, "forget_3": 889, "forget_4": 887}),
        },
    ),
    "tofu": Published(
        repository="locuslab/TOFU",
        revision="324592d84ae4f482ac7249b9285c2ecdb53e3a68",
        licence="mit",
        about="TOFU (arXiv 2401.06121): questions about made-up authors",
        subsets=_tofu(),
    ),
    "wmdp": Published(
        repository="cais/wmdp",
        revision="7125571f22f032c56415e7980f48d877dd830ff8",
        licence="mit",
        about="WMDP (arXiv 2403.03218): questions; before April 2024 there were 1520, 412 and 2225",
        subsets=_alike(_QUESTION, {"wmdp-bio": 1273, "wmdp-chem": 408, "wmdp-cyber": 1987}, split="test"),
    ),
    "wmdp_corpora": Published(
        repository="cais/wmdp-corpora",
        revision="daf89fa9b618b63a624228061a9cebacca88009c",
        licence="mit",
        about="WMDP: the corpora that anyone may read",
        subsets=_alike(_TEXT, {"bio-retain-corpus": 60_887, "cyber-forget-corpus": 1000, "cyber-retain-corpus": 4473}),
    ),
    "wikitext": Published(
        repository="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        licence="cc-by-sa-3.0, gfdl",
        about="what RMU's authors retain on",
        subsets={"wikitext-2-raw-v1": Subset(_TEXT, {"test": 4358, "validation": 3760, "train": 36_718})},
    ),
    # Revision and rows: huggingface.co/datasets/cais/mmlu/commit/c30699e. Its auxiliary training split isn't kept.
    "mmlu": Published(
        repository="cais/mmlu",
        revision="c30699e8356da336a370243923dbaf21066bb9fe",
        licence="mit",
        about="MMLU (arXiv 2009.03300): questions on 57 subjects",
        subsets={"all": Subset(_QUESTION | {"subject": TEXT}, {"test": 14_042, "validation": 1531, "dev": 285})},
    ),
    # Revision: github.com/MaxKamachee/entanglement_problem. Rows and columns: two public accounts of that revision, one
    # of its metadata and one of a copy.
    "wmdp_bio_forget": Published(
        repository="cais/wmdp-bio-forget-corpus",
        revision="5a786ed1041e56fef2d4ed26c1239f12b73a68eb",
        licence="none stated; not to be passed on",
        about="WMDP: the papers to forget",
        subsets=_alike(_TEXT | dict.fromkeys(("title", "abstract", "doi"), TEXT_OR_NULL), {"default": 24_453}),
        gated="ask for access at https://huggingface.co/datasets/cais/wmdp-bio-forget-corpus, signed in (WMDP's "
        "authors grant it), then `hf auth login`",
    ),
}


def published(name: str) -> tuple[str, Published, tuple[str, ...]]:
    """The data set NAME with all its configurations, or one of them, NAME/CONFIG. Raises DataError: there is none."""
    base, _, config = name.partition("/")
    if base not in PUBLISHED:
        raise DataError(f"{name}: no such published data set is known here; there are {', '.join(PUBLISHED)}.")
    dataset = PUBLISHED[base]
    if config and config not in dataset.subsets:
        raise DataError(f"{name}: no such configuration; {base} has {', '.join(dataset.subsets)}.")
    return base, dataset, (config,) if config else tuple(dataset.subsets)


def overview() -> str:
    """The table, for people: data sets, rows per split, licence, revision, and what is gated."""
    lines = []
    for name, dataset in PUBLISHED.items():
        where = f"{dataset.repository} at {dataset.revision}; licence: {dataset.licence}"
        lines += [f"{name}: {dataset.about}", f"  {where}", *[f"  gated: {dataset.gated}"] * bool(dataset.gated)]
        for config, subset in dataset.subsets.items():
            rows = ", ".join(f"{s} {'not known' if n is None else f'{n:,}'}" for s, n in subset.rows.items())
            lines.append(f"  {name}/{config}: {rows} ({', '.join(subset.columns)})")
    return "\n".join(lines)
