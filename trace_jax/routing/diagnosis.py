"""Whether forget and retain text use the experts differently, beyond the noise of samples, before anything trains.

Rows are dealt at random into halves. The experts that the first halves select are looked at in the second ones, so that
selection can't follow noise: the held-out ratio is their forget over their retain frequency, both summed. Noise is the
same between two samples of one text, made from its quarters; so it is a little overstated.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from trace_jax.io.files import encode
from trace_jax.io.progress import aligned, format_number
from trace_jax.routing.calibration import trade_off
from trace_jax.routing.config import Difference, select_experts
from trace_jax.routing.differences import counts_by_row, frequency_gap
from trace_jax.routing.statistics import Assignments, ExpertStatistics

PRESENT, WEAK = 2.0, 1.25  # least held-out ratio
MIN_ROWS = 8  # of either text, two for each quarter
_REPETITIONS, _QUANTILE = 50, 0.95
_GROUPS = 200  # neighbouring rows of a longer text are dealt together
_ADVICE = {
    "present": "there is something to calibrate",
    "weak": "expect little beyond uniform weights",
    "absent": "there is nothing worth calibrating, so expect from weights by experts what uniform ones give",
    "undecided": "the noise hides what there is: give more rows of text",
}
_QUANTITIES = ("largest_ratio", "above_ratio_2", "gap")
_CURVE = {  # fields of `Certificate`
    "effective_sample_size": "effective sample",
    "closed": "gap closed, selected experts",
    "closed_all": "gap closed, all experts",
    "largest_weight": "largest weight",
}


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; noise is the 95 % quantile over repetitions, of the noisier text."""

    verdict: str  # "present", "weak", "absent" or "undecided"
    held_out: float  # f^F / f^R of experts that other rows selected; NaN with too few rows
    noise: float  # the same between two samples of one text
    # largest_ratio: f^F / f^R, of the experts with f^F of at least half of uniform; above_ratio_2: share of the experts
    # where it is above 2; gap: sum_e |f^F - f^R|, 0 to 2K. Each has "value" and "noise" f64 [L], which is between two
    # halves of one text.
    quantities: Mapping[str, Mapping[str, Any]]
    forget: np.ndarray  # f64 [L, E], f^F
    retain: np.ndarray  # f64 [L, E], f^R
    selected: np.ndarray  # bool [L, E], by the default rule
    tokens: Mapping[str, int]  # of "forget" and "retain"
    rows: Mapping[str, int]
    top_k: int
    layers: tuple[int, ...]  # of the network, from 0
    curve: tuple[Mapping[str, float], ...]  # what weights of tokens reach (`trade_off`): fields of `Certificate`

    def __repr__(self) -> str:
        return f"Diagnosis({self.sentence()})"

    def sentence(self) -> str:
        """The verdict, and what it rests on."""
        if np.isnan(self.held_out):
            return f"undecided: a text has fewer than {MIN_ROWS} rows; {_ADVICE['undecided']}."
        return (
            f"{self.verdict}: the experts that half of the rows select are used {self.held_out:.2f} times as often on "
            f"forget as on retain text in the other half (on two samples of one text up to {self.noise:.2f} times); "
            f"{_ADVICE[self.verdict]}."
        )

    def to_json(self) -> dict[str, Any]:
        """As plain values, with the sentence: frequencies, and no token's experts."""
        return {"sentence": self.sentence()} | encode(self, digits=6)

    def text(self, most: int = 12) -> str:
        """A screen for a terminal: of more layers than `most`, evenly spread ones."""
        table = [["layer", *(f"{name.replace('_', ' ')} (noise)" for name in _QUANTITIES), "selected experts"]]
        for row in sorted({round(row) for row in np.linspace(0, len(self.layers) - 1, most)}):
            cells = (f"{of['value'][row]:.3g} ({of['noise'][row]:.3g})" for of in self.quantities.values())
            table.append([str(self.layers[row]), *cells, " ".join(map(str, np.flatnonzero(self.selected[row])))])
        share = f"{self.selected.sum():,} ({self.selected.mean():.1%})"
        ratio, above = (self.quantities[name]["value"] for name in _QUANTITIES[:2])
        lines = [
            f"mismatch {self.sentence()}",
            f"present from {PRESENT:g}, weak from {WEAK:g}, and above the noise; absent below {WEAK:g}",
            *(f"{self.tokens[s]:,} tokens in {self.rows[s]:,} rows of {s} text" for s in self.tokens),
            f"{len(self.layers)} layers, {self.top_k} of {self.selected.shape[1]} experts a token: largest ratio "
            f"{ratio.max():.1f}, above 2 at {above.mean():.1%}; selected {share}",
            "",
            *aligned(table),
        ]
        if self.curve:
            curve = [[words, *(format_number(p[name]) for p in self.curve)] for name, words in _CURVE.items()]
            lines += ["", *aligned(curve)]
        return "\n".join(lines)


