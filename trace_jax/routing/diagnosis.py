"""Whether forget and retain text use the experts differently, beyond the noise of samples, before anything trains.

Rows are dealt at random into halves. The experts that the first halves select are looked at in the second ones, so that
selection can't follow noise: the held-out ratio is their forget over their retain frequency, both summed. Noise is the
same between two samples of one text, made from its quarters; so it is a little overstated.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trace_jax.io.files import encode
from trace_jax.io.progress import aligned, format_number, format_share
from trace_jax.routing.config import select_experts
from trace_jax.routing.statistics import Assignments, ExpertStatistics, counts_by_row, frequency_gap

PRESENT, WEAK = 2.0, 1.25  # least held-out ratio
MIN_ROWS = 8  # of either text, two for each quarter
_REPETITIONS, _QUANTILE = 50, 0.95
_GROUPS = 200  # neighbouring rows of a longer text are dealt together
_ADVICE = {
    "present": "there is something to calibrate",
    "weak": "expect little beyond uniform weights",
    "absent": "there is nothing to calibrate, and weights by experts amount to uniform ones",
    "undecided": "the noise hides what there is: give more rows of text",
}
# Each has one value per layer, and one of all layers.
_OF_ALL = {"largest_ratio": np.max, "above_ratio_2": np.mean, "gap": np.mean}


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; noise is the 95 % quantile over repetitions, of the noisier text."""

    verdict: str  # "present", "weak", "absent" or "undecided"
    held_out: float  # f^F / f^R of experts that other rows selected; NaN with too few rows
    noise: float  # the same between two samples of one text
    # largest_ratio: f^F / f^R, of the experts with f^F of at least half of uniform; above_ratio_2: share of the experts
    # where it is above 2; gap: sum_e |f^F - f^R|, 0 to 2K. Each has "value" and "noise" f64 [L], which is between two
    # halves of one text, and "of_all" and "noise_of_all".
    quantities: Mapping[str, Mapping[str, Any]]
    forget: np.ndarray  # f64 [L, E], f^F
    retain: np.ndarray  # f64 [L, E], f^R
    selected: np.ndarray  # bool [L, E], by the default rule
    tokens: Mapping[str, int]  # of "forget" and "retain"
    rows: Mapping[str, int]
    top_k: int
    layers: tuple[int, ...]  # of the network, from 0

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
        """As plain values, with the sentence: counts and frequencies, and no token's experts."""
        return {"sentence": self.sentence()} | encode(self, digits=6)

    def text(self, most: int = 12) -> str:
        """A screen for a terminal: of more layers than `most`, evenly spread ones."""
        sizes = " and ".join(f"{self.tokens[s]:,} tokens in {self.rows[s]:,} rows of {s} text" for s in self.tokens)
        rows = sorted({round(row) for row in np.linspace(0, len(self.layers) - 1, most)})
        table = [["layer"], ["all"], *([str(self.layers[row])] for row in rows)]
        for name, show in (("largest_ratio", format_number), ("above_ratio_2", format_share), ("gap", format_number)):
            of = self.quantities[name]
            values = [(of["of_all"], of["noise_of_all"]), *((of["value"][row], of["noise"][row]) for row in rows)]
            columns = [(name.replace("_", " "), "noise"), *((show(float(a)), show(float(b))) for a, b in values)]
            for line, column in zip(table, columns, strict=True):
                line += column
        share = f"{self.selected.sum():,} ({self.selected.mean():.1%})"
        chosen = ["selected experts", share, *(" ".join(map(str, np.flatnonzero(self.selected[row]))) for row in rows)]
        lines = aligned([[*line, column] for line, column in zip(table, chosen, strict=True)])
        return "\n".join(
            [
                f"mismatch {self.sentence()}",
                f"present from {PRESENT:g}, weak from {WEAK:g}, and above the noise; absent below {WEAK:g}",
                f"{sizes}; {len(self.layers)} layers, {self.top_k} of {self.forget.shape[1]} experts a token",
                "",
                *lines,
            ]
        )


