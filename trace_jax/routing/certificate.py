"""What a calibration did, in numbers: written and printed with every calibration."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Frequencies before and after, and what the weights cost. Experts and layers of the network are counted from 0.

    Arrays hold one entry per matched expert (f64 [C]); frequencies are shares of tokens.

    Attributes:
      layer, expert: where the expert is.
      forget: f^F.  retain: f^R.  target: p, what was asked for.
      moment: the matched moment under the clipped weights. It is the frequency itself for units "token" and "row", the
        mean over window means for unit "window".
      weighted: f~, the weighted retain frequency sum_t w_t a_t / sum_t w_t over tokens, after clipping.
      gap_before, gap_after: sum over the matched experts of |f^R - f^F| and |f~ - f^F|.
      gap_elsewhere_before, gap_elsewhere_after: the same over all other experts, which nothing was asked of.
      effective_sample_size: (sum w)^2 / (T sum w^2), a share of the tokens.
      largest_weight: after clipping and renormalisation (uniform is 1).
      clipped: share of the tokens that were clipped.
      touched: share of retain tokens that use a matched expert.
      infeasible: (layer, expert) that were selected but never occur in the retain corpus; left out.
      infeasible_share: their share of the selected experts.
      strength, strength_asked: the one used, and the one configured (higher if the sample size bound held it back).
      ridge: the penalty that was solved with.
      iterations, gradient_norm: Newton steps and largest gradient entry of the final solve.
      notes: what a reader must know, in words.
    """

    layer: np.ndarray
    expert: np.ndarray
    forget: np.ndarray
    retain: np.ndarray
    target: np.ndarray
    moment: np.ndarray
    weighted: np.ndarray
    gap_before: float
    gap_after: float
    gap_elsewhere_before: float
    gap_elsewhere_after: float
    effective_sample_size: float
    largest_weight: float
    clipped: float
    touched: float
    infeasible: tuple[tuple[int, int], ...]
    infeasible_share: float
    strength: float
    strength_asked: float
    ridge: float
    iterations: int
    gradient_norm: float
    tokens: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict:
        """Plain numbers, lists and text, for JSON."""
        plain = dataclasses.asdict(self)
        return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in plain.items()}

    @classmethod
    def from_dict(cls, values: dict) -> Certificate:
        """The inverse of `as_dict`, also after JSON."""
        values = dict(values)
        for name in ("layer", "expert"):
            values[name] = np.asarray(values[name], np.int64)
        for name in ("forget", "retain", "target", "moment", "weighted"):
            values[name] = np.asarray(values[name], np.float64)
        values["infeasible"] = tuple((int(layer), int(expert)) for layer, expert in values["infeasible"])
        values["notes"] = tuple(values["notes"])
        return cls(**values)

    def text(self, most: int = 24) -> str:
        """A page for a terminal: totals, notes, and the `most` experts with the largest forget-retain gap."""
        lines = [
            f"calibration: {len(self.layer)} experts matched on {self.tokens:,} retain tokens",
            f"  gap to the forget frequencies {self.gap_before:.4f} -> {self.gap_after:.4f}"
            f" (other experts {self.gap_elsewhere_before:.4f} -> {self.gap_elsewhere_after:.4f})",
            f"  effective sample size {self.effective_sample_size:.1%}, largest weight {self.largest_weight:.2f}, "
            f"{self.clipped:.2%} of the tokens clipped, {self.touched:.1%} touch a matched expert",
            f"  strength {self.strength:.3f} (asked {self.strength_asked:.3f}), ridge {self.ridge:g}, "
            f"{self.iterations} Newton steps, gradient {self.gradient_norm:.1e}",
            *(f"  note: {note}" for note in self.notes),
        ]
        order = np.argsort(-np.abs(self.forget - self.retain), kind="stable")
        if len(order):
            lines.append("  layer expert   forget   retain   target weighted")
        for c in order[:most]:
            numbers = (self.forget[c], self.retain[c], self.target[c], self.weighted[c])
            lines.append(f"  {self.layer[c]:5d} {self.expert[c]:6d} " + " ".join(f"{n:8.5f}" for n in numbers))
        if len(order) > most:
            lines.append(f"  ... and {len(order) - most} more")
        return "\n".join(lines)