def diagnose(
    forget: Assignments, retain: Assignments, *, num_experts: int, curve: bool = True, seed: int = 0
) -> Diagnosis:
    """Says whether there is a mismatch between the routing of two texts, and what the default rule selects.

    Args:
      forget, retain: `expert_assignments` of one model, or `read_capture`.
      num_experts: E, the routed experts of a layer.
      curve: whether to solve for what weights reach at each effective sample size (`trade_off`).
      seed: of the halves.

    Raises:
      ValueError: routing of different models.

    Example:
      >>> routed = [tj.expert_assignments(model, rows) for rows in (forget, retain)]
      >>> print(tj.diagnose(*routed, num_experts=8).sentence())
      weak: the experts that half of the rows select are used ... times as often on forget as on retain text ...
    """
    if forget.layers != retain.layers or forget.indices.shape[::2] != retain.indices.shape[::2]:
        raise ValueError(
            f"forget routing is {forget.indices.shape} [layers, tokens, K], retain routing {retain.indices.shape}; "
            "both must come from the same layers of one model."
        )
    rng, texts = np.random.default_rng(seed), {"forget": forget, "retain": retain}
    grouped = [_grouped(text, num_experts) for text in texts.values()]
    whole = [_statistics(counts.sum(axis=0), tokens.sum(), top_k) for counts, tokens, top_k in grouped]
    values, ratio, noise = _quantities(*whole), np.nan, np.nan
    noises = np.full_like(values, np.nan)
    if min(len(tokens) for _, tokens, _ in grouped) >= MIN_ROWS:
        halves = [_parts(*of, 2, rng) for of in grouped]
        ratio = float(np.median([_held_out(f[0], r[0], f[1], r[1]) for f, r in zip(*halves, strict=True)]))
        held_out = [[_held_out(*quarters) for quarters in _parts(*of, 4, rng)] for of in grouped]
        noise = float(np.quantile(held_out, _QUANTILE, axis=1).max())
        between = [[_quantities(*two) for two in of] for of in halves]
        noises = np.quantile(between, _QUANTILE, axis=1).max(axis=0)
    verdict = "undecided"  # the noise is not known, or too large
    if ratio < WEAK and noise < PRESENT:
        verdict = "absent"
    elif ratio > noise and ratio >= WEAK:
        verdict = "present" if ratio >= PRESENT else "weak"
    selected = _selected(*whole)
    reached = trade_off(retain, selected=selected, target=whole[0].frequency) if curve else ()
    return Diagnosis(
        verdict=verdict,
        held_out=ratio,
        noise=noise,
        quantities={name: {"value": v, "noise": n} for name, v, n in zip(_QUANTITIES, values, noises, strict=True)},
        forget=whole[0].frequency,
        retain=whole[1].frequency,
        selected=selected,
        tokens={name: text.indices.shape[1] for name, text in texts.items()},
        rows={name: len(np.unique(text.rows)) for name, text in texts.items()},
        top_k=whole[0].top_k,
        layers=forget.layers or tuple(range(len(whole[0].counts))),
        curve=tuple({name: getattr(certificate, name) for name in _CURVE} for certificate in reached),
    )


def _grouped(text: Assignments, num_experts: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Counts f64 [G, L, E] and tokens [G] of each row, or of groups of neighbours, and K."""
    rows, row = np.unique(text.rows, return_inverse=True)
    group = row * min(len(rows), _GROUPS) // len(rows)
    counts = counts_by_row(dataclasses.replace(text, rows=group), num_experts)
    return counts.astype(np.float64), np.bincount(group), text.indices.shape[2]


def _statistics(counts: np.ndarray, tokens: Any, top_k: int) -> ExpertStatistics:
    return ExpertStatistics(counts, np.zeros(counts.shape), int(tokens), top_k)


def _parts(
    counts: np.ndarray, tokens: np.ndarray, top_k: int, parts: int, rng: np.random.Generator
) -> list[list[ExpertStatistics]]:
    """A text dealt into `parts` of equally many rows, once per repetition."""
    repetitions, flat = [], counts.reshape(len(counts), -1)
    for _ in range(_REPETITIONS):
        dealt = np.arange(parts)[:, None] == rng.permutation(np.arange(len(tokens)) % parts)
        sums = (dealt @ flat).reshape(parts, *counts.shape[1:])
        repetitions.append([_statistics(s, n, top_k) for s, n in zip(sums, dealt @ tokens, strict=True)])
    return repetitions


def _held_out(f1: ExpertStatistics, r1: ExpertStatistics, f2: ExpertStatistics, r2: ExpertStatistics) -> float:
    """Selected on the first samples of two texts and looked at in the second, and the other way; the mean of both."""
    ratios = []
    for f, r, forget, retain in ((f1, r1, f2, r2), (f2, r2, f1, r1)):
        selected = _selected(f, r)
        ratios.append(forget.counts[selected].sum() / max(retain.counts[selected].sum(), 0.5))
        ratios[-1] *= retain.tokens / forget.tokens
    return float(np.mean(ratios))


def _selected(forget: ExpertStatistics, retain: ExpertStatistics) -> np.ndarray:
    """What the default rule selects, of models with fewer experts too."""
    return select_experts(forget, retain, rule=Difference(top=min(Difference().top, forget.counts.shape[1])))


def _quantities(forget: ExpertStatistics, retain: ExpertStatistics) -> np.ndarray:
    """f64 [3, L]: what `Diagnosis.quantities` names. No use counts as half of one."""
    f, r = forget.frequency, retain.frequency
    used = f >= forget.top_k / f.shape[1] / 2
    ratio = np.where(used, f / np.maximum(r, 0.5 / retain.tokens), 0.0)
    return np.array([ratio.max(axis=1), (ratio > 2).mean(axis=1), frequency_gap(f, r)])