def diagnose(forget: Assignments, retain: Assignments, *, num_experts: int, seed: int = 0) -> Diagnosis:
    """Says whether there is a mismatch between the routing of two texts, and what the default rule selects.

    Args:
      forget, retain: `expert_assignments` of one model, or `read_capture`.
      num_experts: E, the routed experts of a layer.
      seed: of the halves.

    Raises:
      ValueError: routing of different models.
    """
    texts = {"forget": forget, "retain": retain}
    if forget.layers != retain.layers or forget.indices.shape[::2] != retain.indices.shape[::2]:
        raise ValueError(
            f"forget routing is {forget.indices.shape} [layers, tokens, K], retain routing {retain.indices.shape}; "
            "both must come from the same layers of one model."
        )
    top_k, uniform = forget.indices.shape[2], forget.indices.shape[2] / num_experts
    counts = {name: _counts(text, num_experts) for name, text in texts.items()}  # f64 [G, L, E] and [G]
    whole = [(c.sum(axis=0), n.sum()) for c, n in counts.values()]
    values = _quantities(*whole, uniform)
    rng, noise, ratio, noisy = np.random.default_rng(seed), [], np.nan, np.nan
    if min(len(n) for _, n in counts.values()) >= MIN_ROWS:
        drawn = [_parts(*counts[name], 2, rng) for name in texts]
        ratio = float(np.median(_held_out(drawn[0], drawn[1], top_k)))
        ends = []
        for c, n in counts.values():
            noise.append([_quantities(*halves, uniform) for halves in _parts(c, n, 2, rng)])
            quarters = _parts(c, n, 4, rng)
            ends.append(np.quantile(_held_out([q[:2] for q in quarters], [q[2:] for q in quarters], top_k), _QUANTILE))
        noisy = float(max(ends))

    def with_noise(name: str) -> dict[str, Any]:
        layers = [[sample[name] for sample in samples] for samples in noise]  # of each text [R, L]
        shape = values[name].shape
        high = [np.quantile(of, _QUANTILE, axis=0) for of in layers] or [np.full(shape, np.nan)]
        highest = [np.quantile(_OF_ALL[name](of, axis=1), _QUANTILE) for of in layers] or [np.nan]
        of_all = {"of_all": float(_OF_ALL[name](values[name])), "noise_of_all": float(max(highest))}
        return {"value": values[name], "noise": np.max(high, axis=0), **of_all}

    statistics = [_statistics(*of, top_k) for of in whole]
    return Diagnosis(
        verdict=_verdict(ratio, noisy),
        held_out=ratio,
        noise=noisy,
        quantities={name: with_noise(name) for name in values},
        forget=statistics[0].frequency,
        retain=statistics[1].frequency,
        selected=select_experts(*statistics, rule="difference"),
        tokens={name: int(n.sum()) for name, (_, n) in counts.items()},
        rows={name: len(np.unique(text.rows)) for name, text in texts.items()},
        top_k=top_k,
        layers=forget.layers or tuple(range(len(values["gap"]))),
    )


def _verdict(ratio: float, noise: float) -> str:
    if ratio < WEAK and noise < PRESENT:
        return "absent"
    if not ratio > noise:  # too close, or not known
        return "undecided"
    return "present" if ratio >= PRESENT else "weak"


Sample = tuple[np.ndarray, Any]  # counts f64 [L, E] of some rows, and their tokens


def _counts(text: Assignments, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts f64 [G, L, E] and tokens [G] of each row, or of groups of neighbours."""
    rows, row = np.unique(text.rows, return_inverse=True)
    groups = min(len(rows), _GROUPS)
    group = row * groups // len(rows)
    counts = counts_by_row(dataclasses.replace(text, rows=group), num_experts)
    return counts.astype(np.float64), np.bincount(group, minlength=groups)


def _parts(counts: np.ndarray, tokens: np.ndarray, parts: int, rng: np.random.Generator) -> list[list[Sample]]:
    """A text dealt into `parts` of equally many rows, once per repetition."""
    order = rng.permuted(np.tile(np.arange(len(tokens)) % parts, (_REPETITIONS, 1)), axis=1)
    flat = counts.reshape(len(counts), -1)
    sums = [((order == p) @ flat).reshape(-1, *counts.shape[1:]) for p in range(parts)]
    sizes = [(order == p) @ tokens for p in range(parts)]
    return [[(sums[p][r], sizes[p][r]) for p in range(parts)] for r in range(_REPETITIONS)]


def _held_out(forget: Sequence[Sequence[Sample]], retain: Sequence[Sequence[Sample]], top_k: int) -> list[float]:
    """By repetition: selected on the first samples of both texts and looked at in the second, and the other way."""
    ratios = []
    for of_forget, of_retain in zip(forget, retain, strict=True):
        (f, g), (r, s) = ([_statistics(*sample, top_k) for sample in of] for of in (of_forget, of_retain))
        both = [(select_experts(f, r, rule="difference"), g, s), (select_experts(g, s, rule="difference"), f, r)]
        ratios.append(np.mean([_ratio(x.counts[c].sum(), x.tokens, y.counts[c].sum(), y.tokens) for c, x, y in both]))
    return ratios


def _quantities(forget: Sample, retain: Sample, uniform: float) -> dict[str, np.ndarray]:
    """Of two samples, by name, f64 [L]."""
    (c, n), (d, m) = forget, retain
    ratio = np.where(c / n >= uniform / 2, _ratio(c, n, d, m), 0.0)
    return {
        "largest_ratio": ratio.max(axis=1),
        "above_ratio_2": (ratio > 2).mean(axis=1),
        "gap": frequency_gap(c / n, d / m),
    }


def _ratio(forget: Any, forget_tokens: Any, retain: Any, retain_tokens: Any) -> Any:
    """f^F / f^R of counts, finite where the retain text never uses an expert: that counts as half a use."""
    return (forget / forget_tokens) / (np.maximum(retain, 0.5) / retain_tokens)


def _statistics(counts: np.ndarray, tokens: Any, top_k: int) -> ExpertStatistics:
    return ExpertStatistics(counts, np.zeros(counts.shape), int(tokens), top_k)
